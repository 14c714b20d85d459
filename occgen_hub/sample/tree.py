"""Write the whole tree of a sample. Each trajectory appears complete or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.atomic import atomic_folder
from occgen_hub.errors import UsageError
from occgen_hub.sample import vlnce
from occgen_hub.sample.episode import (
    CAMERAS,
    OPENCV,
    Episode,
    length_of,
    plan_cameras,
    plan_episode,
)
from occgen_hub.sample.figure import People
from occgen_hub.sample.images import (
    Bytes,
    Video,
    depth_picture,
    depth_units,
    write_colour,
    write_depth,
    write_label,
)
from occgen_hub.sample.materials import Array
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.people import plan_people
from occgen_hub.sample.ply import cloud_of, to_world, write_cloud, write_mesh
from occgen_hub.sample.pose_errors import Size, with_drift, with_noise
from occgen_hub.sample.records import Recorder
from occgen_hub.sample.render import Camera, Renderer
from occgen_hub.sample.scene import TAXONOMY, Scene, build_scene
from occgen_hub.sample.sensors import MODELS, corrupt
from occgen_hub.sample.truth import write_mesh_labels, write_truth

GROUP = "sample_zed"
PER_SCENE = 2
LAYOUTS = {
    "vln-n1": "trajectories",
    "vln-n1-scenes": "scenes",
    "vln-ce": "cameras",
    "trajectories": "trajectories",
    "scenes": "scenes",
}
"""The names of the layouts, and how each is recorded."""
VIDEOS = "videos/chunk-000"
Tick = Callable[[], None]


@dataclass(frozen=True)
class Corruptions:
    """The differences of a recording from a perfect one of empty rooms; see `make_sample`."""

    noise: tuple[str, ...] = ()
    pose_noise: Size | None = None
    pose_drift: Size | None = None
    people: int = 0
    labels: bool = False

    def check(self) -> None:
        """Raise UsageError for values out of range."""
        for name in self.noise:
            if name not in MODELS:
                raise UsageError(f"noise is {name!r}; give some of {', '.join(MODELS)}.")
        for name, size in (("pose_noise", self.pose_noise), ("pose_drift", self.pose_drift)):
            if size is not None and not _is_size(size):
                raise UsageError(
                    f"{name} is {size!r}; give metres and degrees, two finite numbers of 0 or more."
                )
        if self.people < 0:
            raise UsageError(f"people is {self.people}; give 0 or more.")


def _is_size(size: Size) -> bool:
    values = np.asarray(size)
    return (
        values.shape == (2,)
        and values.dtype.kind in "iuf"
        and bool((np.isfinite(values) & (values >= 0)).all())
    )


def write_tree(
    out: Path,
    trajectories: int,
    frames: int,
    seed: int,
    layout: str,
    faults: bool,
    corruptions: Corruptions,
    progress: Callable[[int, int], None] | None,
) -> list[Path]:
    """See `make_sample`."""
    _check(out, trajectories, frames, seed, layout)
    corruptions.check()
    if corruptions.labels and LAYOUTS[layout] == "cameras":
        raise UsageError(f"labels: the layout {layout} has none; choose another, or leave it out.")
    layout = LAYOUTS[layout]
    group = vlnce.GROUP if layout == "cameras" else GROUP
    total = sum(length_of(k, frames) for k in range(trajectories))
    total *= len(vlnce.MOUNTS) if layout == "cameras" else 1
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    written: list[Path] = []
    scenes: list[Scene] = []
    with atomic_folder(out / "ground_truth") as truth:
        for number in range(-(-trajectories // PER_SCENE)):
            mine = range(number * PER_SCENE, min((number + 1) * PER_SCENE, trajectories))
            place = Path(group, f"house_{number:03d}")
            stage = _SceneRecorder(seed, number, frames, faults, corruptions, truth / place, tick)
            scenes.append(stage.scene)
            if layout == "cameras":
                written.append(stage.record_vlnce(out / place, mine))
            elif layout == "scenes":
                written.append(stage.record_scene(out / place, mine))
            else:
                written += [
                    stage.record_trajectory(out / place / f"trajectory_{k % PER_SCENE}", k)
                    for k in mine
                ]
        write_mesh(truth / "mesh.ply", scenes)
        if corruptions.labels:
            write_mesh_labels(truth / "mesh_labels.npz", scenes)
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
class _EpisodeSetup:
    """The settings with which an episode is recorded."""

    number: int  # the episode's, in its dataset
    first: int  # its first image's number
    camera: int


class _SceneRecorder:
    """Records trajectories in a scene."""

    def __init__(
        self,
        seed: int,
        number: int,
        frames: int,
        faults: bool,
        corruptions: Corruptions,
        truth: Path,
        tick: Tick,
    ) -> None:
        self.seed, self.number, self.frames = seed, number, frames
        self.faults, self.corruptions, self.truth, self.tick = faults, corruptions, truth, tick
        self.scene = build_scene(seed, number)
        self.renderer = Renderer(self.scene)
        self.cloud = cloud_of(self.scene, np.random.default_rng([seed, number, 1]))

    def record_trajectory(self, folder: Path, trajectory: int) -> Path:
        """Write a trajectory into its own folder."""
        with atomic_folder(folder) as part:
            _make_folders(part, labels=self.corruptions.labels)
            recorder = Recorder(part, self.faults, image_ranges=False)
            episode = self._record_episode(
                part, trajectory, _EpisodeSetup(0, 0, trajectory), folder.name
            )
            recorder.add(episode)
            recorder.close()
            walked = episode.world_from_camera[:, :3, 3]
            write_cloud(part / "data/chunk-000/path.ply", self.scene, self.cloud, walked)
        return folder

    def record_scene(self, folder: Path, trajectories: range) -> Path:
        """Write several trajectories as the episodes of one folder, all with the same camera."""
        with atomic_folder(folder) as part:
            _make_folders(part, labels=self.corruptions.labels)
            recorder = Recorder(part, self.faults, image_ranges=True)
            walked: list[Floats] = []
            for number, trajectory in enumerate(trajectories):
                shot = _EpisodeSetup(number, recorder.frames, self.number)
                episode = self._record_episode(part, trajectory, shot, f"episode_{number:06d}")
                recorder.add(episode)
                walked.append(episode.world_from_camera[:, :3, 3])
            recorder.close()
            path = np.concatenate(walked)
            write_cloud(part / "meta/pointcloud.ply", self.scene, self.cloud, path)
        return folder

    def record_vlnce(self, folder: Path, trajectories: range) -> Path:
        """Write several trajectories as episodes of a VLN-CE scene, each with several cameras."""
        camera = vlnce.ce_camera()
        with atomic_folder(folder) as part:
            recorder = vlnce.CeRecorder(part)
            for number, trajectory in enumerate(trajectories):
                n, seed = length_of(trajectory, self.frames), [self.seed, self.number]
                planned = plan_cameras(
                    self.renderer, camera, trajectory, n, [*seed, 2, trajectory],
                    list(vlnce.MOUNTS.values()),
                )  # fmt: skip
                cameras = dict(zip(vlnce.MOUNTS, planned, strict=True))
                people = plan_people(
                    self.renderer, planned[0], self.corruptions.people, [*seed, 5, trajectory]
                )
                vlnce.record_frames(cameras, partial(self._picture, camera, people), part, number)
                bodies = [people.at(i).vertices for i in range(n)]
                vertices = np.stack([to_world(self.scene, body) for body in bodies])
                for name, episode in cameras.items():
                    truth = self.truth / f"episode_{number:06d}.{name}.npz"
                    write_truth(truth, episode, people, vertices)
                recorder.add({k: self._with_pose_errors(v, trajectory) for k, v in cameras.items()})
            recorder.close()
        return folder

    def _picture(
        self, camera: Camera, people: People, pose: Floats, frame: int
    ) -> tuple[Bytes, vlnce.Metres]:
        """The colour and the measured depth (H, W), metres, of a frame; pose: OpenCV axes."""
        posed = people.at(frame)
        colour, metres, _ = self.renderer.picture(camera, pose, posed if people.strolls else None)
        self.tick()
        return colour, self._with_noise(metres, camera.K, [int(pose[2, 3] * 1e4), frame])

    def _record_episode(
        self, folder: Path, trajectory: int, shot: _EpisodeSetup, name: str
    ) -> Episode:
        """Render an episode and write its images, its videos and, as `name`, its truth.

        Returns it with the poses that the tables state.
        """
        camera = CAMERAS[shot.camera % len(CAMERAS)]
        n = length_of(trajectory, self.frames)
        seed = [self.seed, self.number, 2, trajectory]
        episode = plan_episode(self.renderer, camera, trajectory, n, seed)
        people = plan_people(
            self.renderer, episode, self.corruptions.people, [self.seed, self.number, 5, trajectory]
        )
        bodies: list[Array] = []
        rgb, depth, labels = (
            folder / VIDEOS / f"observation.images.{k}" for k in ("rgb", "depth", "labels")
        )
        with ExitStack() as stack:
            films = []
            for key in ("trajectory", "depth"):
                path = folder / VIDEOS / f"observation.video.{key}/episode_{shot.number:06d}.mp4"
                films.append(Video(path, camera.width, camera.height))
                stack.callback(films[-1].close)
            for i, pose in enumerate(episode.house_from_camera, shot.first):
                posed = people.at(i - shot.first)
                bodies.append(posed.vertices)
                present = posed if people.strolls else None
                colour, metres, label = self.renderer.picture(camera, pose @ OPENCV, present)
                units = depth_units(
                    self._with_noise(metres, camera.K, [trajectory, i - shot.first])
                )
                write_colour(rgb / f"{i}.jpg", colour)
                write_depth(depth / f"{i}.png", units)
                if self.corruptions.labels:
                    write_label(labels / f"{i}.png", label)
                films[0].add(colour)
                films[1].add(depth_picture(units))
                self.tick()
        vertices = np.stack([to_world(self.scene, body) for body in bodies])
        write_truth(self.truth / f"{name}.npz", episode, people, vertices)
        return self._with_pose_errors(episode, trajectory)

    def _with_noise(self, depth: Array, K: Floats, own: list[int]) -> NDArray[np.floating[Any]]:
        """Depth (H, W), metres, as the sensor measures it. own: the frame's seed."""
        noise = self.corruptions.noise
        return corrupt(depth, K, noise, [self.seed, self.number, 3, *own]) if noise else depth

    def _with_pose_errors(self, episode: Episode, trajectory: int) -> Episode:
        """The episode with the errors of its stated poses."""
        seed = [self.seed, self.number, 4, trajectory]
        poses = episode.world_from_camera
        if self.corruptions.pose_drift:
            poses = with_drift(
                poses, self.corruptions.pose_drift, np.random.default_rng([*seed, 0])
            )
        if self.corruptions.pose_noise:
            poses = with_noise(
                poses, self.corruptions.pose_noise, np.random.default_rng([*seed, 1])
            )
        return replace(episode, world_from_camera=poses)


def _make_folders(folder: Path, *, labels: bool) -> None:
    kinds = ("images.rgb", "images.depth", "video.trajectory", "video.depth")
    for name in ("data/chunk-000", "meta", *(f"{VIDEOS}/observation.{k}" for k in kinds)):
        (folder / name).mkdir(parents=True)
    if labels:
        place = folder / VIDEOS / "observation.images.labels"
        place.mkdir()
        (place / "taxonomy.txt").write_text(f"{TAXONOMY}\n", encoding="utf-8")
