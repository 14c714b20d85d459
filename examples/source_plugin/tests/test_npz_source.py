"""Tests of the source, used as in a build, on a tiny synthetic recording."""

from pathlib import Path

import numpy as np
import pytest

import occgen_hub
from occgen_hub.builder import load_builder
from occgen_hub.errors import OccGenError


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """A camera that moves sideways in front of a wall with a step, 2 m and 1.6 m away."""
    size, K = (48, 64), np.array([[60.0, 0, 32], [0, 60, 24], [0, 0, 1]])
    u = np.arange(size[1]) + 0.5
    poses, depths = np.tile(np.eye(4), (6, 1, 1)), []
    for frame in range(6):
        poses[frame, 0, 3] = x = 0.1 * frame - 0.25
        near = x + (u - K[0, 2]) / K[0, 0] * 1.6 > 0.1
        depths.append(np.tile(np.where(near, 1.6, 2.0), (size[0], 1)))
    rgb = np.full((6, *size, 3), 120, np.uint8)
    root = tmp_path / "recordings"
    root.mkdir()
    depth = np.array(depths, np.float32)
    np.savez_compressed(root / "wall.npz", rgb=rgb, depth=depth, poses=poses, intrinsics=K)
    return root


def test_source_is_valid(recording: Path) -> None:
    (episode,) = occgen_hub.check_source(load_builder("npz", recording))
    assert episode.length == 6


def test_wrong_units_fail_early(recording: Path) -> None:
    arrays = dict(np.load(recording / "wall.npz"))
    arrays["depth"] *= 1000
    np.savez_compressed(recording / "wall.npz", **arrays)
    with pytest.raises(OccGenError, match=r"in the median.* give metres"):
        occgen_hub.check_source(load_builder("npz", recording))


def test_it_builds(recording: Path, tmp_path: Path) -> None:
    config = occgen_hub.Config(voxel_size=0.1)
    summary = occgen_hub.build("npz", recording, tmp_path / "out", config=config)
    assert not summary.failures
    assert occgen_hub.validate(tmp_path / "out").valid
