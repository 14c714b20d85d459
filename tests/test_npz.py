"""Headers of npz files: a change of any byte gives an array or an error of one sentence."""

from __future__ import annotations

import io
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from occgen_hub.builder import load_builder
from occgen_hub.cli import cli
from occgen_hub.config import Config
from occgen_hub.episode_build import Settings, build_episode
from occgen_hub.errors import DatasetError, OccGenError
from occgen_hub.loading import Trajectory, npz_array, trajectories
from occgen_hub.sample import make_sample

VALUES = b"\0\n '(),-.09:<>AUVOc[\\]{}\x7f\xff"
"""Replacement bytes: each kind of character that has a meaning in a header or in Python."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source with one trajectory and the built dataset. Tests must not change it."""
    place = tmp_path_factory.mktemp("npz")
    make_sample(place / "rooms", trajectories=1, frames=2)
    builder = load_builder("internnav", place / "rooms")
    (ref,) = builder.episodes()
    build_episode(builder, ref, place / "out", Settings(config=Config(voxel_size=0.2)))
    return place


def change_header(path: Path, name: str, change) -> None:
    """Rewrite an npz file with a change in the content of one array."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    members[f"{name}.npy"] = change(members[f"{name}.npy"])
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)


def write_npz(path: Path, content: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.npy", content)
    return path


def npy_bytes(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(4, dtype=">i8"),
        np.float64(0.5),
        np.array("packed"),
        np.zeros((0, 3), np.uint8),
        np.array([True, False]),
    ],
    ids=str,
)
def test_arrays_written_by_numpy_are_read(array, tmp_path):
    array = np.asarray(array)
    found = npz_array(write_npz(tmp_path / "a.npz", npy_bytes(array)), "data")
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(found.load(), array)


def test_changed_header_bytes_raise_only_dataset_errors(tmp_path):
    whole = npy_bytes(np.arange(6, dtype=np.float32).reshape(2, 3))
    refused: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Users would see them on the terminal.
        for place in range(128):
            for value in VALUES:
                content = bytearray(whole)
                content[place] = value
                try:
                    npz_array(write_npz(tmp_path / "a.npz", bytes(content)), "data").load()
                except DatasetError as error:
                    refused.append(str(error))
    assert len(refused) > 1000
    assert all(text.startswith(f"{tmp_path / 'a.npz'}: array data") for text in refused)
    assert not [text for text in refused if "\n" in text]


@pytest.mark.parametrize(
    "header",
    [
        "",
        "[]",
        "{}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 3}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3.0,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1" + "0" * 40 + ",)}",
        "{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (3,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,)}",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (3,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,)}",
        "{'descr': 'no such', 'fortran_order': False, 'shape': (3,)}",
        "(" * 9000,
        "__import__('os').abort()",
    ],
)
def test_malformed_header_is_refused(header, tmp_path):
    content = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)
    with pytest.raises(DatasetError):
        npz_array(write_npz(tmp_path / "a.npz", content), "data").load()


@pytest.mark.parametrize(("place", "value"), [(11, b"'"), (18, b"\\"), (20, b","), (128, b"\0")])
@pytest.mark.parametrize("file", ["visible", "observed", "scene_occupancy"])
def test_commands_raise_only_occgen_errors_for_a_damaged_header(
    built, tmp_path, file, place, value
):
    out = Path(shutil.copytree(built / "out", tmp_path / "out"))
    (path,) = trajectories(out)
    name = "indices" if file == "visible" else "data"
    damaged = Trajectory.open(path).file(file)
    change_header(damaged, name, lambda content: content[:place] + value + content[place + 1 :])
    commands = (
        ["validate", out],
        ["inspect", out],
        ["report", out, "--output", tmp_path / "page.html"],
        ["push", out, "--repo-id", "org/rooms", "--dry-run"],
        ["build", "--input", built / "rooms", "--output", out, "--set", "voxel_size=0.2"],
    )
    for command in commands:
        result = CliRunner().invoke(cli, list(map(str, command)), standalone_mode=False)
        assert result.exception is None or isinstance(result.exception, OccGenError), command
    checked = CliRunner().invoke(cli, ["validate", str(out)], standalone_mode=False)
    assert str(damaged) in checked.output
