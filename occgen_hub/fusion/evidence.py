"""Evidence of frames about points: how many saw a point, saw through it, and its displacement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numba import prange
from numpy.typing import NDArray

from occgen_hub.fusion.depth_map import DepthMaps
from occgen_hub.fusion.noise import NoiseModel
from occgen_hub.jit import njit
from occgen_hub.occupancy.point_blocks import PointBlocks
from occgen_hub.prefetch import prefetch

SIGMAS = 3.0
"""Number of standard deviations within which a depth supports a point."""

SLANT = 1.0
"""Allowed displacement of a surface in the image, in pixels, when depths are compared. At a grazing
angle, depth changes a lot from one pixel to the next, which does not contradict a point."""

SLANT_SIGMA = 0.3
"""Standard deviation of that displacement in pixels, for the weight of a depth."""

FLOOR = 0.1
"""Allowed difference of depths in addition to noise, as a share of a cell's edge."""

NEAREST = 0.05
"""Distance from a camera, in metres, below which points are ignored."""

COMPARED_FRAMES = (8, 32)
"""Smallest and largest number of frames that are compared with a point."""

MEAN_ERROR = 1 / 16
"""Target error of the mean of these depths, as a share of a cell's edge."""


@dataclass(frozen=True)
class Evidence:
    """The evidence of frames about n points.

    supports: (n,) uint16, number of frames that measured a surface there; contradictions: (n,)
    uint16, number of frames that saw through the point; doubts: (n,) uint16, number of frames with
    a depth edge beside the point, which do neither; moves: (n, 4) float32, the sums of weights and
    of weighted displacements along the rays to the measured surfaces, world metres.
    """

    supports: NDArray[np.uint16]
    contradictions: NDArray[np.uint16]
    doubts: NDArray[np.uint16]
    moves: NDArray[np.float32]

    def displacement(self) -> NDArray[np.float32]:
        """(n, 3) float32 world metres: the weighted mean displacement, 0 without support."""
        mean: NDArray[np.float32] = self.moves[:, 1:] / np.maximum(self.moves[:, :1], 1e-12)
        return mean


@dataclass(frozen=True)
class Tolerance:
    """The largest distance between a measured depth and a point of the same surface.

    floor: metres, for errors other than noise; max_frames: number of frames that are compared with
    a point, in an order that spreads them over the recording.
    """

    noise: NoiseModel
    floor: float
    max_frames: int

    @classmethod
    def of(cls, noise: NoiseModel, voxel_size: float) -> Tolerance:
        """The tolerance for cells of that edge, metres. Noisier depth needs more frames."""
        needed = (float(noise.sigma(2.0)) / (MEAN_ERROR * voxel_size)) ** 2
        max_frames = int(min(max(np.ceil(needed), COMPARED_FRAMES[0]), COMPARED_FRAMES[1]))
        return cls(noise, FLOOR * voxel_size, max_frames)

    def values(self) -> NDArray[np.float64]:
        """(4,) float64 for compiled code."""
        return np.append(self.noise.coefficients(), self.floor)


def gather_evidence(
    cloud: PointBlocks,
    maps: DepthMaps,
    tolerance: Tolerance,
    progress: Callable[[int], None] = lambda _: None,
) -> Evidence:
    """The evidence of every frame about each point of a cloud.

    A frame supports a point if, at the point's projection, it measured a trusted depth within the
    tolerance. It contradicts the point if all depths in the 3 x 3 pixels around are behind it: the
    frame saw through. If it measured something in front, the point is hidden, and the frame does
    not count. Frames are processed in sequence and points in parallel, so the result does not
    depend on the number of threads.
    """
    count = len(cloud.points)
    found = Evidence(
        supports=np.zeros(count, np.uint16),
        contradictions=np.zeros(count, np.uint16),
        doubts=np.zeros(count, np.uint16),
        moves=np.zeros((count, 4), np.float32),
    )
    for view in prefetch(maps, spread(maps.frames)):
        _compare_frame(
            cloud.points, cloud.starts, cloud.lower, cloud.upper, view.pixels, view.camera(),
            tolerance.values(), tolerance.max_frames, found.supports, found.contradictions,
            found.doubts, found.moves,
        )  # fmt: skip
        progress(1)
    return found


def spread(frames: NDArray[np.int64]) -> Iterator[int]:
    """Frame numbers in an order in which the first ones are always spread over all of them.

    This is the order of the van der Corput sequence: by the reversed bits of their positions.
    """
    bits = max(len(frames) - 1, 1).bit_length()
    for n in range(1 << bits):
        place = int(f"{n:0{bits}b}"[::-1], 2)
        if place < len(frames):
            yield int(frames[place])


@njit(nogil=True, inline="always", error_model="numpy")
def allowed(z, slope, tolerance):
    """Tolerance in metres at depth `z`, which changes by `slope` metres per pixel."""
    square = z * z
    variance = tolerance[0] + tolerance[1] * square + tolerance[2] * square * square
    return SIGMAS * np.sqrt(variance) + SLANT * slope + tolerance[3]


@njit(nogil=True, error_model="numpy")
def in_sight(low, high, camera, width, height):
    """Whether a box in world coordinates may be in a camera's view."""
    least, most = np.empty(3), np.empty(3)
    for row in range(3):
        centre, reach = 0.0, 1e-6
        for axis in range(3):
            first, last = np.float64(low[axis]), np.float64(high[axis])
            turn = camera[3 * axis + row]
            centre += turn * (0.5 * (first + last) - camera[9 + axis])
            reach += abs(turn) * 0.5 * (last - first)
        least[row], most[row] = centre - reach, centre + reach
    if most[2] <= NEAREST:
        return False
    near, far = max(least[2], NEAREST), most[2]
    for axis, size in ((0, width), (1, height)):
        first = -camera[14 + axis] / camera[12 + axis]
        last = (size - camera[14 + axis]) / camera[12 + axis]
        if most[axis] < min(first * near, first * far) or least[axis] > max(
            last * near, last * far
        ):
            return False
    return True


@njit(nogil=True, parallel=True, error_model="numpy")
def _compare_frame(
    points,
    starts,
    low,
    high,
    pixels,
    camera,
    tolerance,
    max_frames,
    supports,
    contradictions,
    doubts,
    moves,
):
    height, width = pixels.shape[:2]
    # Local variables, because the compiler must reload array elements after every store.
    px, py, pz = camera[9], camera[10], camera[11]
    r00, r10, r20, r01, r11, r21 = camera[0], camera[3], camera[6], camera[1], camera[4], camera[7]
    r02, r12, r22 = camera[2], camera[5], camera[8]
    fx, fy, cx, cy = camera[12], camera[13], camera[14], camera[15]
    constant, linear, quadratic, floor = tolerance[0], tolerance[1], tolerance[2], tolerance[3]
    for block in prange(len(starts) - 1):
        if not in_sight(low[block], high[block], camera, width, height):
            continue
        for n in range(starts[block], starts[block + 1]):
            if supports[n] + contradictions[n] >= max_frames:
                continue
            x, y, z = points[n, 0] - px, points[n, 1] - py, points[n, 2] - pz
            depth = r02 * x + r12 * y + r22 * z
            if depth <= NEAREST:
                continue
            nearness = 1 / depth
            u = fx * (r00 * x + r10 * y + r20 * z) * nearness + cx
            v = fy * (r01 * x + r11 * y + r21 * z) * nearness + cy
            if not (0 <= u < width and 0 <= v < height):
                continue
            i, j = int(u), int(v)
            pixel = pixels[j, i]
            seen = np.float64(pixel[0])
            if seen <= 0:
                doubts[n] += pixel[3] > 0
                continue
            gx, gy = np.float64(pixel[1]), np.float64(pixel[2])
            inverse = 1 / seen + gx * (u - 0.5 - i) + gy * (v - 0.5 - j)
            behind = (1 / inverse if inverse > 0 else seen) - depth
            slope = seen * seen * (abs(gx) + abs(gy))
            square = depth * depth
            variance = constant + (linear + quadratic * square) * square
            noisy = SIGMAS * np.sqrt(variance) + floor
            within = noisy + SLANT * slope
            if abs(behind) <= within:
                supports[n] += 1
                weight = 1 / (variance + (SLANT_SIGMA * slope) ** 2 + 1e-8)
                # No farther than noise explains, because slopes beside edges are not real.
                along_ray = weight * min(max(behind, -noisy), noisy) * nearness
                moves[n, 0] += weight
                moves[n, 1] += along_ray * x
                moves[n, 2] += along_ray * y
                moves[n, 3] += along_ray * z
            elif pixel[3] - depth > within:
                contradictions[n] += 1
            elif behind > 0:
                doubts[n] += 1
