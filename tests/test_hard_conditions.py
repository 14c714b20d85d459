"""Difficult conditions for commands: odd names, full disks, huge and hostile files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from commands import occgen_hub, start
from PIL import Image

import occgen_hub as library
from occgen_hub import cli, hub, hub_token
from occgen_hub.atomic import clear_all_leftovers
from occgen_hub.builder import load_builder
from occgen_hub.cli.command import say
from occgen_hub.config import Config
from occgen_hub.errors import DatasetError, OccGenError, SourceError, UsageError, one_line
from occgen_hub.files import read_jsonl
from occgen_hub.job import list_episodes
from occgen_hub.lerobot import writer
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.media import SeekingVideo, pictures, read_rgb
from occgen_hub.sample import make_sample
from occgen_hub.schema import Feature
from occgen_hub.visual.viewpoint import Viewpoint

COARSE = Config(voxel_size=0.25)
SECRET = "hf_abcdefghijklmnopq"


def built(source: Path, out: Path, **options: Any) -> list[str]:
    summary = library.build("internnav", source, out, config=COARSE, **options)
    return [failure.reason for failure in summary.failures]


# Scenes with many episodes


def many_episodes(scene: Path, count: int) -> None:
    """Give the only episode of a scene's folder `count - 1` copies."""
    meta, images = scene / "meta", 0
    for kind in ("rgb", "depth"):
        found = sorted((scene / f"videos/chunk-000/observation.images.{kind}").iterdir())
        images = len(found)
        for number in range(images, count * images):
            image = found[number % images]
            image.with_name(f"{number}{image.suffix}").hardlink_to(image)
    table = scene / "data/chunk-000/episode_000000.parquet"
    for number in range(1, count):
        table.with_name(f"episode_{number:06d}.parquet").hardlink_to(table)
    for name in ("episodes", "episodes_stats"):
        row = json.loads((meta / f"{name}.jsonl").read_text().splitlines()[0])
        rows = []
        for number in range(count):
            row["episode_index"] = number
            if "image_index" in row:
                row["image_index"] = {
                    "min": number * images,
                    "max": (number + 1) * images - 1,
                }
            rows.append(json.dumps(row))
        (meta / f"{name}.jsonl").write_text("\n".join(rows))


@pytest.mark.parametrize("stated", [True, False])
def test_scene_with_many_episodes_is_read_once(tmp_path, monkeypatch, stated):
    make_sample(tmp_path / "tree", trajectories=1, frames=2, layout="scenes", seed=3)
    (scene,) = (path.parent for path in (tmp_path / "tree").rglob("meta"))
    many_episodes(scene, 12)
    if not stated:
        path = scene / "meta/episodes_stats.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("\n".join(json.dumps({**row, "image_index": None}) for row in rows))
    time.sleep(0.2)  # Files that changed just now are read again each time.
    listings: dict[str, int] = {}
    listed, listdir = os.scandir, os.listdir

    def count_listing(function: Any) -> Any:
        def call(path: Any = ".") -> Any:
            if not isinstance(path, int):
                listings[Path(path).name] = listings.get(Path(path).name, 0) + 1
            return function(path)

        return call

    builder = load_builder("internnav", tmp_path / "tree")
    refs = list_episodes(builder)
    assert len(refs) == 12
    monkeypatch.setattr("os.scandir", count_listing(listed))
    monkeypatch.setattr("os.listdir", count_listing(listdir))
    parsed = count_parses(monkeypatch)
    for ref in refs:
        assert builder.has_depth(ref)
        builder.work(ref)
        episode = builder.read(ref)
        assert episode.length == 2
        first = refs.index(ref) * 2
        assert [m.path.stem for m in episode.media if m.file == "rgb"] == [
            str(first),
            str(first + 1),
        ]
    assert parsed == {"episodes.jsonl": 1, "episodes_stats.jsonl": 1, "tasks.jsonl": 1}
    large = ("chunk-000", "observation.images.rgb", "observation.images.depth")
    assert all(listings.get(name, 0) <= 1 for name in large), listings


def count_parses(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    parsed: dict[str, int] = {}

    def counted(path: Path, *selection: Any) -> Any:
        parsed[path.name] = parsed.get(path.name, 0) + 1
        return read_jsonl(path, *selection)

    monkeypatch.setattr("occgen_hub.builders.internnav.read_jsonl", counted)
    return parsed


def test_changed_scene_is_read_again(tmp_path):
    make_sample(tmp_path / "tree", trajectories=1, frames=2, layout="scenes", seed=3)
    (scene,) = (path.parent for path in (tmp_path / "tree").rglob("meta"))
    builder = load_builder("internnav", tmp_path / "tree")
    (ref,) = list_episodes(builder)
    assert builder.read(ref).length == 2
    for text in ("first", "other"):  # Files of equal length, in quick succession.
        path = scene / "meta/episodes.jsonl"
        row = {"episode_index": 0, "tasks": [text], "length": 2}
        path.write_text(json.dumps(row))
        assert [task.text for task in builder.read(ref).tasks] == [text]


# Bounded cost


def test_meta_file_of_millions_of_values_is_refused_quickly(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(b"{}\n" * 3_000_000)
    began = time.monotonic()
    with pytest.raises(SourceError, match=r"tasks.jsonl: has more values"):
        read_jsonl(path)
    assert time.monotonic() - began < 5


def test_many_bad_lines_give_few_findings(dataset, tmp_path):
    (place, *_) = trajectories(dataset)
    copy = Path(shutil.copytree(place, tmp_path / "out/a/b/c"))
    (copy / "meta/tasks.jsonl").write_bytes(b"{}\n" * 100_000)
    findings = library.validate(tmp_path / "out").findings
    assert 1 < len(findings) < 50
    assert any("too many problems" in str(finding) for finding in findings)


def test_a_progressive_image_of_many_scans_is_refused(tmp_path):
    content = BytesIO()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    image.save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    (tmp_path / "good.jpg").write_bytes(whole)
    assert read_rgb(tmp_path / "good.jpg", (64, 64)).shape == (64, 64, 3)
    scan = whole.rindex(b"\xff\xda")
    (tmp_path / "bad.jpg").write_bytes(whole[:-2] + whole[scan:-2] * 30_000 + whole[-2:])
    began = time.monotonic()
    with pytest.raises(SourceError, match=f"more than {pictures.MAX_SCANS} scans"):
        read_rgb(tmp_path / "bad.jpg", (64, 64))
    assert time.monotonic() - began < 2


def test_exponentially_many_link_paths_are_limited(sample_tree, tmp_path, caplog):
    root = tmp_path / "root"
    for number in range(26):
        folder = root / str(number)
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / name).symlink_to(f"../{number + 1}")
    shutil.copytree(next(sample_tree.rglob("meta")).parent, root / "26")
    began = time.monotonic()
    refs = list(load_builder("internnav", root).episodes())
    assert time.monotonic() - began < 10
    assert refs
    assert "more than 16 links lead to it" in caplog.text


def test_deeply_nested_folders_are_searched(sample_tree, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(next(sample_tree.rglob("meta")).parent, root / "group/scene/one")
    deep = str(root)
    for _ in range(1500):
        deep += "/d"
        os.mkdir(deep)  # noqa: PTH102  # pathlib is recursive.
    try:
        assert [ref.id for ref in load_builder("internnav", root).episodes()] == ["group/scene/one"]
    finally:
        subprocess.run(["rm", "-r", root / "d"], check=True)  # pytest is recursive too.


def test_record_of_a_long_episode_is_readable(dataset, tmp_path):
    (place, *_) = trajectories(dataset)
    copy = Path(shutil.copytree(place, tmp_path / "long"))
    record = json.loads((copy / "meta/occgen.json").read_text())
    for kind in ("rgb", "depth"):
        folder = f"videos/chunk-000/observation.images.{kind}"
        record["files"] |= {f"{folder}/{n}.png": f"{n:064x}" for n in range(275_000)}
    (copy / "meta/occgen.json").write_text(json.dumps(record, indent=1))
    assert (copy / "meta/occgen.json").stat().st_size > 64 << 20
    assert len(Trajectory.open(copy).record["files"]) > 550_000


def test_record_above_the_size_limit_is_not_written(sample_tree, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_RECORD_BYTES", 1000)
    failures = built(sample_tree, tmp_path / "out", limit=1)
    assert "cut it into parts" in failures[0]
    assert not trajectories(tmp_path / "out")


def test_a_sparse_file_of_a_terabyte_is_not_read(dataset, tmp_path):
    root = Path(shutil.copytree(dataset, tmp_path / "out"))
    (place, *_) = trajectories(root)
    names = next(iter(json.loads((place / "meta/occgen.json").read_text())["files"]))
    with (place / names).open("r+b") as file:
        file.truncate(1 << 40)
    began = time.monotonic()
    findings = library.validate(root).findings
    assert time.monotonic() - began < 20
    assert any("the limit of such a file" in str(finding) for finding in findings)
    with pytest.raises(SourceError, match="more than 512 GB"):
        load_builder("internnav", root).fingerprint([place / names])


# A dataset that changes while it is open


def test_rewritten_shards_are_reported(sample_tree, dataset, tmp_path):
    torch_dataset = pytest.importorskip("occgen_hub.training").OccupancyDataset
    root = Path(shutil.copytree(dataset, tmp_path / "out"))
    first, *others = trajectories(root)
    opened = torch_dataset(root, keys=("occupancy", "episode"))
    assert opened[0]["episode"] == first.relative_to(root).as_posix()
    for other in others:
        shutil.rmtree(other)
    library.finalize(root)
    again = __import__("pickle").loads(__import__("pickle").dumps(opened))  # As in a worker.
    with pytest.raises(DatasetError, match=r"open the dataset again if it was changed since"):
        again[len(again) - 1]


# Tokens


@pytest.mark.parametrize(
    "bad", [f"hf_\x0b{SECRET}", f"hf_\x0c{SECRET}", f"a b{SECRET}", f"{SECRET}é"]
)
def test_invalid_token_is_refused_without_printing_it(bad, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", bad)
    with pytest.raises(OccGenError, match="HF_TOKEN: holds a token") as caught:
        hub.check_token("me/rooms")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le"])
def test_token_file_in_another_encoding_is_named_without_printing_the_token(
    coding, tmp_path, monkeypatch
):
    place = tmp_path / "token"
    place.write_bytes(SECRET.encode(coding))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(place))
    with pytest.raises(OccGenError, match=f"^{place}: holds a token") as caught:
        hub_token.check_sendable()
    assert "hf_" not in str(caught.value)
    place.write_text(f"{SECRET}\n")
    assert hub_token.check_sendable()


# Full disks


def test_export_does_not_use_the_temporary_folder(dataset, tmp_path, monkeypatch):
    pytest.importorskip("lerobot")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    library.export(dataset, tmp_path / "lerobot")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lerobot"]
    # The keys are sorted, not in the order of a set.
    stats = json.loads((tmp_path / "lerobot/meta/stats.json").read_text())
    assert list(stats) == sorted(stats)
    assert all(list(values) == sorted(values) for values in stats.values())


def test_rerun_recording_on_a_full_disk_fails(dataset, monkeypatch):
    pytest.importorskip("rerun")
    from occgen_hub.visual.viewer import save

    (place, *_) = trajectories(dataset)
    with pytest.raises(OSError, match="No space left"):
        save(Trajectory.open(place), Path("/dev/full"))


def test_failed_export_restores_the_previous_one(dataset, tmp_path, monkeypatch):
    pytest.importorskip("lerobot")
    aside = tmp_path / f".lerobot.{'0' * 16}.old"
    aside.mkdir()
    (aside / "kept").write_text("kept")

    def fail(*_: Any, **__: Any) -> None:
        raise DatasetError(tmp_path, "is full", "make room")

    monkeypatch.setattr("occgen_hub.exporting.write", fail)
    with pytest.raises(OccGenError):
        library.export(dataset, tmp_path / "lerobot", overwrite=True)
    assert (tmp_path / "lerobot/kept").read_text() == "kept"


# Interruptions


@pytest.mark.parametrize("ready", [".mp4.", None])
def test_stopped_render_prints_one_line(people, tmp_path, ready):
    pytest.importorskip("pyvista")
    (place, *_) = trajectories(people)
    process = start("render", place, tmp_path / "room.mp4", "--view", "world")
    try:
        if ready is None:
            time.sleep(2)  # While libraries are imported, or soon after.
        while ready and process.poll() is None and not list(tmp_path.glob(f".*{ready}*")):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert output == ("", "Stopped.\n")
    assert not list(tmp_path.iterdir())


STOPPED_IN_VTK = """
import os, signal, sys
from vtkmodules.util.vtkAlgorithm import VTKPythonAlgorithmBase as Algorithm
from occgen_hub.cli import main

called_back = Algorithm.FillInputPortInformation

def stop(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return called_back(*arguments)

Algorithm.FillInputPortInformation = stop
main()
"""


def test_interrupt_during_a_vtk_callback_ends_in_order(people, tmp_path):
    pytest.importorskip("pyvista")
    (place, *_) = trajectories(people)
    done = occgen_hub("render", place, tmp_path / "room.png", launcher=("-c", STOPPED_IN_VTK))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Stopped.\n")
    assert not list(tmp_path.iterdir())


def test_signal_after_the_command_has_ended_is_ignored(tmp_path):
    script = (
        "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "from occgen_hub.cli import main\n"
        "import threading; threading._register_atexit(os.kill, os.getpid(), signal.SIGINT)\n"
        "main()"
    )
    done = occgen_hub("--version", launcher=("-c", script))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("occgen-hub")
    done = occgen_hub("inspect", tmp_path / "not there", launcher=("-c", script))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error:")


def test_second_signal_ends_the_process():
    script = (
        "import os, signal; from occgen_hub.stopping import hold_stops, stop_in_order\n"
        "stop_in_order()\n"
        "with hold_stops():\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('held', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('not reached', flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "held\n", "")


# Names


def test_an_output_that_looks_like_a_uri_is_a_folder(sample_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not built(sample_tree, Path("run:1"), limit=1)
    assert len(trajectories(Path("run:1"))) == 1
    assert library.validate("run:1").valid


def test_episodes_with_names_that_are_not_utf_8_are_built(sample_tree, tmp_path):
    odd = os.fsdecode(b"sc\xffne")
    source = next(sample_tree.rglob("meta")).parent
    shutil.copytree(source, tmp_path / "tree/group" / odd / "one")
    out = tmp_path / os.fsdecode(b"o\xfft")
    assert not built(tmp_path / "tree", out)
    assert library.validate(out).valid


def test_hidden_source_folder_gets_a_visible_name_in_the_dataset(sample_tree, tmp_path):
    source = next(sample_tree.rglob("meta")).parent
    root = tmp_path / ".group/scene"
    shutil.copytree(source, root / "one")
    assert not built(root / "one", tmp_path / "out")
    (found,) = trajectories(tmp_path / "out")
    assert found.relative_to(tmp_path / "out").as_posix() == "_group/scene/one"


def test_leftovers_of_removed_episodes_are_deleted(dataset, tmp_path):
    root = Path(shutil.copytree(dataset, tmp_path / "out"))
    (path, *_) = trajectories(root)
    for name in (f".gone.{'1' * 16}.partial", ".gone.scratch", ".other.partial"):
        (path.parent / name).mkdir()
    aside = path.parent / f".back.{'2' * 16}.old"
    shutil.copytree(path, aside)
    library.finalize(root)
    assert not [p for p in path.parent.iterdir() if p.name.startswith(".")]
    assert (path.parent / "back").is_dir()
    clear_all_leftovers(path.parent / "not there")


# The terminal


def test_control_characters_do_not_reach_the_terminal(capsys):
    say("a\x1b[31m\r\nb\x07\u202ec \u3042\u00e9")
    assert capsys.readouterr().out == "a\\x1b[31m\\r\\nb\\x07\\u202ec \u3042\u00e9\n"
    assert one_line(os.fsdecode(b"\xff")) == "\\udcff"


def test_control_characters_in_a_task_are_escaped(dataset, tmp_path):
    root = Path(shutil.copytree(dataset, tmp_path / "out"))
    for path in root.rglob("tasks.jsonl"):
        path.write_text(json.dumps({"task_index": 0, "task": "\x1b[2Jgo"}) + "\n")
    result = CliRunner().invoke(
        cli.cli, ["inspect", str(root), "--preview", str(tmp_path / "p.png")]
    )
    assert "\\x1b[2Jgo" in result.output
    assert "\x1b" not in result.output


def test_column_names_are_escaped_in_the_card():
    from occgen_hub.card import _columns

    (row,) = [
        line
        for line in _columns({"a`b|c\n# d": Feature(dtype="int64", shape=(1,))})
        if "int64" in line
    ]
    assert row == "| `` a`b\\|c\\n# d `` | int64 | 1 |"


# Numbers


@pytest.mark.parametrize("setting", [{"voxel_size": 1e300}, {"voxel_size_scale": 5e-324}])
def test_extreme_sizes_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Config(**setting)


def test_extreme_frame_rates_and_viewpoints_are_refused(dataset, tmp_path):
    (place, *_) = trajectories(dataset)
    result = CliRunner().invoke(
        cli.cli, ["render", str(place), str(tmp_path / "a.mp4"), "--fps", "nan"]
    )
    assert result.exit_code == 2
    assert "is not a number" in result.output
    camera = tmp_path / "camera.json"
    camera.write_text(json.dumps({"position": [1e308, 0, 0], "target": [0, 0, 0], "up": [0, 0, 1]}))
    with pytest.raises(UsageError, match="is not a viewpoint"):
        Viewpoint.load(camera)
    from occgen_hub.visual.render import rate

    copy = Path(shutil.copytree(place, tmp_path / "slow"))
    info = json.loads((copy / "meta/info.json").read_text())
    (copy / "meta/info.json").write_text(json.dumps({**info, "fps": 1e-320}))
    with pytest.raises(DatasetError, match="no valid fps"):
        rate(Trajectory.open(copy))


def test_text_in_place_of_poses_is_an_error(dataset, tmp_path):
    pytest.importorskip("lerobot")
    root = Path(shutil.copytree(dataset, tmp_path / "out"))
    path = next(root.rglob("episode_000000.parquet"))
    name, table = "observation.camera_extrinsic_occ", pq.read_table(path)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(["word"] * len(table))), path)
    info = path.parents[2] / "meta/info.json"
    content = json.loads(info.read_text())
    content["features"][name] = {"dtype": "string", "shape": [4, 4], "names": None}
    info.write_text(json.dumps(content))
    with pytest.raises(OccGenError, match=r"^[^ ]+: "):
        library.export(root, tmp_path / "lerobot")
    with pytest.raises(ValueError, match="not string"):
        Feature(dtype="float32", shape=(4, 4)).to_numpy(pa.array(["word"]))


def test_shard_without_its_episodes_is_an_error(dataset, tmp_path):
    training = pytest.importorskip("occgen_hub.training")
    root = Path(shutil.copytree(dataset, tmp_path / "out"))
    opened = training.OccupancyDataset(root, keys=("occupancy",))
    for shard in root.glob("occupancy/*/*.parquet"):
        pq.write_table(pq.read_table(shard).drop_columns(["episode"]), shard)
    with pytest.raises(DatasetError, match=r"\.parquet: .*(no column episode|since the dataset)"):
        opened[0]


def test_a_video_that_was_cut_after_its_keyframe_is_read(tmp_path):
    import av

    path, options = tmp_path / "cut.mp4", {"avoid_negative_ts": "disabled"}
    with av.open(str(path), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=10)
        stream.options = {"x264-params": "keyint=100:bframes=0"}
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        grey = [np.full((64, 64, 3), 30 * n, np.uint8) for n in range(8)]
        packets = [
            packet
            for image in grey
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
        ]
        packets += stream.encode()
        step = packets[1].pts - packets[0].pts
        for packet in packets:  # The first three frames come before time zero.
            packet.pts, packet.dts = packet.pts - 3 * step, packet.dts - 3 * step
            container.mux(packet)
    video = SeekingVideo(path, (64, 64))
    for number in (2, 0, 4):
        assert abs(int(video(number).mean()) - 30 * (number + 3)) <= 2


def test_lack_of_memory_is_reported(monkeypatch, capsys):
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(cli.cli, "main", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "not enough memory" in capsys.readouterr().err


# Compiling


def test_kernels_are_compiled_without_a_cache_folder(tmp_path):
    code = "from occgen_hub.jit import njit\n@njit()\ndef f(a):\n    return a + 1\nprint(f(1))\n"
    (tmp_path / "kernel.py").write_text(code)
    # The only locator is that of NUMBA_CACHE_DIR, which is not set.
    env = {**os.environ, "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator"}
    env.pop("NUMBA_CACHE_DIR", None)
    result = subprocess.run(
        [sys.executable, tmp_path / "kernel.py"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "2\n", result.stderr


@pytest.fixture
def run_read_only(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run commands of a read-only copy of the package with a read-only home folder.

    The commands share one process, and so the compiled kernels.
    """
    bare: tuple[str, ...] = ()
    if os.geteuid() == 0:  # Root may write anywhere unless that capability is dropped.
        bare = ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
        if not shutil.which(bare[0]):
            pytest.skip("root needs setpriv (util-linux) to do without its rights")
    package, home = tmp_path / "site/occgen_hub", tmp_path / "home"
    root, ours = (
        Path(__file__).parent.parent,
        shutil.ignore_patterns("__pycache__", "*.safetensors"),
    )
    shutil.copytree(root / "occgen_hub", package, ignore=ours)
    for name in ("builders", "schemas", "ckpt"):
        shutil.copytree(root / name, package / name, ignore=ours)
    home.mkdir()
    folders = [home, *(path for path in (tmp_path / "site").rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    env = {k: v for k, v in os.environ.items() if k not in ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME")}
    env |= {"PYTHONPATH": str(tmp_path / "site"), "HOME": str(home)}
    where = "import occgen_hub, sys; sys.stderr.write(occgen_hub.__file__); "

    def run(*commands: list[str]) -> subprocess.CompletedProcess[str]:
        script = f"{where}from occgen_hub.cli import cli\n"
        script += f"for each in {commands!r}: cli.main(each, standalone_mode=False)"
        return subprocess.run(
            [*bare, sys.executable, "-c", script],
            cwd=home, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip

    yield run
    assert not list(home.iterdir())
    assert not list((tmp_path / "site").rglob("__pycache__"))
    for folder in folders:
        folder.chmod(0o755)


@pytest.mark.parametrize("builds", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_read_only_installation_without_a_home_builds_and_validates(
    sample_tree, dataset, tmp_path, run_read_only, builds
):
    """Without a cache, a build compiles for a minute. Validation compiles less."""
    out, package = str(tmp_path / "out" if builds else dataset), tmp_path / "site/occgen_hub"
    options = ["--output", out, "--set", "voxel_size=0.25", "--limit", "1", "--workers", "1"]
    build = [["build", "--input", str(sample_tree), *options]] if builds else []
    done = run_read_only(*build, ["validate", out])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.startswith(str(package / "__init__.py"))
    assert ": valid." in done.stdout


def test_all_kernels_use_our_njit():
    for path in Path(library.__file__).parent.rglob("*.py"):
        if path.name != "jit.py":
            assert not re.search(r"from numba import.*njit|numba\.njit", path.read_text()), path
