"""Write one trajectory: every file that its schema lists, in a folder of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import Table

from occgen_hub.config import Config
from occgen_hub.episode import Column, Episode, MediaFile, Note
from occgen_hub.errors import OccGenError, SourceError
from occgen_hub.files import MAX_RECORD_BYTES, dump_json, files_under, printable, sha256
from occgen_hub.geometry.alignment import Alignment
from occgen_hub.geometry.cloud import voxel_downsample
from occgen_hub.geometry.ply import write_ply
from occgen_hub.lerobot.stats import episode_stats
from occgen_hub.media import (
    RESTORE,
    is_jpeg,
    read_depth,
    read_rgb,
    write_depth,
    write_jpeg,
    write_video,
)
from occgen_hub.occupancy.classes import classes_of_cells
from occgen_hub.occupancy.codec import CellsWriter, NpzWriter, ObservedWriter
from occgen_hub.occupancy.grid import Grid, SceneGrid, cell_numbers, scene_grid
from occgen_hub.occupancy.states import FreeSpace
from occgen_hub.occupancy.visibility import FrameOccupancy
from occgen_hub.prefetch import background
from occgen_hub.quality import Quality
from occgen_hub.scene import Scene
from occgen_hub.schema import Schema

Media = Literal["copy", "link", "none"]


@dataclass(frozen=True)
class Provenance:
    """Where a trajectory comes from: the builder, its version, the engine, and the configuration.

    weights: of the engine's network, or None; cameras: the user's settings for the source's
    cameras, see `CameraMapping.as_json`; license: of the recording, if the source states it,
    recorded but not compared; segmenter: the record of the segmenter that makes labels if the
    source has none, or None.
    """

    builder: str
    builder_version: str
    engine: str
    weights: dict[str, Any] | None
    config: Config
    media: Media
    cameras: tuple[dict[str, Any], ...] = ()
    license: str | None = None
    segmenter: dict[str, Any] | None = None

    def record(self, schema: Schema, episode: str, fingerprint: str) -> dict[str, Any]:
        """What a later run compares to decide whether the trajectory must be built again."""
        source = {
            "builder": self.builder,
            "builder_version": self.builder_version,
            "episode": episode,
            "fingerprint": fingerprint,
        }
        return {
            "schema": {"name": schema.name, "version": schema.version},
            "source": {**source, "cameras": list(self.cameras)} if self.cameras else source,
            "engine": self.engine,
            **({} if self.weights is None else {"weights": self.weights}),
            **({} if self.segmenter is None else {"segmenter": self.segmenter}),
            "config": self.config.model_dump(mode="json"),
            "media": "none" if self.media == "none" else "kept",
        }


MAX_BELOW = 0.1
"""Share of the surface ahead of the camera below the grid above which a note says so."""


class TrajectoryWriter:
    """Writes a trajectory into an empty folder: occupancy first, `finish` last."""

    def __init__(self, folder: Path, schema: Schema, episode: Episode, grid: Grid) -> None:
        self.folder, self.schema, self.episode, self.grid = folder, schema, episode, grid
        self.moving = 0.0
        self.cells = SceneGrid(np.zeros((0, 3), np.float32), np.zeros(3), (0, 0, 0), 0.0)
        self.notes: list[Note] = []

    def path(self, file: str, frame: int | None = None) -> Path:
        """The path of a file of the schema. Creates its folder."""
        path = self.folder / self.schema.path(file, frame)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_occupancy(self, frames: Iterable[FrameOccupancy]) -> None:
        """Write the visible and the observed cells, frame by frame, compressed in threads.

        Moving cells, classes and rays that were left out have files of their own, which are written
        only if there are any.
        """
        visible = CellsWriter(self.path("visible"), self.grid.cells)
        dynamic = CellsWriter(self.path("dynamic"), self.grid.cells)
        observed = ObservedWriter(self.path("observed"), self.episode.length, self.grid.shape)
        width, height = self.episode.image_size
        left_out = CellsWriter(self.path("left_out"), width * height)
        labels = None
        if self.episode.taxonomy is not None:
            labels = CellsWriter(self.path("labels"), self.grid.cells)
        with background(observed.append) as pack:
            for frame in frames:
                pack(frame.observed)
                visible.append(frame.visible)
                dynamic.append(frame.dynamic)
                left_out.append(frame.left_out)
                if labels is not None:
                    labels.append(frame.visible, frame.labels)
            visible.close()
            if labels is not None:
                labels.close()
        observed.close()
        dynamic.close()
        left_out.close()
        self.moving = dynamic.count / max(visible.count, 1)
        if not dynamic.count:
            self.path("dynamic").unlink()
            self.path("dynamic").parent.rmdir()
        if not left_out.count:
            self.path("left_out").unlink()

    def write_scene(self, scene: Scene, config: Config) -> None:
        """Write the scene's cloud. `write_states` writes its cells."""
        self.cells = cells = scene_grid(scene.cloud.points, config.voxel_size)
        thinned = voxel_downsample(scene.cloud, cloud_voxel_size(cells.shape, config))
        write_ply(self.path("scene_cloud"), thinned)
        below = self.grid.share_below(cells.centres, scene.world_from_camera)
        if below > MAX_BELOW:
            depth = config.pc_range[4]
            text = (
                f"{below:.0%} of the surface ahead of the camera is below the grid, which ends "
                f"{depth:g} m below the camera; increase y_max of pc_range to include it"
            )
            self.notes.append(Note("below grid", text))

    def write_states(self, scene: Scene, free: FreeSpace) -> None:
        """Write the scene's cells. Call it after `write_scene`, with all frames added to `free`."""
        cells, states = self.cells, free.states(scene.cloud.points)
        occupied, opened = states.packed()
        with NpzWriter(self.path("scene_occupancy")) as out:
            out.add("data", cells.centres)
            out.add("voxel_size", np.asarray(cells.voxel_size, np.float64))
            out.add("origin", cells.origin)
            out.add("shape", np.asarray(cells.shape, np.int64))
            out.add("blocks", states.blocks)
            out.add_bits("occupied", occupied)
            out.add_bits("free", opened)
            if scene.labels is not None:
                numbers = cell_numbers(cells.centres, cells.voxel_size)
                of_points = cell_numbers(scene.cloud.points, cells.voxel_size)
                places = np.searchsorted(numbers, of_points)
                order = np.arange(len(numbers))
                out.add("labels", classes_of_cells(order, places, scene.labels.static))

    def write_media(self, media: Media) -> None:
        """Copy or link the source's files, and encode the RGB video if the source has none.

        Every image is decoded once, so that a damaged one is not copied. Where the schema has
        JPEGs, other images are encoded as JPEG, and so are images that are not files of the
        source. Depth is encoded again unless the source's images have the schema's unit.
        """
        if media == "none":
            return
        new_depth = self.episode.read_depth is not None and not self._depth_fits()
        if new_depth:
            self._write_depth()
        for item in self.episode.media:
            if new_depth and item.file == "depth":
                continue
            place = self.path(item.file, item.frame)
            if item.read is not None:
                write_jpeg(place, item.read())
                continue
            if self.schema.files[item.file].kind == "image":
                self._check_image(item)
                if place.suffix == ".jpg" and not is_jpeg(item.path):
                    write_jpeg(place, read_rgb(item.path, self.episode.image_size))
                    continue
            _copy_or_link(item.path, place, link=media == "link")
        if not any(item.file == "video" for item in self.episode.media):
            frames = (self.episode.read_rgb(t) for t in range(self.episode.length))
            write_video(self.path("video"), frames, self.episode.fps)

    def _depth_fits(self) -> bool:
        """Whether the source's depth images have the schema's unit; compares the first depth."""
        assert self.episode.read_depth is not None
        images = [item for item in self.episode.media if item.file == "depth"]
        for item in images:
            stored = read_depth(item.path, self.episode.image_size)
            if stored.any():
                metres = stored / self.schema.depth_units_per_metre
                return np.allclose(self.episode.read_depth(item.frame or 0), metres, atol=1e-3)
        return bool(images)

    def _write_depth(self) -> None:
        """Write the depth of every frame as 16-bit PNG in the schema's unit.

        Depth beyond the range of 16 bits is stored as 0 (none), with a note.
        """
        read, units = self.episode.read_depth, self.schema.depth_units_per_metre
        assert read is not None
        frames = range(self.episode.length)
        if far := sum(write_depth(self.path("depth", t), read(t), units) for t in frames):
            reach = np.iinfo(np.uint16).max / units
            text = f"depth beyond {reach:g} m is stored as none, in {far} of the depth images"
            self.notes.append(Note("far depth", text))

    def _check_image(self, item: MediaFile) -> None:
        if item.check is not None:
            item.check()
        elif "RGB" in self.schema.files[item.file].modes:
            read_rgb(item.path, self.episode.image_size)
        else:
            read_depth(item.path, self.episode.image_size)

    def write_tables(self, scene: Scene) -> None:
        """Write the parquet table and the meta files that describe it."""
        columns = self.columns(scene)
        features = {name: column.feature for name, column in columns.items()}
        arrays = [column.feature.to_arrow(column.values) for column in columns.values()]
        table = Table.from_arrays(arrays, schema=self.schema.arrow_schema(features))
        place = os.fsencode(self.path("frames"))
        with pa.OSFile(place, "wb") as file:  # A path may look like a URI.
            pq.write_table(table, file, compression="zstd")

        episode = self.episode
        words = list(dict.fromkeys(task.text for task in episode.tasks))
        self._write("info", [self._info(columns)], indent=4)
        self._write(
            "episodes",
            [{"episode_index": 0, "tasks": words, "length": episode.length, "scale": scene.scale}],
        )
        self._write("stats", [{"episode_index": 0, "stats": episode_stats(columns)}])
        tasks = enumerate(episode.tasks)
        self._write(
            "tasks",
            [{"task_index": i, "task": t.text, **_source_entry(t.source)} for i, t in tasks],
        )

    def columns(self, scene: Scene) -> dict[str, Column]:
        """Every column of the table: the source's, the computed ones, then LeRobot's."""
        frames = np.arange(self.episode.length)
        features = self.schema.features
        episode = printable(self.episode.id)
        ours = {
            self.schema.poses: scene.world_from_camera,
            self.schema.intrinsics: scene.intrinsics,
            "episode": [episode] * len(frames),
            "scene": [episode.rpartition("/")[0]] * len(frames),
            "timestamp": frames / self.episode.fps,
            "frame_index": frames,
            "episode_index": np.full(len(frames), self.schema.episode_index),
            "index": frames,
            "task_index": self.episode.task_index,
        }
        columns = {name: c for name, c in self.episode.columns.items() if name not in ours}
        known = {
            name: c.values
            for name, c in columns.items()
            if name in features
            and not (features[name].other_kinds and c.feature.shape != features[name].shape)
        } | ours
        for name, values in known.items():
            feature = features[name]
            kind = object if feature.dtype == "string" else feature.dtype
            columns[name] = Column(feature, np.asarray(values).astype(kind))
        return columns

    def finish(self, provenance: Provenance, scene: Scene) -> None:
        """Write `meta/occgen.json`: the provenance and a SHA-256 of every other file."""
        config = provenance.config
        files = {
            path.relative_to(self.folder).as_posix(): sha256(path)
            for path in files_under(self.folder)
        }
        record: dict[str, Any] = {
            "version": version("occgen-hub"),
            **provenance.record(self.schema, self.episode.id, self.episode.fingerprint),
            "grid": {
                "voxel_size": self.grid.voxel_size,
                "pc_range": list(config.pc_range),
                "shape": list(self.grid.shape),
            },
            "scene": {
                "image_size": list(self.episode.image_size),
                "points": len(scene.cloud),
                "scale": scene.scale,
                **({"world_origin": list(scene.world_origin)} if any(scene.world_origin) else {}),
                **({} if scene.alignment is None else {"alignment": _fit(scene.alignment)}),
                **({} if scene.windows is None else {"windows": asdict(scene.windows)}),
            },
            **({} if scene.quality is None else {"quality": self._quality(scene.quality)}),
            **({} if self.episode.origin is None else {"origin": self.episode.origin}),
            **({} if self.episode.taxonomy is None else {"taxonomy": self.episode.taxonomy}),
            "notes": [note.text for note in self.all_notes(scene)],
            "files": files,
        }
        if provenance.license is not None:
            record["source"]["license"] = provenance.license
        self._write("record", [record], indent=1)
        if self.path("record").stat().st_size > MAX_RECORD_BYTES:
            raise OccGenError(
                f"{self.episode.id}: has {self.episode.length} frames, too many images for its "
                "record; cut it into parts, or build with --media none."
            )

    def all_notes(self, scene: Scene) -> tuple[Note, ...]:
        """The notes of the source, of the reconstruction and of this writer."""
        return (*self.episode.notes, *scene.notes, *self.notes)

    def _quality(self, quality: Quality) -> dict[str, Any]:
        """The figures of fusion, and the fraction of visible cells that move."""
        return {**quality.record(), "moving": round(self.moving, 6)}

    def _info(self, columns: dict[str, Column]) -> dict[str, Any]:
        return {
            "codebase_version": self.schema.codebase_version,
            "robot_type": self.episode.robot_type,
            "total_episodes": 1,
            "total_frames": self.episode.length,
            "total_tasks": len(self.episode.tasks),
            "total_videos": 0,
            "total_chunks": 1,
            "chunks_size": self.schema.chunks_size,
            "fps": int(self.episode.fps) if self.episode.fps.is_integer() else self.episode.fps,
            "splits": {"train": "0:1"},
            "data_path": self.schema.data_path,
            "video_path": self.schema.video_path,
            "features": {name: column.feature.info() for name, column in columns.items()},
        }

    def _write(self, file: str, rows: list[dict[str, Any]], indent: int | None = None) -> None:
        text = "".join(dump_json(row, indent=indent) + "\n" for row in rows)
        self.path(file).write_text(text, encoding="utf-8")


def cloud_voxel_size(shape: tuple[int, int, int], config: Config) -> float:
    """The voxel size of origin_pcd.ply in metres, for a scene of `shape` cells.

    It is `config.voxel_size`, or, if `voxel_size_scale` is set, the cube root of the scene's
    volume divided by it, if that is coarser.
    """
    if config.voxel_size_scale is None:
        return config.voxel_size
    volume = float(np.prod(shape, dtype=np.float64)) * config.voxel_size**3
    return max(config.voxel_size, float(np.cbrt(volume)) / config.voxel_size_scale)


def _fit(alignment: Alignment) -> dict[str, Any]:
    return {
        "translation_rmse": alignment.translation_rmse,
        "rotation_error": alignment.rotation_error,
        "inliers": alignment.inliers,
        "frames": alignment.frames,
        "scaled": alignment.scaled,
    }


def _source_entry(source: dict[str, Any]) -> dict[str, Any]:
    return {"source": source} if source else {}


def _copy_or_link(source: Path, place: Path, *, link: bool) -> None:
    try:
        if link:
            try:
                place.hardlink_to(source.resolve())  # The target of a symbolic link.
                return
            except OSError:
                pass  # Another file system, or one without hard links: copy instead.
        shutil.copyfile(source, place)
    except OSError as error:
        if error.filename2 or error.filename == str(place):
            raise
        raise SourceError(source, f"cannot be copied ({error.strerror})", RESTORE) from error
