"""Whether depth that is not aligned to the images is found, and aligned depth is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from made_up import depth_of, episode_of, path, room

import occgen_hub as library
from occgen_hub.builder import load_builder
from occgen_hub.engines import load_engine
from occgen_hub.episode import Episode
from occgen_hub.fusion.registration import registration, registration_notes
from occgen_hub.pipeline import reconstruct
from occgen_hub.sample import make_sample

NOISES = [
    pytest.param(noise, marks=pytest.mark.long)
    for noise in ("", "stereo", "network", "flying", "speckle")
]
SEEDS = (0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(600, 606)))


def warped(episode: Episode, scale: float, x: float, y: float) -> Episode:
    """The episode with images of a camera of another focal length, which looks elsewhere."""
    width, height = episode.image_size
    matrix = np.array([[scale, 0, (1 - scale) * width / 2 + x],
                       [0, scale, (1 - scale) * height / 2 + y]])  # fmt: skip
    return replace(
        episode,
        read_rgb=lambda frame: cv2.warpAffine(episode.read_rgb(frame), matrix, (width, height)),
    )


@pytest.fixture(scope="module", params=SEEDS)
def sample(request: pytest.FixtureRequest, tmp_path_factory) -> Callable[[str], Episode]:
    """A function that makes an episode with one kind of noise, or none."""

    def made(noise: str) -> Episode:
        out = tmp_path_factory.mktemp("registration")
        noises = (noise,) if noise else ()
        make_sample(out, trajectories=1, frames=8, seed=request.param, noise=noises)
        builder = load_builder("internnav", out)
        return builder.read(next(builder.episodes()))

    return made


@pytest.mark.parametrize("noise", ["kinect", *NOISES])
def test_only_images_of_another_camera_give_a_note(
    noise: str, sample: Callable[[str], Episode]
) -> None:
    episode = sample(noise)
    assert registration_notes(episode) == []
    assert registration_notes(warped(episode, 1, 1, 0)) == []
    for scale, x, y in ((1, 6, 3), (1, -14, 0), (1.3, 0, 0), (0.8, 0, 0), (1.1, 10, 0)):
        found = registration(warped(episode, scale, x, y))
        assert found is not None
        assert found.off(episode.image_size[0]), (scale, x, y)
        if scale == 1:  # Of other scales, the next one that is tried may fit as well.
            assert found.scale == 1
            assert np.abs(np.subtract(found.shift, (x, y))).max() <= 2


def test_without_edges_nothing_is_concluded() -> None:
    poses = path(6)
    depths = [depth_of(room(), pose) for pose in poses]
    plain = episode_of(depths, poses)  # Its images have one colour each.
    assert registration(plain) is None
    assert registration(replace(plain, read_depth=None)) is None
    assert registration(episode_of([np.ones((60, 80))] * 6, poses)) is None
    assert registration(episode_of([np.ones((1, 1))] * 6, poses)) is None


def test_the_note_of_a_build_has_the_shift_in_pixels_of_the_images(
    tmp_path: Path, sample: Callable[[str], Episode]
) -> None:
    config, engine = library.Config(voxel_size=0.08), load_engine("rgbd")
    episode = warped(sample(""), 1, 12, 4)
    codes = [note.code for note in reconstruct(episode, engine, config, tmp_path).notes]
    assert "depth not aligned" not in codes  # A simulator's depth is.
    recorded = replace(episode, unmeasured="unknown")
    notes = reconstruct(recorded, engine, config, tmp_path).notes
    (text,) = (note.text for note in notes if note.code == "depth not aligned")
    assert "match the images best if they are shifted by 12, 4 pixels (x, y)" in text

    def enlarged(frame: int) -> np.ndarray:
        return cv2.resize(episode.read_rgb(frame), None, fx=3, fy=3)

    def depth(frame: int) -> np.ndarray:
        return cv2.resize(
            episode.read_depth(frame), None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST
        )

    width, height = (3 * length for length in episode.image_size)
    large = replace(episode, read_rgb=enlarged, read_depth=depth, image_size=(width, height))
    found = registration(large)
    assert found is not None
    assert np.abs(np.subtract(found.shift, (36, 12))).max() <= 3


def test_the_function_on_the_page_aligns_depth() -> None:
    page = (Path(__file__).parent.parent / "docs/troubleshooting.md").read_text()
    (code,) = re.findall(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    defined: dict[str, Any] = {}
    exec(code, defined)
    depth = np.full((48, 64), 2000, np.uint16)
    depth[10:20, 20:30] = 1000
    matrix = np.array([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]])
    color_from_depth = np.eye(4)
    color_from_depth[0, 3] = 0.04
    found = defined["aligned"](depth, matrix, matrix, color_from_depth, (64, 48))
    assert found.dtype == np.uint16
    assert found.shape == (48, 64)
    # Shifted by 0.04 m: 2 pixels at 1 m, 1 pixel at 2 m, which leaves a column without depth.
    assert (found[10:20, 22:32] == 1000).all()
    assert (found[10:20, 21] == 0).all()
    assert (np.delete(found, 21, 1)[:, 1:] > 0).all()
