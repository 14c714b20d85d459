"""Check a built dataset against its schema, and its files against each other."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator
from numpy.typing import NDArray

from occgen_hub.errors import SourceError
from occgen_hub.files import (
    ABSENT,
    LINK_OUT,
    MAX_BUILT_BYTES,
    PUT_FILE,
    files_under,
    links_leaving_folder,
    printable,
    sha256,
)
from occgen_hub.geometry.camera import intrinsics_problem
from occgen_hub.geometry.ply import check_ply, read_ply
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.index import read_index
from occgen_hub.lerobot.export_check import check_export, exported, lengths
from occgen_hub.loading import (
    REBUILD,
    NpzArray,
    Trajectory,
    is_navdp_export,
    npz_array,
    trajectories,
)
from occgen_hub.media import read_depth, read_rgb, video_facts
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.states import FreeSpace
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, FrameOccupancy, trace
from occgen_hub.prefetch import prefetch
from occgen_hub.quality import Quality
from occgen_hub.schema import ArraySpec, Feature, FileSpec
from occgen_hub.shards import check_shards, missing_shards

MAX_DIMENSIONS = 5
MAX_FINDINGS = 20
"""Limit of findings on the lines of one file."""

RESTORE = "restore it from a copy, or remove this trajectory's folder and build it again"


@dataclass(frozen=True)
class Finding:
    """A problem of a dataset: the file, the problem and the remedy."""

    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.file}: {self.problem}; {self.remedy}."


@dataclass(frozen=True)
class Report:
    """The result of `validate`.

    trajectories, frames: the numbers that were checked; warnings: sentences on a valid dataset that
    may be of poor quality.
    """

    root: str
    trajectories: int
    frames: int
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...] = ()

    @property
    def valid(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def as_dict(self) -> dict[str, Any]:
        """The report as a dictionary for JSON."""
        return {**asdict(self), "valid": self.valid}


def validate(
    root: str | Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Check every trajectory below `root`. Problems of the dataset are returned, not raised.

    Checks files and folders, checksums, meta files against their JSON Schemas, columns and arrays
    against the schema and each other, poses and intrinsics. In each frame, the rays of the camera,
    which end at visible cells, must observe exactly the cells of `occ.mask`; rays that were left
    out must meet no visible cell. Then the index and
    the Parquet shards are compared with the trajectories, row by row. If only a part of the
    dataset is on this disk, that part is checked. For exports see
    `lerobot.export_check.check_export`. Links that lead out of the dataset are findings, and their
    targets are not read.

    Trajectories with poor agreement between frames, according to their records, are warnings.
    """
    root = Path(root)
    links = {
        str(path): Finding(str(path), LINK_OUT, PUT_FILE) for path in links_leaving_folder(root)
    }
    if exported(root):
        return _exported(root, tuple(links.values()), progress)
    findings: list[Finding] = []
    found, frames = [], 0
    grids: list[tuple[Path, Grid]] = []
    poor: dict[str, list[str]] = {}
    try:
        found = trajectories(root)
    except SourceError as error:
        findings.append(Finding(error.path, error.problem, error.remedy))
    if is_navdp_export(found):
        problem = "is an export for NavDP, which has no record to check"
        upload = f"hf upload ORG/NAME {shlex.quote(str(root))} navdp --repo-type dataset"
        remedy = f"give the dataset that it was made from, or upload the export with {upload}"
        findings.append(Finding(str(root), problem, remedy))
        found = []
    packed = [row for row in _lengths_in_shards(root) if not found]
    if not found and not findings and not packed:
        problem = "has no trajectories" if root.is_dir() else "is not a folder"
        findings.append(Finding(str(root), problem, "give the folder that occgen-hub build wrote"))
    for number, path in enumerate(found):
        try:
            check = _Check(Trajectory.open(path))
            check.run()
        except SourceError as error:
            findings.append(Finding(error.path, error.problem, error.remedy))
        else:
            frames += check.frames
            findings += check.findings
            for code, text in _disagreement(check.trajectory.record):
                poor.setdefault(code, []).append(f"{path}: {text}")
            with suppress(SourceError):  # It has a finding of its own.
                grids.append((path, check.trajectory.grid))
        progress(number + 1, len(found))
    findings += _different_grid(grids)
    shard_findings, notes = _shards(root, findings)
    findings += shard_findings
    findings += _leftovers(root)
    others = (finding for finding in findings if finding.file not in links)
    warnings = (*(_with_count(*texts) for texts in poor.values()), *notes)
    count, frames = len(found) + len(packed), frames + sum(packed)
    return Report(str(root), count, frames, (*links.values(), *others), warnings)


def _lengths_in_shards(root: Path) -> list[int]:
    """The number of frames of each trajectory that has only shards, if all of them are here."""
    try:
        rows = read_index(root, ["files", "frames", "shards"]).to_pylist()
    except SourceError:  # It has a finding of its own.
        return []
    here = [row for row in rows if not row["files"] and row["shards"]]
    return [row["frames"] for row in here if all((root / name).exists() for name in row["shards"])]


def check_trajectory(path: Path) -> tuple[Finding, ...]:
    """The findings of `validate` for one trajectory."""
    findings = [Finding(str(link), LINK_OUT, PUT_FILE) for link in links_leaving_folder(path)]
    if findings:
        return tuple(findings)
    try:
        check = _Check(Trajectory.open(path))
        check.run()
    except SourceError as error:
        return (Finding(error.path, error.problem, error.remedy),)
    return tuple(check.findings)


def _exported(
    root: Path, links: tuple[Finding, ...], progress: Callable[[int, int], None]
) -> Report:
    """The report on an export. Its episodes count as trajectories.

    links: findings on links that lead out of it. If there are any, nothing is read.
    """
    if links:
        return Report(str(root), 0, 0, links)
    findings = tuple(Finding(e.path, e.problem, e.remedy) for e in check_export(root))
    try:
        episodes = lengths(root)
    except SourceError:  # It has a finding of its own.
        episodes = {}
    progress(len(episodes), len(episodes))
    return Report(str(root), len(episodes), sum(episodes.values()), findings)


def _disagreement(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Code and text of the notes on disagreement between the frames of a trajectory."""
    quality, config = Quality.from_record(record), record.get("config")
    if quality is not None:
        setting = config.get("refine_poses") if isinstance(config, dict) else None
        yield from ((note.code, note.text) for note in quality.notes(setting))


def _with_count(first: str, *more: str) -> str:
    return f"{first} (and {len(more)} more trajectories)." if more else f"{first}."


def _different_grid(grids: list[tuple[Path, Grid]]) -> Iterator[Finding]:
    """The first trajectory with a different grid: it does not fit into a batch with the others."""
    for path, grid in grids[1:]:
        if grid != grids[0][1]:
            problem = f"has {grid.shape} cells of {grid.voxel_size} m from {grid.lower}"
            remedy = "build the whole dataset with one configuration"
            yield Finding(str(path), f"{problem}, unlike {grids[0][0]}", remedy)
            return


def _shards(root: Path, findings: list[Finding]) -> tuple[list[Finding], list[str]]:
    """Findings on the index and the shards, without those already reported for trajectories.

    Also warnings about missing shards, if only a part of the dataset is here.
    """
    known = {finding.file for finding in findings}
    try:
        errors = [error for error in check_shards(root) if error.path not in known]
        missing, count = missing_shards(root)
    except SourceError as error:
        return [Finding(error.path, error.problem, error.remedy)], []
    notes = []
    if missing:
        notes.append(
            f"{root}: {len(missing)} of the {count} shards in the index are missing here, "
            f"for example {missing[0]}; download them to have the whole dataset."
        )
    return [Finding(error.path, error.problem, error.remedy) for error in errors], notes


def _leftovers(root: Path) -> Iterator[Finding]:
    for pattern in (".*.partial", ".*.old"):
        for path in sorted(root.rglob(pattern)) if root.is_dir() else ():
            yield Finding(str(path), "was left by an interrupted build", "run the build again")


class _Check:
    """The checks of one trajectory. A problem in one step does not stop the others."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.trajectory = trajectory
        self.schema = trajectory.schema
        self.findings: list[Finding] = []
        self.frames = 0

    def run(self) -> None:
        """Run all checks, fast ones first."""
        self._run_step(self._record)
        self._run_step(self._documents)
        self._run_step(self._table)
        for key, spec in self.schema.files.items():
            self._run_step(lambda key=key, spec=spec: self._file(key, spec))  # type: ignore[misc]  # bound now
        if not self.findings:  # The next checks need valid files.
            self._run_step(self._counts)
            counted = len(self.findings)
            self._run_step(self._geometry)
            if len(self.findings) == counted:
                self._run_step(self._visibility)
        self._run_step(self._checksums)

    def add_finding(self, path: Path, problem: str, remedy: str = REBUILD) -> None:
        self.findings.append(Finding(str(path), problem, remedy))

    def _run_step(self, step: Callable[[], None]) -> None:
        try:
            step()
        except SourceError as error:
            self.findings.append(Finding(error.path, error.problem, RESTORE))
        except OSError as error:
            self.add_finding(
                Path(error.filename or self.trajectory.path), f"cannot be read ({error.strerror})"
            )

    # Meta files

    def _record(self) -> None:
        self._check_json_schema(
            "record", self.trajectory.record, self.trajectory.file("record"), ""
        )

    def _documents(self) -> None:
        for key, spec in self.schema.files.items():
            if spec.json_schema is None or key == "record":
                continue
            path, found = self.trajectory.file(key), len(self.findings)
            for number, row in enumerate(self.trajectory.document(key), 1):
                where = "" if spec.kind == "json" else f"line {number}: "
                self._check_json_schema(spec.json_schema, row, path, where)
                if len(self.findings) - found >= MAX_FINDINGS:
                    self.add_finding(
                        path, f"has too many problems; line {number} is the last one checked"
                    )
                    break

    def _check_json_schema(self, name: str, value: Any, path: Path, where: str) -> None:
        validator = Draft202012Validator(self.schema.json_schemas[name])
        for error in sorted(validator.iter_errors(value), key=lambda e: list(map(str, e.path)))[:5]:
            place = ".".join(str(part) for part in error.absolute_path)
            message = error.message if len(error.message) < 160 else error.message[:157] + "..."
            self.add_finding(path, f"{where}{place + ': ' if place else ''}{message}")

    # The parquet

    def _table(self) -> None:
        path = self.trajectory.file("frames")
        table = self.trajectory.table()
        self.frames = table.num_rows
        declared = self._declared()
        for name in sorted(set(declared) - set(table.column_names)):
            self.add_finding(path, f"lacks the column {name}, which info.json declares")
        for name in sorted(set(table.column_names) - set(declared)):
            self.add_finding(path, f"has a column {name}, which info.json does not declare")
        for name, feature in self.schema.features.items():
            if feature.required and name not in declared:
                self.add_finding(
                    self.trajectory.file("info"), f"does not declare the feature {name}"
                )
            elif (
                name in declared
                and declared[name].info() != feature.info()
                and not feature.other_kinds
            ):
                self.add_finding(
                    self.trajectory.file("info"), f"declares {name} differently from the schema"
                )
        for name, feature in declared.items():
            if name not in table.column_names:
                continue
            if table.schema.field(name).type != feature.arrow_type():
                kind = table.schema.field(name).type
                self.add_finding(
                    path, f"column {name} is {kind}, but info.json has {feature.info()}"
                )
                continue
            try:
                feature.to_numpy(table[name])
            except ValueError as error:
                self.add_finding(path, f"column {name}: {error}")

    def _declared(self) -> dict[str, Feature]:
        declared: dict[str, Feature] = {}
        features = self.trajectory.info().get("features")
        for name, value in features.items() if isinstance(features, dict) else ():
            try:
                feature = Feature.model_validate(value)
                if len(feature.shape) <= MAX_DIMENSIONS:
                    feature.arrow_type()
                    declared[name] = feature
                    continue
            except (ValueError, KeyError):
                pass
            self.add_finding(
                self.trajectory.file("info"), f"feature {name} has an invalid description"
            )
        return declared

    # Files

    def _file(self, key: str, spec: FileSpec) -> None:
        if spec.media and self.trajectory.record.get("media") == "none":
            return
        if spec.kind == "image":
            self._images(key, spec)
            return
        path = self.trajectory.file(key)
        if not path.is_file():
            if spec.required:
                self.add_finding(path, "is missing", ABSENT)
            return
        if spec.kind in ("npz", "mask"):
            labelled = self.trajectory.taxonomy is not None
            wanted = {k: array for k, array in spec.arrays.items() if array.required or labelled}
            self._arrays(path, {name: npz_array(path, name) for name in wanted}, wanted)
        elif spec.kind == "csr":
            self._csr(key, path, spec)
        elif spec.kind == "ply":
            if spec.media:  # Copied from the source, not used in computations.
                check_ply(path)
            elif not np.isfinite(read_ply(path).points).all():
                self.add_finding(path, "has points that are not finite")
        elif spec.kind == "video":
            facts = video_facts(path)
            if facts.frames != self.frames:
                self.add_finding(
                    path, f"has {facts.frames} frames, but the table has {self.frames}"
                )

    def _images(self, key: str, spec: FileSpec) -> None:
        """Check that all images or none are present, and decode each."""
        paths = [self.trajectory.file(key, frame) for frame in range(self.frames)]
        there = [path.is_file() for path in paths]
        if not any(there) and not spec.required:
            return
        for path, exists in zip(paths, there, strict=True):
            if not exists:
                self.add_finding(path, "is missing", ABSENT)
        size, read = self.trajectory.image_size, read_rgb if "RGB" in spec.modes else read_depth

        def problem(path: Path) -> SourceError | None:
            try:
                read(path, size)
            except SourceError as error:
                return error
            return None

        held = [path for path, exists in zip(paths, there, strict=True) if exists]
        for error in prefetch(problem, held):
            if error is not None:
                self.add_finding(Path(error.path), error.problem, RESTORE)

    def _sizes(self) -> dict[str, int]:
        cells = self.trajectory.grid.cells
        pixels = math.prod(self.trajectory.image_size)
        return {"frames": self.frames, "cells": cells, "packed": -(-cells // 8), "pixels": pixels}

    def _arrays(self, path: Path, arrays: dict[str, NpzArray], specs: dict[str, ArraySpec]) -> None:
        names = self._sizes()
        for name, spec in specs.items():
            array = arrays[name]
            kind = "str" if array.dtype.kind == "U" else array.dtype.name
            if kind != spec.dtype:
                self.add_finding(path, f"array {name} is {kind}, expected {spec.dtype}")
            expected = tuple(names.get(n, -1) if isinstance(n, str) else n for n in spec.shape)
            fits = len(array.shape) == len(expected) and all(
                a == b or b == -1 for a, b in zip(array.shape, expected, strict=True)
            )
            if not fits:
                self.add_finding(
                    path, f"array {name} has shape {array.shape}, expected {spec.shape} {names}"
                )

    def _csr(self, key: str, path: Path, file: FileSpec) -> None:
        spec = file.arrays["data"]
        shape = tuple(npz_array(path, "shape").check("i", 2).load().tolist())
        data = npz_array(path, "data").check("u", None)
        expected = tuple(self._sizes()[str(n)] for n in spec.shape)
        if shape != expected:
            self.add_finding(path, f"is a matrix of {shape}, expected {expected}")
        if data.dtype != np.dtype(spec.dtype):
            self.add_finding(path, f"is {data.dtype.name}, expected {spec.dtype}")
        ends = self.trajectory.row_ends(key)
        if len(ends) != self.frames + 1 or data.shape != (ends[-1],):
            self.add_finding(
                path, f"has {len(ends) - 1} rows and {data.shape} values for {self.frames} frames"
            )
        if file.classes:
            for _ in self.trajectory.label_frames():  # Raises where they are wrong.
                pass
        elif not all((row == 1).all() for row in data.pieces(ends, self.trajectory.row_width(key))):
            self.add_finding(path, "has values other than 1")

    # Consistency

    def _counts(self) -> None:
        info = self.trajectory.info()
        if info["total_frames"] != self.frames:
            self.add_finding(
                self.trajectory.file("info"),
                f"has {info['total_frames']} total_frames, but the table has {self.frames}",
            )
        episodes = self.trajectory.file("episodes")
        rows = self.trajectory.document("episodes")
        if len(rows) != 1 or rows[0]["length"] != self.frames:
            self.add_finding(episodes, f"does not describe one episode of {self.frames} frames")
        tasks = self.trajectory.document("tasks")
        if [row["task_index"] for row in tasks] != list(range(info["total_tasks"])):
            self.add_finding(
                self.trajectory.file("tasks"), f"does not have {info['total_tasks']} numbered tasks"
            )
        index = self.trajectory.column("task_index")
        if index.min() < 0 or index.max() >= len(tasks):
            self.add_finding(
                self.trajectory.file("frames"), "has a task_index that tasks.jsonl lacks"
            )
        for name in ("frame_index", "index"):
            if not np.array_equal(self.trajectory.column(name), np.arange(self.frames)):
                self.add_finding(
                    self.trajectory.file("frames"), f"column {name} does not count the frames"
                )
        episode = str(self.trajectory.record["source"]["episode"])
        for name, value in (("episode", episode), ("scene", episode.rpartition("/")[0])):
            if not (self.trajectory.column(name) == printable(value)).all():
                problem = f"column {name} is not {value}, as in the record"
                self.add_finding(self.trajectory.file("frames"), problem)
        time = self.trajectory.column("timestamp")
        with np.errstate(over="ignore"):
            follows = np.abs(time - np.arange(self.frames) / info["fps"]).max() <= 1e-3
        if not follows:
            self.add_finding(self.trajectory.file("frames"), "column timestamp does not match fps")
        self._stats()

    def _stats(self) -> None:
        path = self.trajectory.file("stats")
        rows = self.trajectory.document("stats")
        if len(rows) != 1:
            self.add_finding(path, "does not describe one episode")
            return
        table = self.trajectory.table()
        for name, feature in self._declared().items():
            if feature.dtype in ("string", "bool"):
                continue
            stats = rows[0]["stats"].get(name)
            if stats is None:
                self.add_finding(path, f"lacks the feature {name}")
                continue
            values = feature.to_numpy(table[name]).reshape(self.frames, *feature.shape)
            wide = values.astype(np.float64)
            expected = {
                "min": wide.min(0),
                "max": wide.max(0),
                "mean": wide.mean(0),
                "std": wide.std(0),
            }
            for key, value in expected.items():
                if not _is_close(stats[key], value):
                    self.add_finding(path, f"{key} of {name} does not match the column")
            if stats["count"] != [self.frames]:
                self.add_finding(
                    path, f"count of {name} is {stats['count']}, expected [{self.frames}]"
                )

    def _geometry(self) -> None:
        path, size = self.trajectory.file("frames"), self.trajectory.image_size
        error = rigidity_error(self.trajectory.column(self.schema.poses))
        for frame in np.flatnonzero(~(error <= RIGID))[:5]:
            what = "is not finite" if np.isinf(error[frame]) else "is not rigid"
            self.add_finding(path, f"the pose of frame {frame} {what}")
        for frame, K in enumerate(self.trajectory.column(self.schema.intrinsics)):
            if problem := intrinsics_problem(K, size):
                self.add_finding(path, f"the intrinsics of frame {frame}: the matrix {problem}")
                break
        self.trajectory.scene_cells()

    def _visibility(self) -> None:
        """Check that each frame's rays, which end at visible cells, observe exactly the mask."""
        grid, size = self.trajectory.grid, self.trajectory.image_size
        intrinsics = self.trajectory.intrinsics()
        shape = npz_array(self.trajectory.file("observed"), "shape").check("i", 3).load()
        if tuple(shape.tolist()) != grid.shape:
            self.add_finding(
                self.trajectory.file("observed"), f"has a grid of {shape}, expected {grid.shape}"
            )
            return
        state: NDArray[np.uint8] = np.zeros(grid.cells, np.uint8)
        poses, free = self.trajectory.world_from_camera(), FreeSpace(grid)
        rows = zip(
            self.trajectory.visible_frames(),
            self.trajectory.dynamic_frames(),
            self.trajectory.left_out_frames(),
            self.trajectory.observed_packed(),
            intrinsics,
            strict=True,
        )
        for frame, (visible, dynamic, left_out, packed, K) in enumerate(rows):
            observed = unpack(packed, grid.cells)
            free.add(FrameOccupancy(visible.astype(np.int32), packed), poses[frame])
            sorted_rows = {"visible": visible, "dynamic": dynamic, "left_out": left_out}
            for key, columns in sorted_rows.items():
                if not (columns[1:] > columns[:-1]).all():
                    self.add_finding(
                        self.trajectory.file(key), f"frame {frame}: columns are not sorted"
                    )
            if not np.isin(dynamic, visible).all():
                self.add_finding(
                    self.trajectory.file("dynamic"),
                    f"frame {frame}: moving cells are not visible in occ.view",
                )
            if not observed[visible].all():
                self.add_finding(
                    self.trajectory.file("visible"),
                    f"frame {frame}: visible cells are not observed in occ.mask",
                )
                continue
            state[:] = 0
            state[visible] = OCCUPIED
            if not np.array_equal(
                trace(grid, K, size, state, _image_mask(left_out, size)), left_out
            ):
                self.add_finding(
                    self.trajectory.file("left_out"),
                    f"frame {frame}: has rays that meet a visible cell or miss the grid",
                )
            if not np.array_equal((state & OBSERVED) > 0, observed):
                self.add_finding(
                    self.trajectory.file("observed"),
                    f"frame {frame}: differs from the cells that the camera's rays observe",
                )
                return
        self._states(free)

    def _states(self, free: FreeSpace) -> None:
        """Compare the scene's occupied cells with their centres, and its free cells with frames."""
        path, found = self.trajectory.file("scene_occupancy"), self.trajectory.states()
        expected = free.states(self.trajectory.scene_cells())
        for name in ("blocks", "occupied", "free"):
            if not np.array_equal(getattr(found, name), getattr(expected, name)):
                what = "free" if name == "free" else "occupied"
                self.add_finding(
                    path, f"its {what} cells do not match its centres and frames ({name})"
                )
                return

    def _checksums(self) -> None:
        files = self.trajectory.record.get("files")
        if not isinstance(files, dict):
            return
        mark = self.trajectory.file("record")
        held = {
            p.relative_to(self.trajectory.path).as_posix()
            for p in files_under(self.trajectory.path)
        }
        for name in sorted(held - set(files) - {mark.relative_to(self.trajectory.path).as_posix()}):
            self.add_finding(
                self.trajectory.path / name, "is not listed in the record", "remove it"
            )
        for name, digest in files.items():
            if name not in held:
                path = self.trajectory.path / name
                if str(path) not in {finding.file for finding in self.findings}:
                    self.add_finding(path, "is listed in the record but missing", ABSENT)
            elif sha256(self.trajectory.path / name, MAX_BUILT_BYTES) != digest:
                self.add_finding(
                    self.trajectory.path / name, "has changed since it was built", RESTORE
                )


def _image_mask(pixels: NDArray[np.integer], size: tuple[int, int]) -> NDArray[np.bool_] | None:
    """(H, W) bool: the pixels `v * width + u`; None if there are none."""
    if not len(pixels):
        return None
    mask = np.zeros(size[0] * size[1], bool)
    mask[pixels] = True
    return mask.reshape(size[1], size[0])


def _is_close(stated: Any, expected: NDArray[np.float64]) -> bool:
    try:
        array = np.asarray(stated, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    scale = max(1.0, float(np.abs(expected).max()))
    return array.shape == expected.shape and bool(np.allclose(array, expected, atol=1e-5 * scale))
