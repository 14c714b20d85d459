"""Occupancy files: scipy and numpy read what we write, and we read what they write."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from zlib_ng import zlib_ng

from occgen_hub.config import Config
from occgen_hub.errors import DatasetError
from occgen_hub.loading import npz_array
from occgen_hub.occupancy.codec import CellsWriter, NpzWriter, ObservedWriter, unpack
from occgen_hub.occupancy.grid import Grid, scene_grid


@settings(max_examples=60)
@given(
    frames=st.integers(0, 4),
    shape=st.tuples(*[st.integers(1, 7)] * 3),
    fill=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_occupancy_round_trip_through_scipy_and_numpy(frames, shape, fill, seed):
    rng = np.random.default_rng(seed)
    cells = int(np.prod(shape))
    occupied, seen = rng.random((2, frames, cells)) < fill
    with tempfile.TemporaryDirectory() as folder:
        visible = CellsWriter(Path(folder, "occ_sequence.npz"), cells)
        observed = ObservedWriter(Path(folder, "mask_sequence.npz"), frames, shape)
        for t in range(frames):
            visible.append(np.flatnonzero(occupied[t]).astype(np.int32))
            observed.append(np.packbits(seen[t]))
        visible.close()
        observed.close()

        matrix = sparse.load_npz(Path(folder, "occ_sequence.npz"))
        assert isinstance(matrix, sparse.csr_matrix)
        assert matrix.dtype == np.uint8
        assert matrix.shape == (frames, cells)
        assert np.array_equal(matrix.toarray(), occupied)
        with np.load(Path(folder, "mask_sequence.npz"), allow_pickle=False) as mask:
            assert set(mask) == {"data", "shape", "mode"}
            assert mask["data"].dtype == np.uint8
            assert tuple(mask["shape"]) == shape
            assert str(mask["mode"]) == "packed"
            assert np.array_equal(unpack(mask["data"], cells), seen)
        assert sorted(p.name for p in Path(folder).iterdir()) == [
            "mask_sequence.npz",
            "occ_sequence.npz",
        ]


def test_equal_content_gives_equal_bytes(tmp_path):
    array = np.arange(1000).reshape(10, 100)
    for name in ("a.npz", "b.npz"):
        with NpzWriter(tmp_path / name) as out:
            out.add("data", array)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as loaded:
        assert np.array_equal(loaded["data"], array)


def test_masks_are_deflated_by_zlib_ng_frame_by_frame(tmp_path):
    """zipfile has no option for the compressor; this fails if ours is no longer used."""
    shape = (40, 50, 60)
    masks = np.packbits(np.random.default_rng(1).random((3, 120_000)) < 0.02, axis=1)
    observed = ObservedWriter(tmp_path / "a.npz", 3, shape)
    for mask in masks:
        observed.append(mask)
    observed.close()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        info = archive.getinfo("data.npy")
        content = archive.read(info)
    compressor = zlib_ng.compressobj(5, zlib_ng.DEFLATED, -15)
    head = len(content) - masks.nbytes
    pieces = [content[:head], *(mask.tobytes() for mask in masks)]
    deflated = b"".join(map(compressor.compress, pieces)) + compressor.flush()
    assert info.compress_size == len(deflated)
    assert deflated in (tmp_path / "a.npz").read_bytes()


@pytest.mark.parametrize(
    "array",
    [np.float64(0.02), np.array([1, 2, 3]), np.array("packed"), np.zeros((0, 3), np.float32)],
    ids=["number", "row", "word", "empty"],
)
def test_arrays_are_read_like_numpy(tmp_path, array):
    np.savez_compressed(tmp_path / "a.npz", data=array)
    found = npz_array(tmp_path / "a.npz", "data").load()
    assert np.array_equal(found, array)
    assert found.dtype == np.asarray(array).dtype


def test_rows_are_read_one_by_one(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (20, 33)).astype(np.uint8)
    np.savez(tmp_path / "a.npz", data=array)
    rows = list(npz_array(tmp_path / "a.npz", "data").rows())
    assert np.array_equal(rows, array)


def test_pickled_array_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", data=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DatasetError, match="pickled"):
        npz_array(tmp_path / "a.npz", "data")


@pytest.mark.parametrize("shape", [(10**15,), (10**9, 10**9), (2**62, 4)])
def test_array_header_that_claims_terabytes_is_refused(tmp_path, shape):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("data.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
    with pytest.raises(DatasetError, match=r"a\.npz"):
        npz_array(tmp_path / "a.npz", "data").load()


def test_truncated_array_is_an_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, archive.open("data.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (100,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(b"x" * 99)
    with pytest.raises(DatasetError, match="cut short"):
        npz_array(tmp_path / "a.npz", "data").load()


@settings(max_examples=50)
@given(st.integers(0, 1000), st.sampled_from([0.02, 0.1, 0.5]))
def test_scene_grid_contains_the_cell_of_every_point(seed, size):
    rng = np.random.default_rng(seed)
    points = rng.normal([10, -20, -3], 2, (200, 3)).astype(np.float32)
    grid = scene_grid(points, size)
    cells = np.unique(np.floor(points.astype(float) / size).astype(int), axis=0)
    expected = (cells + 0.5) * size
    assert len(grid.centres) == len(cells)
    np.testing.assert_allclose(np.sort(grid.centres, axis=0), np.sort(expected, axis=0), atol=1e-5)
    index = np.rint((grid.centres - grid.origin) / size - 0.5).astype(int)
    assert (index >= 0).all()
    assert (index < grid.shape).all()
    assert (index.min(axis=0) == 0).all()
    assert (index.max(axis=0) == np.asarray(grid.shape) - 1).all()
    columns = np.ravel_multi_index(index.T, grid.shape)
    assert (np.diff(columns) > 0).all()


@pytest.mark.parametrize(
    ("size", "pc_range", "shape"),
    [
        (0.02, (-2, -1.5, -0.5, 2, 1, 3.5), (200, 125, 200)),
        (0.04, (-2, -1.5, -0.5, 2, 1, 3.5), (100, 63, 100)),
        (0.1, (-1, -1, 0, 1, 1, 3), (20, 20, 30)),
        (0.3, (-1, -1, 0, 1, 1, 1), (7, 7, 4)),
        (0.07, (0, 0, 0, 0.7, 0.7, 0.7), (10, 10, 10)),
    ],
)
def test_grid_shape_follows_from_range_and_voxel_size(size, pc_range, shape):
    grid = Grid.of(Config(voxel_size=size, pc_range=pc_range))
    assert grid.shape == shape


def test_cell_centres_follow_the_order_of_columns():
    grid = Grid((-1.0, 0.0, 2.0), 0.5, (2, 3, 4))
    i, j, k = 1, 2, 3
    centre = grid.centres(np.array([i * 12 + j * 4 + k]))
    np.testing.assert_allclose(centre, [[-1 + 1.5 * 0.5, 2.5 * 0.5, 2 + 3.5 * 0.5]])
