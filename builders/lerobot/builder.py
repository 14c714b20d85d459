"""The source `lerobot`: an episode of a LeRobot dataset, from each of its cameras."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from occgen_hub.builder import CameraSurvey, DatasetBuilder, EpisodeRef, other_source
from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Column, Episode, Note, Task, column_of
from occgen_hub.errors import OccGenError, SourceError, UsageError
from occgen_hub.files import is_file
from occgen_hub.hub_source import HubSource
from occgen_hub.kinds import lerobot_kind
from occgen_hub.schema import Feature

from ..capture.builder import pinhole_views
from .cameras import (
    HALF_TURN,
    camera_name,
    check_mapping,
    is_color,
    lenses_of,
    notes_of,
    poses_of,
    survey,
)
from .dataset import (
    CONTAINERS,
    INFO,
    RESTORE,
    EpisodeEntry,
    Info,
    read_episodes,
    read_info,
    read_rows,
    read_tasks,
)
from .images import Place, color_reader, depth_reader

GROUP = "lerobot"
EPISODE, FRAME, TIME = "source_episode_index", "source_frame_index", "source_timestamp"
"""Columns that identify the rows of the source."""

OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""LeRobot's own columns, which are computed again."""

TASK = "perform the task"
"""The task of an episode if the source has none."""


@dataclass(frozen=True)
class Rows:
    """The rows of an episode.

    entry: from the dataset's list of episodes; path: their file; columns: of numbers or texts, with
    T rows each; times: (T,) float64 seconds, ascending.
    """

    entry: EpisodeEntry
    path: Path
    columns: dict[str, Column]
    times: NDArray[np.float64]
    notes: tuple[Note, ...]


class LeRobotBuilder(DatasetBuilder):
    """Reads LeRobot datasets: each camera of an episode is a trajectory, <episode>.<camera>."""

    name = "lerobot"
    maps = (
        *("rgb", "depth", "pose", "info", "intrinsics", "depth_unit", "pose_layout"),
        *("pose_direction", "pose_axes", "body_from_camera", "time_offset"),
    )
    several_cameras = True
    takes_repository = True
    media = "none"

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """By meta/info.json."""
        return lerobot_kind(root)

    def episodes(self) -> Iterator[EpisodeRef]:
        """Every camera of every episode, sorted by id. Raises UsageError if there is none."""
        self._check_root()
        names = self._cameras()
        scene = _scene(self.root)
        entries = read_episodes(self.root, self._info())
        digits = max(6, len(str(max(entries))))
        for index in entries:
            for name in sorted(names):
                ident = f"{GROUP}/{scene}/episode_{index:0{digits}d}.{name}"
                yield EpisodeRef(ident, self.root, index)

    def survey_cameras(self) -> CameraSurvey:
        """A survey of the features' names and shapes. Raises UsageError for other folders."""
        self._check_root()
        return survey(self._info())

    def _check_root(self) -> None:
        if not is_file(self.root / INFO):
            other = other_source(self.root, self.name)
            raise UsageError(
                f"{self.root}: is not a LeRobot dataset: it has no meta/info.json; "
                f"{other or 'give the folder with meta, data and videos'}."
            )

    def has_depth(self, ref: EpisodeRef) -> bool:
        """Whether the camera's mapping names depth."""
        return self._camera(ref).depth is not None

    def work(self, ref: EpisodeRef) -> float:
        """Frames times pixels, from info.json."""
        footage = self.footage(ref)
        return 0.0 if footage is None else float(footage[0] * np.prod(footage[1]))

    def footage(self, ref: EpisodeRef) -> tuple[int, tuple[int, int]] | None:
        """Number of frames and their size, as listed in the dataset."""
        try:
            info, camera = self._info(), self._camera(ref)
            assert camera.rgb is not None
            return self._entry(ref).length, info.features[camera.rgb].size
        except OccGenError:
            return None

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The file that lists the episode, its table, and the videos of the cameras to build."""
        info, entry = self._info(), self._entry(ref)
        tasks, _ = read_tasks(self.root, info)
        keys = [key for c in self._cameras().values() for key in (c.rgb, c.depth) if key]
        videos = [self._video(entry, key) for key in keys if key in entry.videos]
        listed = [info.path, *([] if tasks is None else [tasks]), entry.listed]
        return list(dict.fromkeys([*listed, self._file(entry.data), *videos]))

    def read(self, ref: EpisodeRef) -> Episode:
        """One episode from one of its cameras. The other cameras are in `beside`."""
        rows = self._rows(self._entry(ref))
        cameras, own = self._cameras(), self._camera(ref)
        known = np.ones(len(rows.times), np.bool_)
        for camera in cameras.values():
            known &= poses_of(camera, rows.columns, rows.times, rows.path)[1]
        kept = np.flatnonzero(known)
        if not len(kept):
            problem = "has no frame with known poses of all cameras"
            raise SourceError(rows.path, problem, "build its cameras one by one, with --camera")
        lost = len(known) - len(kept)
        notes = [*rows.notes]
        if lost:
            text = f"{lost} of {len(known)} frames are left out: no pose is known"
            notes.append(Note("left out", text))
        fingerprint = self.fingerprint(self.sources(ref))
        above = ref.id.removesuffix(f".{self._camera_name(ref)}")
        episode = self._seen(ref.id, own, rows, kept, fingerprint, notes)
        others = tuple(
            self._seen(f"{above}.{name}", camera, rows, kept, fingerprint, [])
            for name, camera in cameras.items()
            if camera is not own and camera.depth is not None
        )
        return episode if own.depth is None else replace(episode, beside=others)

    def _seen(
        self,
        name: str,
        camera: CameraMapping,
        rows: Rows,
        kept: NDArray[np.int64],
        fingerprint: str,
        notes: list[Note],
    ) -> Episode:
        """The rows `kept` of an episode from a camera."""
        info, entry, path = self._info(), rows.entry, rows.path
        assert camera.rgb is not None
        read_color = color_reader(self._place(rows, kept, camera.rgb))
        height, width = read_color(0).shape[:2]
        size = width, height
        lenses, turned = lenses_of(camera, rows.columns, size, path)
        poses, _ = poses_of(camera, rows.columns, rows.times, path)
        if poses is not None:
            poses = np.ascontiguousarray(poses[kept] @ HALF_TURN if turned else poses[kept])
        notes = [*notes, *notes_of(camera, rows.columns, turned=turned)]
        read_depth, depth_size = None, None
        if camera.depth is not None:
            if lenses is None:
                problem = f"{camera.rgb} has depth, but no intrinsics"
                remedy = "give intrinsics in the mapping, or --intrinsics fx,fy,cx,cy"
                raise SourceError(info.path, problem, remedy)
            read_depth = depth_reader(self._place(rows, kept, camera.depth), camera)
            high, wide = read_depth(0).shape
            depth_size = wide, high
            notes += _unit_notes(info, camera)
        intrinsics = None
        if lenses is not None:
            lenses = [lenses[row] for row in kept.tolist()]
            views, depth_views, own = pinhole_views(lenses, path, depth_size=depth_size)
            notes += own
            size = views[0].target.size
            intrinsics = np.stack([view.target.matrix for view in views])

        def color(frame: int) -> NDArray[np.uint8]:
            image = read_color(frame)
            return image if lenses is None else views[frame].color(image)

        def depth(frame: int) -> NDArray[np.float64]:
            assert read_depth is not None
            return depth_views[frame].depth(np.asarray(read_depth(frame), np.float64))

        columns, lost = _passed_through(rows, entry, kept)
        if lost:
            text = f"columns with numbers that are not finite are left out: {', '.join(lost)[:300]}"
            notes.append(Note("not finite", text))
        tasks, task_index = self._tasks(rows, kept)
        return Episode(
            id=name,
            length=len(kept),
            fps=info.fps,
            robot_type=info.robot_type,
            image_size=size,
            read_rgb=color,
            read_depth=None if read_depth is None else depth,
            world_from_camera=poses,
            intrinsics=intrinsics,
            tasks=tasks,
            task_index=task_index,
            columns=columns,
            media=(),
            fingerprint=fingerprint,
            notes=tuple(notes),
            origin=_origin(self.root),
        )

    def _place(self, rows: Rows, kept: NDArray[np.int64], key: str) -> Place:
        """The place of the images of a feature."""
        info, entry = self._info(), rows.entry
        feature, start, path = info.features[key], 0.0, rows.path
        if feature.video:
            start, path = entry.videos[key].start, self._video(entry, key)
        times = start + rows.times[kept]
        return Place(key, feature, self.root, path, entry.index, kept, times, 0.5 / info.fps)

    def _rows(self, entry: EpisodeEntry) -> Rows:
        info, path, notes = self._info(), self._file(entry.data), []
        images = {key for key, feature in info.features.items() if feature.visual}
        table = read_rows(path, entry.index, images)
        if table.num_rows != entry.length:
            text = f"{entry.listed.name} says {entry.length} frames of episode {entry.index}, the "
            notes.append(Note("length", f"{text}table has {table.num_rows}: these are used"))
        columns, lost = _columns(table, info)
        if lost:
            listed = "; ".join(f"{name[:60]} {reason}" for name, reason in list(lost.items())[:4])
            notes.append(Note("column", f"{len(lost)} columns are left out: {listed}"))
        if "timestamp" in columns:
            times = np.asarray(columns["timestamp"].values, np.float64)
        else:
            times = np.arange(table.num_rows) / info.fps
        if not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
            raise SourceError(path, f"has times of episode {entry.index} out of order", RESTORE)
        return Rows(entry, path, columns, times, tuple(notes))

    def _tasks(
        self, rows: Rows, kept: NDArray[np.int64]
    ) -> tuple[tuple[Task, ...], NDArray[np.int64]]:
        """The instructions of an episode, and the instruction's number for each frame."""
        _, named = read_tasks(self.root, self._info())
        column = rows.columns.get("task_index")
        numbers = np.zeros(0) if column is None else np.asarray(column.values)[kept]
        if len(numbers) and all(int(number) in named for number in np.unique(numbers)):
            texts = [named[int(number)] for number in numbers]
            words = list(dict.fromkeys(texts))
            return (
                tuple(Task(text) for text in words),
                np.array([words.index(text) for text in texts], np.int64),
            )
        words = list(rows.entry.tasks[:1]) or [TASK]
        return tuple(Task(text) for text in words), np.zeros(len(kept), np.int64)

    # Files and cameras

    def _info(self) -> Info:
        return read_info(self.root)

    def _entry(self, ref: EpisodeRef) -> EpisodeEntry:
        entries = read_episodes(self.root, self._info())
        if ref.index not in entries:
            raise SourceError(self.root, f"no longer has episode {ref.index}", RESTORE)
        return entries[ref.index]

    def _cameras(self) -> dict[str, CameraMapping]:
        """The cameras to build, by name. Raises UsageError if they have to be chosen."""
        info, mappings = self._info(), self.cameras
        keys = [key for key, feature in info.features.items() if is_color(key, feature)]
        if not keys:
            problem = "has no feature of colour images, which --source lerobot needs"
            raise UsageError(f"{info.path}: {problem}; give another dataset.")
        if not mappings:
            mappings = (CameraMapping(),)
        if mappings[0].rgb is None:
            if len(keys) > 1:
                raise UsageError(
                    f"{self.root}: has {len(keys)} cameras ({', '.join(keys)[:400]}); choose with "
                    "--camera KEY (repeatable)."
                )
            mappings = (mappings[0].model_copy(update={"rgb": keys[0]}), *mappings[1:])
        for mapping in mappings:
            check_mapping(mapping, info)
        named = {camera_name(mapping.rgb or ""): mapping for mapping in mappings}
        if len(named) < len(mappings):
            named = {(m.rgb or "").replace(".", "_").replace("/", "_"): m for m in mappings}
        if len(named) < len(mappings):
            raise UsageError("--cameras: lists a camera twice; leave one of the two out.")
        return named

    def _camera(self, ref: EpisodeRef) -> CameraMapping:
        return self._cameras()[self._camera_name(ref)]

    @staticmethod
    def _camera_name(ref: EpisodeRef) -> str:
        return ref.id.rpartition("/")[2].partition(".")[2]

    def _video(self, entry: EpisodeEntry, key: str) -> Path:
        """An episode's video, in any supported container."""
        name = entry.videos[key].path
        stem, dot, suffix = name.rpartition(".")
        names = [name, *(f"{stem}{s}" for s in CONTAINERS if f"{dot}{suffix}" != s)]
        there = next((n for n in names if is_file(self.root / n)), None)
        return self._file(there or name)

    def _file(self, name: str) -> Path:
        """A file of the dataset. It is downloaded if the dataset is on the Hub."""
        path = self.root / name
        if not is_file(path) and (source := HubSource.of_snapshot(self.root)) is not None:
            source.fetch(name)
        return path


def _unit_notes(info: Info, camera: CameraMapping) -> list[Note]:
    """A note if the unit of a camera's depth is not stated."""
    feature = info.features[camera.depth or ""]
    own = feature.depth_map and (feature.video or "depth_unit" in feature.info)
    if own or camera.depth_unit is not None:
        return []
    text = (
        f"{camera.depth} has no unit: integers are read as millimetres and other numbers as "
        "metres; set depth_unit to change that"
    )
    return [Note("depth unit", text)]


def _columns(table: pa.Table, info: Info) -> tuple[dict[str, Column], dict[str, str]]:
    """The columns as arrays, and for each of the others the reason why it is left out."""
    columns, lost = dict[str, Column](), dict[str, str]()
    for field, values in zip(table.schema, table.columns, strict=True):
        nested = pa.types.is_list(field.type) or pa.types.is_fixed_size_list(field.type)
        try:
            if nested and len(values) and len(values[0].as_py() or ()) == 1:
                values = pa.chunked_array([values.combine_chunks().flatten()])
                field = pa.field(field.name, values.type)
            if len(values) != table.num_rows:
                raise ValueError("has lists of several lengths")
            column = column_of(field, values, finite=False)
        except ValueError as error:
            lost[field.name] = str(error)
            continue
        feature = info.features.get(field.name)
        if feature is not None and feature.names and feature.shape == column.feature.shape:
            named = column.feature.model_copy(update={"names": feature.names})
            column = Column(named, column.values)
        columns[field.name] = column
    return columns, lost


def _passed_through(
    rows: Rows, entry: EpisodeEntry, kept: NDArray[np.int64]
) -> tuple[dict[str, Column], list[str]]:
    """The source's own columns, and those that identify its rows.

    Also the names of columns that are left out because they have numbers that are not finite.
    """
    columns, lost = {}, []
    values: Any
    for name, column in rows.columns.items():
        if name in OWN:
            continue
        if column.feature.dtype == "string":
            values = [column.values[row] for row in kept]
        else:
            values = np.asarray(column.values)[kept]
            with np.errstate(over="ignore"):
                if not np.isfinite(np.square(values, dtype=np.float64)).all():
                    lost.append(name)
                    continue
        columns[name] = Column(column.feature, values)
    number = Feature(dtype="int64", shape=(1,))
    frames: Any = rows.columns.get("frame_index")
    frames = np.arange(len(rows.times)) if frames is None else np.asarray(frames.values)
    columns[EPISODE] = Column(number, np.full(len(kept), entry.index))
    columns[FRAME] = Column(number, frames[kept].astype(np.int64))
    columns[TIME] = Column(Feature(dtype="float64", shape=(1,)), rows.times[kept])
    return columns, lost


def _scene(root: Path) -> str:
    """The name of a dataset in ids: the name of its folder or repository."""
    source = HubSource.of_snapshot(root)
    name = root.resolve().name if source is None else source.repo_id
    return re.sub(r"[^\w.-]+", "_", name).strip("._-")[-100:] or "dataset"


def _origin(root: Path) -> dict[str, str] | None:
    """The repository and the commit that a dataset was downloaded from. None if unknown."""
    source = HubSource.of_snapshot(root)
    return None if source is None else {"repo_id": source.repo_id, "revision": source.revision}
