"""The values that flow: an episode as it was recorded, and what was reconstructed from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.alignment import Alignment
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.schema import Feature


@dataclass(frozen=True)
class Note:
    """Something about a source that a user should know. `code` names its kind, for counting."""

    code: str
    text: str


@dataclass(frozen=True)
class Task:
    """An instruction in words, and what the source says of it besides."""

    text: str
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A column of the source: what it is, and (T, *shape) values, (T,) for plain numbers."""

    feature: Feature
    values: Any


@dataclass(frozen=True)
class MediaFile:
    """A file that goes with the episode; `file` is its key in the schema.

    check: decodes an image, unless that was done already, and raises SourceError where it is
    damaged; where it is None, the writer decodes the image.
    """

    file: str
    path: Path
    frame: int | None = None
    check: Callable[[], None] | None = None


@dataclass(frozen=True)
class Episode:
    """One recording of T frames. Frames are decoded when asked for, by number from 0.

    id: "<group>/<scene>/<trajectory>"; image_size: (width, height) in pixels, the same for all
    frames; read_rgb(t): (H, W, 3) uint8; read_depth(t): (H, W) float64, metres along the optical
    axis, 0 for none; world_from_camera: (T, 4, 4) float64, OpenCV axes, metres, in the source's
    world; intrinsics: (T, 3, 3) float64, pixels; task_index: (T,) int64 into `tasks`;
    fingerprint: SHA-256 over the names and contents of the source's files.
    """

    id: str
    length: int
    fps: float
    robot_type: str
    image_size: tuple[int, int]
    read_rgb: Callable[[int], NDArray[np.uint8]]
    tasks: tuple[Task, ...]
    task_index: NDArray[np.int64]
    columns: dict[str, Column]
    media: tuple[MediaFile, ...]
    fingerprint: str
    read_depth: Callable[[int], NDArray[np.float64]] | None = None
    world_from_camera: NDArray[np.float64] | None = None
    intrinsics: NDArray[np.float64] | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Reconstruction:
    """What an engine makes of an episode.

    cloud: the fused scene; world_from_camera: (T, 4, 4) float64, OpenCV axes; intrinsics:
    (T, 3, 3) float64, pixels of the episode's images; in_source_world: whether that is the
    source's world, in metres, else one of the engine's own; frames: numbers of those that the
    engine looked at, None for all.
    """

    engine: str
    cloud: Cloud
    world_from_camera: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    in_source_world: bool = True
    frames: NDArray[np.int64] | None = None
    notes: tuple[Note, ...] = ()


@dataclass(frozen=True)
class Scene:
    """What is written of an episode: its reconstruction, in the source's world where it has one.

    scale: what the engine's lengths were multiplied by to become metres; alignment: how well the
    engine's cameras fit onto the source's, None where that was not asked.
    """

    cloud: Cloud
    world_from_camera: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    scale: float = 1.0
    alignment: Alignment | None = None
    notes: tuple[Note, ...] = ()
