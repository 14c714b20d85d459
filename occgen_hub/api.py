"""Functions for programs: `build`, `finalize`, `push` and `load_episode`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.config import Config
from occgen_hub.engines import AUTO
from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.job import License, open_job
from occgen_hub.lerobot.writer import Media
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.publishing import EVERY, HubPublisher, Keep, Layout
from occgen_hub.runtime.build import build_dataset, build_shard
from occgen_hub.runtime.finalize import finalize as finalize_dataset
from occgen_hub.runtime.results import Summary
from occgen_hub.runtime.shard import Shard
from occgen_hub.scratch import DEFAULT_LIMIT


def build(
    source: str,
    root: str | Path,
    out: str | Path,
    *,
    cameras: Sequence[CameraMapping] = (),
    engine: str = AUTO,
    weights: str | Path | None = None,
    device: str | None = None,
    config: Config | None = None,
    media: Media | None = None,
    workers: int = 1,
    limit: int | None = None,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    parquet_occupancy: bool = True,
    license: License = "any",
    parquet_images: bool = False,
    scenes: Sequence[str] = (),
    scratch: str | Path | None = None,
    scratch_limit: int = DEFAULT_LIMIT,
    push_to: str | None = None,
    keep: Keep = "all",
    layout: Layout = "trajectories",
    push_every: float = EVERY,
    segmenter: str | None = None,
    segmenter_weights: str | Path | None = None,
) -> Summary:
    """Build an occupancy dataset from a source, as `occgen-hub build` does.

    source: its kind, such as "internnav", "lerobot", "capture" or "video"; root: a path, or an
    address `hf://datasets/ORG/NAME[@REVISION][/FOLDER]` of the Hub; out: the dataset's folder;
    cameras: settings of cameras that the files do not state; media: what to do with images, by
    default "copy", or "none" for LeRobot datasets; config: the settings, with lengths in metres;
    workers: number of processes; limit: maximum number of episodes, or of fetched scenes; scenes:
    patterns of scenes to build; scratch: folder for fetched scenes, with at most `scratch_limit`
    bytes; shard: (i, n) to build share i of n of the episodes, numbered from 0, for `finalize`;
    push_to: "org/name" on the Hub, to push scenes during the build. The other arguments are like
    the command's options. Up-to-date episodes are skipped.

    Raises UsageError for an invalid argument; then nothing was done. A failed episode does not stop
    the others, and is listed with its reason in the summary's `failures`. With several workers the
    calling script needs `if __name__ == "__main__":`, since processes are spawned.
    """
    if config is not None and not isinstance(config, Config):
        raise UsageError(f"config is a {type(config).__name__}; give an occgen_hub.Config.")
    if media is not None and media not in get_args(Media):
        raise UsageError(f"media is {media!r}; give one of {', '.join(get_args(Media))}.")
    if license not in get_args(License):
        raise UsageError(f"license is {license!r}; give one of {', '.join(get_args(License))}.")
    if workers < 1 or (limit is not None and limit < 1):
        raise UsageError("workers and limit must be 1 or more.")
    publisher = None
    if push_to is not None:
        publisher = HubPublisher(push_to, keep=keep, layout=layout, every=push_every)
    job = open_job(
        source,
        root,
        Path(out),
        cameras=cameras,
        engine=engine,
        weights=None if weights is None else Path(weights),
        device=device,
        config=config,
        media=media,
        limit=limit,
        overwrite=overwrite,
        parquet_occupancy=parquet_occupancy,
        license=license,
        parquet_images=parquet_images or layout == "packed",
        scenes=(scenes,) if isinstance(scenes, str) else tuple(scenes),
        scratch=None if scratch is None else Path(scratch),
        scratch_limit=scratch_limit,
        whole_scenes=push_to is not None,
        segmenter=segmenter,
        segmenter_weights=None if segmenter_weights is None else Path(segmenter_weights),
    )
    if shard is not None:
        own = Shard.parse(f"{shard[0]}/{shard[1]}")
        return build_shard(job, own, workers, publisher=publisher)
    return build_dataset(job, workers, publisher=publisher)


def finalize(out: str | Path) -> Summary:
    """Write the files of the whole dataset after its shards are built, as `occgen-hub finalize`.

    Raises UsageError if there is no build or one is running, and OccGenError if a file cannot be
    read or written.
    """
    return finalize_dataset(Path(out))


def push(
    root: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push a built dataset to the Hub, as `occgen-hub push` does. Returns its address there.

    It is validated first, and its card is updated. Raises UsageError for invalid names, and
    OccGenError if the dataset is not valid or the push fails. Calling it again resumes the push.
    """
    from occgen_hub import hub

    hub.check_target(repo_id, revision, create_pr)
    hub.check_token(repo_id)
    hub.prepare(Path(root))
    return hub.push(Path(root), repo_id, private=private, revision=revision, create_pr=create_pr)


@dataclass(frozen=True)
class Frame:
    """The occupancy of one frame, in the grid of its camera (OpenCV axes).

    columns: (n,) flat numbers `i * (ny * nz) + j * nz + k` of the occupied and visible cells,
    ascending; packed: (ceil(cells / 8),) uint8, `np.packbits` of the observed ones;
    dynamic_columns: (m,) the `columns` with moving objects; classes: (n,) uint8 of
    `columns`, ids of `Trajectory.taxonomy`, None without labels.
    """

    grid: Grid
    columns: NDArray[np.integer]
    packed: NDArray[np.uint8]
    dynamic_columns: NDArray[np.integer]
    classes: NDArray[np.uint8] | None = None

    @property
    def occupancy(self) -> NDArray[np.bool_]:
        """(nx, ny, nz) bool: occupied and visible."""
        return self._dense(self.columns)

    @property
    def dynamic(self) -> NDArray[np.bool_]:
        """(nx, ny, nz) bool: occupied, visible, and with moving objects."""
        return self._dense(self.dynamic_columns)

    @property
    def cells(self) -> NDArray[np.int32]:
        """(n, 3) int32: the occupied and visible cells (i, j, k)."""
        return np.stack(np.unravel_index(self.columns, self.grid.shape), axis=-1).astype(np.int32)

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(nx, ny, nz) uint8: 0 free, 255 unknown, else occupied: its class, 1 without labels."""
        labels = np.where(self.mask, 0, 255).astype(np.uint8)
        labels.reshape(-1)[self.columns] = 1 if self.classes is None else self.classes
        return labels

    @property
    def mask(self) -> NDArray[np.bool_]:
        """(nx, ny, nz) bool: observed, whether free or occupied."""
        return unpack(self.packed, self.grid.cells).reshape(self.grid.shape)

    def _dense(self, columns: NDArray[np.integer]) -> NDArray[np.bool_]:
        dense = np.zeros(self.grid.cells, bool)
        dense[columns] = True
        return dense.reshape(self.grid.shape)


class LoadedEpisode:
    """A built trajectory of T frames.

    trajectory: its files; grid: of its occupancy; world_from_camera: (T, 4, 4) float64, OpenCV
    axes, metres; intrinsics: (T, 3, 3) float64, pixels; tasks: the instructions as text;
    task_index: (T,) int64, the instruction of each frame.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.grid = trajectory.grid
        self.world_from_camera = trajectory.world_from_camera()
        self.intrinsics = trajectory.intrinsics()
        self.tasks = trajectory.tasks()
        self.task_index: NDArray[np.int64] = trajectory.column("task_index")
        self._images = trajectory.images()
        self._frames: Iterator[Frame] = iter(())
        self._next = len(self)

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.world_from_camera)

    def frame(self, number: int) -> Frame:
        """The occupancy of a frame, numbered from 0. Ascending order is fast.

        The files are compressed as a whole, so going back reads them again from the start. Use
        OccupancyDataset for random access. Raises IndexError for other numbers, and DatasetError.
        """
        self._check(number)
        if number < self._next:
            self._frames, self._next = self._decoded(), 0
        for frame in self._frames:
            self._next += 1
            if self._next > number:
                return frame
        self._next = len(self)
        path = self.trajectory.file("visible")
        raise DatasetError(path, f"ends before frame {number}", REBUILD)

    def rgb(self, number: int) -> NDArray[np.uint8] | None:
        """(H, W, 3) uint8, or None if the dataset was built without media.

        Raises IndexError for other numbers.
        """
        self._check(number)
        return self._images(number)

    def depth(self, number: int) -> NDArray[np.float64] | None:
        """(H, W) float64 metres along the optical axis, 0 for none; None without depth images.

        Raises IndexError for other numbers.
        """
        self._check(number)
        return self.trajectory.depth(number)

    def _check(self, number: int) -> None:
        if not 0 <= number < len(self):
            raise IndexError(f"frame {number} of an episode of {len(self)}")

    def _decoded(self) -> Iterator[Frame]:
        files = self.trajectory
        rows = (files.visible_frames(), files.observed_packed(), files.dynamic_frames())
        classes = repeat(None) if files.taxonomy is None else files.label_frames()
        for columns, packed, dynamic, named in zip(*rows, classes, strict=False):
            yield Frame(self.grid, columns, packed, dynamic, named)


def load_episode(folder: str | Path) -> LoadedEpisode:
    """Load a built trajectory from its folder `<dataset>/<group>/<scene>/<trajectory>`.

    Raises DatasetError if there is none, or if one of its files is invalid.
    """
    return LoadedEpisode(Trajectory.open(Path(folder)))
