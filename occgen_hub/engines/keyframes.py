"""Keyframes: which frames of a video to reconstruct, and the poses of the frames between them.

Many frames with little motion make networks drift, and cost time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.spatial.transform import Rotation

from occgen_hub.geometry.camera import scale_intrinsics
from occgen_hub.prefetch import prefetch

WIDTH = 96
"""Longer side of the reduced images in which motion is measured, pixels."""

MAX_SHIFT = 0.015
"""Median shift of the image's blocks, as a share of that side, that makes a new keyframe."""

MAX_CHANGE = 0.5
"""Brightness that no shift explains, as a share of contrast, that makes a new keyframe too."""

MAX_GAP = 30
"""Largest number of frames from a keyframe to the next."""

BLOCKS = (3, 4)
"""Rows and columns of blocks. The shift of each is estimated on its own."""

_Array = NDArray[np.float64]

STEPS = 10
HUBER = 0.02
"""Brightness differences (of [0, 1]) beyond which residuals count less."""


def keyframes(read_rgb: Callable[[int], NDArray[np.uint8]], length: int) -> NDArray[np.int64]:
    """Frames to reconstruct: (n,) int64, ascending, including the first and last of `length`.

    A frame becomes a keyframe if the image has shifted by `MAX_SHIFT` or changed since the last
    keyframe, or if that was `MAX_GAP` frames ago.
    """
    chosen = [0]
    images = _small_images(read_rgb, range(length))
    last = next(images)
    for frame, image in enumerate(images, 1):
        if frame - chosen[-1] >= MAX_GAP or frame == length - 1 or _moved(last, image):
            chosen.append(frame)
            last = image
    return np.array(chosen, np.int64)


def refine_skipped(
    read_rgb: Callable[[int], NDArray[np.uint8]],
    read_depth: Callable[[int], NDArray[np.float32]],
    frames: NDArray[np.int64],
    world_from_camera: NDArray[np.float64],
    intrinsics: NDArray[np.float64],
    image_size: tuple[int, int],
) -> NDArray[np.float64]:
    """Refine the poses of frames between keyframes, so that they match their keyframe's image.

    frames: the keyframes, whose poses are kept; read_depth: a keyframe's depth, in the unit of the
    poses; world_from_camera: (T, 4, 4); intrinsics: (T, 3, 3), pixels of images of `image_size`.

    The method is direct alignment of pixel brightness (Gauss-Newton with Huber weights). A pose
    that does not improve is kept. Returns (T, 4, 4) poses.
    """
    refined = world_from_camera.copy()
    points: _Array = np.zeros((0, 3))
    brightness: _Array = np.zeros(0)
    images = _small_images(read_rgb, range(len(refined)))
    known = set(frames.tolist())
    for frame, image in enumerate(images):
        factors = np.divide(image.shape[::-1], image_size)
        K = scale_intrinsics(intrinsics[frame], *factors)
        if frame in known:
            points, brightness = _unproject(read_depth(frame), image, K, refined[frame])
        elif len(points):
            refined[frame] = _align(points, brightness, image, K, refined[frame])
    return refined


def _small_images(
    read_rgb: Callable[[int], NDArray[np.uint8]], frames: Iterable[int]
) -> Iterator[NDArray[np.float64]]:
    def small(frame: int) -> NDArray[np.float64]:
        rgb = read_rgb(frame)
        scale = WIDTH / max(rgb.shape[:2])
        size = max(8, round(rgb.shape[1] * scale)), max(8, round(rgb.shape[0] * scale))
        image = Image.fromarray(rgb).convert("L").resize(size, Image.Resampling.BOX)
        smooth: _Array = gaussian_filter(np.asarray(image, np.float64) / 255, 1.0)
        return smooth

    return prefetch(small, list(frames))


def _moved(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether the picture has shifted or changed between two images (Lucas and Kanade 1981)."""
    first, second = gaussian_filter(first, 1.5), gaussian_filter(second, 1.5)
    dy, dx = np.gradient((first + second) / 2)
    dt = second - first
    shifts, left, contrast = [], [], []
    for rows in np.array_split(np.arange(first.shape[0]), BLOCKS[0]):
        for columns in np.array_split(np.arange(first.shape[1]), BLOCKS[1]):
            block = np.ix_(rows, columns)
            A = np.stack([dx[block].ravel(), dy[block].ravel()], axis=1)
            b = -dt[block].ravel()
            if not A.any():
                continue
            # A little is added, so that a block without edges does not shift wildly.
            shift = np.linalg.solve(A.T @ A + 1e-4 * np.eye(2), A.T @ b)
            shifts.append(np.linalg.norm(shift))
            left.append(np.abs(b - A @ shift).mean())
            contrast.append(np.abs(first[block] - first[block].mean()).mean())
    if not shifts:
        return False
    changed = np.median(left) > MAX_CHANGE * np.median(contrast) + 1e-3
    return bool(np.median(shifts) > MAX_SHIFT * max(first.shape) or changed)


def _unproject(
    depth: NDArray[np.float32],
    image: NDArray[np.float64],
    K: NDArray[np.float64],
    world_from_camera: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, 3) world points of the pixels that have depth, and their (n,) brightness in [0, 1]."""
    height, width = image.shape
    v, u = np.indices(image.shape) + 0.5
    rows = (v * depth.shape[0] / height).astype(np.int64)
    columns = (u * depth.shape[1] / width).astype(np.int64)
    z = depth[rows, columns].astype(np.float64)
    valid = z > 0
    x, y = (u - K[0, 2]) / K[0, 0] * z, (v - K[1, 2]) / K[1, 1] * z
    local = np.stack((x, y, z), axis=-1)[valid]
    return local @ world_from_camera[:3, :3].T + world_from_camera[:3, 3], image[valid]


def _align(
    points: NDArray[np.float64],
    brightness: NDArray[np.float64],
    image: NDArray[np.float64],
    K: NDArray[np.float64],
    world_from_camera: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The (4, 4) pose near the given one in which the image shows points at their brightness."""
    gradient = np.gradient(image)
    pose: _Array = np.linalg.inv(world_from_camera).astype(np.float64)
    first = least = _residuals(points, brightness, image, K, pose)[0]
    best = pose
    for _ in range(STEPS):
        _, local, u, v, error = _residuals(points, brightness, image, K, pose)
        if len(local) < 100:
            break
        gy, gx = (map_coordinates(g, (v - 0.5, u - 0.5), order=1) for g in gradient)
        x, y, z = local.T
        du, dv = gx * K[0, 0] / z, gy * K[1, 1] / z
        slope = np.stack((du, dv, -(du * x + dv * y) / z), axis=1)
        J = np.concatenate((np.cross(local, slope), slope), axis=1)
        weights = np.minimum(1, HUBER / np.maximum(np.abs(error), 1e-9))
        A = J.T @ (weights[:, None] * J)
        A += 1e-6 * np.trace(A) * np.eye(6)
        step = -np.linalg.solve(A, J.T @ (weights * error))
        moved = np.eye(4)
        moved[:3, :3] = Rotation.from_rotvec(step[:3]).as_matrix()
        moved[:3, 3] = step[3:]
        pose = (moved @ pose).astype(np.float64)
        cost = _residuals(points, brightness, image, K, pose)[0]
        if cost < least:
            least, best = cost, pose
        if np.abs(step).max() < 1e-6:
            break
    if not least < first:
        return world_from_camera
    refined: _Array = np.eye(4)
    refined[:3, :3] = best[:3, :3].T
    refined[:3, 3] = -best[:3, :3].T @ best[:3, 3]
    return refined


def _residuals(
    points: NDArray[np.float64],
    brightness: NDArray[np.float64],
    image: NDArray[np.float64],
    K: NDArray[np.float64],
    camera_from_world: NDArray[np.float64],
) -> tuple[float, _Array, _Array, _Array, _Array]:
    """The mean absolute residual, truncated, and for the n points inside the image their (n, 3)
    camera coordinates, pixel coordinates u and v, and brightness residuals.
    """
    local = points @ camera_from_world[:3, :3].T + camera_from_world[:3, 3]
    z = np.where(local[:, 2] > 1e-6, local[:, 2], np.nan)
    u, v = K[0, 0] * local[:, 0] / z + K[0, 2], K[1, 1] * local[:, 1] / z + K[1, 2]
    height, width = image.shape
    inside = (u >= 1) & (u < width - 1) & (v >= 1) & (v < height - 1)
    local, u, v = local[inside], u[inside], v[inside]
    error = map_coordinates(image, (v - 0.5, u - 0.5), order=1) - brightness[inside]
    if not len(error):
        return np.inf, local, u, v, error
    error = error - np.median(error)  # The exposure may change.
    cost = float(np.minimum(np.abs(error), 3 * HUBER).mean()) / max(float(inside.mean()), 0.5)
    return cost, local, u, v, error
