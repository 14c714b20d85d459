"""A reconstructed episode: its static scene in the source's world, and the moving points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.episode import Note
from occgen_hub.geometry.alignment import Alignment
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.occupancy.classes import PointLabels
from occgen_hub.quality import Quality
from occgen_hub.views import WindowRecord


@dataclass(frozen=True)
class Scene:
    """A reconstructed episode of T frames.

    Attributes:
        cloud: the static surface, world coordinates, metres.
        world_from_camera: (T, 4, 4) float64, OpenCV axes, metres.
        intrinsics: (T, 3, 3) float64, pixels of the episode's images.
        moving: frame number to (n, 3) float32, the moving points of that frame, world metres; None
            if there are none in any frame.
        labels: the classes of static and moving points; None without labels.
        read_depth: frame number to (H, W) metres, 0 for none, as `Episode.read_depth`: a ray that
            meets no surface counts only if its pixel's depth is beyond the grid. None: it counts.
        scale: factor from the engine's unit of length to metres.
        alignment: of the engine's cameras with the source's; None if they were not aligned.
        quality: how well the frames agree; None if they were not compared.
        windows: how a network's windows were joined; None without a network.
        notes: for the user.
        world_origin: metres that were subtracted from the source's coordinates, see `near_origin`.
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
    world_origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    labels: PointLabels | None = None
    read_depth: Callable[[int], NDArray[np.float64]] | None = None
