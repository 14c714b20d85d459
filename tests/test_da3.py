"""The engine da3: the real package of Depth Anything 3 with random weights; licences of weights."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.transform import Rotation
from standin import random_weights, save

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines import Auto, check_license, load_engine, network_engine
from occgen_hub.engines.network import View
from occgen_hub.engines.weights import find_weights, published
from occgen_hub.errors import UsageError
from occgen_hub.geometry.sim3 import Sim3
from occgen_hub.job import list_episodes
from occgen_hub.pipeline import align
from occgen_hub.sample import make_sample


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """da3-small with random weights, named like the published file, without a config.json."""
    pytest.importorskip("depth_anything_3")
    from occgen_hub.engines.da3 import tensor_shapes

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in tensor_shapes("da3-small").items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 1
        noise = torch.randn(shape, generator=generator) / math.sqrt(fan_in)
        scale = len(shape) == 1 and not name.endswith("bias")
        tensors[name] = 1 + 0.05 * noise if scale else noise
    fov = "model.cam_dec.fc_fov.0"  # The camera's field of view is about a radian.
    tensors[f"{fov}.weight"] *= 0.05
    tensors[f"{fov}.bias"] = torch.ones(2)
    folder = tmp_path_factory.mktemp("da3")
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def episode(tmp_path_factory):
    out = tmp_path_factory.mktemp("da3") / "tree"
    make_sample(out, trajectories=1, frames=6, seed=3)
    builder = load_builder("internnav", out)
    return builder.read(list_episodes(builder)[0])


SMALL = Config(max_pixels=20_000, window=6)


def test_points_and_poses_follow_the_project_conventions(checkpoint, episode):
    """The package's own cameras project the points back to their pixels."""
    engine = load_engine("da3", checkpoint, "cpu")
    network = engine.load(SMALL)
    size = engine.input_size(episode.image_size, SMALL)
    assert size[0] % 14 == size[1] % 14 == 0
    images = np.random.default_rng(0).integers(0, 256, (3, *size[::-1], 3), np.uint8)
    found = network.predict([View(image) for image in images])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2)[None]
    with torch.inference_mode():
        own = network.network(x, ref_view_strategy="saddle_balanced")

    assert found.points.shape == (3, *size[::-1], 3)
    assert found.confidence.shape == (3, *size[::-1])
    assert found.descriptors.shape == (3, 384)
    np.testing.assert_allclose(found.points[..., 2], own.depth[0], rtol=1e-4, atol=1e-5)
    logit = np.log(own.depth_conf[0].numpy() - 1)
    np.testing.assert_allclose(found.confidence, 1 / (1 + np.exp(-logit)), atol=1e-4)
    camera_from_world = own.extrinsics[0].numpy().astype(np.float64)
    for view, pose in enumerate(found.world_from_camera):
        there = camera_from_world[view][:3, :3] @ pose[:3, 3] + camera_from_world[view][:3, 3]
        np.testing.assert_allclose(there, 0, atol=1e-4)
        world = found.points[view] @ pose[:3, :3].T + pose[:3, 3]
        local = world @ camera_from_world[view][:3, :3].T + camera_from_world[view][:3, 3]
        pixel = local @ own.intrinsics[0, view].numpy().T
        pixel = pixel[..., :2] / pixel[..., 2:]
        v, u = np.indices(pixel.shape[:2]) + 0.5
        far = np.abs(local[..., 2]) > 1e-3
        np.testing.assert_allclose(pixel[far], np.stack((u, v), -1)[far], atol=0.05)


def test_alignment_recovers_a_known_sim3(checkpoint, episode, tmp_path):
    engine = load_engine("da3", checkpoint, "cpu")
    views = engine.reconstruct(episode, SMALL, tmp_path)
    known = Sim3(2.5, Rotation.from_euler("xyz", [0.5, 1, -2]).as_matrix(), np.array([3.0, -1, 7]))
    source = dataclasses.replace(episode, world_from_camera=known.poses(views.world_from_camera))
    moved, alignment = align(views, source)
    assert alignment.sim3.scale == pytest.approx(2.5, rel=1e-6)
    np.testing.assert_allclose(alignment.sim3.rotation, known.rotation, atol=1e-6)
    np.testing.assert_allclose(moved.world_from_camera, source.world_from_camera, atol=1e-5)
    np.testing.assert_allclose(moved.depth(0), 2.5 * views.depth(0), rtol=1e-5)


def test_longer_side_is_about_504_pixels():
    pytest.importorskip("depth_anything_3")
    from occgen_hub.engines.da3 import Da3Engine

    engine = Da3Engine(None, "cpu")
    for size in ((1920, 1080), (1080, 1920), (640, 480), (500, 500)):
        found = engine.input_size(size, Config())
        assert 480 <= max(found) <= 504 + 14, found


def test_model_preset_is_detected_from_the_weights(checkpoint):
    found = find_weights("da3", checkpoint, missing="raise")
    assert found.checkpoint.preset == "da3-small"
    assert found.record()["license"] == "apache-2.0"
    assert isinstance(network_engine(checkpoint, "cpu").name, str)
    assert network_engine(checkpoint, "cpu").name == "da3"


def test_missing_package_error_names_the_remedy(monkeypatch):
    monkeypatch.setattr("occgen_hub.engines.da3.find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"scripts/setup\.sh --with-da3"):
        load_engine("da3", None, "cpu")


def test_commercial_use_is_checked_against_the_weights_licence(checkpoint, tmp_path):
    check_license(load_engine("da3", checkpoint, "cpu"))
    check_license(Auto(None))
    check_license(load_engine("rgbd"))
    folder = save(tmp_path / "pi3", "pi3", random_weights("pi3"))
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"license": "cc-by-nc-4.0"}))
    with pytest.raises(UsageError, match=r"cc-by-nc-4\.0, which does not allow it"):
        check_license(Auto(load_engine("pi3", folder, "cpu")))
    (folder / "config.json").write_text(json.dumps(described | {"license": "unknown"}))
    with pytest.raises(UsageError, match="--license commercial"):
        check_license(load_engine("pi3", folder, "cpu"))


def test_published_weights_have_the_apache_licence():
    assert published("da3").license == "apache-2.0"
    assert published("da3").preset == "da3-base"
