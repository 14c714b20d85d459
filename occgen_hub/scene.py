"""What is written of an episode: its scene in the source's world, and what moves in each frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.episode import Note
from occgen_hub.fusion.quality import Quality
from occgen_hub.geometry.alignment import Alignment
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.views import WindowRecord


@dataclass(frozen=True)
class Scene:
    """A reconstructed episode of T frames.

    Attributes:
        cloud: the static surface, world coordinates, metres.
        world_from_camera: (T, 4, 4) float64, OpenCV axes, metres.
        intrinsics: (T, 3, 3) float64, pixels of the episode's images.
        moving: frame number to (n, 3) float32, the points of that frame alone, world metres; None
            where nothing was looked for.
        scale: what the engine's lengths were multiplied by to become metres.
        alignment: how well the engine's cameras fit onto the source's; None where it was not asked.
        quality: how well the frames agree; None where they were not compared.
        windows: how a network's windows were put together; None where there was no network.
        notes: what a user should know.
    """

    cloud: Cloud
    world_from_camera: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    moving: Callable[[int], NDArray[np.float32]] | None = None
    scale: float = 1.0
    alignment: Alignment | None = None
    quality: Quality | None = None
    windows: WindowRecord | None = None
    notes: tuple[Note, ...] = ()
