"""Speed of a network on this CPU with 16-bit weights and with quantised linear layers.

    .venv/bin/python scripts/bench_precision.py

The network is pi3 at full width with fewer blocks (2 of the encoder, 4 of the decoder, 1 of each
head), random weights and two views. The variants run in turn, and the fastest of three runs counts.
The script also prints the depth error relative to float32: an error above the size of a cell
changes cells.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import nn

from occgen_hub.engines.pi3.network import Pi3
from occgen_hub.engines.pi3.sizes import Sizes

SIZE = (224, 308)
RUNS = 3


def network() -> Pi3:
    torch.manual_seed(0)
    made = Pi3(Sizes(encoder_depth=2, decoder_depth=4, head_depth=1))
    for name, values in made.state_dict().items():
        if values.ndim > 1 or name.endswith("bias"):
            values.normal_(0, 0.02)
    return made.requires_grad_(False).eval()


def quantised(model: nn.Module) -> nn.Module:
    """Use 8-bit integer linear layers in the trunk. The last layers of the heads are unchanged."""
    copied = copy.deepcopy(model)
    for part in ("encoder", "decoder", "point_decoder", "conf_decoder", "camera_decoder"):
        inner = getattr(copied, part)
        dynamic = torch.ao.quantization.quantize_dynamic(inner, {nn.Linear}, torch.qint8)
        setattr(copied, part, dynamic)
    return copied


def in_bfloat16(model: nn.Module) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
    def run(images: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            found: dict[str, torch.Tensor] = model(images)
        return found

    return run


def timed(
    run: Callable[[torch.Tensor], dict[str, torch.Tensor]], images: torch.Tensor
) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    depth = run(images)["local_points"][..., 2]
    return time.perf_counter() - start, depth


def main() -> None:
    model = network()
    images = torch.rand(1, 2, 3, *SIZE)
    ways = {"float32": model, "bfloat16": in_bfloat16(model), "8-bit linear": quantised(model)}
    best = dict.fromkeys(ways, float("inf"))
    depth = {}
    for _ in range(RUNS):
        for name, run in ways.items():
            seconds, depth[name] = timed(run, images)
            best[name] = min(best[name], seconds)
    for name, seconds in best.items():
        off = (depth[name].float() / depth["float32"] - 1).abs()
        print(
            f"{name:14} {seconds / 2:.2f} s a frame, depth off by {off.median():.2%} (median), "
            f"{off.quantile(0.95):.2%} (95th percentile)"
        )


if __name__ == "__main__":
    main()
