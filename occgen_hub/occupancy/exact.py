"""Exact comparison of where a ray crosses two grid planes.

Floating-point arithmetic decides nearly all comparisons; this module decides the rest. Products and
sums are represented as unevaluated sums of floats that are exact (T. J. Dekker, "A
floating-point technique for extending the available precision", 1971; J. R. Shewchuk, "Adaptive
precision floating-point arithmetic and fast robust geometric predicates", 1997).
"""

from __future__ import annotations

import numpy as np

from occgen_hub.jit import njit

_SPLIT = 134217729.0  # 2^27 + 1: halves a 53-bit significand


@njit(inline="always")
def _two_sum(a, b):
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@njit()
def _two_product(a, b):
    product = a * b
    c = _SPLIT * a
    a_high = c - (c - a)
    a_low = a - a_high
    c = _SPLIT * b
    b_high = c - (c - b)
    b_low = b - b_high
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    return product, error


@njit()
def compare_crossings(plane_a, origin_a, slope_a, plane_b, origin_b, slope_b):
    """The sign of (plane_a - origin_a) / slope_a - (plane_b - origin_b) / slope_b, exactly.

    All are float64; slopes are not zero and neither quotient is negative. Returns -1, 0 or 1.
    """
    distance_a, rest_a = _two_sum(plane_a, -origin_a)
    distance_b, rest_b = _two_sum(plane_b, -origin_b)
    if slope_a < 0.0:
        distance_a, rest_a, slope_a = -distance_a, -rest_a, -slope_a
    if slope_b < 0.0:
        distance_b, rest_b, slope_b = -distance_b, -rest_b, -slope_b
    # The quotients compare as the cross products do, since both slopes are positive now.
    left, left_rest = _two_product(distance_a, slope_b)
    right, right_rest = _two_product(distance_b, slope_a)
    if rest_a == 0.0 and rest_b == 0.0 and left == right:
        return _sign(left_rest - right_rest)  # For example a camera on a corner of the grid.
    more_left, more_left_rest = _two_product(rest_a, slope_b)
    more_right, more_right_rest = _two_product(rest_b, slope_a)
    return _sign_of_sum(
        (left, left_rest, more_left, more_left_rest),
        (-right, -right_rest, -more_right, -more_right_rest),
    )


@njit()
def _sign(value):
    return 1 if value > 0.0 else (-1 if value < 0.0 else 0)


@njit()
def _sign_of_sum(some, others):
    """The sign of the exact sum of two tuples of four numbers.

    By Shewchuk's grow-expansion, after which the last component that is not zero has that sign.
    """
    expansion = np.zeros(8)
    for count in range(8):
        carry = some[count] if count < 4 else others[count - 4]
        for i in range(count):
            carry, expansion[i] = _two_sum(carry, expansion[i])
        expansion[count] = carry
    for i in range(7, -1, -1):
        if expansion[i] != 0.0:
            return _sign(expansion[i])
    return 0
