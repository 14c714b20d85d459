"""A built dataset in another form: one LeRobot v3.0 dataset, or files as OccScanNet has them."""

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
    links_out,
    printable,
    read_json,
    sha256,
    try_lock,
)
from occgen_hub.frame_exports import EXPORTS, write_frames
from occgen_hub.index import describe, parts
from occgen_hub.lerobot.export_check import RECORD, check_content, exported, held_episodes
from occgen_hub.lerobot.v30 import CODEBASE, DEPTH_MAX, OWN, RESERVED, STATE, Fit, Layout, write
from occgen_hub.loading import REBUILD, SCHEMA, Trajectory, built, trajectories
from occgen_hub.scene_states import states_files
from occgen_hub.schema import Feature, load_schema
from occgen_hub.shards import shards, write_shards

Format = Literal["lerobot-v3.0", "occscannet", "occ3d"]
FORMATS: tuple[Format, ...] = get_args(Format)
MAX_FPS = 240
"""Frames a second: what the encoder takes at most."""

MIN_SIDE = 64
"""Pixels: encoders refuse smaller images, or crash."""


@dataclass(frozen=True)
class Plan:
    """What an export will hold. names: the trajectories' ids, sorted, and folders; leave_out: the
    folders of others; remarks: what a user should know of what is not kept as it was.
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

    root: the folder that `build` wrote; out: the new one, which appears when it is whole; to: one
    LeRobot v3.0 dataset, or the files of OccScanNet or of Occ3D, see `frame_exports`; fps: of
    LeRobot's, frames a second, where the trajectories have several rates; overwrite: whether an
    earlier export at `out` is replaced; progress: called with frames done and in all.

    In the LeRobot dataset, an episode is a trajectory, in the order of their ids. Columns that all
    trajectories have alike are kept, matrices as their numbers row after row; RGB becomes video,
    depth LeRobot's depth video. Images of different sizes are brought to the commonest, with black
    around them, and intrinsics with them. The occupancy lies beside it as Parquet, its rows in the
    order of the frames.

    Returns what a user should know, in sentences. Raises UsageError where the arguments do not fit;
    OccGenError where a trajectory cannot be read or written.
    """
    root, out = Path(root), Path(out)
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int)):
        raise UsageError(f"fps: {fps!r} is no whole number.")
    if to not in FORMATS:
        raise UsageError(f"--to {to}: is no form to export to; give one of {', '.join(FORMATS)}.")
    check_places(root, out, overwrite=overwrite)
    if to in EXPORTS:
        if fps is not None:
            raise UsageError("--fps: goes with --to lerobot-v3.0; leave it out.")
        return _export_frames(root, out, to, overwrite=overwrite, progress=progress)
    plan = plan_export(root, fps)
    count = frame_counter(plan.facts.frames, progress)
    with staged(out) as folder:
        check_places(root, out, overwrite=overwrite)  # Another may have been faster.
        write(folder, plan.layout, (Trajectory.open(path) for _, path in plan.names), count)
        _add_occupancy(root, folder, plan.leave_out)
        picture = root / PICTURE
        if picture.is_file():
            shutil.copyfile(picture, folder / PICTURE)
        features = plan.layout.lerobot_features(load_schema(SCHEMA))
        write_export_card(folder, plan.facts, features, plan.remarks)
        _write_record(folder, plan)
        for problem in check_content(folder):  # LeRobot goes on after some of its errors.
            raise problem
    return list(plan.remarks)


def update_export(root: str | Path, out: str | Path) -> list[str]:
    """Bring the occupancy of an export up to date, as `occgen-hub export --update` does.

    root: the folder that `build` wrote; out: what LeRobot's tools made of its export: episodes
    deleted, split off or merged, tasks and statistics changed. Which trajectory an episode is the
    column "episode" says. Tables and videos stay as they are.

    Returns what a user should know, in sentences. Raises UsageError where the episodes are not all
    different trajectories of `root`; OccGenError where a file cannot be read or written.
    """
    root, out = Path(root), Path(out)
    if exported(root):
        raise UsageError(f"{root}: is an export already; give the dataset that it was made from.")
    info = read_json(out / "meta/info.json")
    features = info.get("features")
    if info.get("codebase_version") != CODEBASE or not isinstance(features, dict):
        raise UsageError(f"{out}: is no LeRobot {CODEBASE} dataset; give what an export became.")
    try:
        plan = _plan_update(root, out, info, features)
        with _alone(out, out.with_name(f".{out.name}.lock")):
            (out / RECORD).unlink(missing_ok=True)  # The mark of an export that is whole.
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
    """What an export holds after it was edited; raises UsageError where that cannot be told."""
    found = {printable(path.relative_to(root).as_posix()): path for path in trajectories(root)}
    held = held_episodes(out)
    again = "export the dataset again, with --overwrite, and edit that"
    for name, count in Counter(name for name, _ in held).items():
        if name not in found:
            raise UsageError(
                f"{out}: holds the trajectory {name}, which is not in {root}; give the dataset "
                "that it was exported from."
            )
        if count > 1:
            raise UsageError(f"{out}: holds the trajectory {name} {count} times; {again}.")
    for name, length in held:
        frames = Trajectory.open(found[name]).info().get("total_frames")
        if frames != length:
            raise UsageError(
                f"{out}: holds {length} frames of the trajectory {name}, of {frames}; {again}."
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
    """Write the files of OccScanNet or Occ3D; as `export`."""
    for link in links_out(root):
        raise DatasetError(link, LINK_OUT, PUT_FILE)
    names = sorted((path.relative_to(root).as_posix(), path) for path in trajectories(root))
    facts = survey(describe(printable(name), path) for name, path in names)
    if len(facts.grids) > 1:
        raise UsageError(_several_grids(root, facts))
    count = frame_counter(facts.frames, progress)
    with staged(out) as folder:
        check_places(root, out, overwrite=overwrite)  # Another may have been faster.
        folder.mkdir()
        remarks = write_frames(folder, to, names, count)
        write_frames_card(folder, facts, EXPORTS[to].card, remarks)
        (folder / RECORD).parent.mkdir()
        record = _record_of(to, names, facts, remarks, folder)
        (folder / RECORD).write_text(dump_json(record, indent=1) + "\n", encoding="utf-8")
    return remarks


def _several_grids(root: Path, facts: Facts) -> str:
    return (
        f"{root}: its trajectories have {len(facts.grids)} different grids, which no batch can "
        "hold together; build the whole dataset with one configuration."
    )


def plan_export(root: Path, fps: int | None = None) -> Plan:
    """What an export of a dataset will hold; raises UsageError where it cannot be one dataset.

    Raises DatasetError where a link leads out of the dataset: what it leads to is no part of it.
    """
    for link in links_out(root):
        raise DatasetError(link, LINK_OUT, PUT_FILE)
    remarks: list[str] = []
    kept, leave_out = _long_enough(root, remarks)
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


def _long_enough(root: Path, remarks: list[str]) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The trajectories that LeRobot can hold, and those of one frame, which it cannot.

    Its statistics of one frame are of other shapes than those of several.
    """
    found = trajectories(root)
    single = tuple(path for path in found if Trajectory.open(path).info().get("total_frames") == 1)
    if len(single) == len(found):
        raise UsageError(f"{root}: has only trajectories of one frame, which LeRobot cannot hold.")
    if single:
        of = f"{len(single)} of {len(found)} trajectories, {single[0]} for one"
        remarks.append(f"LeRobot holds no episodes of one frame, which leaves out {of}")
    return tuple(path for path in found if path not in single), single


def _features(facts: Facts, remarks: list[str]) -> dict[str, Feature]:
    """The columns to keep: what all have alike, and LeRobot can hold under its name."""
    if facts.partial:
        listed = ", ".join(sorted(facts.partial))
        remarks.append(f"not all trajectories have alike, and the export leaves out: {listed}")
    schema = load_schema(SCHEMA)
    taken = (*RESERVED, schema.folder("rgb"), schema.folder("depth"))
    kept = {name: feature for name, feature in facts.features.items() if name not in OWN}
    lost = sorted(name for name in kept if name in taken or "/" in name)
    if lost:
        remarks.append(f"LeRobot holds no columns of these names: {', '.join(lost)}")
    return {name: feature for name, feature in kept.items() if name not in lost}


def _rate(root: Path, found: list[Trajectory], fps: int | None, remarks: list[str]) -> int:
    """Frames a second, whole, as LeRobot wants them."""
    if fps is not None:
        if not 1 <= fps <= MAX_FPS:
            raise UsageError(f"--fps {fps}: give a rate from 1 to {MAX_FPS}.")
        return fps
    rates = sorted({_stated_rate(trajectory) for trajectory in found})
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in rates[:4])
        raise UsageError(
            f"{root}: its trajectories have {len(rates)} rates ({listed} frames a second), and "
            "LeRobot holds one; say with --fps at which all are to play."
        )
    whole = min(max(1, round(rates[0])), MAX_FPS)
    if whole != rates[0]:
        remarks.append(f"LeRobot holds whole rates: {rates[0]:g} frames a second became {whole}")
    return whole


def _stated_rate(trajectory: Trajectory) -> float:
    rate = trajectory.info().get("fps")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < float("inf"):
        raise DatasetError(trajectory.file("info"), "states no usable fps", REBUILD)
    return float(rate)


def _robot(found: list[Trajectory]) -> str:
    robots = {str(trajectory.info().get("robot_type", "unknown")) for trajectory in found}
    return robots.pop() if len(robots) == 1 else "unknown"


def _size(found: list[Trajectory], remarks: list[str]) -> tuple[int, int]:
    """(width, height) that an encoder takes: of most trajectories, and of these the largest."""
    count = Counter(trajectory.image_size for trajectory in found)
    width, height = max(count, key=lambda size: (count[size], size))
    into = max(MIN_SIDE, width // 2 * 2), max(MIN_SIDE, height // 2 * 2)
    resized = sum(n for size, n in count.items() if not Fit(size, into).cut)
    if resized:
        of = f"{resized} of {len(found)} trajectories"
        remarks.append(
            f"images of {of} were brought to {into[0]} x {into[1]} pixels, black around them, and "
            "their intrinsics with them"
        )
    if into != (width, height) and Fit((width, height), into).cut:
        remarks.append(f"a video's sides are even: of {width} x {height} pixels, {into} are kept")
    return into


def _all_have(
    found: list[Trajectory], files: tuple[str, ...], what: str, remarks: list[str]
) -> bool:
    """Whether all trajectories have one of these files, told by their first frames."""
    have = [any(trajectory.file(file, 0).is_file() for file in files) for trajectory in found]
    if any(have) and not all(have):
        lacking = found[have.index(False)].path
        missing = f"{have.count(False)} of {len(have)} trajectories have none, {lacking} for one"
        remarks.append(f"{what} is left out: {missing}")
    return all(have)


def _add_occupancy(root: Path, folder: Path, leave_out: tuple[Path, ...]) -> None:
    """The dataset's shards, copied, and made anew where they are missing or out of date."""
    for path in (*shards(root), *parts(root), *states_files(root)):
        place = folder / path.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(place) as partial:
            shutil.copyfile(path, partial)
    write_shards(root, out=folder, leave_out=leave_out, drop_missing=True)


def _write_record(folder: Path, plan: Plan) -> None:
    """meta/occgen_export.json, last: which trajectory each episode is, a SHA-256 of every file."""
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
    """The record of an export to a form, whose files are in a folder."""
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
    """Call `progress` with frames done and in all, from what is called with frames done since."""
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
    """Raise UsageError where reading from `root` and writing to `out` would go wrong.

    ours: whether a folder is an export of this form, which `overwrite` replaces.
    """
    if exported(root):
        raise UsageError(f"{root}: is an export already; give the dataset that it was made from.")
    if built(root) == [root]:
        raise UsageError(f"{root}: is one trajectory; give the dataset's folder, three above it.")
    if out.name in ("", ".."):
        raise UsageError(f"{out}: give the name of a new folder as OUT.")
    source, target = root.resolve(), out.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise UsageError(f"{out}: lies inside {root}, or holds it; choose a folder beside it.")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out}: is there and no folder; choose another place.")
    if out.is_dir() and any(out.iterdir()):
        if not ours(out):
            raise UsageError(f"{out}: holds files that no export wrote; choose another place.")
        if not overwrite:
            raise UsageError(f"{out}: is there already; --overwrite replaces it.")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A path beside `out` for a new folder, which takes its place when the block ends well.

    Raises UsageError where another export is at it, OccGenError for what a disk does not take.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _alone(out, out.with_name(f".{out.name}.lock")), atomic_folder(out) as partial:
            partial.rmdir()  # LeRobot makes it; until then, and after, the lock keeps others out.
            yield partial
    except OSError as error:
        raise _unwritable(error, out) from error


def _unwritable(error: OSError, out: Path) -> OccGenError:
    place = error.filename or out
    said = error.strerror or error
    return OccGenError(f"{place}: cannot be read or written ({said}); fix that and export again.")


@contextmanager
def _alone(out: Path, lock: Path) -> Iterator[None]:
    """Hold the place of an export; raises UsageError where another export holds it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(lock, flags, 0o666), "r+b", buffering=0) as file:
        if not try_lock(file.fileno()):
            raise UsageError(
                f"{out}: another export is writing there; wait for it or choose another place."
            )
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
