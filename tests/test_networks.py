"""The networks compared with the published ones, and loading of weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from pydantic import ValidationError
from reference import random_tensors
from standin import TINY, random_weights, save
from torch.utils._python_dispatch import TorchDispatchMode

from occgen_hub.engines.pi3.blocks import Block, Rotary
from occgen_hub.engines.pi3.network import NETWORKS, relative_poses
from occgen_hub.engines.pi3.sizes import Sizes
from occgen_hub.engines.weights import Checkpoint, WeightsError, load_network, published

PARITY = ROOT.parent / "shared" / "parity"
STORED_PART = Path(__file__).parent / "data" / "parity.npz"
"""Every seventh row and column of the maps in pi3x.all.npz, used where the full file is missing."""

STORED_SMALL = Path(__file__).parent / "data" / "small_networks.npz"

INPUTS = {"in_depths": "depths", "in_intrinsics": "intrinsics", "in_poses": "poses"}


def shapes_of(name, sizes):
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in NETWORKS[name](sizes).state_dict().items()}


def outputs(network, images, **known):
    """The outputs of a network for (N, 3, H, W) images, without the batch axis."""
    known = {k: torch.as_tensor(np.asarray(v)).float()[None] for k, v in known.items()}
    found = network(torch.as_tensor(np.asarray(images))[None], **known)
    return {k: v[0].numpy() if v.ndim > 1 else v.numpy() for k, v in found.items()}


# Comparison with the published networks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        pytest.param("pi3", False, marks=pytest.mark.long),
        pytest.param("pi3x", False, marks=pytest.mark.long),
        pytest.param("pi3x", True, marks=pytest.mark.long),
    ],
    ids=["pi3", "pi3x", "pi3x, stored part"],
)
def test_full_size_networks_match_reference_vectors(name, kept):
    """All outputs in float32, and the names and shapes of all tensors."""
    vectors = [(np.load(path), 1) for path in sorted(PARITY.glob(f"{name}.*.npz"))]
    if not vectors and not kept:
        pytest.skip("../shared/parity is missing; a part of pi3x's vectors is kept and tested")
    if kept:
        vectors = [(np.load(STORED_PART), 7)]
    sizes = published(name).sizes
    shapes = shapes_of(name, sizes)
    layout = PARITY / f"{name}.layout.json"
    if layout.is_file():
        expected = json.loads(layout.read_text())
        assert shapes == {k: tuple(v) for k, v in expected.items()}
    network = load_network(name, random_tensors(shapes))
    for reference, step in vectors:
        known = {INPUTS[k]: reference[k] for k in INPUTS if k in reference}
        found = outputs(network, reference["imgs"], **known)
        wanted = {k for k in reference if k != "imgs" and k not in INPUTS}
        assert wanted | {"descriptors"} == set(found)  # Ours alone, for loop closure.
        for key in wanted:
            ours = found[key][:, ::step, ::step] if found[key].ndim == 4 else found[key]
            error = np.linalg.norm(ours - reference[key]) / np.linalg.norm(reference[key])
            assert error <= 1e-5, (key, error)


def test_stored_part_matches_the_reference_vectors():
    if not PARITY.is_dir():
        pytest.skip("../shared/parity is missing")
    kept, whole = np.load(STORED_PART), np.load(PARITY / "pi3x.all.npz")
    for key, values in whole.items():
        assert np.array_equal(
            kept[key], values if values.shape == kept[key].shape else values[:, ::7, ::7]
        )
    assert STORED_PART.stat().st_size < 1e6


@pytest.mark.parametrize("name", NETWORKS)
def test_small_networks_keep_their_outputs(name):
    """The stored outputs are of code whose full-size outputs equal the published ones.

    So a change of the arithmetic is noticed without minutes of full size. After an intended change,
    run the tests marked `long`, and store what `small_outputs` returns with np.savez_compressed.
    """
    stored = np.load(STORED_SMALL)
    found = small_outputs(name)
    assert {f"{name}.{key}" for key in found} == {k for k in stored if k.startswith(f"{name}.")}
    for key, values in found.items():
        expected = stored[f"{name}.{key}"]
        assert np.linalg.norm(values - expected) <= 1e-4 * np.linalg.norm(expected), key


def small_outputs(name):
    """Outputs of a tiny network for three views, with all conditions that it takes."""
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in NETWORKS[name](TINY).state_dict().items()}
    network = load_network(name, random_tensors(shapes), sizes=TINY)
    random = np.random.Generator(np.random.Philox(key=7))
    n, h, w = 3, 56, 84
    known = {}
    if name == "pi3x":
        known["depths"] = random.uniform(1, 3, (n, h, w))
        known["intrinsics"] = np.tile([[70.0, 0, w / 2], [0, 70, h / 2], [0, 0, 1]], (n, 1, 1))
        known["poses"] = np.tile(np.eye(4), (n, 1, 1))
        known["poses"][:, 0, 3] = np.arange(n)
    images = random.random((n, 3, h, w), dtype=np.float32)
    found = outputs(network, images, **known)
    return {k: v[:, ::7, ::7] if v.ndim == 4 else v for k, v in found.items()}


# Properties of the networks


@pytest.fixture(scope="module")
def tiny():
    """Both networks, with tiny sizes and random weights."""
    weights = {name: random_weights(name) for name in NETWORKS}
    return {name: load_network(name, tensors, sizes=TINY) for name, tensors in weights.items()}


@pytest.fixture(scope="module")
def images():
    """(5, 3, 56, 84) in [0, 1]."""
    return torch.rand(5, 3, 56, 84, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("order", [(4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
def test_pi3_is_permutation_equivariant(tiny, images, order):
    order = list(order)
    found, permuted = outputs(tiny["pi3"], images), outputs(tiny["pi3"], images[order])
    for key, values in found.items():
        assert not np.allclose(values, values[order], atol=1e-3)
        error = np.linalg.norm(permuted[key] - values[order]) / np.linalg.norm(values)
        assert error < 1e-5, key


def test_scenes_of_a_batch_are_independent(tiny, images):
    other = images.flip(0) * 0.5
    for network in tiny.values():
        both = network(torch.stack((images, other)))
        for key, values in network(other[None]).items():
            torch.testing.assert_close(both[key][1:], values, atol=2e-5, rtol=1e-4)


def test_points_are_local_points_transformed_by_the_poses(tiny, images):
    for network in tiny.values():
        found = outputs(network, images)
        R, t = found["camera_poses"][:, :3, :3], found["camera_poses"][:, :3, 3]
        np.testing.assert_allclose(
            R @ R.transpose(0, 2, 1), np.tile(np.eye(3), (5, 1, 1)), atol=1e-5
        )
        assert np.linalg.det(R) == pytest.approx(np.ones(5), abs=1e-5)
        moved = np.einsum("nij,nhwj->nhwi", R, found["local_points"]) + t[:, None, None]
        np.testing.assert_allclose(found["points"], moved, atol=1e-4)


def test_rays_point_at_local_points(tiny, images):
    found = outputs(tiny["pi3x"], images)
    length = np.linalg.norm(found["local_points"], axis=-1, keepdims=True)
    np.testing.assert_allclose(found["rays"], found["local_points"] / length, atol=1e-5)


def test_each_condition_changes_the_output(tiny, images):
    n, _, h, w = images.shape
    plain = outputs(tiny["pi3x"], images)
    K = np.tile([[70.0, 0, w / 2], [0, 70, h / 2], [0, 0, 1]], (n, 1, 1))
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, 0, 3] = np.arange(n)
    for known in ({"depths": np.full((n, h, w), 2.0)}, {"intrinsics": K}, {"poses": poses}):
        conditioned = outputs(tiny["pi3x"], images, **known)
        assert not np.allclose(plain["points"], conditioned["points"], rtol=1e-3)
    one = outputs(tiny["pi3x"], images[:1])
    np.testing.assert_array_equal(
        one["points"], outputs(tiny["pi3x"], images[:1], poses=poses[:1])["points"]
    )


def test_known_poses_are_used_up_to_origin_and_scale(tiny, images):
    """The origin of the world does not matter; without depth, neither does its unit."""
    n = len(images)
    generator = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, :3, 3] = generator.normal(size=(n, 3))
    moved = np.linalg.inv(poses[3]) @ poses
    moved[:, :3, 3] *= 7.0
    first = outputs(tiny["pi3x"], images, poses=poses)
    second = outputs(tiny["pi3x"], images, poses=moved)
    np.testing.assert_allclose(first["points"], second["points"], rtol=1e-3, atol=1e-4)


def test_poses_of_a_camera_at_rest_are_not_rescaled():
    poses = torch.eye(4).repeat(1, 3, 1, 1)
    poses[0, 1, 0, 3] = 0.01
    assert torch.equal(relative_poses(poses, None), poses)


def test_depth_without_valid_pixels_is_accepted(tiny, images):
    n, _, h, w = images.shape
    found = outputs(tiny["pi3x"], images, depths=np.zeros((n, h, w)))
    assert all(np.isfinite(values).all() for values in found.values())


def test_image_sizes_must_be_multiples_of_the_patch(tiny):
    with pytest.raises(ValueError, match="60 x 56 pixels: not multiples of 14"):
        tiny["pi3"](torch.zeros(1, 1, 3, 56, 60))


@pytest.mark.parametrize("name", ["pi3", "pi3x"])
def test_networks_track_no_gradients(tiny, images, name):
    assert not tiny[name].training
    assert not any(p.requires_grad for p in tiny[name].parameters())
    assert all(values.is_inference() for values in tiny[name](images[None]).values())


def test_autocast_keeps_heads_and_cameras_in_float32(tiny, images):
    """The trunk runs in bfloat16, as on a GPU; the heads request float32 themselves."""
    with torch.autocast("cpu", torch.bfloat16):
        coarse = {name: network(images[None]) for name, network in tiny.items()}
    for name, network in tiny.items():
        for key, values in network(images[None]).items():
            assert coarse[name][key].dtype == torch.float32
            error = (coarse[name][key] - values).norm() / values.norm()
            assert error < 0.05, (name, key)


class Activations(TorchDispatchMode):
    """Records the peak of bytes in live tensors, and the functions that return float32 tensors of
    attention heads: (B, heads, tokens, head width).
    """

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.wide = {}, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.ndim >= 4 and tensor.dtype == torch.float32:
                self.wide.add(str(function))
            key, storage = tensor.untyped_storage().data_ptr(), tensor.untyped_storage()
            if key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return out


def test_bfloat16_blocks_do_not_convert_attention_heads_to_float32():
    """Queries and keys in float32 would take twice the memory."""
    block = Block(64, 4, qk_norm=True)
    rotary = Rotary.of_patches(20, 30, 5, 16, torch.device("cpu"))
    tokens = torch.randn(2, 605, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        with Activations() as exact:
            expected = block(tokens, rotary)
        with torch.autocast("cpu", torch.bfloat16), Activations() as coarse:
            found = block(tokens, rotary)
    assert found.dtype == torch.float32  # The residual stream stays in float32.
    assert (found - expected).norm() / expected.norm() < 0.01
    assert exact.wide
    assert not coarse.wide
    assert coarse.peak < 0.7 * exact.peak, (coarse.peak, exact.peak)


# Weights


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 64, "heads": 3}, "multiple of 8"),
        ({"width": 40, "heads": 4}, "multiple of 8"),
        ({"metric_width": 36, "metric_heads": 8}, "metric_width"),
        ({"upsampling": [40]}, "upsampling"),
        ({"pose_blocks": [3, 3]}, "pose_blocks"),
        ({"pose_blocks": [-1]}, "pose_blocks"),
        ({"width": 1 << 40}, "width"),
        ({"depth": 3}, "depth"),
    ],
)
def test_invalid_sizes_are_refused(sizes, message):
    with pytest.raises(ValidationError, match=message):
        Sizes.model_validate(sizes)


def test_pose_blocks_must_exist():
    sizes = {"decoder_depth": 4}
    assert Checkpoint.model_validate({"network": "pi3", "sizes": sizes})
    with pytest.raises(ValidationError, match="pose_blocks"):
        Checkpoint.model_validate({"network": "pi3x", "sizes": sizes})


def test_weights_file_is_memory_mapped_not_copied(tmp_path):
    """Anonymous memory grows by less than a tenth of the file size."""
    sizes = TINY.model_copy(update={"width": 1024, "heads": 16, "decoder_depth": 4})
    folder = save(tmp_path / "large", "pi3", random_weights("pi3", sizes), sizes)
    size = (folder / "model.safetensors").stat().st_size
    assert size > 2e8
    program = (
        "import sys, torch\n"
        "from occgen_hub.engines.weights import load_network\n"
        "from occgen_hub.engines.pi3 import network\n"
        "def own():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return sum(int(l.split()[1]) for l in lines if l.startswith('RssAnon'))\n"
        "before = own()\n"
        "kept = load_network('pi3', sys.argv[1])\n"
        "print((own() - before) * 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < size / 10


def test_file_folder_and_tensors_load_the_same_network(tmp_path, images):
    tensors = random_weights("pi3")
    folder = save(tmp_path / "tiny", "pi3", tensors)
    found = [
        outputs(network, images)
        for network in (
            load_network("pi3", tensors, sizes=TINY),
            load_network("pi3", folder),
            load_network("pi3", str(folder / "model.safetensors")),
        )
    ]
    for other in found[1:]:
        for key, values in found[0].items():
            np.testing.assert_array_equal(values, other[key])


def test_half_precision_weights_become_float32(tmp_path, images):
    half = {k: v.half() for k, v in random_weights("pi3").items()}
    network = load_network("pi3", save(tmp_path / "half", "pi3", half))
    assert all(p.dtype == torch.float32 for p in network.parameters())
    assert np.isfinite(outputs(network, images)["points"]).all()


def write_broken_checkpoint(folder: Path, how: str) -> Path:
    """Write an invalid checkpoint."""
    tensors = random_weights("pi3")
    file = folder / "model.safetensors"
    if how == "missing":
        for key in [k for k in tensors if k.startswith("camera_head")]:
            del tensors[key]
    elif how == "extra":
        tensors["teacher.weight"] = torch.zeros(3)
    elif how == "shape":
        tensors["camera_head.fc_t.weight"] = torch.zeros(4, 64)
    save(folder, "pi3", tensors)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
    elif how == "garbage":
        file.write_bytes(os.urandom(5000))
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "terabytes":
        header = b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'
        file.write_bytes(len(header).to_bytes(8, "little") + header)
    elif how == "pickle":
        torch.save({"a": torch.zeros(2)}, file)
    elif how == "gone":
        file.unlink()
    elif how == "config":
        (folder / "config.json").write_text('{"network": "pi3", "sizes": {"width": -3}}')
    elif how == "config text":
        (folder / "config.json").write_text("{")
    elif how == "other":
        save(folder, "pi3x", random_weights("pi3x"))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing tensors: camera_head\.\S+(, camera_head\.\S+){4} and 15 more"),
        ("extra", r"unexpected tensors: teacher\.weight"),
        (
            "shape",
            r"tensors with another shape: camera_head\.fc_t\.weight \[4, 64\] instead of \[3, 64\]",
        ),
        ("truncated", "not a complete safetensors file"),
        ("garbage", "not a complete safetensors file"),
        ("empty", "not a complete safetensors file"),
        ("terabytes", "not a complete safetensors file"),
        ("pickle", "not a complete safetensors file"),
        ("gone", "does not exist"),
        ("config", r"config\.json: does not describe a checkpoint \(sizes\.width"),
        ("config text", r"config\.json: is not valid JSON"),
        ("other", "has weights of pi3x"),
    ],
)
def test_unsuitable_weights_files_raise_one_sentence(tmp_path, how, message):
    folder = write_broken_checkpoint(tmp_path / "weights", how)
    with pytest.raises(WeightsError, match=message) as error:
        load_network("pi3", folder)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value)) < 900
    assert error.value.exit_code == 2


def test_unsuitable_tensors_raise_an_error():
    tensors = random_weights("pi3")
    del tensors["register_token"]
    with pytest.raises(WeightsError, match=r"the weights: .*missing tensors: register_token"):
        load_network("pi3", tensors, sizes=TINY)


@pytest.mark.long
def test_compiled_network_gives_equal_results_for_any_number_of_views():
    tensors = random_weights("pi3x")
    plain, compiled = (load_network("pi3x", tensors, sizes=TINY) for _ in range(2))
    compiled.compile_blocks()
    programs = []
    for views, size in ((2, (56, 70)), (3, (56, 70)), (4, (70, 84)), (3, (84, 56))):
        images = torch.rand(views, 3, *size, generator=torch.Generator().manual_seed(views))
        expected, found = outputs(plain, images), outputs(compiled, images)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4)
        programs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < programs[1] == programs[-1]
