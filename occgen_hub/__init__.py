"""OccGen Hub: recordings in, 4D occupancy datasets out.

The names in `__all__` are the public API. Each is imported on first use, because importing torch
and other libraries takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from occgen_hub.api import build, finalize, load_episode, push
    from occgen_hub.camera_mapping import CameraMapping
    from occgen_hub.config import Config
    from occgen_hub.exporting import export
    from occgen_hub.lerobot.dataset import LeRobotOccupancyDataset
    from occgen_hub.source_check import check_source
    from occgen_hub.training import (
        ColorJitter,
        Mirror,
        OccupancyDataset,
        OccupancyStream,
        RotateYaw,
        collate,
    )
    from occgen_hub.validation import validate

__all__ = [
    "CameraMapping",
    "ColorJitter",
    "Config",
    "LeRobotOccupancyDataset",
    "Mirror",
    "OccupancyDataset",
    "OccupancyStream",
    "RotateYaw",
    "build",
    "check_source",
    "collate",
    "export",
    "finalize",
    "load_episode",
    "push",
    "validate",
]

_PLACES = {
    "CameraMapping": "camera_mapping",
    "ColorJitter": "training",
    "Config": "config",
    "LeRobotOccupancyDataset": "lerobot.dataset",
    "Mirror": "training",
    "OccupancyDataset": "training",
    "OccupancyStream": "training",
    "RotateYaw": "training",
    "build": "api",
    "check_source": "source_check",
    "collate": "training",
    "export": "exporting",
    "finalize": "api",
    "load_episode": "api",
    "push": "api",
    "validate": "validation",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'occgen_hub' has no attribute {name!r}")
    return getattr(import_module(f"occgen_hub.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
