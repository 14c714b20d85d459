"""A built dataset for PyTorch: any frame by its number."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from occgen_hub.errors import UsageError
from occgen_hub.loading import EXPORT
from occgen_hub.scene_states import states_file
from occgen_hub.training.augment import Augmentation
from occgen_hub.training.items import DEFAULT_KEYS, ItemFormat, Transform, check_augmentations
from occgen_hub.training.reader import RandomReader
from occgen_hub.training.selection import FrameIndex, Selection, frame_index
from occgen_hub.training.source import fetched_source, place


class OccupancyDataset(Dataset[dict[str, Any]]):
    """The frames of a built dataset, sorted by trajectory and time.

    An item needs one row group of occupancy and one image. Opening the dataset reads only the
    index. If the dataset is only partly in the folder, it has the episodes that are there. Worker
    processes of a DataLoader, forked or spawned, open the files themselves.

    Args:
        source: the dataset's folder, or its name on the Hub, "org/name". The files that `keys` need
            are then downloaded to the Hub's cache.
        history_len: number of past frames in "history".
        history_step: step between past frames, in frames.
        align_history: whether past cells are moved into the grid of the current camera. Occupied
            cells are moved by their centres; cells of the mask get the value at their centre. Cells
            outside of the grid are left out.
        dense: whether cells are whole grids; see below.
        target: the content of "occupancy", "mask" and "labels". "visible": what the frame saw.
            "scene": also hidden cells. Cells that the frame did not observe have the state of the
            scene's cell at their centre: occupied, free if some frame of the episode observed it
            as free, else unknown. The history has only what past frames saw.
        upright: whether grids are upright and follow only the camera's rotation about the world's
            vertical; "grid_pose" is their pose. Observed cells are moved into them as with
            `align_history`. The world's z axis must point up.
        keys: the keys of an item; by default all except labels, visible, dynamic, grid_pose and
            depth.
        revision: of the dataset on the Hub.
        episodes, scenes: names of the episodes or scenes to use, "<group>/<scene>/<trajectory>" and
            "<group>/<scene>"; None for all.
        split: "train" or "validation", fixed for each scene by a hash of its name; None for both.
        min_quality: minimum share of an episode's measured points that no other frame saw through,
            0 to 1. Episodes without that figure are left out then.
        image_size: (width, height) to which images and depth are resized. The intrinsics are those
            of the resized image.
        voxel_stride: 1, 2 or 4: cells are that many times as wide. They are occupied if any of
            their cells is, observed if any is, and have the most common class of their occupied
            cells, in a tie the smallest id. The last cells may extend beyond the grid.
        history_keys: the keys of past frames: some of occupancy, mask, labels, dynamic, intrinsics,
            image and depth.
        augment: `Mirror`, `RotateYaw`, `ColorJitter` or similar classes, applied in this order.
            They use torch's random generator.
        transform: called with each item; its result becomes the item.

    An item is a dict with the requested `keys`:

    - "occupancy": occupied and visible cells of the grid in the camera's frame (OpenCV axes).
      dense: (nx, ny, nz) bool; else (n, 3) int32, cells (i, j, k), ascending
    - "dynamic": the cells of "occupancy" with moving objects, in the same format. Empty for shards
      of earlier versions
    - "mask": observed cells, free or occupied. dense: (nx, ny, nz) bool; else
      (ceil(nx * ny * nz / 8),) uint8, packed by `np.packbits`
    - "visible": the cells that the frame itself observed, in the format of "mask", from which it
      differs with target="scene"
    - "labels": (nx, ny, nz) uint8: 0 free, 1 occupied, 255 unknown, that is, not observed. In a
      dataset with labels, an occupied cell has its class instead, an id of `taxonomy`, or 254
      without a class
    - "pose": (4, 4) float32, world_from_camera, OpenCV axes, metres
    - "grid_pose": (4, 4) float32, world_from_grid, metres: "pose", unless `upright`. The grid's
      axes are then x right, y down along gravity, z ahead; the origin is the camera
    - "intrinsics": (3, 3) float32, pixels of the image
    - "image": (3, H, W) uint8 RGB, from the shards if they have images, else from the trajectory's
      images or its video
    - "depth": (H, W) float32, metres along the optical axis, 0 for none
    - "history": occupancy of `history_len` past frames; frame h is `(h + 1) * history_step` frames
      before the current one. dense: (history_len, nx, ny, nz) bool; else (n, 4) int32, rows
      (h, i, j, k). Frames before the start of the episode are empty
    - "history_mask", "history_image" and so on, with "history", for the other `history_keys`:
      (history_len, ...), in the format of the current frame; 0 for missing frames, 255 for labels.
      Sparse "history_dynamic" has the format of sparse "history"
    - "history_valid", with "history": (history_len,) bool, whether the frame exists
    - "history_pose", with "history": (history_len, 4, 4) float32, current_from_past, metres, the
      identity for missing frames
    - "task": the instruction, in words
    - "episode": "<group>/<scene>/<trajectory>"; "frame_index": its number in the episode

    The default collate_fn of a DataLoader stacks dense items; sparse ones need `collate`. If
    recorded sizes of images differ, batches need an `image_size`.

    Attributes: root, the folder; grid, of the items' cells; episodes, their ids in order; starts,
    (episodes + 1,) int64, the number of each episode's first item; taxonomy, the name of the
    labels' taxonomy in `occgen_hub.taxonomy`, None without labels.

    Raises UsageError if there is no such dataset, or if it lacks shards or requested images, and
    DatasetError for a damaged file, also when an item is read.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        history_len: int = 10,
        history_step: int = 2,
        align_history: bool = False,
        dense: bool = True,
        target: str = "visible",
        upright: bool = False,
        keys: Sequence[str] = DEFAULT_KEYS,
        revision: str | None = None,
        episodes: Collection[str] | None = None,
        scenes: Collection[str] | None = None,
        split: str | None = None,
        min_quality: float | None = None,
        image_size: tuple[int, int] | None = None,
        voxel_stride: int = 1,
        history_keys: Sequence[str] = ("occupancy",),
        augment: Sequence[Augmentation] = (),
        transform: Transform | None = None,
    ) -> None:
        self._format = ItemFormat(
            keys=keys,  # type: ignore[arg-type]  # made a tuple once it is checked
            dense=dense,
            target=target,
            upright=upright,
            voxel_stride=voxel_stride,
            image_size=image_size,
            history_len=history_len,
            history_step=history_step,
            align_history=align_history,
            history_keys=history_keys,  # type: ignore[arg-type]
            augment=augment,  # type: ignore[arg-type]
            transform=transform,
        )
        self.keys, self.dense = self._format.keys, dense
        selection = Selection(episodes, scenes, split, min_quality)
        needed = (*self._format.media, *(["states"] if self._format.of_scene else []))
        found = fetched_source(source, needed, revision)
        self.root = found.root
        self._index = frame_index(found, selection, self._format.media)
        self.grid = self._format.grid(self._index.grid)
        self.episodes, self.starts = self._index.episodes, self._index.starts
        self.taxonomy = self._index.taxonomy
        self._held: tuple[int, RandomReader] | None = None
        check_media(self._index, self._format)
        check_states(self._index, self._format)
        check_augmentations(self._format.augment, self.grid)

    def __len__(self) -> int:
        """The number of frames."""
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> Any:
        """One frame, see the class. Raises IndexError if it does not exist."""
        number = operator.index(number)  # TypeError for a slice: see torch.utils.data.Subset
        if not -len(self) <= number < len(self):
            raise IndexError(f"frame {number} of a dataset of {len(self)}")
        rng = None
        if self._format.augment:
            rng = np.random.default_rng(int(torch.randint(1 << 62, ())))
        return self._format.item(self._reader, number % len(self), rng)

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files, which belong to this process."""
        return {**self.__dict__, "_held": None}

    @property
    def _reader(self) -> RandomReader:
        """The open files of this process. A forked process does not share those of its parent."""
        if self._held is None or self._held[0] != os.getpid():
            self._held = os.getpid(), RandomReader(self._index)
        return self._held[1]


def check_states(index: FrameIndex, form: ItemFormat) -> None:
    """Raise UsageError if states of scenes are needed but missing. Checks the first scene."""
    source = index.source
    name = states_file(index.episodes[0].rpartition("/")[0])
    if form.of_scene and source.address is None and not (source.root / name).is_file():
        raise UsageError(
            f"{source.root}: has no {name}, which target='scene' needs; download it or, where it "
            "was built, run occgen-hub build into it again."
        )


def check_media(index: FrameIndex, form: ItemFormat) -> None:
    """Raise UsageError if requested media are missing. Checks the first frame."""
    asked = [key for key in form.media if key not in index.in_shards]
    root = index.source.root
    if asked and index.source.address is not None:
        raise UsageError(
            f"{index.source.address}: has no {asked[0]} in its shards; build it with "
            f"--parquet-images, or leave {', '.join(asked)} out of keys."
        )
    if asked and (root / EXPORT).exists():
        raise UsageError(
            f"{root}: is an export; use LeRobotOccupancyDataset, which reads its images, depth "
            f"and tasks, or leave {', '.join(asked)} out of keys."
        )
    for key, files in {"image": ("rgb", "video"), "depth": ("depth",)}.items():
        places = [place(root, index.episodes[0], file, 0) for file in files]
        if key in asked and not any(path.is_file() for path in places):
            raise UsageError(
                f"{root}: has no {key} of {index.episodes[0]}; build it with --media copy "
                f"from a source that has them, or leave {key!r} out of keys."
            )
