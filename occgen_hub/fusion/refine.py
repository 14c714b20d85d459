"""Refine poses: each frame is aligned to the surface that all frames agree on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from occgen_hub.fusion.depth_map import DepthMap, DepthMaps
from occgen_hub.fusion.evidence import NEAREST, Tolerance, in_sight
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.jit import njit
from occgen_hub.occupancy.point_blocks import PointBlocks, into_blocks
from occgen_hub.prefetch import prefetch

STEPS = 4
"""Number of Gauss-Newton steps for a frame and a surface."""

STRIDE = 11
"""Step between the points of a block that are used, since a frame sees tens of thousands."""

REACH = 0.05
"""Largest distance of a point from its surface beyond three standard deviations, metres."""

POSE_PRIOR = (0.03, np.radians(0.5))
"""Expected error of recorded poses, metres and radians. This prior fixes the directions that a
surface does not determine, such as that along a corridor."""

INDEPENDENT_POINTS = 200.0
"""Number of independent measurements that all points together count as, against the prior. Errors
of neighbouring pixels are correlated."""


def refine_poses(
    cloud: Cloud, maps: DepthMaps, tolerance: Tolerance, width: float = 0.0
) -> NDArray[np.float64]:
    """(T, 4, 4) float64 world_from_camera of all frames. Frames with depth are aligned to a cloud.

    Point to plane, as in Chen and Medioni, "Object modelling by registration of multiple range
    images", 1992, with projective association: each point of the cloud is compared with the plane
    through the pixel of its projection. Frames without depth keep their poses relative to the
    previous frame with depth.
    """
    blocks = into_blocks(cloud.points)
    views, frames = maps.views, maps.frames.tolist()
    refined = views.world_from_camera.copy()
    poses = prefetch(lambda frame: _aligned(blocks, maps(frame), tolerance, width), frames)
    for frame, pose in zip(frames, poses, strict=True):
        refined[frame] = pose
    places = np.maximum(np.searchsorted(views.frames, np.arange(len(refined)), "right") - 1, 0)
    for frame in np.setdiff1d(np.arange(len(refined)), views.frames):
        nearest = views.frames[places[frame]]
        change = refined[nearest] @ np.linalg.inv(views.world_from_camera[nearest])
        refined[frame] = change @ views.world_from_camera[frame]
    return _with_average_of(views.world_from_camera, refined)


def _with_average_of(
    recorded: NDArray[np.float64], refined: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Refined poses, moved by one transform so that their average is that of the recorded ones.

    Frames only determine poses relative to one another. Both (T, 4, 4) world_from_camera.
    """
    turns = (
        Rotation.from_matrix(recorded[:, :3, :3]) * Rotation.from_matrix(refined[:, :3, :3]).inv()
    )
    change = np.eye(4)
    change[:3, :3] = turns.mean().as_matrix()
    change[:3, 3] = (recorded[:, :3, 3] - refined[:, :3, 3] @ change[:3, :3].T).mean(axis=0)
    together: NDArray[np.float64] = change @ refined
    return together


def correction(
    blocks: PointBlocks, view: DepthMap, tolerance: Tolerance
) -> tuple[float, float, float]:
    """The median distance of a surface's points from a frame's planes, metres, and the motion of
    the frame in one step, metres and degrees.
    """
    system, distances = _equations(
        blocks.points, blocks.starts, blocks.lower, blocks.upper, view.pixels,
        view.camera(), tolerance.values(), REACH, STRIDE, 0.0,
    )  # fmt: skip
    step = _solved(system, np.zeros(6))
    median = float(np.median(np.abs(distances))) if len(distances) else 0.0
    return median, float(np.linalg.norm(step[3:])), float(np.degrees(np.linalg.norm(step[:3])))


def _aligned(
    blocks: PointBlocks, view: DepthMap, tolerance: Tolerance, width: float
) -> NDArray[np.float64]:
    """The frame's pose, (4, 4) world_from_camera, that fits the surface best."""
    recorded, pose = view.world_from_camera, view.world_from_camera.copy()
    for _ in range(STEPS):
        moved = replace(view, world_from_camera=pose)
        system, _ = _equations(
            blocks.points, blocks.starts, blocks.lower, blocks.upper, moved.pixels,
            moved.camera(), tolerance.values(), REACH, STRIDE, width,
        )  # fmt: skip
        change = (
            np.linalg.inv(recorded) @ pose
        )  # The motion so far, in the recorded camera's frame.
        so_far = np.concatenate([Rotation.from_matrix(change[:3, :3]).as_rotvec(), change[:3, 3]])
        step = _solved(system, so_far)
        # Points move by the step in the camera's frame, so the camera moves the other way.
        back = np.eye(4)
        back[:3, :3] = Rotation.from_rotvec(-step[:3]).as_matrix()
        back[:3, 3] = -back[:3, :3] @ step[3:]
        pose = pose @ back
    return pose


def _solved(system: NDArray[np.float64], so_far: NDArray[np.float64]) -> NDArray[np.float64]:
    """(6,) rotation vector and translation of points in the camera's frame.

    system: (6, 8) normal equations: matrix, right side and, in the corner, the sum of weights;
    so_far: (6,) the motion of the camera so far, which the prior reduces.
    """
    weights = system[0, 7]
    if weights <= 0:
        return np.zeros(6)
    normal, right = (
        system[:, :6] * (INDEPENDENT_POINTS / weights),
        system[:, 6] * (INDEPENDENT_POINTS / weights),
    )
    prior = 1 / np.repeat([POSE_PRIOR[1], POSE_PRIOR[0]], 3) ** 2
    solution: NDArray[np.float64] = np.linalg.solve(normal + np.diag(prior), right + prior * so_far)
    return solution


@njit(nogil=True, error_model="numpy")
def _equations(points, starts, low, high, pixels, camera, tolerance, reach, stride, kernel):
    """Normal equations of the point-to-plane distances, and the distances, metres.

    A plane through a pixel is all X with a . X = 1 in the camera's frame, where 1 / z is linear in
    the image: the distance of a point p is (a . p - 1) / |a|.
    """
    height, width = pixels.shape[:2]
    system = np.zeros((6, 8))
    distances = np.empty(len(points) // stride + len(starts))
    count = 0
    a, p, jacobian = np.empty(3), np.empty(3), np.empty(6)
    for block in range(len(starts) - 1):
        if not in_sight(low[block], high[block], camera, width, height):
            continue
        for n in range(starts[block], starts[block + 1], stride):
            for row in range(3):
                p[row] = 0.0
                for axis in range(3):
                    p[row] += camera[3 * axis + row] * (points[n, axis] - camera[9 + axis])
            z = p[2]
            if z <= NEAREST:
                continue
            u = camera[12] * p[0] / z + camera[14]
            v = camera[13] * p[1] / z + camera[15]
            if not (0 <= u < width and 0 <= v < height):
                continue
            i, j = int(u), int(v)
            seen = np.float64(pixels[j, i, 0])
            if seen <= 0:
                continue
            a[0] = pixels[j, i, 1] * camera[12]
            a[1] = pixels[j, i, 2] * camera[13]
            a[2] = (
                1 / seen
                - pixels[j, i, 1] * (i + 0.5 - camera[14])
                - pixels[j, i, 2] * (j + 0.5 - camera[15])
            )
            length = np.sqrt((a * a).sum())
            a /= length
            distance = (a * p).sum() - 1 / length
            variance = tolerance[0] + tolerance[1] * z * z + tolerance[2] * z**4
            # Across the surface: a depth error counts less at a slant.
            across = np.sqrt(variance) * max(abs(a[2]), 0.2) + 0.5 * tolerance[3]
            if abs(distance) > 3 * across + reach or abs(seen - z) > 4 * (3 * across + reach):
                continue
            distances[count] = distance
            count += 1
            weight = 1 / (across * (1 + (distance / (2 * across + kernel)) ** 2)) ** 2
            jacobian[0] = p[1] * a[2] - p[2] * a[1]
            jacobian[1] = p[2] * a[0] - p[0] * a[2]
            jacobian[2] = p[0] * a[1] - p[1] * a[0]
            jacobian[3:] = a
            for row in range(6):
                for column in range(6):
                    system[row, column] += weight * jacobian[row] * jacobian[column]
                system[row, 6] -= weight * jacobian[row] * distance
            system[0, 7] += weight * across * across
    return system, distances[:count]
