"""The whole tree: which trajectories there are, and each written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from occgen_hub.atomic import atomic_folder
from occgen_hub.errors import UsageError
from occgen_hub.sample.episode import CAMERAS, OPENCV, Episode, length_of, plan_episode
from occgen_hub.sample.images import Video, depth_picture, depth_units, write_colour, write_depth
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.ply import cloud_of, write_cloud, write_mesh
from occgen_hub.sample.records import Recorder
from occgen_hub.sample.render import Renderer
from occgen_hub.sample.scene import Scene, build_scene

GROUP = "sample_zed"
PER_SCENE = 2
LAYOUTS = ("trajectories", "scenes")
VIDEOS = "videos/chunk-000"
Tick = Callable[[], None]


def write_tree(
    out: Path,
    trajectories: int,
    frames: int,
    seed: int,
    layout: str,
    faults: bool,
    progress: Callable[[int, int], None] | None,
) -> list[Path]:
    """See `make_sample`."""
    _check(out, trajectories, frames, seed, layout)
    total = sum(length_of(k, frames) for k in range(trajectories))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    written: list[Path] = []
    scenes: list[Scene] = []
    for number in range(-(-trajectories // PER_SCENE)):
        mine = range(number * PER_SCENE, min((number + 1) * PER_SCENE, trajectories))
        stage = _Stage(seed, number, frames, faults, tick)
        scenes.append(stage.scene)
        folder = out / GROUP / f"house_{number:03d}"
        if layout == "scenes":
            written.append(stage.film_together(folder, mine))
        else:
            written += [stage.film_alone(folder / f"trajectory_{k % PER_SCENE}", k) for k in mine]
    with atomic_folder(out / "ground_truth") as truth:
        write_mesh(truth / "mesh.ply", scenes)
    return written


def _check(out: Path, trajectories: int, frames: int, seed: int, layout: str) -> None:
    numbers = (("trajectories", trajectories, 1), ("frames", frames, 1), ("seed", seed, 0))
    for name, value, least in numbers:
        if value < least:
            raise UsageError(f"{name} is {value}; give {least} or more.")
    if layout not in LAYOUTS:
        raise UsageError(f"layout is {layout!r}; give one of {', '.join(LAYOUTS)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not an empty folder; name a new one or empty it.")


@dataclass
class _Shot:
    """What an episode of a dataset is filmed with."""

    number: int  # the episode's, in its dataset
    first: int  # its first image's number
    camera: int


class _Stage:
    """A scene, ready to be filmed."""

    def __init__(self, seed: int, number: int, frames: int, faults: bool, tick: Tick) -> None:
        self.seed, self.number, self.frames = seed, number, frames
        self.faults, self.tick = faults, tick
        self.scene = build_scene(seed, number)
        self.renderer = Renderer(self.scene)
        self.cloud = cloud_of(self.scene, np.random.default_rng([seed, number, 1]))

    def film_alone(self, folder: Path, trajectory: int) -> Path:
        """A trajectory in a folder of its own."""
        with atomic_folder(folder) as part:
            _make_folders(part)
            recorder = Recorder(part, self.faults, image_ranges=False)
            episode = self._film(part, trajectory, _Shot(0, 0, trajectory))
            recorder.add(episode)
            recorder.close()
            walked = episode.world_from_camera[:, :3, 3]
            write_cloud(part / "data/chunk-000/path.ply", self.scene, self.cloud, walked)
        return folder

    def film_together(self, folder: Path, trajectories: range) -> Path:
        """Several trajectories as the episodes of one folder, all with the same camera."""
        with atomic_folder(folder) as part:
            _make_folders(part)
            recorder = Recorder(part, self.faults, image_ranges=True)
            walked: list[Floats] = []
            for number, trajectory in enumerate(trajectories):
                shot = _Shot(number, recorder.frames, self.number)
                episode = self._film(part, trajectory, shot)
                recorder.add(episode)
                walked.append(episode.world_from_camera[:, :3, 3])
            recorder.close()
            path = np.concatenate(walked)
            write_cloud(part / "meta/pointcloud.ply", self.scene, self.cloud, path)
        return folder

    def _film(self, folder: Path, trajectory: int, shot: _Shot) -> Episode:
        """Render an episode and write its images and videos."""
        camera = CAMERAS[shot.camera % len(CAMERAS)]
        n = length_of(trajectory, self.frames)
        seed = [self.seed, self.number, 2, trajectory]
        episode = plan_episode(self.renderer, camera, trajectory, n, seed)
        rgb, depth = (folder / VIDEOS / f"observation.images.{k}" for k in ("rgb", "depth"))
        with ExitStack() as stack:
            films = []
            for key in ("trajectory", "depth"):
                path = folder / VIDEOS / f"observation.video.{key}/episode_{shot.number:06d}.mp4"
                films.append(Video(path, camera.width, camera.height))
                stack.callback(films[-1].close)
            for i, pose in enumerate(episode.house_from_camera, shot.first):
                colour, metres = self.renderer.picture(camera, pose @ OPENCV)
                units = depth_units(metres)
                write_colour(rgb / f"{i}.jpg", colour)
                write_depth(depth / f"{i}.png", units)
                films[0].add(colour)
                films[1].add(depth_picture(units))
                self.tick()
        return episode


def _make_folders(folder: Path) -> None:
    kinds = ("images.rgb", "images.depth", "video.trajectory", "video.depth")
    for name in ("data/chunk-000", "meta", *(f"{VIDEOS}/observation.{k}" for k in kinds)):
        (folder / name).mkdir(parents=True)
