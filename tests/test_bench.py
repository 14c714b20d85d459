"""The baselines of scripts/bench do the same work as our code, so its ratios are fair."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from occgen_hub.config import Config
from occgen_hub.engines.pi3.network import NETWORKS
from occgen_hub.engines.pi3.sizes import Sizes
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OBSERVED, trace

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

from bench_networks import relative_difference
from fixed_stride import fixed_stride
from plain_networks import plain


@pytest.mark.parametrize("name", ["pi3", "pi3x"])
def test_plain_network_matches_ours(name):
    sizes = Sizes(
        width=64, heads=2, encoder_depth=2, decoder_depth=4, head_depth=2, camera_width=32,
        upsampling=(32, 16, 16), metric_width=64, metric_heads=2, pose_blocks=(1,), position_grid=7,
    )  # fmt: skip
    torch.manual_seed(1)
    model = NETWORKS[name](sizes).eval()
    for key, values in model.state_dict().items():
        if "norm" not in key and "image" not in key:
            values.normal_(0, 0.05)
    images = torch.rand(1, 3, 3, 42, 56)
    assert relative_difference(model(images), plain(model)(images)) < 1e-5


def test_fixed_stride_is_close_to_exact_rays():
    grid = Grid.of(Config(voxel_size=0.1))
    K, size = np.array([[30.0, 0, 32], [0, 30, 24], [0, 0, 1]]), (64, 48)
    state = (np.random.default_rng(1).random(grid.cells) < 0.005).astype(np.uint8)
    occupied = torch.from_numpy(state > 0)
    trace(grid, K, size, state)
    seen = (state & OBSERVED) > 0
    wrong = (fixed_stride(grid, K, size, occupied).numpy() != seen).sum() / seen.sum()
    assert 0 < wrong < 0.4
