"""Bad input: each mistake gives one sentence that names the file, and the rest is built.

Each table of rows has one outcome: `FAILS` (the episode is reported and skipped, the other is
built), `TOLERATED` (built, possibly with a note), `TAMPERED` (a built dataset that `validate`
refuses), `BAD_WEIGHTS` and `CONFIGS` (a usage error). `HOSTILE`, further down, lists the malicious
rows for every kind of file that is read. Every row has to stay within `SECONDS` and `MEGABYTES`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.lib import format as npy
from PIL import Image

from occgen_hub import cli
from occgen_hub.builder import load_builder
from occgen_hub.config import load_config
from occgen_hub.episode_build import Settings
from occgen_hub.job import Job, list_episodes
from occgen_hub.runtime.build import build_dataset
from occgen_hub.sample import make_sample
from occgen_hub.validation import validate

GOOD, BAD = "sample_zed/house_000/trajectory_0", "sample_zed/house_000/trajectory_1"
COARSE = ("--set", "voxel_size=0.25")
RGB, DEPTH = "videos/chunk-000/observation.images.rgb", "videos/chunk-000/observation.images.depth"
VIDEO = "videos/chunk-000/observation.video.trajectory/episode_000000.mp4"
PARQUET = "data/chunk-000/episode_000000.parquet"
CLOUD = "data/chunk-000/path.ply"
INFO, TASKS = "meta/info.json", "meta/tasks.jsonl"
EPISODES, STATS = "meta/episodes.jsonl", "meta/episodes_stats.jsonl"
K = "observation.camera_intrinsic"

Break = Callable[[Path], object]

SECONDS, MEGABYTES = 30, 500
"""Limits for a command on bad input. The memory that the process had before is not counted."""


@dataclass(frozen=True)
class Run:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes too long or too much memory."""
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    before, start = memory("VmRSS"), time.perf_counter()
    yield
    assert time.perf_counter() - start < SECONDS
    assert memory("VmHWM") - before < MEGABYTES << 10


def memory(which: str) -> int:
    """The memory of this process in kB: VmRSS is the current use, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad") / "tree"
    make_sample(out, trajectories=2, frames=2, seed=3)
    shutil.rmtree(out / "ground_truth")
    return out


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bad_built") / "out"
    builder = load_builder("internnav", tree)
    settings = Settings(load_config(None, COARSE[1:]))
    assert not build_dataset(Job(builder, list_episodes(builder), out, settings)).failures
    return out


@pytest.fixture
def source(tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tree, tmp_path / "tree"))


@pytest.fixture
def run_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Run]:
    """Runs the command line in this process."""

    def run(*args: Any) -> Run:
        monkeypatch.setattr(sys, "argv", ["occgen-hub", *map(str, args)])
        capsys.readouterr()
        with bounded(), pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        code = ended.value.code
        assert isinstance(code, int)
        return Run(code, out, err)

    return run


# Ways to break a file


def breakages(path: str) -> dict[str, Break]:
    """Ways to break a file: missing, empty, cut in half, random bytes, a folder."""
    return {
        "missing": lambda t: (t / path).unlink(),
        "empty": lambda t: (t / path).write_bytes(b""),
        "cut in half": lambda t: cut(t / path),
        "of random bytes": lambda t: (t / path).write_bytes(os.urandom(999)),
        "a folder": lambda t: ((t / path).unlink(), (t / path).mkdir()),
    }


def devices(path: str) -> dict[str, Break]:
    """Replacements for a file that cannot be read like one."""
    return {
        "a pipe": lambda t: ((t / path).unlink(), os.mkfifo(t / path)),
        "a link to nowhere": lambda t: ((t / path).unlink(), (t / path).symlink_to("nowhere")),
        "an endless device": lambda t: ((t / path).unlink(), (t / path).symlink_to("/dev/zero")),
    }


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def text(path: str, content: str | bytes) -> Break:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda t: (t / path).write_bytes(data)


def info(**values: Any) -> Break:
    """Change values of info.json."""

    def change(folder: Path) -> None:
        path = folder / INFO
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def matrices(name: str, change: Callable[[np.ndarray], Any]) -> Break:
    """Replace a column of matrices by what `change` makes of it."""

    def apply(folder: Path) -> None:
        values = np.array(pq.read_table(folder / PARQUET)[name].to_pylist(), np.float32)
        changed = change(values)
        column(name, changed.tolist() if isinstance(changed, np.ndarray) else changed)(folder)

    return apply


def setting(name: str, place: tuple[Any, ...], value: float) -> Break:
    def change(values: np.ndarray) -> np.ndarray:
        values[(-1, *place)] = value
        return values

    return matrices(name, change)


def column(name: str, values: Any, kind: Any = None) -> Break:
    """Add or replace a column of the parquet."""

    def apply(folder: Path) -> None:
        table = pq.read_table(folder / PARQUET).replace_schema_metadata()
        if name in table.column_names:
            old = table.schema.field(name).type
            table = table.drop_columns([name])
            new = pa.array(values, kind or old)
        else:
            new = values if isinstance(values, pa.Array) else pa.array(values, kind)
        pq.write_table(table.append_column(name, new), folder / PARQUET)

    return apply


def rewrite(change: Callable[[pa.Table], pa.Table]) -> Break:
    return lambda t: pq.write_table(change(pq.read_table(t / PARQUET)), t / PARQUET)


def image(path: str, mode: str, size: tuple[int, int] = (320, 240), kind: str = "PNG") -> Break:
    return lambda t: Image.new(mode, size).save(t / path, kind)


def png(width: int, height: int, data: bytes = b"", depth: int = 16) -> bytes:
    """A grey PNG with any size in its header."""

    def chunk(name: bytes, body: bytes) -> bytes:
        checked = name + body
        return struct.pack(">I", len(body)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def jpeg_claiming(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (320, 240)).save(file, "JPEG")
    return file.getvalue().replace(
        struct.pack(">HH", 240, 320), struct.pack(">HH", height, width), 1
    )


def mp4_claiming(frames: int) -> Break:
    """Remove the images, and let the video's tables claim that many frames and that duration."""

    def apply(folder: Path) -> None:
        shutil.rmtree(folder / RGB)
        content = bytearray((folder / VIDEO).read_bytes())
        for box, place in ((b"stsz", 12), (b"stts", 12), (b"mdhd", 20), (b"mvhd", 20)):
            start = content.index(box) + place
            content[start : start + 4] = struct.pack(">I", frames)
        (folder / VIDEO).write_bytes(content)

    return apply


def renamed(folder: str, names: dict[str, str]) -> Break:
    def apply(trajectory: Path) -> None:
        for old, new in names.items():
            (trajectory / folder / old).rename(trajectory / folder / new)

    return apply


def copied(old: str, new: str) -> Break:
    return lambda t: shutil.copy(t / old, t / new)


def scaled(factors: list[float]) -> Callable[[np.ndarray], np.ndarray]:
    return lambda poses: poses @ np.diag([*factors, 1.0])


def flattened(values: np.ndarray) -> np.ndarray:
    values[:, 2, 2] = 0
    return values


def ragged(values: np.ndarray) -> list[Any]:
    rows = values.tolist()
    rows[-1][2] = rows[-1][2][:3]
    return rows


def missing_value(values: np.ndarray) -> list[Any]:
    return [*values.tolist()[:-1], None]


def inner_missing_value(values: np.ndarray) -> list[Any]:
    rows = values.tolist()
    rows[-1][1][1] = None
    return rows


MATRIX = pa.list_(pa.list_(pa.float32()))
HALVES = pa.list_(pa.list_(pa.float16()))
WORDS = pa.list_(pa.list_(pa.string()))

FAILS: dict[str, tuple[Break, str]] = {
    **{f"jpeg {k}": (v, f"{RGB}/1.jpg") for k, v in breakages(f"{RGB}/1.jpg").items()},
    **{f"first jpeg {k}": (v, f"{RGB}/0.jpg") for k, v in breakages(f"{RGB}/0.jpg").items()},
    **{f"png {k}": (v, f"{DEPTH}/1.png") for k, v in breakages(f"{DEPTH}/1.png").items()},
    **{f"parquet {k}": (v, PARQUET) for k, v in breakages(PARQUET).items()},
    **{
        f"{Path(path).name} {k}": (v, path)
        for path in (INFO, TASKS, EPISODES, STATS)
        for k, v in breakages(path).items()
        if not (path != INFO and k == "empty")
    },
    **{
        f"{Path(path).name} {k}": (v, path)
        for path in (f"{RGB}/1.jpg", f"{DEPTH}/0.png", PARQUET, INFO, TASKS)
        for k, v in devices(path).items()
    },
    "jpeg is a link out of the tree": (
        lambda t: ((t / RGB / "1.jpg").unlink(), (t / RGB / "1.jpg").symlink_to("/etc/passwd")),
        f"{RGB}/1.jpg",
    ),
    "video tables claim two billion frames": (mp4_claiming((1 << 31) - 1), VIDEO),
    "jpeg is text": (text(f"{RGB}/1.jpg", "hello"), f"{RGB}/1.jpg"),
    "jpeg claims 65500 x 65500": (
        lambda t: (t / RGB / "1.jpg").write_bytes(jpeg_claiming(65500, 65500)),
        f"{RGB}/1.jpg",
    ),
    "first jpeg claims 9000 x 9000": (
        lambda t: (t / RGB / "0.jpg").write_bytes(jpeg_claiming(9000, 9000)),
        f"{RGB}/0.jpg",
    ),
    "jpeg of another size": (image(f"{RGB}/1.jpg", "RGB", (300, 240), "JPEG"), f"{RGB}/1.jpg"),
    "jpeg is a gif": (image(f"{RGB}/1.jpg", "L", (320, 240), "GIF"), f"{RGB}/1.jpg"),
    "jpeg is a postscript file": (
        text(f"{RGB}/1.jpg", "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 320 240\n"),
        f"{RGB}/1.jpg",
    ),
    "depth claims 100000 x 100000": (
        lambda t: (t / DEPTH / "1.png").write_bytes(png(100_000, 100_000)),
        f"{DEPTH}/1.png",
    ),
    "depth claims no pixels": (
        lambda t: (t / DEPTH / "1.png").write_bytes(png(0, 0)),
        f"{DEPTH}/1.png",
    ),
    "depth has too little data": (
        lambda t: (t / DEPTH / "1.png").write_bytes(png(320, 240, b"\0" * 99)),
        f"{DEPTH}/1.png",
    ),
    "depth is 8-bit grey": (image(f"{DEPTH}/1.png", "L"), f"{DEPTH}/1.png"),
    "depth is colour": (image(f"{DEPTH}/1.png", "RGB"), f"{DEPTH}/1.png"),
    "depth has a palette": (image(f"{DEPTH}/1.png", "P"), f"{DEPTH}/1.png"),
    "depth of another size": (image(f"{DEPTH}/1.png", "I;16", (160, 120)), f"{DEPTH}/1.png"),
    "one image too many": (copied(f"{RGB}/1.jpg", f"{RGB}/2.jpg"), RGB),
    "one depth image too many": (copied(f"{DEPTH}/1.png", f"{DEPTH}/2.png"), DEPTH),
    "a missing frame number": (renamed(RGB, {"1.jpg": "2.jpg"}), f"{RGB}/1.jpg"),
    "rgb and depth have different frame numbers": (
        renamed(RGB, {"1.jpg": "2.jpg", "0.jpg": "1.jpg"}),
        f"{RGB}/0.jpg",
    ),
    "a duplicate frame": (copied(f"{RGB}/1.jpg", f"{RGB}/001.jpg"), f"{RGB}/1.jpg"),
    "all images and the video missing": (
        lambda t: (shutil.rmtree(t / RGB), (t / VIDEO).unlink()),
        "videos",
    ),
    "images missing and the video is text": (
        lambda t: (shutil.rmtree(t / RGB), (t / VIDEO).write_text("hello")),
        VIDEO,
    ),
    "images missing and the video is a playlist": (
        lambda t: (shutil.rmtree(t / RGB), (t / VIDEO).write_text("#EXTM3U\n#EXTINF:1,\na.ts\n")),
        VIDEO,
    ),
    "no data folder": (lambda t: shutil.rmtree(t / "data"), PARQUET),
    "no meta folder": (lambda t: shutil.rmtree(t / "meta"), INFO),
    "no depth": (lambda t: shutil.rmtree(t / DEPTH), BAD),
    "parquet without rows": (rewrite(lambda table: table[:0]), PARQUET),
    "parquet of two million rows": (
        lambda t: pq.write_table(pa.table({"a": np.zeros(1 << 21, np.int8)}), t / PARQUET),
        PARQUET,
    ),
    "parquet that unpacks to gigabytes": (
        lambda t: pq.write_table(gigabytes_of_text(), t / PARQUET),
        PARQUET,
    ),
    "parquet with a duplicate column": (
        rewrite(lambda table: table.append_column("index", table["index"])),
        PARQUET,
    ),
    "no action column": (rewrite(lambda table: table.drop_columns(["action"])), "action"),
    "no intrinsics column": (rewrite(lambda table: table.drop_columns([K])), K),
    "action with a missing value": (matrices("action", missing_value), "action"),
    "action with a missing number": (matrices("action", inner_missing_value), "action"),
    "action of two shapes": (matrices("action", ragged), "action"),
    "action of 3 x 4": (matrices("action", lambda values: values[:, :3]), "action"),
    "action is float16": (
        column("action", np.eye(4, dtype=np.float16)[None].repeat(2, 0).tolist(), HALVES),
        "action",
    ),
    "action is words": (column("action", [[["a"] * 4] * 4] * 2, WORDS), "action"),
    "action is numbers": (column("action", [1, 2], pa.int64()), "action"),
    "action is empty lists": (column("action", [[], []]), "action"),
    "nan pose": (setting("action", (0, 3), np.nan), "action"),
    "infinite pose": (setting("action", (1, 3), np.inf), "action"),
    "pose that scales": (matrices("action", scaled([2, 2, 2])), "action"),
    "pose that mirrors": (matrices("action", scaled([1, 1, -1])), "action"),
    "pose of zeros": (matrices("action", np.zeros_like), "action"),
    "pose with a projective row": (setting("action", (3, 0), 1), "action"),
    "pose 1000 km away": (setting("action", (0, 3), 1e6), BAD),
    "pose at the end of float32": (setting("action", (0, 3), 3e38), BAD),
    "fx of 0": (setting(K, (0, 0), 0), K),
    "fx below 0": (setting(K, (0, 0), -200), K),
    "fx is nan": (setting(K, (0, 0), np.nan), K),
    "fx is infinite": (setting(K, (0, 0), np.inf), K),
    "fx of 1e-30": (setting(K, (0, 0), 1e-30), "focal length"),
    "fx of 1e30": (setting(K, (1, 1), 1e30), "focal length"),
    "K with skew": (setting(K, (0, 1), 3), K),
    "singular K": (matrices(K, flattened), K),
    "principal point outside the image": (setting(K, (0, 2), 1e6), "principal point"),
    "principal point below zero": (setting(K, (0, 2), -1), "principal point"),
    "info.json is a list": (text(INFO, "[]"), INFO),
    "info.json nested deeply": (text(INFO, '{"a":' * 100_000), INFO),
    "info.json nested and closed": (text(INFO, '{"a":' * 900 + "1" + "}" * 900), INFO),
    "info.json with a number of many digits": (text(INFO, '{"fps": ' + "1" * 9999 + "}"), INFO),
    "info.json with NaN": (text(INFO, '{"fps": NaN}'), INFO),
    "info.json with a number beyond float64": (text(INFO, '{"fps": 1e999}'), INFO),
    "info.json of more than 64 MB": (
        lambda t: os.truncate(t / INFO, 65 << 20),
        INFO,
    ),
    "a bad line": (text(TASKS, '{"task_index": 0, "task": "go"}\n{"task_index": 1,\n'), "line 2"),
    "a line that is not an object": (text(EPISODES, "[1]\n"), "line 1"),
    "invalid utf-8": (text(TASKS, b'{"task_index": 0, "task": "\xff\xfe"}\n'), "line 1"),
    "NaN in a line": (text(EPISODES, '{"episode_index": 0, "length": NaN}\n'), "line 1"),
}  # fmt: skip


def gigabytes_of_text() -> pa.Table:
    """4 GB of text in a file of a few kilobytes."""
    return pa.table({"a": pa.array(["x" * (1 << 15)]).take(pa.array(np.zeros(1 << 14, np.int32)))})


@pytest.mark.parametrize("name", FAILS)
def test_bad_episode_is_reported_and_leaves_no_files(
    name: str, source: Path, built: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built / GOOD, out / GOOD)
    make_bad, named = FAILS[name]
    make_bad(source / BAD)

    ended = run_command("build", "--input", source, "--output", out, *COARSE)

    assert ended.code == 1
    reason = only_failure(out)
    assert f"failed  {BAD}: {reason.removeprefix(f'{BAD}: ')}\n" in ended.err
    assert named in reason
    assert BAD in reason
    assert_sentence(reason)
    assert "0 built, 1 already there, 1 failed of 2 episodes" in ended.out
    assert sorted(p.name for p in (out / GOOD).parent.iterdir()) == [Path(GOOD).name]


def only_failure(out: Path) -> str:
    (row,) = (json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines())
    assert set(row) == {"episode", "reason"}
    assert row["episode"] == BAD
    return str(row["reason"])


def assert_sentence(reason: str) -> None:
    assert "\n" not in reason
    assert reason.endswith(".")
    assert "; " in reason  # what is wrong; what to do
    assert len(reason) < 600
    assert not re.search(r"Error\b|Errno|Exception|0x[0-9a-f]{6}", reason)


# Tolerated input


def link_files_outside(folder: Path) -> None:
    """Replace all files by links to files elsewhere, as in the Hub's cache."""
    blobs = folder.parents[3] / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))


def link_whole_trajectory(folder: Path) -> None:
    moved = folder.rename(folder.parents[3] / "elsewhere")
    folder.symlink_to(moved)
    (folder.parent / "loop").symlink_to(folder.parents[2])


def read_only(folder: Path) -> None:
    for path in folder.rglob("*"):
        path.chmod(0o444 if path.is_file() else 0o555)


def video_of_no_frames(folder: Path) -> None:
    import av

    with av.open(str(folder / VIDEO), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        container.start_encoding()


TOLERATED: dict[str, tuple[Break, str]] = {
    "nothing is wrong": (lambda t: None, ""),
    **{
        f"video {k}": (v, "a new video is encoded" if k not in ("missing", "a folder") else "")
        for k, v in breakages(VIDEO).items()
    },
    **{f"video {k}": (v, "") for k, v in devices(VIDEO).items()},
    "video is text": (text(VIDEO, "hello"), "a new video is encoded"),
    "video without frames": (video_of_no_frames, "a new video is encoded"),
    "no cloud": (lambda t: (t / CLOUD).unlink(), ""),
    "cloud is text": (text(CLOUD, "hello"), "path.ply is not a PLY file: left out"),
    "cloud cut in half": (lambda t: cut(t / CLOUD), "path.ply is shorter than its"),
    "cloud claims a trillion vertices": (
        text(CLOUD, "ply\nformat binary_little_endian 1.0\nelement vertex 1000000000000\n"
             "property float x\nproperty float y\nproperty float z\nend_header\n"),
        "path.ply is shorter than its",
    ),
    "paths that lead out of the tree": (
        info(data_path="../../../../etc/passwd", video_path="/etc/passwd", path="/dev/zero"), ""
    ),
    "features are a list": (info(features=[1, 2]), ""),
    "features are numbers": (info(features={"action": 3}), ""),
    "features are nested": (info(features={"action": {"dtype": {"a": [1]}}}), ""),
    "thousands of features": (
        info(features={f"f{n}": {} for n in range(5000)}), "which the parquet lacks"
    ),
    "no features": (info(features=None), ""),
    "fps is null": (info(fps=None), ""),
    "fps is 0": (info(fps=0), ""),
    "fps is negative": (info(fps=-10), ""),
    "fps is a word": (info(fps="fast"), ""),
    "fps is 1e308": (info(fps=1e308), ""),
    "fps of 4000 digits": (info(fps=10**4000), ""),
    "fps is unusable and there is no video": (
        lambda t: (info(fps="fast")(t), (t / VIDEO).unlink()), "30 is assumed"
    ),
    "total_frames is a word": (info(total_frames="many"), ""),
    "total_frames is a list": (info(total_frames=[[[7]]]), "info.json says 7 frames"),
    "robot_type is a list": (info(robot_type=[1]), ""),
    "robot_type is half a surrogate pair": (info(robot_type="\ud800"), ""),
    "info.json is an empty object": (text(INFO, "{}"), ""),
    "tasks of strange types": (
        text(TASKS, '{"task_index": "a", "task": 3}\n{"task": null}\n{}\n{"task_index": [0]}\n'), ""
    ),
    "no task at all": (
        lambda t: (text(TASKS, "")(t), text(EPISODES, "{}")(t)), "the task is named 'navigate'"
    ),
    "empty episodes.jsonl": (text(EPISODES, ""), ""),
    "a task with half a surrogate pair": (
        text(EPISODES, '{"episode_index": 0, "tasks": ["go \\ud83d on"], "length": 2}'), ""
    ),
    "a task with NaN inside": (
        text(EPISODES, json.dumps({"episode_index": 0, "tasks": ['{"instruction": NaN}']})), ""
    ),
    "a task nested deeply": (
        text(EPISODES, json.dumps({"episode_index": 0, "tasks": ['{"a":' * 9999]})), ""
    ),
    "other files beside the images": (
        lambda t: [(t / RGB / name).write_text("x") for name in ("x.jpg", ".DS_Store", "0.txt")], ""
    ),
    "names with leading zeros": (renamed(RGB, {"0.jpg": "000.jpg", "1.jpg": "001.jpg"}), ""),
    "names that end in jpeg": (renamed(RGB, {"0.jpg": "0.jpeg", "1.jpg": "1.JPEG"}), ""),
    "frames are counted from 1": (
        lambda t: (renamed(RGB, {"1.jpg": "2.jpg", "0.jpg": "1.jpg"})(t),
                   renamed(DEPTH, {"1.png": "2.png", "0.png": "1.png"})(t)), ""
    ),
    "grey jpeg": (image(f"{RGB}/1.jpg", "L", (320, 240), "JPEG"), ""),
    "png under the name of a jpeg": (image(f"{RGB}/1.jpg", "RGBA"), ""),
    "files behind links": (link_files_outside, ""),
    "trajectory behind a link, and a link loop": (link_whole_trajectory, ""),
    "read-only files": (read_only, ""),
    "extrinsic with nan": (
        setting("observation.camera_extrinsic", (0, 0), np.nan), "camera_extrinsic holds a number"
    ),
    "extrinsic of another shape": (
        matrices("observation.camera_extrinsic", lambda values: values[:, :3]), "expected float32"
    ),
    "column with a missing value": (column("reward", [1.0, None]), "column reward lacks the value"),
    "column of infinity": (column("reward", [1.0, np.inf]), "column reward holds a number"),
    "column at the end of float64": (column("reward", [1.0, 1e308]), "column reward holds"),
    "column of dates": (column("when", [0, 1], pa.timestamp("s")), "column when is timestamp"),
    "column of words": (column("word", ["a", "\n"]), ""),
    "column of bytes": (column("bytes", [b"a", b"\xff"]), "column bytes is binary"),
    "column in lists of fixed size": (
        column("speed", [[1, 2], [3, 4]], pa.list_(pa.float32(), 2)), ""
    ),
    "action in lists of fixed size": (
        column("action", [np.eye(4).tolist()] * 2, pa.list_(pa.list_(pa.float32(), 4), 4)), ""
    ),
    "action is float64": (
        column("action", [np.eye(4).tolist()] * 2, pa.list_(pa.list_(pa.float64()))), ""
    ),
    "task_index out of range": (column("task_index", [7, -3], pa.int64()), ""),
    "task_index beyond int64": (column("task_index", [2**64 - 1, 0], pa.uint64()), ""),
    "a column with a reserved name": (
        column("observation.camera_extrinsic_occ", ["a", "b"]), "camera_extrinsic_occ"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOLERATED)
def test_tolerated_input_is_built_with_the_expected_note(
    name: str, source: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    make_bad, note = TOLERATED[name]
    shutil.rmtree(source / GOOD)
    make_bad(source / BAD)

    ended = run_command("build", "--input", source, "--output", out, *COARSE)

    assert ended.code == 0, ended.err
    notes = [line for line in ended.err.splitlines() if f"note    {BAD}" in line]
    notes = [line for line in notes if "the camera stands still" not in line]  # Two equal poses.
    assert all(len(line) < 600 for line in notes)
    (known,) = [line for line in notes if "JSON inside strings" in line] or [""]
    assert [line for line in notes if note in line] if note else notes in ([], [known]), ended.err
    assert not (out / "failures.jsonl").exists()
    report = validate(out)
    assert (report.trajectories, report.findings) == (1, ())


def test_damaged_video_is_encoded_again(source: Path, tmp_path: Path, run_command: Any) -> None:
    from occgen_hub.media import video_facts

    cut(source / BAD / VIDEO)
    assert run_command("build", "--input", source, "--output", tmp_path / "out", *COARSE).code == 0
    facts = video_facts(
        tmp_path / "out" / BAD / "videos/chunk-000/observation.video.trajectory/reference.mp4"
    )
    assert (facts.frames, facts.size) == (2, (320, 240))


@pytest.mark.parametrize("media", ["link", "copy"])
def test_dataset_from_linked_source_files_has_no_links(
    media: str, source: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    link_files_outside(source / BAD)
    ended = run_command(
        "build", "--input", source, "--output", tmp_path / "o", "--media", media, *COARSE
    )
    assert ended.code == 0, ended.err
    assert not [path for path in (tmp_path / "o").rglob("*") if path.is_symlink()]
    assert validate(tmp_path / "o").valid


def test_file_that_disappears_during_a_build_is_reported(
    source: Path, tmp_path: Path, run_command: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from occgen_hub.builders import internnav

    read, path = internnav.read_depth, source / BAD / DEPTH / "1.png"

    def gone(where: Path, size: tuple[int, int]) -> Any:
        path.unlink(missing_ok=True)
        return read(where, size)

    monkeypatch.setattr(internnav, "read_depth", gone)
    ended = run_command("build", "--input", source, "--output", tmp_path / "out", *COARSE)
    assert ended.code == 1
    assert_sentence(only_failure(tmp_path / "out"))
    assert f"{path}: is missing" in ended.err
    assert sorted(p.name for p in (tmp_path / "out" / BAD).parent.iterdir()) == ["trajectory_0"]


def test_finalize_reads_no_huge_files(
    source: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    assert run_command("build", "--input", source, "--output", out, *COARSE).code == 0
    before = contents(out)
    files = [*(out / "index").iterdir(), out / "report.json", out / "failures.jsonl"]
    for path in files:
        with path.open("wb") as file:
            file.truncate(1 << 33)
    assert run_command("finalize", out).code == 0
    assert contents(out) == before
    with (out / ".logs/shard-0.jsonl").open("wb") as file:
        file.truncate(1 << 33)
    assert "did not finish" in run_command("finalize", out).out


def test_built_trajectory_is_kept_when_its_source_breaks(
    source: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    out = tmp_path / "out"
    assert run_command("build", "--input", source, "--output", out, *COARSE).code == 0
    before = contents(out)
    cut(source / BAD / RGB / "1.jpg")
    assert run_command("build", "--input", source, "--output", out, *COARSE).code == 1
    (out / "failures.jsonl").unlink()
    assert contents(out) == before


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a dataset, without the report and logs of the last run."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    paths = (path for path in paths if not {"report.json", ".logs"} & set(path.parts))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# The real command, in its own process

BOMBS = {
    "parquet that unpacks to gigabytes": FAILS["parquet that unpacks to gigabytes"],
    "one row of a billion numbers": (
        lambda t: pq.write_table(
            pa.table({"a": pa.ListArray.from_arrays([0, 1 << 27], np.zeros(1 << 27, np.int8))}),
            t / PARQUET,
        ),
        PARQUET,
    ),
    "first depth image of 64 million pixels": (
        lambda t: (
            shutil.rmtree(t / RGB),
            (t / DEPTH / "0.png").write_bytes(png(8192, 8190, bytes(8190 * (2 * 8192 + 1)))),
        ),
        DEPTH,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if n == 0 else pytest.param(name, marks=pytest.mark.long)
        for n, name in enumerate(BOMBS)
    ],
)
def test_real_command_uses_bounded_memory_on_bombs(name: str, source: Path, tmp_path: Path) -> None:
    make_bad, named = BOMBS[name]
    make_bad(source / BAD)
    out = tmp_path / "out"
    command = ["build", "--input", source, "--output", out, *COARSE]

    done = run_process(*command)

    assert done.returncode == 1
    assert named in only_failure(out)
    assert_sentence(only_failure(out))
    assert "Traceback" not in done.stderr
    assert peak_memory(done) < 2 << 20


def run_process(*args: Any) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process. The last line of its stderr is its peak memory."""
    code = (
        "import atexit, re, sys; from pathlib import Path; from occgen_hub.cli import main; "
        "status = Path('/proc/self/status'); "
        "peak = lambda: re.search(r'VmHWM:.*', status.read_text())[0]; "
        "atexit.register(lambda: print('\\n' + peak(), file=sys.stderr)); main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def peak_memory(done: subprocess.CompletedProcess[str]) -> int:
    """In kB."""
    return int(done.stderr.splitlines()[-1].split()[1])


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.long), 2])
def test_real_command_reports_a_failure_and_builds_the_rest(
    workers: int, source: Path, tmp_path: Path
) -> None:
    cut(source / BAD / PARQUET)
    done = run_process(
        "build", "--input", source, "--output", tmp_path / "o", "--workers", workers, *COARSE
    )
    assert done.returncode == 1
    assert "1 built, 0 already there, 1 failed of 2 episodes" in done.stdout
    assert validate(tmp_path / "o").findings == ()
    assert not (tmp_path / "o" / BAD).exists()
    assert_sentence(only_failure(tmp_path / "o"))
    assert only_failure(tmp_path / "o") in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


# Wrong usage


def yaml_bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, "pc_range: *a11", "voxel_size: *a11"])


CONFIGS: dict[str, str | bytes] = {
    "binary": bytes(range(256)),
    "a list": "[1, 2]",
    "a word": "hello",
    "an unknown setting": "voxel: 0.1",
    "a key that is a number": "1: 2",
    "a yaml bomb": yaml_bomb(),
    "a circular reference": "pc_range: &a [*a]",
    "a python object": "voxel_size: !!python/object/apply:os.system ['true']",
    "nested deeply": "pc_range: " + "[" * 20_000,
    "another type": "voxel_size: large",
    "not a number": "voxel_size: .nan",
    "infinity": "depth_edge: .inf",
    "a number of many digits": "interval: " + "9" * 9999,
    "base 60": "interval: " + "59:" * 20_000 + "59",
    "zero": "voxel_size: 0",
    "a reversed range": "pc_range: [2, -1.5, -0.5, -2, 1, 3.5]",
    "a short range": "pc_range: [1, 2, 3]",
    "an enormous grid": "voxel_size: 0.0001",
    "a cell larger than the grid": "voxel_size: 4",
    "an endless grid": "pc_range: [-1.0e+308, -1, -1, 1.0e+308, 1, 1]",
    "a denormal grid": "voxel_size: 5.0e-324",
    "a reversed depth range": "depth_range: [5, 1]",
    "too long": "# " + "x" * (1 << 20),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_configuration_is_refused(
    name: str, tree: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    path, content = tmp_path / "config.yaml", CONFIGS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    ended = run_command("build", "--input", tree, "--output", tmp_path / "out", "--config", path)
    assert_refused(ended, tmp_path / "out")
    assert str(path) in ended.err


def safetensors(header: bytes, length: int | None = None, data: bytes = bytes(64)) -> bytes:
    """A safetensors file: eight bytes for the length of the header, the header, the data."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(**values: Any) -> bytes:
    row = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]} | values
    return safetensors(json.dumps({"weight": row}).encode())


BAD_WEIGHTS: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "random bytes": os.urandom(9999),
    "a pickle": pickle.dumps({"weight": [0.0] * 16}),
    "a header of a yottabyte": safetensors(b"{}", length=1 << 63),
    "a header longer than the file": safetensors(b"{}", length=1 << 20),
    "a header nested deeply": safetensors(b'{"a":' * 100_000),
    "a header with NaN": safetensors(b'{"weight": NaN}'),
    "a tensor of a terabyte": tensor(shape=[1 << 38], data_offsets=[0, 1 << 40]),
    "a tensor outside the file": tensor(data_offsets=[1 << 30, (1 << 30) + 64]),
    "a tensor below zero": tensor(shape=[-4, -4]),
    "a tensor of unknown type": tensor(dtype="object"),
    "another network's tensor": tensor(),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_invalid_weights_are_refused(
    name: str, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD_WEIGHTS[name])
    ended = run_command("weights", "check", "pi3", "--weights", path)
    assert_refused(ended, tmp_path / "out")
    assert str(path) in ended.err


SETTINGS = (
    "voxel_size", "voxel_size=", "=1", "voxel_size=abc", "voxel_size=-1", "voxel_size=.nan",
    "voxel_size=[1", "voxel_size=!!python/name:os.system", "colour=red", "interval=0",
    "interval=1.5", "pc_range=[1,2]", "voxel_size=0.00001", "depth_range=[2,1]", "voxel_size=1e-99",
)  # fmt: skip


@pytest.mark.parametrize("value", SETTINGS)
def test_wrong_setting_is_refused(
    value: str, tree: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    ended = run_command("build", "--input", tree, "--output", tmp_path / "out", "--set", value)
    assert_refused(ended, tmp_path / "out")


def assert_refused(ended: Run, out: Path) -> None:
    """Assert a usage error: exit code 2, one sentence, no output."""
    assert ended.code == 2, ended
    (line,) = [line for line in ended.err.splitlines() if line.startswith("Error: ")]
    assert line.endswith(".")
    assert len(line) < 600
    assert not out.exists() or out.is_file()


def link_to(target: Path, path: Path) -> Path:
    path.symlink_to(target)
    return path


USAGE: dict[str, Callable[[Path, Path], list[Any]]] = {
    "output inside the input": lambda s, t: ["--input", s, "--output", s / "out"],
    "output is the input": lambda s, t: ["--input", s, "--output", s],
    "output inside the input, by a link": lambda s, t: [
        "--input", s, "--output", link_to(s, t / "link") / "out",
    ],
    "input is a link and output inside it": lambda s, t: [
        "--input", link_to(s, t / "link"), "--output", s / "sample_zed/out",
    ],
    "output inside the input, by dots": lambda s, t: [
        "--input", s, "--output", t / "x" / ".." / s.name / "out",
    ],
    "input missing": lambda s, t: ["--input", t / "nowhere", "--output", t / "out"],
    "input is a file": lambda s, t: ["--input", s / BAD / INFO, "--output", t / "out"],
    "input is empty": lambda s, t: [
        "--input", [(t / "empty").mkdir(), t / "empty"][1], "--output", t / "out",
    ],
    "input without trajectories": lambda s, t: ["--input", s / BAD / "meta", "--output", t / "out"],
    "output is a file": lambda s, t: ["--input", s, "--output", s / BAD / INFO],
    "unknown source": lambda s, t: ["--input", s, "--output", t / "out", "--source", "x"],
    "unknown engine": lambda s, t: ["--input", s, "--output", t / "out", "--engine", "x"],
    "missing configuration": lambda s, t: [
        "--input", s, "--output", t / "out", "--config", t / "none.yaml",
    ],
    "configuration is a folder": lambda s, t: ["--input", s, "--output", t / "out", "--config", t],
    "configuration is a device": lambda s, t: [
        "--input", s, "--output", t / "out", "--config", "/dev/zero",
    ],
    "no input": lambda s, t: ["--output", t / "out"],
    "no workers": lambda s, t: ["--input", s, "--output", t / "out", "--workers", 0],
    "unknown media": lambda s, t: ["--input", s, "--output", t / "out", "--media", "all"],
}  # fmt: skip


@pytest.mark.parametrize("name", USAGE)
def test_wrong_usage_is_refused(
    name: str, source: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    before = sorted(source.rglob("*"))
    assert_refused(run_command("build", *USAGE[name](source, tmp_path)), tmp_path / "out")
    assert sorted(source.rglob("*")) == before


def test_real_command_refuses_wrong_usage_in_one_line(tree: Path) -> None:
    command = Path(sys.executable).with_name("occgen-hub")
    done = subprocess.run(
        [command, "build", "--input", tree, "--output", tree / "out"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert len(done.stderr.splitlines()) == 1


# Built datasets that were tampered with

OCC = "videos/chunk-000/observation.occ.view/occ_sequence.npz"
MASK = "videos/chunk-000/observation.occ.mask/mask_sequence.npz"
SCENE, SCENE_CLOUD = "data/chunk-000/all_occ.npz", "data/chunk-000/origin_pcd.ply"
REFERENCE = "videos/chunk-000/observation.video.trajectory/reference.mp4"
RECORD = "meta/occgen.json"
OUTPUTS = (
    PARQUET, SCENE, SCENE_CLOUD, CLOUD, OCC, MASK, REFERENCE, f"{RGB}/0.jpg", f"{DEPTH}/1.png",
    INFO, EPISODES, STATS, TASKS, RECORD,
)  # fmt: skip


def arrays(path: str, **changes: Any) -> Break:
    """Rewrite an npz with other arrays; None removes one."""

    def apply(folder: Path) -> None:
        with np.load(folder / path) as file:
            held = dict(file)
        kept = {k: v for k, v in (held | changes).items() if v is not None}
        np.savez_compressed(folder / path, **{k: np.asarray(v) for k, v in kept.items()})

    return apply


def with_false_header(path: str, name: str, shape: tuple[int, ...], descr: str = "<i4") -> Break:
    """Rewrite an npz with a false shape and type in the header of one array."""

    def apply(folder: Path) -> None:
        with zipfile.ZipFile(folder / path) as archive:
            members = {member: archive.read(member) for member in archive.namelist()}
        header = BytesIO()
        npy.write_array_header_2_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
        members[f"{name}.npy"] = header.getvalue() + bytes(64)
        with zipfile.ZipFile(folder / path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)

    return apply


def record(**values: Any) -> Break:
    def change(folder: Path) -> None:
        path = folder / RECORD
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def occupancy(change: Callable[[np.ndarray, np.ndarray, np.ndarray], Any]) -> Break:
    """Change ends, columns and packed mask in place, or return new ends and columns."""

    def apply(folder: Path) -> None:
        with np.load(folder / OCC) as file:
            ends, columns = file["indptr"], file["indices"]
        with np.load(folder / MASK) as file:
            packed = file["data"]
        ends, columns = change(ends, columns, packed) or (ends, columns)
        values = np.ones(len(columns), np.uint8)
        arrays(OCC, indptr=ends, indices=columns, data=values)(folder)
        arrays(MASK, data=packed)(folder)
        update_checksums(folder)

    return apply


def update_checksums(folder: Path) -> None:
    """Update the record's checksums to the files as they are now."""
    from occgen_hub.files import sha256

    names = json.loads((folder / RECORD).read_text())["files"]
    record(files={name: sha256(folder / name) for name in names})(folder)


def without_a_cell(ends: np.ndarray, columns: np.ndarray, _: np.ndarray) -> Any:
    return np.append(ends[:1], ends[1:] - 1), columns[1:]


def flip_a_bit(ends: np.ndarray, columns: np.ndarray, packed: np.ndarray) -> None:
    packed[0, packed.shape[1] // 2] ^= 16


def grid(**values: Any) -> Break:
    return lambda t: record(grid=json.loads((t / RECORD).read_text())["grid"] | values)(t)


def with_checksums(change: Break) -> Break:
    return lambda t: (change(t), update_checksums(t))


KEYS = (
    "version", "schema", "source", "engine", "config", "media", "grid", "scene", "notes", "files",
)  # fmt: skip
HUGE = np.array([1 << 40, 1 << 40, 1 << 40])
TAMPERED: dict[str, tuple[Break, str]] = {
    **{
        f"{Path(p).name} {k}": (v, p)
        for p in OUTPUTS for k, v in breakages(p).items()
        if p in (PARQUET, OCC, RECORD) or k in ("missing", "cut in half")
    },
    **{f"{Path(p).name} {k}": (v, p) for p in (RECORD, OCC) for k, v in devices(p).items()},
    **{
        f"{Path(p).name} with one byte changed": (
            lambda t, p=p: (t / p).write_bytes(flipped((t / p).read_bytes())), p,
        )
        for p in OUTPUTS if p != RECORD
    },
    "pickled array": (arrays(SCENE, data=np.array([{}], object)), SCENE),
    "pickled visible cells": (arrays(OCC, indices=np.array([[]], object)), OCC),
    "pickled mask": (arrays(MASK, data=np.array([{}], object)), MASK),
    **{
        f"{Path(p).name} claims a {size} in {name}": (
            with_checksums(with_false_header(p, name, shape)), p,
        )
        for p, name in ((OCC, "indices"), (OCC, "indptr"), (OCC, "shape"), (OCC, "data"),
                        (MASK, "data"), (MASK, "shape"), (SCENE, "data"), (SCENE, "origin"))
        for size, shape in {
            "terabyte": (1 << 38,), "gigabyte": (1 << 28,), "yottabyte": (1 << 62, 1 << 62),
            "matrix of zero width": (1 << 50, 0), "number": (),
        }.items()
    },
    "a zip bomb": (with_checksums(arrays(OCC, data=np.zeros(1 << 27, np.uint8))), OCC),
    "visible cells as floats": (arrays(OCC, indices=[0.5]), OCC),
    "visible cells as words": (arrays(OCC, data=["a"]), OCC),
    "row ends unsigned and decreasing": (
        lambda t: arrays(OCC, indptr=np.array([0, 5, 3], np.uint64))(t), OCC,
    ),
    "visible cells outside the grid": (
        with_checksums(occupancy(lambda e, c, m: (e, np.sort(np.append(c[:-1], 1 << 30))))), OCC,
    ),
    "visible cells below zero": (
        with_checksums(occupancy(lambda e, c, m: (e, np.append(c[:-1], -1)))), OCC,
    ),
    "matrix of another size": (with_checksums(arrays(OCC, shape=HUGE[:2])), OCC),
    "mask of another grid": (with_checksums(arrays(MASK, shape=HUGE)), MASK),
    "mask without data": (with_checksums(arrays(MASK, data=None)), MASK),
    "mask of floats": (with_checksums(arrays(MASK, data=np.zeros((2, 9)))), MASK),
    "a visible cell removed": (occupancy(without_a_cell), "observation.occ"),
    "a bit of the mask flipped": (occupancy(flip_a_bit), "observation.occ"),
    "scene cells are not finite": (
        with_checksums(arrays(SCENE, data=np.full((3, 3), np.nan, np.float32))), SCENE,
    ),
    "nan pose": (
        with_checksums(setting("observation.camera_extrinsic_occ", (0, 3), np.nan)), PARQUET,
    ),
    "mirrored pose": (
        with_checksums(matrices("observation.camera_extrinsic_occ", scaled([1, 1, -1]))), PARQUET,
    ),
    "fx of 0": (with_checksums(setting("observation.camera_intrinsic_occ", (0, 0), 0)), PARQUET),
    "fx of 1e-30": (
        with_checksums(setting("observation.camera_intrinsic_occ", (0, 0), 1e-30)), PARQUET,
    ),
    "fx of 1e30": (
        with_checksums(setting("observation.camera_intrinsic_occ", (0, 0), 1e30)), "",
    ),
    "poses as words": (
        with_checksums(column("observation.camera_extrinsic_occ", ["a", "b"], pa.string())),
        PARQUET,
    ),
    "a duplicate column": (
        with_checksums(rewrite(lambda table: table.append_column("index", table["index"]))),
        PARQUET,
    ),
    "no rows": (with_checksums(rewrite(lambda table: table[:0])), PARQUET),
    "an undeclared column": (with_checksums(column("reward", [1.0, 2.0])), PARQUET),
    "an unknown file": (text("data/extra.bin", "x"), "data/extra.bin"),
    "a link to outside": (lambda t: (t / "data/link").symlink_to("/etc/passwd"), ""),
    "record of numbers": (text(RECORD, json.dumps(dict.fromkeys(KEYS, 7))), RECORD),
    "record of lists": (text(RECORD, json.dumps({key: [key] for key in KEYS})), RECORD),
    "record nested deeply": (text(RECORD, '{"a":' * 100_000), RECORD),
    "record lists files outside": (
        record(files={"../../x": "0" * 64, "/etc/passwd": "0" * 64, "": "0" * 64}), "passwd",
    ),
    "checksums that are numbers": (record(files={PARQUET: 3}), RECORD),
    "notes that are not text": (record(notes=[{}, 3]), RECORD),
    "a giant grid": (grid(shape=[1 << 20] * 3), RECORD),
    "a grid with numbers of 400 digits": (grid(shape=[10**400] * 3), RECORD),
    "a grid below zero": (grid(shape=[-1, 4, 4]), RECORD),
    "a grid that is text": (grid(shape="abc", pc_range={"a": 1}), RECORD),
    "a grid of another voxel size": (grid(voxel_size=10**400), RECORD),
    "a half-gigabyte grid": (grid(shape=[1 << 9, 1 << 10, 1 << 10]), ""),
    "a grid without a range": (grid(pc_range=[None] * 6), RECORD),
    "giant images": (record(scene={"image_size": [10**6, 10**6], "points": 1, "scale": 1}), RECORD),
    "images without a size": (record(scene={"image_size": [], "points": 1, "scale": 1}), RECORD),
    "features are a list": (with_checksums(info(features=[1])), INFO),
    "features of a thousand dimensions": (
        with_checksums(info(features={"action": {"dtype": "float32", "shape": [1] * 99_999,
                                           "names": None}})), INFO,
    ),
    "features of unknown types": (
        with_checksums(info(features={"action": {"dtype": "object", "shape": [1], "names": None}})),
        INFO,
    ),
    "fps of 1e-320": (with_checksums(info(fps=1e-320)), ""),
    "another fps": (with_checksums(info(fps=29)), PARQUET),
    "two frames too many": (with_checksums(info(total_frames=4)), INFO),
    "stats with a number of 400 digits": (
        with_checksums(lambda t: (t / STATS).write_text(
            re.sub(r'"mean": \[[^]]*\]', f'"mean": [{10**400}]', (t / STATS).read_text(), count=1)
        )), STATS,
    ),
    "leftovers of a build": (
        lambda t: (t.parent / ".trajectory_9.partial").mkdir(), ".trajectory_9.partial",
    ),
}  # fmt: skip


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Iterator[Path]:
    """One built trajectory."""
    out = tmp_path / "out" / "trajectory_1"
    shutil.copytree(built / BAD, out)
    yield out
    shutil.rmtree(out.parent)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:occgen_hub.visual")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TAMPERED)
def test_validate_reports_tampering_and_never_raises(
    name: str, copy: Path, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    make_bad, named = TAMPERED[name]
    make_bad(copy)

    with bounded():
        report = validate(copy.parent)

    if name in ("a link to outside",):
        return
    assert not report.valid
    assert any(named in finding.file for finding in report.findings), report.findings
    assert all("\n" not in str(finding) and len(str(finding)) < 900 for finding in report.findings)

    seen = run_command("inspect", copy.parent, "--preview", tmp_path / "x.png")
    assert seen.code in (0, 1, 2)
    if seen.code:
        assert len(seen.err.splitlines()) == 1


@pytest.mark.long
@pytest.mark.slow
def test_real_command_validates_tampered_files_with_bounded_memory(
    built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built / BAD, out / "a")
    shutil.copytree(built / BAD, out / "b")
    zeros = np.zeros(1 << 29, np.uint8)  # Half a megabyte in the file.
    np.savez_compressed(out / "a" / OCC, indices=zeros, indptr=zeros, shape=zeros, data=zeros)
    (out / "b" / PARQUET).unlink()
    pq.write_table(gigabytes_of_text(), out / "b" / PARQUET)
    done = run_process("validate", out)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert OCC in done.stdout
    assert PARQUET in done.stdout
    assert peak_memory(done) < 2 << 20


@pytest.mark.parametrize("what", ["missing", "empty", "a file"])
def test_missing_dataset_is_reported(
    what: str, tmp_path: Path, run_command: Callable[..., Run]
) -> None:
    place = tmp_path / "place"
    if what == "empty":
        place.mkdir()
    elif what == "a file":
        place.write_text("x")
    assert run_command("validate", place).code == 1
    assert run_command("inspect", place).code == 2


# Malicious input

HOSTILE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "parquet": (FAILS, (
        "parquet of two million rows", "parquet that unpacks to gigabytes",
        "parquet with a duplicate column", "episode_000000.parquet an endless device",
        "action is words", "nan pose", "infinite pose", "fx is nan", "fx is infinite",
    )),
    "json": (FAILS, (
        "info.json nested deeply", "info.json with a number of many digits", "info.json with NaN",
        "info.json with a number beyond float64", "info.json of more than 64 MB",
        "info.json a pipe", "info.json an endless device",
    )),
    "tolerated json": (TOLERATED, (
        "paths that lead out of the tree", "fps of 4000 digits", "thousands of features",
    )),
    "jsonl": (FAILS, ("NaN in a line", "invalid utf-8", "a bad line", "tasks.jsonl a pipe")),
    "jpeg": (FAILS, (
        "jpeg claims 65500 x 65500", "first jpeg claims 9000 x 9000",
        "jpeg is a postscript file", "jpeg is a link out of the tree", "1.jpg an endless device",
    )),
    "png": (FAILS, (
        "depth claims 100000 x 100000", "depth claims no pixels", "depth has too little data",
    )),
    "mp4": (FAILS, (
        "video tables claim two billion frames", "images missing and the video is a playlist",
    )),
    "ply": (TOLERATED, ("cloud claims a trillion vertices",)),
    "links": (TOLERATED, ("trajectory behind a link, and a link loop",)),
    "npz": (TAMPERED, (
        "pickled array", "pickled visible cells", "pickled mask", "a zip bomb",
        "occ_sequence.npz claims a terabyte in indices",
        "mask_sequence.npz claims a yottabyte in data", "visible cells outside the grid",
    )),
    "the record of a dataset": (TAMPERED, (
        "record lists files outside", "record nested deeply", "a giant grid", "giant images",
        "a link to outside",
    )),
    "safetensors": (BAD_WEIGHTS, (
        "a pickle", "a header of a yottabyte", "a header nested deeply", "a tensor of a terabyte",
        "a tensor outside the file",
    )),
    "yaml": (CONFIGS, (
        "a yaml bomb", "a circular reference", "a python object", "nested deeply", "base 60",
        "not a number", "an endless grid",
    )),
}  # fmt: skip


def test_hostile_rows_exist_in_their_tables() -> None:
    for kind, (table, names) in HOSTILE.items():
        assert set(names) <= set(table), kind
    assert sum(len(names) for _, names in HOSTILE.values()) >= 40
