"""Export a built dataset: as one LeRobot v3.0 dataset, or as OccScanNet or Occ3D files."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from occgen_hub.atomic import atomic_file, atomic_folder
from occgen_hub.card import (
    CARD,
    PICTURE,
    Facts,
    is_own,
    survey,
    write_export_card,
    write_frames_card,
)
from occgen_hub.errors import DatasetError, OccGenError, UsageError
from occgen_hub.files import (
    LINK_OUT,
    PUT_FILE,
    dump_json,
    files_under,
    links_leaving_folder,
    printable,
    read_json,
    sha256,
    try_lock,
)
from occgen_hub.frame_exports import EXPORTS, write_frames
from occgen_hub.index import describe, parts
from occgen_hub.lerobot.export_check import RECORD, check_content, exported, read_exported_episodes
from occgen_hub.lerobot.v30 import CODEBASE, DEPTH_MAX, OWN, RESERVED, STATE, Fit, Layout, write
from occgen_hub.loading import REBUILD, SCHEMA, Trajectory, built, trajectories
from occgen_hub.scene_states import states_files
from occgen_hub.schema import Feature, load_schema
from occgen_hub.shards import shards, write_shards

Format = Literal["lerobot-v3.0", "occscannet", "occ3d"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_FPS = 240
"""Frames per second: the limit of the encoder."""

MIN_SIDE = 64
"""Pixels: encoders reject smaller images, or crash."""


@dataclass(frozen=True)
class Plan:
    """What an export will hold.

    names: sorted ids of the trajectories, with their folders; leave_out: folders of trajectories
    that are left out; remarks: for the user, on what the export changes.
    """

    names: tuple[tuple[str, Path], ...]
    leave_out: tuple[Path, ...]
    facts: Facts
    layout: Layout
    remarks: tuple[str, ...]


def export(
    root: str | Path,
    out: str | Path,
    *,
    to: Format = "lerobot-v3.0",
    fps: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write a built dataset in another form, as `occgen-hub export` does.

    root: the folder that `build` wrote; out: the new folder, which appears when it is complete;
    to: one LeRobot v3.0 dataset, or the files of OccScanNet or Occ3D, see `frame_exports`; fps:
    frames per second, needed for LeRobot if the trajectories have several rates; overwrite:
    whether to replace an earlier export at `out`; progress: called with frames done and total.

    In the LeRobot dataset, every trajectory is an episode, in the order of their ids. Columns that
    all trajectories share are kept, with matrices flattened in row-major order. RGB becomes video,
    depth becomes LeRobot's depth video. Images are scaled to the most common size, with black
    borders, and their intrinsics are adjusted. The occupancy is stored beside it as Parquet.

    Returns remarks for the user. Raises UsageError for invalid arguments, and OccGenError if a
    trajectory cannot be read or written.
    """
    root, out = Path(root), Path(out)
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int)):
        raise UsageError(f"fps: {fps!r} is not an integer; give frames per second.")
    if to not in FORMATS:
        raise UsageError(f"--to {to}: is not an export format; give one of {', '.join(FORMATS)}.")
    check_places(root, out, overwrite=overwrite)
    if to in EXPORTS:
        if fps is not None:
            raise UsageError("--fps: is only for --to lerobot-v3.0; leave it out.")
        return _export_frames(root, out, to, overwrite=overwrite, progress=progress)
    plan = plan_export(root, fps)
    count = frame_counter(plan.facts.frames, progress)
    with staging_folder(out) as folder:
        check_places(root, out, overwrite=overwrite)  # Another export may have finished.
        write(folder, plan.layout, (Trajectory.open(path) for _, path in plan.names), count)
        _add_occupancy(root, folder, plan.leave_out)
        picture = root / PICTURE
        if picture.is_file():
            shutil.copyfile(picture, folder / PICTURE)
        features = plan.layout.lerobot_features(load_schema(SCHEMA))
        write_export_card(folder, plan.facts, features, plan.remarks)
        _write_record(folder, plan)
        for problem in check_content(folder):  # LeRobot continues after some errors.
            raise problem
    return list(plan.remarks)


def update_export(root: str | Path, out: str | Path) -> list[str]:
    """Bring the occupancy of an export up to date, as `occgen-hub export --update` does.

    root: the folder that `build` wrote; out: its export after LeRobot's tools deleted, split or
    merged episodes or changed tasks or statistics. The column "episode" has the trajectory of each
    episode. Tables and videos are not changed.

    Returns remarks for the user. Raises UsageError if the episodes are not distinct trajectories
    of `root`, and OccGenError if a file cannot be read or written.
    """
    root, out = Path(root), Path(out)
    if exported(root):
        raise UsageError(f"{root}: is already an export; give the dataset that it was made from.")
    info = read_json(out / "meta/info.json")
    features = info.get("features")
    if info.get("codebase_version") != CODEBASE or not isinstance(features, dict):
        raise UsageError(f"{out}: is not a LeRobot {CODEBASE} dataset; give an edited export.")
    try:
        plan = _plan_update(root, out, info, features)
        with _locked(out, out.with_name(f".{out.name}.lock")):
            (out / RECORD).unlink(missing_ok=True)  # It marks a complete export.
            _add_occupancy(root, out, plan.leave_out)
            if is_own(out / CARD):
                write_export_card(out, plan.facts, features, plan.remarks)
            _write_record(out, plan)
            for problem in check_content(out):
                (out / RECORD).unlink()
                raise problem
    except OSError as error:
        raise _unwritable(error, out) from error
    return list(plan.remarks)


def _plan_update(root: Path, out: Path, info: dict[str, Any], features: dict[str, Any]) -> Plan:
    """What an edited export holds. Raises UsageError if its trajectories cannot be identified."""
    found = {printable(path.relative_to(root).as_posix()): path for path in trajectories(root)}
    held = read_exported_episodes(out)
    again = "export the dataset again with --overwrite, and edit the new export"
    for name, count in Counter(name for name, _ in held).items():
        if name not in found:
            raise UsageError(
                f"{out}: has the trajectory {name}, which is not in {root}; give the dataset "
                "that it was exported from."
            )
        if count > 1:
            raise UsageError(f"{out}: has the trajectory {name} {count} times; {again}.")
    for name, length in held:
        frames = Trajectory.open(found[name]).info().get("total_frames")
        if frames != length:
            raise UsageError(
                f"{out}: has {length} of the {frames} frames of the trajectory {name}; {again}."
            )
    names = tuple((found[name].relative_to(root).as_posix(), found[name]) for name, _ in held)
    kept = {path for _, path in names}
    facts = survey(describe(printable(name), path) for name, path in names)
    schema = load_schema(SCHEMA)
    layout = Layout(
        fps=int(info.get("fps") or 0),
        robot_type=str(info.get("robot_type")),
        size=(0, 0),  # Nothing is encoded.
        features={},
        rgb=schema.folder("rgb") in features,
        depth=schema.folder("depth") in features,
    )
    remark = "LeRobot's tools have changed tables or videos since the export"
    leave_out = tuple(path for path in found.values() if path not in kept)
    return Plan(names, leave_out, facts, layout, (remark,))


def _export_frames(
    root: Path,
    out: Path,
    to: Format,
    *,
    overwrite: bool,
    progress: Callable[[int, int], None],
) -> list[str]:
    """Write the files of OccScanNet or Occ3D. Arguments, result and errors as in `export`."""
    for link in links_leaving_folder(root):
        raise DatasetError(link, LINK_OUT, PUT_FILE)
    names = sorted((path.relative_to(root).as_posix(), path) for path in trajectories(root))
    facts = survey(describe(printable(name), path) for name, path in names)
    if len(facts.grids) > 1:
        raise UsageError(_several_grids(root, facts))
    count = frame_counter(facts.frames, progress)
    with staging_folder(out) as folder:
        check_places(root, out, overwrite=overwrite)  # Another export may have finished.
        folder.mkdir()
        remarks = write_frames(folder, to, names, count)
        write_frames_card(folder, facts, EXPORTS[to].card, remarks)
        (folder / RECORD).parent.mkdir()
        record = _record_of(to, names, facts, remarks, folder)
        (folder / RECORD).write_text(dump_json(record, indent=1) + "\n", encoding="utf-8")
    return remarks


def _several_grids(root: Path, facts: Facts) -> str:
    return (
        f"{root}: its trajectories have {len(facts.grids)} different grids, which do not fit into "
        "one batch; build the whole dataset with one configuration."
    )


def plan_export(root: Path, fps: int | None = None) -> Plan:
    """What an export of a dataset will hold.

    Raises UsageError if the trajectories do not fit into one dataset, and DatasetError if a link
    leads out of the dataset.
    """
    for link in links_leaving_folder(root):
        raise DatasetError(link, LINK_OUT, PUT_FILE)
    remarks: list[str] = []
    kept, leave_out = _split_by_length(root, remarks)
    names = tuple(sorted((path.relative_to(root).as_posix(), path) for path in kept))
    facts = survey(describe(printable(name), path) for name, path in names)
    if len(facts.grids) > 1:
        raise UsageError(_several_grids(root, facts))
    opened = [Trajectory.open(path) for _, path in names]
    layout = Layout(
        fps=_rate(root, opened, fps, remarks),
        robot_type=_robot(opened),
        size=_size(opened, remarks),
        features=_features(facts, remarks),
        rgb=_all_have(opened, ("rgb", "video"), "RGB", remarks),
        depth=_all_have(opened, ("depth",), "depth", remarks),
        state=STATE not in facts.features and STATE not in facts.partial,
    )
    return Plan(names, leave_out, facts, layout, tuple(remarks))


def _split_by_length(root: Path, remarks: list[str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The trajectories of several frames, and those of one frame, which LeRobot does not support.

    LeRobot's statistics of a single frame have other shapes than those of several frames.
    """
    found = trajectories(root)
    single = tuple(path for path in found if Trajectory.open(path).info().get("total_frames") == 1)
    if len(single) == len(found):
        raise UsageError(
            f"{root}: has only trajectories of one frame, which LeRobot does not support."
        )
    if single:
        of = f"{len(single)} of {len(found)} trajectories, for example {single[0]}"
        remarks.append(f"LeRobot does not support episodes of one frame, which leaves out {of}")
    return tuple(path for path in found if path not in single), single


def _features(facts: Facts, remarks: list[str]) -> dict[str, Feature]:
    """The columns to keep: those that all trajectories share, under names that LeRobot allows."""
    if facts.partial:
        listed = ", ".join(sorted(facts.partial))
        remarks.append(f"columns that not all trajectories share are left out: {listed}")
    schema = load_schema(SCHEMA)
    taken = (*RESERVED, schema.folder("rgb"), schema.folder("depth"))
    kept = {name: feature for name, feature in facts.features.items() if name not in OWN}
    lost = sorted(name for name in kept if name in taken or "/" in name)
    if lost:
        remarks.append(f"columns with names that LeRobot reserves are left out: {', '.join(lost)}")
    return {name: feature for name, feature in kept.items() if name not in lost}


def _rate(root: Path, found: list[Trajectory], fps: int | None, remarks: list[str]) -> int:
    """Frames per second, an integer as LeRobot requires."""
    if fps is not None:
        if not 1 <= fps <= MAX_FPS:
            raise UsageError(f"--fps {fps}: give a rate from 1 to {MAX_FPS}.")
        return fps
    rates = sorted({_stated_rate(trajectory) for trajectory in found})
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in rates[:4])
        raise UsageError(
            f"{root}: its trajectories have {len(rates)} rates ({listed} frames per second), and "
            "LeRobot allows one; choose one for all with --fps."
        )
    whole = min(max(1, round(rates[0])), MAX_FPS)
    if whole != rates[0]:
        remarks.append(f"LeRobot's rates are integers: {rates[0]:g} frames a second became {whole}")
    return whole


def _stated_rate(trajectory: Trajectory) -> float:
    rate = trajectory.info().get("fps")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise DatasetError(trajectory.file("info"), "has no valid fps", REBUILD)
    return float(rate)


def _robot(found: list[Trajectory]) -> str:
    robots = {str(trajectory.info().get("robot_type", "unknown")) for trajectory in found}
    return robots.pop() if len(robots) == 1 else "unknown"


def _size(found: list[Trajectory], remarks: list[str]) -> tuple[int, int]:
    """(width, height): the most common image size, made even, and the largest of several."""
    count = Counter(trajectory.image_size for trajectory in found)
    width, height = max(count, key=lambda size: (count[size], size))
    into = max(MIN_SIDE, width // 2 * 2), max(MIN_SIDE, height // 2 * 2)
    resized = sum(n for size, n in count.items() if not Fit(size, into).cut)
    if resized:
        of = f"{resized} of {len(found)} trajectories"
        remarks.append(
            f"images of {of} were scaled to {into[0]} x {into[1]} pixels with black borders, and "
            "their intrinsics adjusted"
        )
    if into != (width, height) and Fit((width, height), into).cut:
        remarks.append(f"video sizes are even: {width} x {height} pixels were cut to {into}")
    return into


def _all_have(
    found: list[Trajectory], files: tuple[str, ...], what: str, remarks: list[str]
) -> bool:
    """Whether all trajectories have one of these files. Checks their first frames."""
    have = [any(trajectory.file(file, 0).is_file() for file in files) for trajectory in found]
    if any(have) and not all(have):
        lacking = found[have.index(False)].path
        missing = f"{have.count(False)} of {len(have)} trajectories have none"
        remarks.append(f"{what} is left out: {missing}, for example {lacking}")
    elif not any(have):
        remarks.append(f"{what} is left out: the trajectories have none")
    return all(have)


def _add_occupancy(root: Path, folder: Path, leave_out: tuple[Path, ...]) -> None:
    """Copy the dataset's shards, and write those that are missing or out of date."""
    for path in (*shards(root), *parts(root), *states_files(root)):
        place = folder / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as partial:
            shutil.copyfile(path, partial)
    write_shards(root, out=folder, leave_out=leave_out, drop_missing=True)


def _write_record(folder: Path, plan: Plan) -> None:
    """Write meta/occgen_export.json: the trajectory of each episode, a SHA-256 of each file."""
    record = _record_of(f"lerobot-{CODEBASE}", plan.names, plan.facts, plan.remarks, folder)
    record["lerobot"] = version("lerobot")
    if plan.layout.depth:
        record["depth_max"] = DEPTH_MAX
    (folder / RECORD).write_text(dump_json(record, indent=1) + "\n", encoding="utf-8")


def _record_of(
    form: str,
    names: Iterable[tuple[str, Path]],
    facts: Facts,
    remarks: Iterable[str],
    folder: Path,
) -> dict[str, Any]:
    """The record of an export of this form, with its files in `folder`."""
    episodes = []
    for name, path in names:
        trajectory = Trajectory.open(path)
        episodes.append(
            {
                "episode": printable(name),
                "length": int(trajectory.info()["total_frames"]),
                "scale": trajectory.record["scene"].get("scale"),
                "image_size": list(trajectory.image_size),
                "record": sha256(trajectory.file("record")),
            }
        )
    shape, voxel_size, pc_range = next(iter(facts.grids))
    return {
        "format": form,
        "version": version("occgen-hub"),
        "grid": {"voxel_size": voxel_size, "pc_range": list(pc_range), "shape": list(shape)},
        "weights": [
            {"network": network, "license": licence} for network, licence in sorted(facts.licences)
        ],
        "notes": list(remarks),
        "episodes": episodes,
        "files": {
            path.relative_to(folder).as_posix(): sha256(path) for path in files_under(folder)
        },
    }


# Places


def frame_counter(total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """A function that adds to the frames done, then calls `progress` with frames done and total."""
    done = 0

    def count(frames: int) -> None:
        nonlocal done
        done += frames
        progress(done, total)

    count(0)
    return count


def check_places(
    root: Path, out: Path, *, overwrite: bool, ours: Callable[[Path], bool] = exported
) -> None:
    """Raise UsageError unless `root` can be read and `out` be written.

    ours: whether a folder is an export of this form, which `overwrite` replaces.
    """
    if exported(root):
        raise UsageError(f"{root}: is already an export; give the dataset that it was made from.")
    if built(root) == [root]:
        raise UsageError(f"{root}: is a trajectory; give the dataset, three folders above it.")
    if out.name in ("", ".."):
        raise UsageError(f"{out}: give the name of a new folder as OUT.")
    source, target = root.resolve(), out.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise UsageError(f"{out}: is inside {root}, or contains it; choose a folder beside it.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: exists and is not a folder; choose another path.")
    if out.is_dir() and any(out.iterdir()):
        if not ours(out):
            raise UsageError(f"{out}: has files that no export wrote; choose another path.")
        if not overwrite:
            raise UsageError(f"{out}: already exists; --overwrite replaces it.")


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A path beside `out` for a new folder, which replaces `out` if the block succeeds.

    Raises UsageError if another export is writing there, OccGenError for errors of the disk.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out, out.with_name(f".{out.name}.lock")), atomic_folder(out) as partial:
            partial.rmdir()  # LeRobot creates it. The lock keeps others out.
            yield partial
    except OSError as error:
        raise _unwritable(error, out) from error


def _unwritable(error: OSError, out: Path) -> OccGenError:
    place = error.filename or out
    reason = error.strerror or error
    return OccGenError(f"{place}: cannot be read or written ({reason}); fix that and export again.")


@contextmanager
def _locked(out: Path, lock: Path) -> Iterator[None]:
    """Lock the output of an export. Raises UsageError if another export has locked it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(lock, flags, 0o666), "r+b", buffering=0) as file:
        if not try_lock(file.fileno()):
            raise UsageError(
                f"{out}: another export is writing there; wait for it or choose another path."
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
