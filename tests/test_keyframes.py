"""Keyframes: fewer where the camera hardly moves; the poses of the frames between them."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

from occgen_hub.engines.keyframes import MAX_GAP, keyframes, refine_skipped

SIZE = (192, 108)
K = np.array([[150.0, 0, 96], [0, 150, 54], [0, 0, 1]])
DEPTH = 2.0
PICTURE = gaussian_filter(np.random.default_rng(0).normal(size=(600, 900)), 4)
PICTURE = np.clip(128 + 40 * PICTURE / PICTURE.std(), 0, 255)


def render(pose: np.ndarray) -> np.ndarray:
    """The image that a camera sees of a picture on the wall z = 2, with 300 pixels per metre."""
    v, u = np.indices(SIZE[::-1]) + 0.5
    ray = np.stack(((u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)), -1)
    ray = ray @ pose[:3, :3].T
    point = pose[:3, 3] + ray * ((DEPTH - pose[2, 3]) / ray[..., 2])[..., None]
    where = (300 + 300 * point[..., 1], 450 + 300 * point[..., 0])
    grey = map_coordinates(PICTURE, where, order=1, mode="nearest")
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def poses_at(places: np.ndarray) -> np.ndarray:
    poses = np.tile(np.eye(4), (len(places), 1, 1))
    poses[:, 0, 3] = places
    return poses


def test_camera_at_rest_has_few_keyframes():
    still = np.concatenate([np.zeros(25), np.linspace(0, 0.6, 20), np.full(45, 0.6)])
    poses = poses_at(still)
    found = keyframes(lambda t: render(poses[t]), len(poses))
    assert found[0] == 0
    assert found[-1] == 89
    assert np.diff(found).max() <= MAX_GAP
    moving = ((found >= 25) & (found < 45)).sum()
    assert moving >= 9  # A step shifts the picture by 1.25 %, two of them by more than `MAX_SHIFT`.
    assert len(found) - moving <= 6


def test_first_frame_after_a_cut_is_a_keyframe():
    poses = poses_at(np.repeat([0.0, 0.9], 10))
    assert 10 in keyframes(lambda t: render(poses[t]), len(poses))


def test_poses_between_keyframes_are_refined():
    poses = poses_at(np.linspace(0, 0.05, 9))
    poses[1:8, 1, 3] += 0.008  # A bounce that interpolation cannot predict.
    start = poses.copy()
    start[1:8, 1, 3] = 0
    depth = np.full(SIZE[::-1], DEPTH, np.float32)
    found = refine_skipped(
        lambda t: render(poses[t]), lambda _: depth, np.array([0, 8]), start,
        np.repeat(K[None], 9, axis=0), SIZE,
    )  # fmt: skip
    before = np.linalg.norm(start[1:8, :3, 3] - poses[1:8, :3, 3], axis=1)
    # On a plane, a small rotation looks much like a small shift.
    v, u = np.indices(SIZE[::-1])[:, ::12, ::12].reshape(2, -1) + 0.5
    ray = np.stack(((u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)), -1) * DEPTH
    apart = [
        np.linalg.norm((ray @ (a[:3, :3] - b[:3, :3]).T) + a[:3, 3] - b[:3, 3], axis=1).mean()
        for a, b in zip(found[1:8], poses[1:8], strict=True)
    ]
    assert np.max(apart) < 0.3 * before.min()
    np.testing.assert_array_equal(found[[0, 8]], start[[0, 8]])
