"""Time and memory of the networks at full size, with random weights, which cost the same.

scripts/bench runs one process per network, to get the peak memory of each.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_networks import plain
from torch.utils.flop_counter import FlopCounterMode

from occgen_hub.engines.pi3.network import NETWORKS
from occgen_hub.engines.weights import load_network, published

SIZE = (224, 308)
"""Height and width of a view."""


def network(name: str, device: str) -> torch.nn.Module:
    """The network with random weights of typical magnitude."""
    with torch.device("meta"):
        shapes = NETWORKS[name](published(name).sizes).state_dict()
    weights = {k: torch.empty(v.shape).normal_(0, 0.02) for k, v in shapes.items()}
    return load_network(name, weights, device=device)


class Memory:
    """Peak memory of a block, relative to its start, in megabytes."""

    def __init__(self, device: str) -> None:
        self.device, self.peak = device, 0.0

    def __enter__(self) -> Memory:
        if self.device == "cpu":  # Returns memory that malloc kept from earlier work.
            ctypes.CDLL(None).malloc_trim(0)
        self._before, self._done = self._current(), False
        if self.device == "cpu":
            self._watch = threading.Thread(target=self._sample, daemon=True)
            self._watch.start()
        else:
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        if self.device == "cpu":
            self._watch.join()
        else:
            self.peak = torch.cuda.max_memory_allocated() / 1e6 - self._before

    def _sample(self) -> None:
        while not self._done:
            self.peak = max(self.peak, self._current() - self._before)
            time.sleep(0.005)

    def _current(self) -> float:
        if self.device != "cpu":
            return torch.cuda.memory_allocated() / 1e6
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def rate(device: str) -> float:
    """Floating-point operations per second of a matrix product in the trunk's data type."""
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    best = 1e9
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def timed(
    run: Callable[[torch.Tensor], dict[str, torch.Tensor]], images: torch.Tensor, device: str
) -> tuple[dict[str, torch.Tensor], float, float]:
    """Run a network. Returns its output, the time in seconds and the additional megabytes."""
    with Memory(device) as memory:
        start = time.perf_counter()
        found = run(images)
        found["conf"].sum().item()
        seconds = time.perf_counter() - start
    return found, seconds, memory.peak


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest ||ours - theirs|| / ||theirs|| over all common outputs."""
    pairs = [(ours[name].double(), theirs[name].double()) for name in theirs]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measure(model: torch.nn.Module, views: int, device: str) -> dict[str, float | None]:
    """Time our network and the plain one: best of two alternating runs, memory of the first."""
    images = torch.rand(1, views, 3, *SIZE, device=device)
    with FlopCounterMode(display=False) as counted:
        model(images)
    product, plainly = rate(device), plain(model)
    ours, seconds, peak = timed(model, images, device)
    against: dict[str, float | None] = dict.fromkeys(
        ("plain_seconds_a_frame", "plain_peak_memory_mb", "plain_differs_by")
    )
    try:
        theirs, plain_seconds, plain_peak = timed(plainly, images, device)
        difference = relative_difference(ours, theirs)
        del ours, theirs
        plain_seconds = min(plain_seconds, timed(plainly, images, device)[1])
        against = {
            "plain_seconds_a_frame": plain_seconds / views,
            "plain_peak_memory_mb": plain_peak,
            "plain_differs_by": difference,
        }
    except torch.OutOfMemoryError:
        pass  # Its attention weights grow with the square of the number of views.
    seconds = min(seconds, timed(model, images, device)[1])
    return {
        "views": views,
        "seconds_a_frame": seconds / views,
        "peak_memory_mb": peak,
        **against,
        "tflop_a_frame": counted.get_total_flops() / views / 1e12,
        "share_of_matrix_product": counted.get_total_flops() / seconds / product,
    }


def main() -> None:
    name, *views = sys.argv[1:]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = network(name, device)
    rows: list[dict[str, Any]] = [measure(model, int(n), device) for n in views]
    print(json.dumps({"network": name, "device": device, "rows": rows}))


if __name__ == "__main__":
    main()
