"""A LeRobot dataset with the occupancy in its items. Needs lerobot and torch."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import httpx
from lerobot.datasets.feature_utils import check_delta_timestamps, get_delta_indices
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.hub_token import check_sendable
from occgen_hub.index import INDEX, parts
from occgen_hub.lerobot.export_check import AGAIN, exported, lengths
from occgen_hub.loading import SCHEMA
from occgen_hub.schema import load_schema
from occgen_hub.shards import FOLDER, shards
from occgen_hub.training import OccupancyDataset

NAMES = {
    load_schema(SCHEMA).folder(file): key
    for file, key in (
        *(("visible", "occupancy"), ("observed", "mask"), ("dynamic", "dynamic")),
        ("labels", "labels"),
    )
}
"""The occupancy features that an item may have, and their keys in an OccupancyDataset."""

DEFAULT_NAMES = tuple(name for name, key in NAMES.items() if key in ("occupancy", "mask"))


class LeRobotOccupancyDataset(LeRobotDataset):  # type: ignore[misc]  # lerobot comes without types
    """A LeRobotDataset of an export, with the occupancy of each frame in its items.

    repo_id, root and the keyword arguments not listed here are passed to LeRobotDataset. Depth,
    "observation.images.depth", is in millimetres by LeRobot's default, and in metres with
    `depth_output_unit="m"`. An item also has the features that `occupancy` names, by default the
    first two of:

    - "observation.occ.view": occupied and visible cells of the grid in the camera's frame (OpenCV
      axes). dense: (nx, ny, nz) bool; else (n, 3) int32, cells (i, j, k), ascending
    - "observation.occ.mask": observed cells, free or occupied. dense: (nx, ny, nz) bool;
      else (ceil(nx * ny * nz / 8),) uint8, packed by `np.packbits`
    - "observation.occ.dynamic": the cells of "observation.occ.view" with moving objects, in the
      same format
    - "observation.occ.labels": (nx, ny, nz) uint8, as "labels" of OccupancyDataset

    `delta_timestamps` may name them too. They are then stacked: (deltas, nx, ny, nz), or, if
    sparse, (n, 4) int32 with rows (d, i, j, k) of delta d. Each frame is in the grid of its own
    camera. As in LeRobot, frames beyond an end of the episode repeat the frame at that end, and
    "observation.occ.view_is_pad" and so on mark them.

    Additional attributes: occupancy, the OccupancyDataset of the same frames.

    Raises UsageError if the dataset has no occupancy, DatasetError if the occupancy belongs to
    other frames, and the errors of LeRobotDataset.
    """

    def __init__(
        self,
        repo_id: str,
        root: str | Path | None = None,
        *,
        occupancy: Sequence[str] = DEFAULT_NAMES,
        dense: bool = True,
        delta_timestamps: dict[str, list[float]] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(occupancy, str) or (unknown := sorted({*occupancy} - {*NAMES})):
            wrong = occupancy if isinstance(occupancy, str) else ", ".join(unknown)
            raise UsageError(f"occupancy: got {wrong}; give a list with any of {', '.join(NAMES)}.")
        deltas = dict(delta_timestamps or {})
        own = {name: deltas.pop(name) for name in NAMES if name in deltas}
        if stray := sorted(own.keys() - {*occupancy}):
            raise UsageError(f"delta_timestamps: {stray[0]} is not listed in occupancy; add it.")
        if options.get("video_backend") is None:
            options["video_backend"] = _video_backend()
        check_sendable(options.get("token"))
        super().__init__(repo_id, root, delta_timestamps=deltas or None, **options)
        check_delta_timestamps(own, self.meta.fps, self.tolerance_s)
        self._deltas: dict[str, list[int]] = get_delta_indices(own, self.meta.fps)
        self._names = tuple(occupancy)
        self._fetch_occupancy(root, options.get("token"))
        keys = [NAMES[name] for name in self._names]
        self.occupancy = OccupancyDataset(self.root, keys=keys, dense=dense)
        self._ranges = self._frame_ranges()

    def __getitem__(self, number: int | slice) -> Any:
        """One frame, see the class. A slice gives a list of frames, as in LeRobot."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        item: dict[str, Any] = super().__getitem__(operator.index(number))
        first, end = self._ranges[int(item["episode_index"])]
        index = first + int(item["frame_index"])
        now = self.occupancy[index]
        for name in self._names:
            if name not in self._deltas:
                item[name] = now[NAMES[name]]
                continue
            frames = [index + delta for delta in self._deltas[name]]
            there = [self.occupancy[min(max(n, first), end - 1)][NAMES[name]] for n in frames]
            item[name] = self._stacked(NAMES[name], there)
            item[f"{name}_is_pad"] = torch.tensor([not first <= n < end for n in frames])
        return item

    def _frame_ranges(self) -> list[tuple[int, int]]:
        """The (start, end) of each episode's frames in the occupancy.

        Raises DatasetError if frames are missing there.
        """
        root, starts = Path(self.root), self.occupancy.starts.tolist()
        frames = [int(length) for length in self.meta.episodes["length"]]
        names = self.occupancy.episodes
        order = list(lengths(root)) if exported(root) else list(names)
        places = dict(zip(names, pairwise(starts), strict=True))
        found = [places[name] for name in order if name in places]
        if [end - first for first, end in found] != frames or len(names) != len(frames):
            raise DatasetError(root / FOLDER, "is not the occupancy of these episodes", AGAIN)
        return found

    def _stacked(self, key: str, frames: list[torch.Tensor]) -> torch.Tensor:
        if key not in ("mask", "labels") and not self.occupancy.dense:
            pad = torch.nn.functional.pad
            return torch.cat([pad(rows, (1, 0), value=d) for d, rows in enumerate(frames)])
        return torch.stack(frames)

    def _fetch_occupancy(self, root: str | Path | None, token: Any) -> None:
        """Download the occupancy shards if LeRobot, which may skip them, has not."""
        if shards(Path(self.root)) and parts(Path(self.root)):
            return
        place = {"cache_dir": HF_LEROBOT_HUB_CACHE} if root is None else {"local_dir": root}
        try:
            snapshot_download(
                self.repo_id,
                repo_type="dataset",
                revision=self.revision,
                allow_patterns=[f"{FOLDER}/*.parquet", f"{INDEX}/*.parquet"],
                token=token,
                **place,
            )
        except (httpx.HTTPError, OSError, HFValidationError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UsageError(
                f"{self.root}: has no {FOLDER}/*.parquet, and they cannot be downloaded from the "
                f"Hub ({reason.rstrip('.')}); give a folder written by occgen-hub export."
            ) from error


def _video_backend() -> str:
    """LeRobot's own choice of backend, without its pages of warnings if FFmpeg is missing."""
    try:
        import torchcodec  # noqa: F401  # Only tests that it loads.
    except (ImportError, OSError, RuntimeError):
        return "pyav"
    return "torchcodec"
