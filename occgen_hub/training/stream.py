"""A built dataset for PyTorch as a stream: all frames, shuffled, read row group by row group."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from occgen_hub.errors import UsageError
from occgen_hub.occupancy.states import SceneStates
from occgen_hub.prefetch import prefetch
from occgen_hub.training.augment import Augmentation
from occgen_hub.training.dataset import check_media, check_states
from occgen_hub.training.items import DEFAULT_KEYS, ItemFormat, Transform, check_augmentations
from occgen_hub.training.reader import MAX_FILES, MAX_SCENES, UnitReader
from occgen_hub.training.selection import MEDIA, FrameIndex, Selection, frame_index
from occgen_hub.training.shard_file import open_shard, states_of
from occgen_hub.training.source import streamed_source


class OccupancyStream(IterableDataset[dict[str, Any]]):
    """The frames of a built dataset, each once per epoch, in a shuffled order.

    Row groups, each with a few frames of one episode, are read in a random order into a buffer of
    `shuffle_buffer` frames, from which the next frame is chosen at random. The row groups are
    divided among ranks and worker processes of a DataLoader: each is read exactly once. A thread
    prefetches. From the Hub, a row group is one request, with retries.

    Args:
        source: the dataset's folder, "org/name" on the Hub or "hf://datasets/org/name[@revision]".
            From the Hub only the index is downloaded, and images, depth and tasks must be in the
            shards (`occgen-hub build --parquet-images`).
        shuffle: whether the order is random; else it is that of OccupancyDataset.
        seed: the same seed and epoch give the same order. See `set_epoch`.
        shuffle_buffer: number of frames from which the next one is chosen, in each worker. A frame
            takes 1 MB with the default grid.
        prefetch: number of row groups that are prefetched in each worker.
        rank, world_size: of this process; by default those of torch.distributed if it is
            initialized, else of the variables RANK and WORLD_SIZE, else 0 of 1. The frames are
            already divided among ranks, so do not pass the DataLoader to accelerate's `prepare`.
        even: whether each worker of each rank gives as many frames as the one with the fewest, so
            that all ranks have the same number of batches. Up to a row group per worker is left out
            then, a different one in each epoch.

    The other arguments, and the items, are those of `OccupancyDataset`. For a history, a few row
    groups before those of the frames are read as well.

    The order depends on the number of ranks and of workers. `state_dict` and `load_state_dict` save
    and restore the position exactly; torchdata's StatefulDataLoader calls them in its workers.

    Attributes: root, the folder with the index; grid, of the items' cells; episodes, their ids;
    num_frames, of all ranks and workers together; epoch; taxonomy, as in OccupancyDataset.

    Raises the errors of OccupancyDataset.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        shuffle: bool = True,
        seed: int = 0,
        shuffle_buffer: int = 256,
        prefetch: int = 2,
        rank: int | None = None,
        world_size: int | None = None,
        even: bool = False,
        target: str = "visible",
        upright: bool = False,
        history_len: int = 10,
        history_step: int = 2,
        align_history: bool = False,
        dense: bool = True,
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
        if (rank is None) != (world_size is None):
            raise UsageError("rank and world_size: give both or neither.")
        if rank is not None and world_size is not None and not 0 <= rank < world_size:
            raise UsageError(f"rank is {rank} of {world_size}; give 0 to world_size - 1.")
        if shuffle_buffer < 1 or prefetch < 1:
            raise UsageError("shuffle_buffer and prefetch must be 1 or more.")
        self._place = None if rank is None or world_size is None else (rank, world_size)
        self._shuffle, self._seed, self._even = shuffle, seed, even
        self._buffer, self._prefetch = shuffle_buffer, prefetch
        selection = Selection(episodes, scenes, split, min_quality)
        found = streamed_source(source, revision)
        self.root = found.root
        self._index = frame_index(found, selection, self._format.media)
        check_media(self._index, self._format)
        check_states(self._index, self._format)
        self.grid = self._format.grid(self._index.grid)
        self.episodes, self.taxonomy = self._index.episodes, self._index.taxonomy
        self.num_frames = int(self._index.starts[-1])
        check_augmentations(self._format.augment, self.grid)
        self._units = _units(self._index, self._format.past)
        # In shared memory, so that persistent workers see changes.
        self._epoch: torch.Tensor = torch.zeros(1, dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._start = self._given = 0

    @property
    def epoch(self) -> int:
        """The number of the epoch, from 0. The order depends on it."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, also in running workers."""
        self._epoch[0] = epoch

    def state_dict(self) -> dict[str, Any]:
        """The position of the latest iteration in this process, as plain numbers."""
        return {
            "epoch": self.epoch,
            "given": self._given,
            "seed": self._seed,
            "frames": self.num_frames,
            "consumer": list(self._consumer()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume the next iteration from a state of the same rank and worker.

        Raises UsageError if the frames, the seed, the rank or the worker differ.
        """
        here = {
            "seed": self._seed,
            "frames": self.num_frames,
            "consumer": list(self._consumer()),
        }
        for name, value in here.items():
            if state[name] != value:
                raise UsageError(
                    f"load_state_dict: {name} is {value} here and {state[name]} in the state; use "
                    "the same dataset, seed, ranks and workers."
                )
        self.set_epoch(state["epoch"])
        self._start = self._given = state["given"]

    def __iter__(self) -> Iterator[Any]:
        """The frames of this rank and worker, from the start or from a loaded state."""
        start, self._start = self._start, 0
        self._given = start
        return self._items(start, self.epoch)

    def _items(self, start: int, epoch: int) -> Iterator[Any]:
        index, number, count = self._index, *self._consumer()
        shares = _shares(self._units, count, [self._seed, epoch] if self._shuffle else None)
        units = self._units[shares[number]]
        frames = int((units[:, 1] - units[:, 0]).sum())
        if self._even:
            sizes = self._units[:, 1] - self._units[:, 0]
            frames = min(int(sizes[share].sum()) for share in shares)
        rng = np.random.default_rng([self._seed, epoch, number]) if self._shuffle else None
        order = FrameOrder(units, self._buffer, rng)
        for _ in range(min(start, frames)):
            order.draw()
        open_file = lru_cache(MAX_FILES)(
            lambda shard: open_shard(index.source, index.shards[shard])
        )

        scene_states = lru_cache(MAX_SCENES)(
            lambda episode: states_of(index.source, index.episodes[episode])
        )

        def load(unit: int) -> tuple[int, UnitReader]:
            return unit, self._loaded(units[unit], open_file, scene_states)

        readers: dict[int, UnitReader] = {}
        # Closed at the end, so that no thread remains if the loop is left early.
        with closing(prefetch(load, order.to_open(), threads=1, ready=self._prefetch)) as loaded:
            for _ in range(start, frames):
                unit, frame, is_last = order.draw()
                while unit not in readers:
                    opened, reader = next(loaded)
                    readers[opened] = reader
                item_rng = None
                if self._format.augment:
                    item_rng = np.random.default_rng([self._seed, epoch, frame])
                item = self._format.item(readers[unit], frame, item_rng)
                if is_last:
                    del readers[unit]
                self._given += 1
                yield item

    def _loaded(
        self,
        unit: NDArray[np.int64],
        open_file: Callable[[int], pq.ParquetFile],
        scene_states: Callable[[int], SceneStates],
    ) -> UnitReader:
        """The row groups of a unit and, for histories, those before it in the episode."""
        index, form = self._index, self._format
        first, stop = unit.tolist()
        episode, _ = index.located(first)
        earliest = max(int(index.starts[episode]), first - form.past)
        names = [n for n in form.columns if n not in MEDIA or n in index.in_shards]
        reader = UnitReader(index, scene_states(episode) if form.of_scene else None)
        for group in range(index.group_of(earliest), index.group_of(stop - 1) + 1):
            reader.load(open_file(int(index.groups[group, 0])), group, names)
        return reader

    def _consumer(self) -> tuple[int, int]:
        """The number of this worker among the workers of all ranks, and their total number."""
        rank, world_size = self._place or _distributed()
        worker = get_worker_info()
        if worker is None:
            return rank, world_size
        return rank * worker.num_workers + worker.id, world_size * worker.num_workers


def _distributed() -> tuple[int, int]:
    """The rank of this process, and the number of ranks."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


# Distribution and order of the frames


def _units(index: FrameIndex, past: int) -> NDArray[np.int64]:
    """(units, 2) the first and last + 1 frames of units, which are row groups read together.

    With histories of `past` frames, a unit has several row groups of an episode, so that few frames
    are read only for a history.
    """
    bounds = [0]
    ends = {*index.starts.tolist()}
    for stop in index.group_starts[1:].tolist():
        if stop in ends or stop - bounds[-1] >= 2 * past:
            bounds.append(stop)
    return np.stack([bounds[:-1], bounds[1:]], axis=1).astype(np.int64)


def _shares(
    units: NDArray[np.int64], count: int, seed: list[int] | None
) -> list[NDArray[np.int64]]:
    """The numbers of the units of each of `count` workers, in the order of reading.

    With a seed they are shuffled. Each unit is assigned to the worker with the fewest frames, so
    workers differ by at most one unit.
    """
    sizes = units[:, 1] - units[:, 0]
    if seed is None:
        middles = np.cumsum(sizes) - sizes / 2
        owners = (middles * count / max(int(sizes.sum()), 1)).astype(np.int64)
        return [np.flatnonzero(owners == n) for n in range(count)]
    order = np.random.default_rng(seed).permutation(len(units))
    shares: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, n) for n in range(count)]
    for unit in order.tolist():
        frames, n = heap[0]
        shares[n].append(unit)
        heapq.heapreplace(heap, (frames + int(sizes[unit]), n))
    return [np.array(share, np.int64) for share in shares]


class FrameOrder:
    """Draws the frames of units in a random order, from a buffer of open units.

    units: (n, 2) first and last + 1 frames; buffer: minimum number of open frames, if there are so
    many; rng: None for no shuffling. It computes the order without reading anything.
    """

    def __init__(
        self, units: NDArray[np.int64], buffer: int, rng: np.random.Generator | None
    ) -> None:
        self._units, self._buffer, self._rng = units, buffer if rng is not None else 1, rng
        self._open: list[_OpenUnit] = []
        self._frames = self._next = 0
        self._fill()

    def to_open(self) -> list[int]:
        """The units with remaining frames, in the order in which they are opened."""
        opened = sorted(unit.number for unit in self._open)
        return [*opened, *range(self._next, len(self._units))]

    def draw(self) -> tuple[int, int, bool]:
        """The unit and the number of the next frame, and whether it is the unit's last."""
        place = 0
        if self._rng is not None:
            place = int(self._rng.random() * len(self._open))
        unit = self._open[place]
        frame = unit.frames.pop()
        self._frames -= 1
        if not unit.frames:
            self._open[place] = self._open[-1]
            self._open.pop()
        self._fill()
        return unit.number, frame, not unit.frames

    def _fill(self) -> None:
        while self._next < len(self._units) and self._frames < self._buffer:
            first, stop = self._units[self._next].tolist()
            frames = np.arange(first, stop)[::-1]
            if self._rng is not None:
                frames = self._rng.permutation(frames)
            self._open.append(_OpenUnit(self._next, frames.tolist()))
            self._frames += stop - first
            self._next += 1


@dataclass
class _OpenUnit:
    """A unit and its remaining frames."""

    number: int
    frames: list[int]
