"""A built dataset for PyTorch: any frame by its number, decoded alone."""

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
    """The frames of a built dataset, in the order of its trajectories' names and of time.

    For an item, one row group of occupancy is read and decoded, and one image. Opening reads the
    index alone. Of a dataset that is only partly in the folder, there are the episodes that are.
    Processes of a DataLoader, forked or spawned, open the files each for itself.

    Args:
        source: the dataset's folder, or its name on the Hub, "org/name", of which what `keys` need
            is fetched into the Hub's cache.
        history_len: how many past frames "history" has.
        history_step: frames between them.
        align_history: whether past cells are moved into the grid of the current camera, those that
            leave it left out: occupied ones by their centres; of the mask, each cell is looked up
            where its centre was.
        dense: whether cells come as whole grids; see below.
        target: what "occupancy", "mask" and "labels" have of a frame. "visible": what it saw.
            "scene": what is there, hidden cells included: where the frame saw nothing, cells have
            the state of the scene's cell that their centre lies in, occupied, free if some frame
            of the episode observed it free, else unknown. The history is what past frames saw.
        upright: whether grids stand upright, turned with the camera about the world's vertical
            alone; "grid_pose" says where. What a frame saw is moved into them as `align_history`
            moves what past frames saw. The world's z axis must point up.
        keys: what an item holds; all but labels, visible, dynamic, grid_pose and
            depth by default.
        revision: of the dataset on the Hub.
        episodes, scenes: names of those to have, "<group>/<scene>/<trajectory>" and
            "<group>/<scene>"; None for all.
        split: "train" or "validation", fixed for each scene by a hash of its name; None for both.
        min_quality: the least share of an episode's measured points that no other frame saw
            through, 0 to 1. Episodes without that figure are left out then.
        image_size: (width, height) that images and depth are resized to. The intrinsics are those
            of the resized image.
        voxel_stride: 1, 2 or 4: cells that many times as wide, occupied if any of their cells is,
            observed if any is, with the commonest class of its occupied cells, of equally common
            ones the smallest. Where it does not divide the grid, the last cells reach beyond it.
        history_keys: what an item holds of past frames: some of occupancy, mask, labels, dynamic,
            intrinsics, image and depth.
        augment: `Mirror`, `RotateYaw` and `ColorJitter`, done in this order, or others like them;
            they draw from torch's random generator.
        transform: called with each item; what it returns is the item.

    An item is a dict of those of `keys` that were asked for:

    - "occupancy": occupied and visible cells of the grid in the camera's frame (OpenCV axes).
      dense: (nx, ny, nz) bool; else (n, 3) int32, cells (i, j, k), ascending
    - "dynamic": those cells of "occupancy" that hold something that moves, in the same forms. None
      in shards of earlier versions, which did not tell
    - "mask": observed cells, free and occupied alike. dense: (nx, ny, nz) bool; else
      (ceil(nx * ny * nz / 8),) uint8, as `np.packbits` has them
    - "visible": the cells that the frame itself observed, in the forms of "mask", from which it
      differs with target="scene"
    - "labels": (nx, ny, nz) uint8: 0 free, 1 occupied, 255 unknown, which is not observed. In a
      dataset with labels, an occupied cell has its class instead, an id of `taxonomy`, or 254 where
      no frame says what it is
    - "pose": (4, 4) float32, world_from_camera, OpenCV axes, metres
    - "grid_pose": (4, 4) float32, world_from_grid, metres: "pose", unless `upright`. The grid's
      axes are then x right, y down along gravity, z ahead; its origin is the camera
    - "intrinsics": (3, 3) float32, pixels of the image
    - "image": (3, H, W) uint8 RGB, from the shards if they have images, else from the trajectory's
      images or its video
    - "depth": (H, W) float32, metres along the optical axis, 0 for none
    - "history": occupancy of `history_len` past frames, number h being the one at
      `(h + 1) * history_step` frames before. dense: (history_len, nx, ny, nz) bool; else (n, 4)
      int32, rows (h, i, j, k). A frame from before the episode's beginning is empty
    - "history_mask", "history_image" and so on, with "history", for the other `history_keys`:
      (history_len, ...), as of the current frame; 0 where there is no such frame, labels 255.
      Sparse "history_dynamic" is as sparse "history"
    - "history_valid", with "history": (history_len,) bool, whether there is such a frame
    - "history_pose", with "history": (history_len, 4, 4) float32, current_from_past, metres, the
      identity where there is no such frame
    - "task": the instruction, in words
    - "episode": "<group>/<scene>/<trajectory>"; "frame_index": its number in the episode

    The default collate_fn of a DataLoader stacks dense items; sparse ones need `collate`. Images of
    different recorded sizes need an `image_size` to be in one batch.

    Attributes: root, the folder; grid, of the items' cells; episodes, their ids in order; starts,
    (episodes + 1,) int64, the number of each one's first item; taxonomy, the name of that of the
    labels in `occgen_hub.taxonomy`, None where no episode has labels.

    Raises UsageError when there is no such dataset, when it has no shards, or no images and they
    are asked for; DatasetError when a file of it is damaged, here or when an item is asked for.
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
        """How many frames there are."""
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> Any:
        """One frame, as the class says; raises IndexError where there is none."""
        number = operator.index(number)  # TypeError for a slice: see torch.utils.data.Subset
        if not -len(self) <= number < len(self):
            raise IndexError(f"frame {number} of a dataset of {len(self)}")
        rng = None
        if self._format.augment:
            rng = np.random.default_rng(int(torch.randint(1 << 62, ())))
        return self._format.item(self._reader, number % len(self), rng)

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, which are of this process."""
        return {**self.__dict__, "_held": None}

    @property
    def _reader(self) -> RandomReader:
        """What this process has open: one that was forked shares nothing with its parent."""
        if self._held is None or self._held[0] != os.getpid():
            self._held = os.getpid(), RandomReader(self._index)
        return self._held[1]


def check_states(index: FrameIndex, form: ItemFormat) -> None:
    """Raise UsageError where the states of scenes are asked for and not there, by the first."""
    source = index.source
    name = states_file(index.episodes[0].rpartition("/")[0])
    if form.of_scene and source.address is None and not (source.root / name).is_file():
        raise UsageError(
            f"{source.root}: has no {name}, which target='scene' needs; fetch it or, where it was "
            "built, run occgen-hub build into it again."
        )


def check_media(index: FrameIndex, form: ItemFormat) -> None:
    """Raise UsageError where media that are asked for are not there, by the first frame."""
    asked = [key for key in form.media if key not in index.in_shards]
    root = index.source.root
    if asked and index.source.address is not None:
        raise UsageError(
            f"{index.source.address}: has no {asked[0]} in its shards; build it with "
            f"--parquet-images, or leave {', '.join(asked)} out of keys."
        )
    if asked and (root / EXPORT).exists():
        raise UsageError(
            f"{root}: is an export, of which LeRobotOccupancyDataset reads images, depth "
            f"and tasks; take that one, or leave {', '.join(asked)} out of keys."
        )
    for key, files in {"image": ("rgb", "video"), "depth": ("depth",)}.items():
        places = [place(root, index.episodes[0], file, 0) for file in files]
        if key in asked and not any(path.is_file() for path in places):
            raise UsageError(
                f"{root}: has no {key} of {index.episodes[0]}; build it with --media copy "
                f"from a source that has them, or leave {key!r} out of keys."
            )
