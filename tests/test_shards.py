"""Occupancy as Parquet: `datasets` reads the content of the npz files, and the bytes of the files
do not depend on how they were built.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.episode_build import Settings
from occgen_hub.errors import DatasetError
from occgen_hub.files import sha256
from occgen_hub.index import bucket, read_entries
from occgen_hub.job import Job, list_episodes
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.runtime.build import build_dataset
from occgen_hub.sample import make_sample
from occgen_hub.shards import group_rows, remove_shards, shards, write_shards
from occgen_hub.validation import validate

COARSE = Settings(Config(voxel_size=0.1), media="none")
VISIBLE = "videos/chunk-000/observation.occ.view/occ_sequence.npz"
DYNAMIC = "videos/chunk-000/observation.occ.dynamic/dynamic_sequence.npz"
OBSERVED = "videos/chunk-000/observation.occ.mask/mask_sequence.npz"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trajectories in two scenes, 36 frames. Tests must not change it."""
    out = tmp_path_factory.mktemp("source") / "tree"
    make_sample(out, trajectories=3, frames=12)
    return out


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset built from `source`. Tests must not change it."""
    return build(source, tmp_path_factory.mktemp("built") / "out")


@pytest.fixture
def dataset_copy(built: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may change."""
    return Path(shutil.copytree(built, tmp_path / "mine"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` for each test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(source: Path, out: Path, limit: int | None = None, **options: Any) -> Path:
    builder = load_builder("internnav", source)
    summary = build_dataset(Job(builder, list_episodes(builder, limit), out, COARSE, **options))
    assert not summary.failures
    return out


def rows(root: Path, own_cache: Path) -> list[dict[str, Any]]:
    import datasets

    options: dict[str, Any] = {"streaming": True, "cache_dir": str(own_cache)}
    found = datasets.load_dataset(str(root), "occupancy", split="train", **options)
    return sorted(found, key=lambda row: (row["episode"], row["frame_index"]))


def expected(root: Path) -> Iterator[dict[str, Any]]:
    """The rows of all frames, read from the trajectories with scipy and numpy."""
    for path in sorted(root.glob("*/*/trajectory_*")):
        visible, mask = sparse.load_npz(path / VISIBLE), np.load(path / OBSERVED)
        moving = sparse.csr_matrix(visible.shape, dtype=np.uint8)
        if (path / DYNAMIC).exists():
            moving = sparse.load_npz(path / DYNAMIC)
        table = pq.read_table(path / "data/chunk-000/episode_000000.parquet")
        for t in range(visible.shape[0]):
            yield {
                "episode": path.relative_to(root).as_posix(),
                "scene": path.parent.relative_to(root).as_posix(),
                "frame_index": t,
                "occupied": visible[t].indices.tolist(),
                "dynamic": moving[t].indices.tolist(),
                "observed": mask["data"][t].tobytes(),
                "shape": mask["shape"].tolist(),
                "voxel_size": 0.1,
                "pc_range": [-2.0, -1.5, -0.5, 2.0, 1.0, 3.5],
                "camera_extrinsic": table["observation.camera_extrinsic_occ"][t].as_py(),
                "camera_intrinsic": table["observation.camera_intrinsic_occ"][t].as_py(),
            }


def content(root: Path) -> dict[str, str]:
    """SHA-256 of all files of a dataset, hidden ones too, except those of the last run."""
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    run = {name for name in files if name.split("/")[0] in (".logs", "report.json")}
    return {name: sha256(path) for name, path in files.items() if name not in run}


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    found = [*shards(root), *(root / "index").iterdir()]
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


# Reading
def test_streamed_rows_match_the_npz_files(built, own_cache):
    found, wanted = rows(built, own_cache), list(expected(built))
    assert len(found) == sum(1 for _ in wanted) == 36
    for row, want in zip(found, wanted, strict=True):
        assert row == want


def test_loaded_table_has_the_documented_columns(built, own_cache):
    from datasets import Array2D, List, Value, load_dataset

    loaded = load_dataset(str(built), "occupancy", split="train", cache_dir=str(own_cache))
    assert dict(loaded.features) == {
        "episode": Value("string"),
        "scene": Value("string"),
        "frame_index": Value("int64"),
        "occupied": List(Value("int32")),
        "dynamic": List(Value("int32")),
        "observed": Value("binary"),
        "shape": List(Value("int32")),
        "voxel_size": Value("float64"),
        "pc_range": List(Value("float64")),
        "camera_extrinsic": Array2D((4, 4), "float32"),
        "camera_intrinsic": Array2D((3, 3), "float32"),
    }
    pose = loaded.with_format("numpy")[5]["camera_extrinsic"]
    assert (pose.shape, pose.dtype) == ((4, 4), np.float32)


def test_shards_are_read_without_datasets_or_occgen_hub(built):
    """In a process that imports neither `datasets` nor occgen_hub."""
    code = (
        "import sys, pyarrow.parquet as pq, numpy as np; t = pq.read_table(sys.argv[1]);"
        "row = t.slice(3, 1).to_pylist()[0]; n = int(np.prod(row['shape']));"
        "seen = np.unpackbits(np.frombuffer(row['observed'], np.uint8), count=n);"
        "assert seen[row['occupied']].all() and len(row['occupied']) > 100;"
        "sys.exit(bool({'datasets', 'occgen_hub'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, *map(str, shards(built))], check=True)


def test_build_does_not_import_datasets_huggingface_hub_or_torch(source, tmp_path):
    code = (
        "import sys; from occgen_hub import cli; sys.argv = ['occgen-hub', *sys.argv[1:]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted({'datasets', 'huggingface_hub', 'torch'} & set(sys.modules)))"
    )
    arguments = ["build", "--input", source, "--output", tmp_path / "out", "--limit", "1"]
    options = ["--engine", "rgbd", "--set", "voxel_size=0.2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments), *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "out/occupancy").is_dir()


def test_shards_are_less_than_half_the_size_of_the_npz_files(dataset):
    """Measured with a few frames per trajectory, which compress less well than many."""
    npz = sum(path.stat().st_size for path in dataset.rglob("*_sequence.npz"))
    assert sum(path.stat().st_size for path in shards(dataset)) < 0.5 * npz


def test_row_group_has_a_few_frames_of_one_episode(built):
    assert group_rows((200, 125, 200)) == 8
    assert group_rows((1000, 1000, 1000)) == 1
    assert group_rows((40, 25, 40)) == 32
    for shard in shards(built):
        file = pq.ParquetFile(shard)
        for n in range(file.num_row_groups):
            table = file.read_row_group(n, ["episode", "frame_index"]).to_pydict()
            assert len(set(table["episode"])) == 1
            assert table["frame_index"] == [*range(file.metadata.row_group(n).num_rows)]


# Builds that give the same files


def test_splitting_into_more_shards_keeps_the_rows(dataset_copy, own_cache):
    size = max(npz_bytes(path) for path in trajectories(dataset_copy))
    assert write_shards(dataset_copy, shard_bytes=size) == 2  # The shard of the other scene stays.
    assert [p.name[-12:] for p in shards(dataset_copy)].count("-001.parquet") == 1
    assert rows(dataset_copy, own_cache) == list(expected(dataset_copy))
    assert validate(dataset_copy).findings == ()
    # A trajectory that is too long for one shard is split.
    assert write_shards(dataset_copy, shard_bytes=size // 2) > 3
    assert rows(dataset_copy, own_cache) == list(expected(dataset_copy))
    assert validate(dataset_copy).findings == ()
    assert write_shards(dataset_copy, shard_bytes=size // 2) == 0


def npz_bytes(path: Path) -> int:
    return sum((path / name).stat().st_size for name in (VISIBLE, OBSERVED))


def test_number_of_workers_does_not_change_the_files(dataset_copy, tmp_path):
    other = Path(shutil.copytree(dataset_copy, tmp_path / "other"))
    size = npz_bytes(trajectories(dataset_copy)[0]) // 3
    write_shards(dataset_copy, 1, shard_bytes=size)
    write_shards(other, 4, shard_bytes=size)
    assert len(shards(dataset_copy)) > 5
    assert content(dataset_copy) == content(other)


def test_builds_in_steps_end_with_the_bytes_of_one_build(source, built, tmp_path):
    out = tmp_path / "out"
    for limit in (1, 2, None):
        build(source, out, limit)
        assert validate(out).findings == ()
    assert content(out) == content(built)
    before = stamps(out)
    build(source, out)
    assert (content(out), stamps(out)) == (content(built), before)


def test_only_changed_shards_are_written(source, dataset_copy):
    before, bytes_before = stamps(dataset_copy), content(dataset_copy)
    first, second, other = trajectories(dataset_copy)
    kept = shutil.move(second, dataset_copy.parent / "kept")
    assert write_shards(dataset_copy) == 1
    assert list(read_entries(dataset_copy)) == [
        p.relative_to(dataset_copy).as_posix() for p in (first, other)
    ]
    changed = {name for name, stamp in stamps(dataset_copy).items() if stamp != before[name]}
    assert len(changed) == 2  # The shard of the scene and the part of the index.
    shutil.move(kept, second)
    assert write_shards(dataset_copy) == 1
    assert content(dataset_copy) == bytes_before
    assert write_shards(dataset_copy) == 0


def test_missing_scene_keeps_its_index_rows_and_its_shard(dataset_copy, own_cache):
    """As in a folder with only a part of a dataset."""
    everything, before = list(read_entries(dataset_copy)), stamps(dataset_copy)
    shutil.rmtree(dataset_copy / "sample_zed/house_000")
    assert write_shards(dataset_copy) == 0
    assert (list(read_entries(dataset_copy)), stamps(dataset_copy)) == (everything, before)
    assert len(rows(dataset_copy, own_cache)) == 36
    assert validate(dataset_copy).findings == ()
    lost = next(p for p in shards(dataset_copy) if "house_000" in p.name)
    lost.write_bytes(lost.read_bytes()[:-100])
    assert "another SHA-256" in validate(dataset_copy).findings[0].problem
    lost.unlink()
    assert write_shards(dataset_copy) == 0
    assert list(read_entries(dataset_copy)) == everything
    report = validate(dataset_copy)
    assert report.findings == ()
    assert "1 of the 2 shards in the index are missing here" in report.warnings[-1]
    write_shards(dataset_copy, drop_missing=True)
    assert list(read_entries(dataset_copy)) == everything[2:]
    assert (validate(dataset_copy).findings, validate(dataset_copy).warnings) == ((), ())


def test_scenes_built_separately_give_the_same_files(source, built, tmp_path):
    """As on several machines: together they equal one build."""
    joined = tmp_path / "joined"
    for n, scene in enumerate(("house_000", "house_001")):
        part = tmp_path / str(n)
        shutil.copytree(source / "sample_zed" / scene, part / "in/sample_zed" / scene)
        out = build(part / "in", part / "out")
        for folder in ("index", "occupancy"):
            shutil.copytree(out / folder, joined / folder, dirs_exist_ok=True)
    for folder in ("index", "occupancy"):
        wanted = {p: d for p, d in content(built).items() if p.startswith(folder)}
        found = {p: d for p, d in content(joined).items() if p.startswith(folder)}
        assert found == wanted


def test_shards_of_an_earlier_version_are_replaced(dataset_copy, built):
    old = dataset_copy / "occupancy/train-00000-of-00001.parquet"
    shards(dataset_copy)[0].rename(old)
    shutil.rmtree(dataset_copy / "index")
    assert validate(dataset_copy).findings[0].problem == "is a shard of an earlier version"
    write_shards(dataset_copy)
    assert content(dataset_copy) == content(built)


def test_changed_settings_rewrite_the_shards(source, dataset_copy, tmp_path):
    other = Settings(Config(voxel_size=0.2), media="none")
    builder = load_builder("internnav", source)
    for settings in (other, COARSE):
        build_dataset(Job(builder, list_episodes(builder), dataset_copy, settings))
        fresh = tmp_path / str(settings.config.voxel_size)
        build_dataset(Job(builder, list_episodes(builder), fresh, settings))
        assert content(dataset_copy) == content(fresh)


def test_shards_can_be_left_out_and_added_again(source, dataset_copy, built):
    build(source, dataset_copy, parquet_occupancy=False)
    assert not (dataset_copy / "occupancy").exists()
    assert [row.shards for row in read_entries(dataset_copy).values()] == [()] * 3
    assert "occupancy/*/*.parquet" not in (dataset_copy / "README.md").read_text()
    assert validate(dataset_copy).findings == ()
    build(source, dataset_copy)
    assert content(dataset_copy) == content(built)


def test_damaged_shard_is_rewritten(source, dataset_copy, built):
    shard = shards(dataset_copy)[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    half = shard.with_name(f".{shard.name}.partial")
    half.write_bytes(b"half")
    assert {f.file for f in validate(dataset_copy).findings} == {str(shard), str(half)}
    build(source, dataset_copy)
    assert content(dataset_copy) == content(built)


@pytest.mark.parametrize("change", [write_shards, remove_shards])
def test_foreign_parquet_file_is_neither_replaced_nor_removed(dataset_copy, change):
    """Other tools also use such names for parts of a dataset."""
    theirs = shards(dataset_copy)[0].with_name("theirs.parquet")
    pq.write_table(pa.table({"mine": [1, 2]}), theirs)
    content = theirs.read_bytes()
    with pytest.raises(DatasetError, match="did not write it; move it away"):
        change(dataset_copy)
    assert theirs.read_bytes() == content
    theirs.unlink()
    change(dataset_copy)


def test_shards_have_the_episodes_that_did_not_fail(source, tmp_path, own_cache):
    broken = Path(shutil.copytree(source, tmp_path / "broken"))
    (broken / "sample_zed/house_000/trajectory_1/data/chunk-000/episode_000000.parquet").unlink()
    builder = load_builder("internnav", broken)
    summary = build_dataset(Job(builder, list_episodes(builder), tmp_path / "out", COARSE))
    assert len(summary.failures) == 1
    assert {row["episode"] for row in rows(tmp_path / "out", own_cache)} == {
        "sample_zed/house_000/trajectory_0", "sample_zed/house_001/trajectory_0",
    }  # fmt: skip
    assert validate(tmp_path / "out").findings == ()


def test_killed_write_leaves_only_complete_shards(dataset_copy, built):
    code = (
        "import sys; from pathlib import Path; from occgen_hub.shards import write_shards;"
        "print('ready', flush=True); root = Path(sys.argv[1])\n"
        "while True: write_shards(root, 2, overwrite=True, shard_bytes=int(sys.argv[2]))"
    )
    size = npz_bytes(trajectories(dataset_copy)[0]) // 2
    rng = random.Random(3)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(dataset_copy), str(size)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.25))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        for path in shards(dataset_copy):
            pq.ParquetFile(path).scan_contents()
    write_shards(dataset_copy)
    assert content(dataset_copy) == content(built)


def test_full_disk_is_reported_and_keeps_existing_files(dataset_copy):
    """A limit on the file size raises the same kind of error as a full disk."""
    shards(dataset_copy)[0].write_bytes(
        shards(dataset_copy)[0].read_bytes()[:-100]
    )  # It has to be rewritten.
    before = content(dataset_copy)
    code = (
        "import resource, signal, sys; from pathlib import Path;"
        "from occgen_hub.runtime.finalize import finalize;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "finalize(Path(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(dataset_copy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cannot be read or written (" in done.stderr.splitlines()[-1]
    assert "OccGenError" in done.stderr.splitlines()[-1]
    assert content(dataset_copy) == before


# Validation
def rewrite(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    def damage(shard: Path) -> None:
        table = change(pq.read_table(shard))
        pq.write_table(table, shard, row_group_size=12)

    return damage


def with_column(name: str, change: Callable[[list[Any]], Any]) -> Callable[[Path], None]:
    def change_table(table: pa.Table) -> pa.Table:
        index, kind = table.column_names.index(name), table.schema.field(name)
        values = table[name].to_pylist()
        change(values)
        return table.set_column(index, kind, pa.array(values, kind.type))

    return rewrite(change_table)


def change_type(table: pa.Table) -> pa.Table:
    index = table.column_names.index("occupied")
    return table.set_column(index, "occupied", table["occupied"].cast(pa.list_(pa.int64())))


def flip_bit(values: list[bytes]) -> None:
    values[9] = bytes([values[9][0] ^ 1]) + values[9][1:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (with_column("occupied", lambda v: v[11].pop()), "row 11, frame 11 of"),
        (with_column("dynamic", lambda v: v[12].append(7)), "row 12, frame 0 of"),
        (with_column("observed", flip_bit), "row 9, frame 9"),
        (with_column("camera_extrinsic", lambda v: v[0][0].__setitem__(3, 9.0)), "row 0"),
        (with_column("voxel_size", lambda v: v.__setitem__(20, 0.2)), "row 20"),
        (rewrite(lambda t: pa.concat_tables([t.slice(0, 7), t.slice(8)])), "row 7, frame 7"),
        (rewrite(lambda t: t.slice(0, 20)), "8 rows in the row group at row 12"),
        (rewrite(lambda t: t.slice(0, 12)), "ends before frame 0 of"),
        (rewrite(lambda t: pa.concat_tables([t, t.slice(0, 1)])), "10 rows in the row group"),
        (rewrite(change_type), "has other columns"),
        (rewrite(lambda t: t.drop_columns(["shape"])), "has other columns"),
        (lambda p: pq.write_table(pa.concat_tables([pq.read_table(p)] * 2), p), "more than 32"),
        (lambda p: p.write_bytes(b"PAR1"), "is not a readable Parquet file"),
        (rewrite(lambda t: t.append_column("shape", t["shape"])), "two columns with the same"),
        (lambda p: shutil.copy(p, p.with_name("more.parquet")), "that is not in the index"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
    ],
)  # fmt: skip
def test_validate_reports_faults_of_a_shard(dataset_copy, damage, words):
    shard = next(path for path in shards(dataset_copy) if "house_000" in path.name)
    damage(shard)
    (finding,) = validate(dataset_copy).findings
    assert words in str(finding)
    assert str(finding).count("\n") == 0
    assert str(dataset_copy / "occupancy") in finding.file
    assert "run the build again" in finding.remedy or "finalize" in finding.remedy


def test_validate_reports_a_shard_of_another_dataset(source, dataset_copy, tmp_path):
    other = tmp_path / "other"
    builder = load_builder("internnav", source)
    coarser = Settings(Config(voxel_size=0.1, interval=3), media="none")
    build_dataset(Job(builder, list_episodes(builder), other, coarser))
    shutil.copy(shards(other)[0], shards(dataset_copy)[0])
    (finding,) = validate(dataset_copy).findings
    assert "occupied differs from the trajectory" in finding.problem


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: p.unlink(), "has no row of sample_zed/house_000/trajectory_0"),
        (lambda p: p.write_bytes(b"PAR1"), "is not a readable Parquet file"),
        (lambda p: pq.write_table(pq.read_table(p).slice(1), p), "has no row of"),
        (
            lambda p: pq.write_table(pq.read_table(p).drop_columns(["frames"]), p),
            "has no column frames",
        ),
        (
            lambda p: pq.write_table(pa.concat_tables([pq.read_table(p)] * 2), p),
            "has an episode twice",
        ),
        (lambda p: p.rename(p.with_name("00.parquet")), "belongs to another part"),
        (with_column("frames", lambda v: v.__setitem__(0, 7)), "frames of sample_zed/house_000/"),
        (with_column("episode", lambda v: v.__setitem__(0, "../x")), "not a valid episode name"),
        (with_column("shards", lambda v: v[0].__setitem__(0, "/etc/x")), "not a valid shard name"),
        (with_column("frames", lambda v: v.__setitem__(0, None)), "lacks a value of frames"),
        (
            rewrite(lambda t: t.append_column("frames", t["frames"])),
            "two columns with the same name",
        ),
    ],
)
def test_validate_reports_faults_of_the_index(dataset_copy, built, damage, words):
    entry = read_entries(dataset_copy)["sample_zed/house_000/trajectory_0"]
    damage(dataset_copy / "index" / f"{bucket(entry.scene)}.parquet")
    assert any(words in str(finding) for finding in validate(dataset_copy).findings)
    write_shards(dataset_copy)
    assert content(dataset_copy) == content(built)


def test_validate_reports_a_damaged_trajectory_once(dataset_copy):
    path = Trajectory.open(trajectories(dataset_copy)[1]).file("visible")
    path.write_bytes(path.read_bytes()[:2000])
    findings = validate(dataset_copy).findings
    assert {finding.file for finding in findings} == {str(path)}
