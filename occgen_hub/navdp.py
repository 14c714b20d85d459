"""Export a built dataset for InternNav's NavDP loader: group folders with scene folders."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.exporting import check_places, frame_counter, staging_folder
from occgen_hub.files import LINK_OUT, PUT_FILE, dump_json, links_leaving_folder, printable, sha256
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.geometry.ply import read_ply, write_ply
from occgen_hub.loading import NAVDP, Trajectory, built
from occgen_hub.media import encode_jpeg

NavLayout = Literal["scenes", "trajectories"]
"""The current layout, many episodes in a scene's folder, and the earlier one."""

MATRICES = {
    "observation.camera_intrinsic": (3, 3),
    "observation.camera_extrinsic": (4, 4),
    "action": (4, 4),
}
"""The columns that the loader reads."""

OBSTACLE = np.array([0.0, 0.0, 0.5])
NEAR = 0.05
"""The colour of obstacles in a scene's cloud, 0 to 1, and the tolerance (sum of differences)."""

CHUNK = "chunk-000"
RGB, DEPTH = "observation.images.rgb", "observation.images.depth"


def export_navdp(
    root: str | Path,
    out: str | Path,
    *,
    layout: NavLayout = "scenes",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Write a built dataset as a root for InternNav's NavDP loader.

    root: the folder that `build` wrote; out: the new folder, which appears when it is complete;
    layout: "scenes" for `<group>/<scene>` with many episodes each, "trajectories" for the earlier
    `<group>/<scene>/<trajectory>`; overwrite: whether to replace an earlier export at `out`;
    progress: called with frames done and total.

    Returns remarks for the user on trajectories that are left out because they lack something
    that the loader reads. Raises UsageError for invalid arguments, OccGenError if a file cannot be
    read or written.
    """
    root, out = Path(root), Path(out)
    if layout not in get_args(NavLayout):
        raise UsageError(f"layout: got {layout}; give one of {', '.join(get_args(NavLayout))}.")
    check_places(root, out, overwrite=overwrite, ours=_is_navdp_export)
    for link in links_leaving_folder(root):
        raise DatasetError(link, LINK_OUT, PUT_FILE)
    found, remarks = _supported_trajectories(root)
    count = frame_counter(sum(trajectory.table().num_rows for trajectory in found), progress)
    scenes: dict[Path, list[Trajectory]] = {}
    for trajectory in found:
        scenes.setdefault(trajectory.path.parent.relative_to(root), []).append(trajectory)
    with staging_folder(out) as folder:
        check_places(
            root, out, overwrite=overwrite, ours=_is_navdp_export
        )  # Another may have finished.
        for name, members in scenes.items():
            if layout == "scenes":
                _write_scene(folder / name, members)
            else:
                for member in members:
                    _write_trajectory(folder / name / member.path.name, member)
            count(sum(member.table().num_rows for member in members))
    return remarks


def _is_navdp_export(out: Path) -> bool:
    """Whether a folder is a NavDP export and has nothing else in it."""
    places = [place for place in out.glob("*/*") if place.is_dir()]
    marked = all(any(p.glob(NAVDP)) or any(p.glob(f"*/{NAVDP}")) for p in places)
    files = any(path.is_file() for path in (*out.iterdir(), *out.glob("*/*")))
    return bool(places) and marked and not files


def _supported_trajectories(root: Path) -> tuple[list[Trajectory], list[str]]:
    """The sorted trajectories that the loader can read, and remarks on the others."""
    good, lacking = [], Counter[str]()
    example: dict[str, Path] = {}
    for path in built(root):
        trajectory = Trajectory.open(path)
        if (lack := _missing_part(trajectory)) is None:
            good.append(trajectory)
        else:
            lacking[lack] += 1
            example.setdefault(lack, path)
    if not good:
        lack, count = lacking.most_common(1)[0]
        raise UsageError(
            f"{root}: NavDP can read none of its trajectories: {count} {lack}; "
            "export a dataset that was built from InternData-N1 with depth."
        )
    total = len(good) + sum(lacking.values())
    remarks = [f"{count} of {total} trajectories {lack} and are left out, e.g. {example[lack]}"
               for lack, count in lacking.items()]  # fmt: skip
    return sorted(good, key=lambda trajectory: trajectory.path), remarks


def _missing_part(trajectory: Trajectory) -> str | None:
    """Describes what the loader needs and a trajectory lacks. None if nothing is missing."""
    schema, table = trajectory.schema, trajectory.table()
    for name in MATRICES:
        kind = schema.features[name].arrow_type()
        if name not in table.column_names or table[name].type != kind:
            return f"have no column {name} of matrices"
    if not trajectory.file("depth", 0).is_file():
        return "have no depth images"
    if not (trajectory.file("rgb", 0).is_file() or trajectory.file("video").is_file()):
        return "have no images"
    if not trajectory.file("source_cloud").is_file():
        return f"have no {schema.path('source_cloud')} with the scene's obstacles"
    return None


@dataclass
class _Scene:
    """The meta files of a scene while its episodes are written."""

    frames: int = 0
    tasks: list[dict[str, Any]] = field(default_factory=list)
    episodes: list[dict[str, Any]] = field(default_factory=list)
    stats: list[dict[str, Any]] = field(default_factory=list)


def _write_scene(folder: Path, members: list[Trajectory]) -> None:
    """Write many episodes into one folder, with only tables in data/.

    The numbers of images have equal length, because the loader sorts their names as text.
    """
    scene = _Scene()
    digits = max(6, len(str(sum(member.table().num_rows for member in members))))
    for number, member in enumerate(members):
        table, length = member.table(), member.table().num_rows
        values = {
            "episode_index": np.full(length, number),
            "index": scene.frames + np.arange(length),
            "task_index": member.column("task_index") + len(scene.tasks),
        }
        for name, column in values.items():
            at = table.column_names.index(name)
            kind = table.schema.field(at)
            table = table.set_column(at, kind, pa.array(column).cast(kind.type))
        place = folder / "data" / CHUNK / f"episode_{number:06d}.parquet"
        place.parent.mkdir(parents=True, exist_ok=True)
        with pa.OSFile(os.fsencode(place), "wb") as file:  # A path may look like a URI.
            pq.write_table(table, file, compression="zstd")
        _write_images(folder, member, scene.frames, digits)
        last = scene.frames + length - 1
        stats = member.document("stats")[0].get("stats")
        scene.stats.append(
            {
                "episode_index": number,
                "image_index": {"min": scene.frames, "max": last},
                "stats": stats,
            }
        )
        texts = member.tasks()
        scene.episodes.append({"episode_index": number, "tasks": texts, "length": length})
        scene.tasks += [
            {"task_index": len(scene.tasks) + n, "task": t} for n, t in enumerate(texts)
        ]
        scene.frames += length
    meta = folder / "meta"
    meta.mkdir()
    info = members[0].info() | {
        "total_episodes": len(members),
        "total_frames": scene.frames,
        "total_tasks": len(scene.tasks),
        "splits": {"train": f"0:{len(members)}"},
    }
    _write(meta / "info.json", [info], indent=4)
    _write(meta / "episodes.jsonl", scene.episodes)
    _write(meta / "episodes_stats.jsonl", scene.stats)
    _write(meta / "tasks.jsonl", scene.tasks)
    _write_cloud(meta / "pointcloud.ply", [member.file("source_cloud") for member in members])
    _write_mark(folder, members)


def _write_trajectory(folder: Path, member: Trajectory) -> None:
    """Write one episode into a folder: the loader's layout before March 2026."""
    for key in ("frames", "source_cloud", "info", "episodes", "stats", "tasks"):
        source = member.file(key)
        place = folder / source.relative_to(member.path)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    _write_images(folder, member, 0, 1)
    _write_mark(folder, [member])


def _write_images(folder: Path, member: Trajectory, first: int, digits: int) -> None:
    """Write the images and depth of an episode, numbered from `first` with `digits` digits."""
    images, files = member.images(), member.file("rgb", 0).is_file()
    rgb, depth = (folder / "videos" / CHUNK / name for name in (RGB, DEPTH))
    for place in (rgb, depth):
        place.mkdir(parents=True, exist_ok=True)
    for frame in range(member.table().num_rows):
        name = f"{first + frame:0{digits}d}"
        if files:
            shutil.copyfile(member.file("rgb", frame), rgb / f"{name}.jpg")
        else:
            pixels = images(frame)
            assert pixels is not None
            (rgb / f"{name}.jpg").write_bytes(encode_jpeg(pixels))
        shutil.copyfile(member.file("depth", frame), depth / f"{name}.png")


def _write_cloud(place: Path, sources: list[Path]) -> None:
    """Write a scene's cloud. If its trajectories differ in obstacles, it has those of all."""
    if len({sha256(path) for path in sources}) == 1:
        shutil.copyfile(sources[0], place)
        return
    clouds = [read_ply(path) for path in sources]
    obstacles = [_rows(cloud)[_obstacles(cloud)] for cloud in clouds]
    parts = [np.unique(part, axis=0) for part in obstacles]
    if all(np.array_equal(part, parts[0]) for part in parts):
        shutil.copyfile(sources[0], place)  # Keeps points of more than 32 bits.
        return
    rows = np.unique(np.concatenate([_rows(cloud) for cloud in clouds]), axis=0)
    write_ply(place, Cloud(rows[:, :3].astype(np.float32), rows[:, 3:].astype(np.uint8)))


def _rows(cloud: Cloud) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, 6): points and colours."""
    return np.concatenate([cloud.points, cloud.colors], axis=1, dtype=np.float64)


def _obstacles(cloud: Cloud) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """(n,): which points have the colour of obstacles."""
    away: np.ndarray[Any, np.dtype[np.bool_]] = (
        np.abs(cloud.colors / 255 - OBSTACLE).sum(axis=1) < NEAR
    )
    return away


def _write_mark(folder: Path, members: list[Trajectory]) -> None:
    """Record which episode is which, in a file that the loader does not read."""
    episodes = [
        {"episode": printable("/".join(member.path.parts[-3:])), "length": member.table().num_rows}
        for member in members
    ]
    _write(folder / NAVDP, [{"format": "navdp", "episodes": episodes}], indent=1)


def _write(path: Path, rows: list[dict[str, Any]], indent: int | None = None) -> None:
    text = "".join(dump_json(row, indent=indent) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
