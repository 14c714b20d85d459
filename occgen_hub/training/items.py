"""The content of an item: its keys, the sizes of cells and images, and the history."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from occgen_hub.errors import UsageError
from occgen_hub.geometry.poses import upright_pose
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.history import moved, moved_classes, past_frames
from occgen_hub.occupancy.states import FREE
from occgen_hub.training.augment import BITS, Augmentation, RotateYaw, View
from occgen_hub.training.coarse import (
    STRIDES,
    coarse_cells,
    coarse_classes,
    coarse_grid,
    coarse_mask,
    resampled,
)
from occgen_hub.training.reader import FrameReader

logger = logging.getLogger(__name__)

KEYS = (
    *("occupancy", "mask", "labels", "visible", "dynamic", "pose", "grid_pose", "intrinsics"),
    *("image", "depth", "history", "task", "episode", "frame_index"),
)
"""The possible keys of an item."""

DEFAULT_KEYS = tuple(
    key for key in KEYS if key not in ("labels", "visible", "depth", "dynamic", "grid_pose")
)

HISTORY_KEYS = ("occupancy", "mask", "labels", "dynamic", "intrinsics", "image", "depth")
"""The possible keys of past frames, in addition to their poses."""

UNKNOWN = 255
"""The label of a cell that was not observed. 0 is free; others are occupied: 1, or the class."""

COLUMNS_OF = {
    "occupancy": ("occupied",),
    "mask": ("observed",),
    "visible": ("observed",),
    "labels": ("occupied", "observed", "labels"),
    "dynamic": ("dynamic",),
    "pose": ("camera",),
    "grid_pose": ("camera",),
    "intrinsics": ("camera",),
    "history": ("camera",),
    "image": ("image",),
    "depth": ("depth",),
    "task": ("task",),
}
"""The columns of the shards for each key of an item."""

TARGETS = ("visible", "scene")

TARGET_KEYS = ("occupancy", "mask", "labels")
"""The keys that `target` affects."""

CELLS = (*TARGET_KEYS, "visible", "dynamic")

MAX_TILT = -0.1
"""Largest z component of a camera's down axis in an upright world. More is a warning."""

Transform = Callable[[dict[str, Any]], Any]


@cache
def _warn_of_tilt() -> None:
    """Warn once that upright grids may lie on their side."""
    logger.warning(
        "Warning: upright=True assumes that the world's z axis points up, but a camera's up axis "
        "is nearly horizontal or points down there; leave it out if the source's world has other "
        "axes."
    )


@dataclass(frozen=True)
class ItemFormat:
    """The format of items. The fields are the arguments of OccupancyDataset with these names.

    Raises UsageError if they are invalid.
    """

    keys: tuple[str, ...] = DEFAULT_KEYS
    dense: bool = True
    target: str = "visible"
    upright: bool = False
    voxel_stride: int = 1
    image_size: tuple[int, int] | None = None
    history_len: int = 10
    history_step: int = 2
    align_history: bool = False
    history_keys: tuple[str, ...] = ("occupancy",)
    augment: tuple[Augmentation, ...] = ()
    transform: Transform | None = None

    def __post_init__(self) -> None:
        for name, known in (("keys", KEYS), ("history_keys", HISTORY_KEYS)):
            asked = getattr(self, name)
            if isinstance(asked, str):
                raise UsageError(f"{name}: {asked!r} is not a list; give ({asked!r},).")
            if unknown := sorted({*asked} - {*known}):
                wrong = ", ".join(unknown)
                raise UsageError(f"{name}: {wrong} is unknown; give some of {', '.join(known)}.")
            object.__setattr__(self, name, tuple(asked))
        if self.history_len < 0 or self.history_step < 1:
            raise UsageError("history_len must be 0 or more, and history_step 1 or more.")
        if self.voxel_stride not in STRIDES:
            raise UsageError(f"voxel_stride is {self.voxel_stride}; give 1, 2 or 4.")
        if self.target not in TARGETS:
            raise UsageError(f"target is {self.target!r}; give {' or '.join(TARGETS)}.")
        if (self.of_scene or self.upright) and any(isinstance(a, RotateYaw) for a in self.augment):
            raise UsageError(
                "RotateYaw rotates only what a frame saw in its camera's grid; leave it out with "
                "target='scene' and with upright=True."
            )
        size = self.image_size
        if size is not None:
            if (
                not isinstance(size, Sequence)
                or len(size) != 2
                or not all(isinstance(n, int) and 0 < n <= 1 << 13 for n in size)
            ):
                raise UsageError(f"image_size is {size}; give (width, height), pixels.")
            object.__setattr__(self, "image_size", (size[0], size[1]))
        object.__setattr__(self, "augment", tuple(self.augment))

    @property
    def of_scene(self) -> bool:
        """Whether items have the scene's cells and not only those that the frame saw."""
        return self.target == "scene" and not {*TARGET_KEYS}.isdisjoint(self.keys)

    @property
    def past(self) -> int:
        """The number of frames that the history goes back."""
        return self.history_len * self.history_step if "history" in self.keys else 0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the shards that items need."""
        keys = [*self.keys, *(self.history_keys if "history" in self.keys else ())]
        needed = [name for key in keys for name in COLUMNS_OF.get(key, ())]
        if self.of_scene:
            needed += ["occupied", "observed", "labels"]
        if self.of_scene or self.upright or self.augment:
            needed.append("camera")
        return tuple(dict.fromkeys(needed))

    @property
    def media(self) -> tuple[str, ...]:
        """Which of image, depth and task are read, for the frame or for past ones."""
        return tuple(name for name in self.columns if name in ("image", "depth", "task"))

    def grid(self, stored: Grid) -> Grid:
        """The grid of the items, for a dataset with that grid."""
        return coarse_grid(stored, self.voxel_stride)

    def item(self, reader: FrameReader, number: int, rng: np.random.Generator | None) -> Any:
        """Item `number`. rng: the random generator for augmentations."""
        index = reader.index
        episode, frame = index.located(number)
        item: dict[str, Any] = {}
        of_scene = self._of_scene(reader, number) if self.of_scene else {}
        for key in self.keys:
            if key in of_scene:
                item[key] = torch.from_numpy(of_scene[key])
            elif key == "history":
                item |= self._history(reader, number, frame)
            elif key in ("episode", "frame_index"):
                item[key] = index.episodes[episode] if key == "episode" else frame
            elif key == "task":
                item[key] = reader.task(number)
            elif key == "pose":
                item[key] = torch.from_numpy(reader.camera(number)[0].copy())
            elif key == "grid_pose":
                item[key] = torch.from_numpy(self._grid_pose(reader, number).astype(np.float32))
            else:
                motion = self._grid_from_camera(reader, number) if key in CELLS else None
                item[key] = torch.from_numpy(self._value(reader, key, number, motion))
        if self.augment:
            assert rng is not None
            view = self._view(reader, number)
            for augmentation in self.augment:
                view = augmentation(item, view, rng)
        return item if self.transform is None else self.transform(item)

    def _view(self, reader: FrameReader, number: int) -> View:
        size = self.image_size or reader.index.image_size(reader.index.located(number)[0])
        pose = reader.camera(number)[0].astype(np.float64)
        K = self._intrinsics(reader, number).astype(np.float64)
        return View(self.grid(reader.index.grid), pose, K, size, self.align_history)

    def _grid_pose(self, reader: FrameReader, number: int) -> NDArray[np.float64]:
        """(4, 4) world_from_grid of a frame's cells."""
        pose = reader.camera(number)[0].astype(np.float64)
        if not self.upright:
            return pose
        if pose[2, 1] > MAX_TILT:
            _warn_of_tilt()
        return upright_pose(pose)

    def _grid_from_camera(self, reader: FrameReader, number: int) -> NDArray[np.float64] | None:
        """(4, 4) grid_from_camera of a frame; None if its cells stay in its camera's grid."""
        if not self.upright:
            return None
        pose = reader.camera(number)[0].astype(np.float64)
        return np.linalg.inv(self._grid_pose(reader, number)) @ pose

    def _of_scene(self, reader: FrameReader, number: int) -> dict[str, NDArray[Any]]:
        """The scene's cells around a frame, as "occupancy", "mask" and "labels"."""
        motion, grid = self._grid_from_camera(reader, number), reader.index.grid
        observed = np.unpackbits(reader.observed(number), count=grid.cells).view(np.bool_)
        observed = observed.reshape(grid.shape)
        if motion is not None:
            observed = resampled(observed, grid, np.linalg.inv(motion).astype(np.float64))
        classes = reader.index.taxonomy is not None
        states, stride = (
            reader.states(number).labelled(classes),
            1 if classes else self.voxel_stride,
        )
        seen = self._labels(reader, number, motion, stride), observed
        pose = self._grid_pose(reader, number)
        labels = states.cut(grid, pose, self.voxel_stride, seen)
        known = labels != UNKNOWN
        occupied = known & (labels != FREE)
        if self.dense:
            return {"occupancy": occupied, "mask": known, "labels": labels}
        cells = np.argwhere(occupied).astype(np.int32)
        return {"occupancy": cells, "mask": np.packbits(known), "labels": labels}

    def _value(
        self,
        reader: FrameReader,
        key: str,
        number: int,
        motion: NDArray[np.float64] | None = None,
    ) -> NDArray[Any]:
        """The value of a key for a frame. motion: (4, 4), from its grid to another camera's."""
        if key == "image":
            pixels = reader.image(number, self.image_size)
            return np.array(pixels.transpose(2, 0, 1), order="C")
        if key == "depth":
            return reader.depth(number, self.image_size)
        if key == "intrinsics":
            return self._intrinsics(reader, number)
        if key == "labels":
            return self._labels(reader, number, motion, self.voxel_stride)
        grid = self.grid(reader.index.grid)
        if key in BITS:
            if self.dense or motion is not None or self.voxel_stride > 1:
                dense = self._mask(reader, number, motion, self.voxel_stride)
                return dense if self.dense else np.packbits(dense)
            return reader.observed(number).copy()
        cells = self._cells(reader, key, number, motion)
        if self.dense:
            return coarse_cells(cells, reader.index.grid.shape, self.voxel_stride)
        if self.voxel_stride > 1:
            stride = self.voxel_stride
            coarse = coarse_cells(cells, reader.index.grid.shape, stride)
            cells = np.flatnonzero(coarse).astype(np.int32)
        return np.stack(np.unravel_index(cells, grid.shape), axis=-1).astype(np.int32)

    def _cells(
        self, reader: FrameReader, key: str, number: int, motion: NDArray[np.float64] | None
    ) -> NDArray[np.int32]:
        """(n,) flat numbers of cells of the stored grid."""
        cells = reader.dynamic(number) if key == "dynamic" else reader.occupied(number)
        return cells if motion is None else moved(cells, motion, reader.index.grid)

    def _mask(
        self,
        reader: FrameReader,
        number: int,
        motion: NDArray[np.float64] | None,
        stride: int,
    ) -> NDArray[np.bool_]:
        shape, packed = reader.index.grid.shape, reader.observed(number)
        if stride == 1:
            cells = reader.index.grid.cells
            dense: NDArray[np.bool_] = np.unpackbits(packed, count=cells).view(np.bool_)
            dense = dense.reshape(shape)
        else:
            dense = coarse_mask(packed, shape, stride)
        if motion is None:
            return dense
        past_from_current = np.linalg.inv(motion).astype(np.float64)
        return resampled(dense, coarse_grid(reader.index.grid, stride), past_from_current)

    def _labels(
        self,
        reader: FrameReader,
        number: int,
        motion: NDArray[np.float64] | None,
        stride: int,
    ) -> NDArray[np.uint8]:
        grid, classes = reader.index.grid, reader.classes(number)
        labels = self._mask(reader, number, motion, stride).view(np.uint8)
        np.subtract(labels, 1, out=labels)  # Observed, 1, becomes 0; 0 becomes 255.
        if classes is not None:
            cells = reader.occupied(number)
            if motion is not None:
                cells, classes = moved_classes(cells, classes, motion, grid)
            if stride > 1:
                numbers, classes = coarse_classes(cells, classes, grid.shape, stride)
                labels.reshape(-1)[numbers] = classes
            else:
                labels.reshape(-1)[cells] = classes
            return labels
        cells = self._cells(reader, "occupancy", number, motion)
        if stride == 1:
            labels.reshape(-1)[cells] = 1
        else:
            labels[coarse_cells(cells, grid.shape, stride)] = 1
        return labels

    def _intrinsics(self, reader: FrameReader, number: int) -> NDArray[np.float32]:
        """(3, 3) float32, for the returned image."""
        intrinsics = reader.camera(number)[1].copy()
        if self.image_size is not None:
            recorded = reader.index.image_size(reader.index.located(number)[0])
            intrinsics[0] *= self.image_size[0] / recorded[0]
            intrinsics[1] *= self.image_size[1] / recorded[1]
        return intrinsics

    def _history(self, reader: FrameReader, number: int, frame: int) -> dict[str, torch.Tensor]:
        """The existing past frames, nearest first."""
        count = self.history_len
        before = past_frames(frame, count, self.history_step)
        poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
        found: dict[str, list[NDArray[Any]]] = {key: [] for key in self.history_keys}
        if before:
            camera_from_world = np.linalg.inv(reader.camera(number)[0].astype(np.float64))
            turn = self._grid_from_camera(reader, number)
        for h, past_frame in enumerate(before):
            past = number - frame + past_frame
            motion = camera_from_world @ reader.camera(past)[0]
            poses[h] = motion
            move = self._grid_from_camera(reader, past)
            if self.align_history:
                move = motion if turn is None else turn @ motion
            for key in self.history_keys:
                found[key].append(self._value(reader, key, past, move))
        history = {}
        for key, values in found.items():
            name = history_name(key)
            if key in ("occupancy", "dynamic") and not self.dense:
                rows = [np.insert(cells, 0, h, axis=1) for h, cells in enumerate(values)]
                stacked = np.concatenate([np.zeros((0, 4), np.int32), *rows])
            else:
                shape, kind = self._past_shape(reader, key, number)
                stacked = np.full((count, *shape), UNKNOWN if key == "labels" else 0, kind)
                for h, value in enumerate(values):
                    stacked[h] = value
            history[name] = torch.from_numpy(stacked)
        history["history_valid"] = torch.arange(count) < len(before)
        history["history_pose"] = torch.from_numpy(poses)
        return history

    def _past_shape(
        self, reader: FrameReader, key: str, number: int
    ) -> tuple[tuple[int, ...], type[np.generic]]:
        """The shape and type of one past frame's value of a key."""
        grid = self.grid(reader.index.grid)
        width, height = self.image_size or reader.index.image_size(reader.index.located(number)[0])
        if key == "mask" and not self.dense:
            return (-(-grid.cells // 8),), np.uint8
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "image": ((3, height, width), np.uint8),
            "depth": ((height, width), np.float32),
            "intrinsics": ((3, 3), np.float32),
            "labels": (grid.shape, np.uint8),
        }
        return shapes.get(key, (grid.shape, np.bool_))


def history_name(key: str) -> str:
    """The name of a key of past frames in an item."""
    return "history" if key == "occupancy" else f"history_{key}"


def check_augmentations(augment: Sequence[Augmentation], grid: Grid) -> None:
    """Raise UsageError for an augmentation that cannot be used with the grid."""
    for augmentation in augment:
        augmentation.check(grid)
