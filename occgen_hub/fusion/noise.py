"""The noise of depth from a sensor or network: named, given, or estimated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from occgen_hub.fusion.depth_map import DepthMap, DepthMaps
from occgen_hub.jit import njit
from occgen_hub.prefetch import prefetch

PAIRS = 12
"""Maximum number of pairs of frames for an estimate."""

STRIDE = 5
"""Step between the rows and columns of a frame that are compared."""

BIN_EDGES = np.arange(0.25, 20.0, 0.5)
"""Edges of the ranges of depth in which the spread of differences is computed, metres."""

MIN_DIFFERENCES = 100
"""Minimum number of differences for a range of depth to be used."""

MAX_DIFFERENCE = 0.25
"""Differences above this share of the depth are between different objects, and are ignored."""


@dataclass(frozen=True)
class NoiseModel:
    """Standard deviation of a depth: sqrt(constant^2 + (linear z)^2 + (quadratic z^2)^2) metres.

    constant: metres; linear: metres per metre; quadratic: metres per square metre. The slant of a
    surface is handled separately, when depths are compared.
    """

    constant: float
    linear: float
    quadratic: float

    def sigma(self, depth: NDArray[np.floating] | float) -> NDArray[np.float64]:
        """Metres, for depths in metres."""
        z = np.asarray(depth, np.float64)
        variance = self.constant**2 + (self.linear * z) ** 2 + (self.quadratic * z * z) ** 2
        return np.sqrt(variance)

    def coefficients(self) -> NDArray[np.float64]:
        """(3,) float64: the variance as a polynomial of the squared depth."""
        return np.array([self.constant, self.linear, self.quadratic]) ** 2


NAMED = {
    "simulated": NoiseModel(0.0005, 0.0, 0.0),
    # Nguyen, Izadi and Lovell, "Modeling Kinect sensor noise for improved 3D reconstruction and
    # tracking", 2012: .0012 + .0019 (z - .4)^2 metres along the optical axis.
    "kinect": NoiseModel(0.0012, 0.0, 0.0016),
    # z^2 s / (f B), for a subpixel error s of 0.1, 425 pixels and a baseline of 5 cm, as Intel's
    # tuning guide for the D400 series gives them.
    "stereo": NoiseModel(0.001, 0.0, 0.0047),
    # Time of flight: nearly constant, growing with the square of the distance as light decreases.
    "tof": NoiseModel(0.003, 0.0, 0.0006),
}


def noise_model(maps: DepthMaps, setting: str | Sequence[float]) -> NoiseModel:
    """The noise model of a configuration.

    setting: "auto" estimates it from the depth maps, see `estimate_noise`; else a name of `NAMED`,
    or the three numbers of a `NoiseModel`.
    """
    if not isinstance(setting, str):
        return NoiseModel(*setting)
    if setting != "auto":
        return NAMED[setting]
    return estimate_noise(maps) or NAMED["simulated"]


def estimate_noise(maps: DepthMaps) -> NoiseModel | None:
    """Estimate the noise of a recording from differences between the depths of its frames.

    Points of one frame are compared with the depth of other frames, near and far in time. The
    spread in each range of depth is robust, the median of absolute differences. Differences between
    two frames are sqrt(2) times as large as the noise of one. The estimate includes errors of the
    poses. None if frames overlap too little.
    """
    depths, differences = [], []
    for z, difference in prefetch(
        lambda pair: compare(maps(pair[0]), maps(pair[1])), _pairs(maps.frames)
    ):
        depths.append(z)
        differences.append(difference)
    if not depths:
        return None
    z, difference = np.concatenate(depths), np.abs(np.concatenate(differences))
    rows, variances = [], []
    for low, high in pairwise(BIN_EDGES):
        inside = (z >= low) & (z < high)
        if np.count_nonzero(inside) < MIN_DIFFERENCES:
            continue
        middle = float(np.median(z[inside]))
        rows.append([1.0, middle**2, middle**4])
        variances.append((1.4826 * float(np.median(difference[inside]))) ** 2 / 2)
    if not rows:
        return None
    # Relative errors have equal weight, so that near depths matter as much as far ones.
    weight = 1 / (np.asarray(variances) + 1e-8)
    fitted, _ = nnls(np.asarray(rows) * weight[:, None], np.asarray(variances) * weight)
    return NoiseModel(*np.sqrt(fitted).tolist())


def _pairs(frames: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Pairs of frames with depth, from neighbours to half the recording apart."""
    count = len(frames)
    gaps = sorted({gap for gap in (1, 2, 3, count // 4, count // 2) if 0 < gap < count})
    pairs = []
    for gap in gaps:
        step = max(1, (count - gap) * len(gaps) // PAIRS)
        pairs += [(n, n + gap) for n in range(0, count - gap, step)]
    return [(int(frames[a]), int(frames[b])) for a, b in pairs]


def compare(
    here: DepthMap, there: DepthMap, stride: int = STRIDE, farthest: float = MAX_DIFFERENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compare the points of one depth map with another.

    Returns (n,) float64 depths of the points in the other's camera, metres, and (n,) float64
    distances from the points to the other's surface behind them, metres. Only points are used that
    project onto a pixel with depth, on a surface that is not at a grazing angle, and at a distance
    of at most `farthest` times their depth.
    """
    return _compare(  # type: ignore[no-any-return]  # compiled
        here.depth, here.camera(), there.pixels, there.camera(), stride, farthest,

    )  # fmt: skip


@njit(nogil=True, error_model="numpy")
def _compare(depth, camera, pixels, other_camera, stride, farthest):
    height, width = depth.shape
    size = ((height + stride - 1) // stride) * ((width + stride - 1) // stride)
    found, behind = np.empty(size), np.empty(size)
    count = 0
    R, t = camera[:9].reshape(3, 3), camera[9:12]
    S, s = other_camera[:9].reshape(3, 3), other_camera[9:12]
    for v in range(0, height, stride):
        for u in range(0, width, stride):
            here = depth[v, u]
            if here <= 0:
                continue
            x = (u + 0.5 - camera[14]) / camera[12] * here
            y = (v + 0.5 - camera[15]) / camera[13] * here
            world = R[:, 0] * x + R[:, 1] * y + R[:, 2] * here + t - s
            z = (S[:, 2] * world).sum()
            if z <= 0.05:
                continue
            a = other_camera[12] * (S[:, 0] * world).sum() / z + other_camera[14]
            b = other_camera[13] * (S[:, 1] * world).sum() / z + other_camera[15]
            if not (0 <= a < pixels.shape[1] and 0 <= b < pixels.shape[0]):
                continue
            i, j = int(a), int(b)
            seen, gx, gy = pixels[j, i, 0], pixels[j, i, 1], pixels[j, i, 2]
            if seen <= 0:
                continue
            if seen * (abs(gx) + abs(gy)) > 0.02:
                continue
            inverse = 1 / seen + gx * (a - 0.5 - i) + gy * (b - 0.5 - j)
            if inverse > 0 and abs(1 / inverse - z) <= farthest * z:
                found[count], behind[count] = z, 1 / inverse - z
                count += 1
    return found[:count], behind[:count]
