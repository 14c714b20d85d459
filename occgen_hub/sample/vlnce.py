"""The VLN-CE layout: the episodes of a scene, each recorded by several cameras."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occgen_hub.sample.episode import OPENCV, Episode
from occgen_hub.sample.images import VIDEO_FPS, Bytes, write_colour
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.render import Camera

Metres = NDArray[np.floating[Any]]
GROUP = "sample_r2r"
HFOV = 79.0
"""Horizontal field of view in degrees, which the files do not state."""

MOUNTS = {"125cm_0deg": (1.25, 0.0), "125cm_30deg": (1.25, -30.0)}
"""The cameras, by name: metres above the floor, degrees upward."""

UNITS = 1000
SEPARATOR = "<INSTRUCTION_SEP>"
STOP, FORWARD, LEFT, RIGHT = range(4)
TURN = np.radians(2.0)
"""Largest rotation between two frames for which the action is forward."""


def ce_camera() -> Camera:
    """The camera, with the proportions of the real data, at half the size."""
    focal = 320 / 2 / np.tan(np.radians(HFOV) / 2)
    return Camera(320, 240, float(focal), float(focal))


def image_path(folder: Path, kind: str, camera: str, episode: int, frame: int) -> Path:
    """The path of an image. kind: "rgb" or "depth"."""
    suffix = "jpg" if kind == "rgb" else "png"
    place = folder / f"videos/chunk-{episode // 1000:03d}/observation.images.{kind}.{camera}"
    return place / f"episode_{episode:06d}_{frame}.{suffix}"


def write_frame(
    folder: Path, camera: str, number: tuple[int, int], colour: Bytes, metres: Metres
) -> None:
    """The images of a camera. number: of the episode and the frame; metres: (H, W)."""
    rgb, depth = (image_path(folder, kind, camera, *number) for kind in ("rgb", "depth"))
    for path in (rgb, depth):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_colour(rgb, colour)
    units = np.rint(metres.astype(np.float64) * UNITS)
    Image.fromarray(np.where(units <= 65535, units, 0).astype(np.uint16)).save(depth)


class CeRecorder:
    """Writes the tables of a scene's episodes, and its metadata at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.episodes: list[dict[str, Any]] = []

    def add(self, cameras: dict[str, Episode]) -> None:
        """Write an episode's parquet. Each camera's poses have a column."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        number, first = len(self.episodes), next(iter(cameras.values()))
        row = pa.list_(pa.field("element", pa.float32()))
        matrix = pa.list_(pa.field("element", row))
        columns = {"action": pa.array(_actions(first), pa.int64())}
        for name, episode in cameras.items():
            poses = (episode.world_from_camera @ OPENCV).astype(np.float32)
            columns[f"pose.{name}"] = pa.array(poses.tolist(), matrix)
            goal = np.repeat(poses[-1:, :3, 3], len(poses), axis=0)
            columns[f"goal.{name}"] = pa.array(goal.tolist(), row)
            left = np.arange(len(poses))[::-1]
            columns[f"relative_goal_frame_id.{name}"] = pa.array(left, pa.int64())
        path = self.folder / f"data/chunk-{number // 1000:03d}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), path)
        texts = [task.text for task in first.tasks]
        self.episodes.append(
            {"episode_index": number, "tasks": [SEPARATOR.join(texts)], "length": len(first)}
        )

    def close(self) -> None:
        """Write the metadata."""
        meta = self.folder / "meta"
        meta.mkdir(parents=True, exist_ok=True)
        lengths = [episode["length"] for episode in self.episodes]
        info = {
            "codebase_version": "v2.1",
            "robot_type": "unknown",
            "total_episodes": len(lengths),
            "total_frames": sum(lengths),
            "chunks_size": 1000,
            "fps": VIDEO_FPS,
        }
        (meta / "info.json").write_text(json.dumps(info, indent=4), encoding="utf-8")
        tasks = [task for episode in self.episodes for task in episode["tasks"]]
        for name, rows in (
            ("episodes.jsonl", self.episodes),
            ("tasks.jsonl", [{"task_index": i, "task": text} for i, text in enumerate(tasks)]),
        ):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (meta / name).write_text("".join(lines), encoding="utf-8")


def record_frames(
    cameras: dict[str, Episode],
    picture: Callable[[Floats, int], tuple[Bytes, Metres]],
    folder: Path,
    number: int,
) -> None:
    """Write the images of an episode. picture: from (4, 4) poses and a frame to colour, metres."""
    for name, episode in cameras.items():
        for frame, pose in enumerate(episode.house_from_camera):
            write_frame(folder, name, (number, frame), *picture(pose @ OPENCV, frame))


def _actions(episode: Episode) -> NDArray[np.int64]:
    """(T,) the action that leads to the next frame: forward or a turn; the last one is stop."""
    forward = -episode.world_from_camera[:, :2, 2]
    heading = np.unwrap(np.arctan2(forward[:, 1], forward[:, 0]))
    turn = np.diff(heading)
    actions = np.where(turn > TURN, LEFT, np.where(turn < -TURN, RIGHT, FORWARD))
    return np.append(actions, STOP).astype(np.int64)
