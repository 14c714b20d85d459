"""RGB frames in, views out: the networks pi3 and pi3x, window after window."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Condition, Config
from occgen_hub.engines import Engine, Progress, may_fetch
from occgen_hub.engines.pi3.frames import (
    depth_edges,
    network_depth,
    network_image,
    network_size,
)
from occgen_hub.engines.pi3.sizes import HEAD_VIEWS
from occgen_hub.engines.pi3.weights import Name, Weights, find, load_network
from occgen_hub.engines.pi3.windows import POOR_SEAM, Assembly, Window, plan
from occgen_hub.engines.store import FrameStore
from occgen_hub.episode import Episode, Note
from occgen_hub.errors import MachineError, OccGenError, UsageError
from occgen_hub.geometry.camera import scale_intrinsics
from occgen_hub.geometry.trajectory import interpolate_poses
from occgen_hub.prefetch import GPU_SHARED_BY, own_threads, prefetch
from occgen_hub.views import Views

if TYPE_CHECKING:
    from torch import Tensor

    from occgen_hub.engines.pi3.network import Pi3, Pi3X

WINDOWS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

TRUNK_BYTES, HEAD_BYTES = 150_000, 300_000
"""A token's, of all views in the trunk and of `HEAD_VIEWS` views in pi3x's heads. Measured in
float32: 84,000 and 255,000."""

NO_CAMERAS = (
    "the network finds no cameras in these frames (its poses are not finite); check the weights "
    "with 'occgen-hub weights check'."
)

USUAL_VIEW = 60
"""Degrees across the longer side, where nothing tells."""


@dataclass(frozen=True)
class NetworkEngine(Engine):
    """One of the networks, with weights, on a device. It is loaded when first used."""

    name: Name
    found: Weights
    device: str

    def weights(self) -> dict[str, Any]:
        """What a dataset records of the weights."""
        return self.found.record()

    def check(self, config: Config) -> None:
        """Raise UsageError for conditions that are given to pi3."""
        if self.name == "pi3":
            super().check(config)

    def uses_device(self) -> bool:
        """Always."""
        return True

    def on(self, device: str | None) -> NetworkEngine:
        """The same network there; raises UsageError where that cannot be."""
        return replace(self, device=_device(device))

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """Depth and cameras of an episode's frames, in the world of its first camera.

        Every `config.interval`-th frame is used; the others' cameras are interpolated. Raises
        OccGenError where what the network finds is no camera's, or a condition is not there.
        """
        self.check(config)
        _check_conditions(episode, config)
        network = _loaded(self.name, self.found, self.device, config.compile)
        frames = np.arange(0, episode.length, config.interval)
        inputs = Inputs(episode, config, network.sizes.patch)
        size = config.window or window_size(inputs.size, network.sizes.patch, self.device)
        windows = plan(len(frames), size, min(config.overlap, size // 2))
        store = FrameStore(scratch, inputs.size)
        assembly = Assembly(store, episode.image_size)
        views = inputs.views(frames)
        held: list[View] = []
        for number, window in enumerate(windows):
            before = len(held)
            held += [next(views) for _ in range(len(window) - before)]
            found = _infer(network, held, config, self.device)
            after = 0
            if number + 1 < len(windows):
                after = window.stop - windows[number + 1].start
            assembly.add(found, before, after)
            progress(len(window) - before)
            held = held[len(held) - after :]
        notes = _notes(self.name, assembly, frames, episode)
        if config.window is None and len(windows) > 1:
            text = f"reconstructed in windows of {size} frames, by the memory that was free"
            notes.append(Note("window", text))
        poses = interpolate_poses(frames, np.stack(assembly.world_from_camera), episode.length)
        intrinsics, further = _intrinsics(assembly.intrinsics, frames, episode)

        def place(frame: int) -> int:
            return frame // config.interval

        return Views(
            engine=self.name,
            world_from_camera=poses,
            intrinsics=intrinsics,
            image_size=episode.image_size,
            depth_size=inputs.size,
            frames=frames,
            read_depth=lambda frame: store.depth(place(frame)),
            read_color=lambda frame: store.color(place(frame)),
            read_confidence=lambda frame: store.confidence(place(frame)),
            edges="network",
            in_source_world=False,
            notes=(*notes, *further),
        )


def open_pi3(weights: Path | None, device: str | None) -> NetworkEngine:
    """The engine pi3; raises UsageError where its weights or the device cannot be had."""
    return _open("pi3", weights, device)


def open_pi3x(weights: Path | None, device: str | None) -> NetworkEngine:
    """The engine pi3x; raises UsageError where its weights or the device cannot be had."""
    return _open("pi3x", weights, device)


def _open(name: Name, weights: Path | None, device: str | None) -> NetworkEngine:
    chosen = _device(device)  # First, because looking for weights may take long.
    return NetworkEngine(name, find(name, weights, fetching=may_fetch()), chosen)


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"--device {name}: cannot be used; choose cpu, cuda or cuda:0.")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")[:160]
        raise UsageError(
            f"--device {name}: cannot be used ({reason}); choose cpu, cuda or cuda:0."
        ) from error
    return name


@lru_cache(maxsize=1)
def _loaded(name: Name, weights: Weights, device: str, compiled: bool) -> Pi3 | Pi3X:
    """The network, kept for the episodes to come."""
    sizes = weights.checkpoint.sizes
    network = load_network(name, weights.path, sizes=sizes, device=device)
    if compiled:
        network.compile_blocks()
    return network


def _check_conditions(episode: Episode, config: Config) -> None:
    have: dict[Condition, object] = {
        "depth": episode.read_depth,
        "intrinsics": episode.intrinsics,
        "poses": episode.world_from_camera,
    }
    for condition in config.condition:
        if have[condition] is None:
            raise OccGenError(
                f"{episode.id}: --condition {condition}: the source has none; leave it out."
            )


# What goes into the network


@dataclass(frozen=True)
class View:
    """A frame as the network takes it: image (h, w, 3) uint8, and what is known of it besides.

    depth: (h, w) float32 metres; intrinsics: (3, 3), pixels of that image; pose: (4, 4).
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float64] | None = None
    pose: NDArray[np.float64] | None = None


class Inputs:
    """An episode's frames, decoded and resized ahead of the network."""

    def __init__(self, episode: Episode, config: Config, patch: int) -> None:
        self.size = network_size(episode.image_size, config.max_pixels, patch)
        self._episode, self._condition = episode, config.condition
        self._depth_range = config.depth_range
        self._factors = np.divide(self.size, episode.image_size)

    def views(self, frames: NDArray[np.int64]) -> Iterator[View]:
        """The frames of these numbers, in order."""
        return prefetch(self._view, frames.tolist())

    def _view(self, frame: int) -> View:
        episode, wanted = self._episode, self._condition
        image = network_image(episode.read_rgb(frame), self.size)
        depth = K = pose = None
        if "depth" in wanted and episode.read_depth is not None:
            depth = network_depth(episode.read_depth(frame), self.size)
            near, far = self._depth_range
            depth[(depth < near) | (depth > far)] = 0
        if "intrinsics" in wanted and episode.intrinsics is not None:
            K = scale_intrinsics(episode.intrinsics[frame], *self._factors)
        if "poses" in wanted and episode.world_from_camera is not None:
            # From the first camera: far from the world's origin float32 would be too coarse.
            pose = np.linalg.inv(episode.world_from_camera[0]) @ episode.world_from_camera[frame]
        return View(image, depth, K, pose)


def _infer(network: Pi3 | Pi3X, views: list[View], config: Config, device: str) -> Window:
    """What the network makes of views, with what is not to be believed marked."""
    import torch

    colors = np.stack([view.image for view in views])
    images = torch.from_numpy(colors).to(device).permute(0, 3, 1, 2).float()[None] / 255
    known = {"depths": "depth", "intrinsics": "intrinsics", "poses": "pose"}
    conditions = {}
    for name, attribute in known.items():
        values = [getattr(view, attribute) for view in views]
        if values[0] is not None:
            conditions[name] = torch.from_numpy(np.stack(values)).to(device).float()[None]
    try:
        found = network(images, **conditions)
    except RuntimeError as error:  # Torch has several kinds, of which few tell by their type.
        if "linalg" in str(error):
            raise OccGenError(NO_CAMERAS) from error
        if "memory" not in str(error).lower() and "alloc" not in str(error).lower():
            if "CUDA error" not in str(error):
                raise
            said = str(error).splitlines()[0].rstrip(".")
            raise MachineError(f"{device}: failed ({said}); run the same build again.") from error
        raise MachineError(
            f"{len(views)} frames at once need more memory than the device {device} has free; "
            f"set a smaller window, as with --set window={max(1, len(views) // 2)}."
        ) from error
    return _believed(found, colors, config)


def _believed(found: dict[str, Tensor], colors: NDArray[np.uint8], config: Config) -> Window:
    local = found["local_points"][0].cpu().numpy()
    logit = found["conf"][0, ..., 0].cpu().numpy()
    there = np.isfinite(local).all(axis=-1) & (local[..., 2] > 0)
    with np.errstate(over="ignore", invalid="ignore"):
        confidence = np.where(there, 1 / (1 + np.exp(-logit)), 0).astype(np.float32)
    confidence = np.nan_to_num(confidence)
    kept = (confidence > config.confidence) & ~depth_edges(local[..., 2], config.depth_edge)
    poses = found["camera_poses"][0].cpu().numpy().astype(np.float64)
    if not np.isfinite(poses).all():
        raise OccGenError(NO_CAMERAS)
    return Window(poses, local, kept, confidence, colors)


# What comes out


def _notes(
    name: Name, assembly: Assembly, frames: NDArray[np.int64], episode: Episode
) -> list[Note]:
    """What a user should know of a reconstruction."""
    notes = []
    if len(frames) == 1 < episode.length:
        text = f"one of {episode.length} frames was looked at: set a smaller interval"
        notes.append(Note("interval", text))
    if name == "pi3" and episode.world_from_camera is None:
        text = "pi3's unit of length is its own, not the metre, and so is that of voxel_size here"
        notes.append(Note("no metres", text))
    if assembly.unscaled:
        text = (
            f"{assembly.unscaled} windows share nothing that tells their scales apart: they were "
            "joined as they are; a larger overlap may help"
        )
        notes.append(Note("seam scale", text))
    if assembly.residuals and max(assembly.residuals) > POOR_SEAM:
        text = (
            f"windows join poorly: the worst seam's points are {max(assembly.residuals):.0%} of "
            "their distance apart; a larger window or overlap may help"
        )
        notes.append(Note("seam", text))
    return notes


def _intrinsics(
    fitted: list[NDArray[np.float64] | None], frames: NDArray[np.int64], episode: Episode
) -> tuple[NDArray[np.float64], list[Note]]:
    """(T, 3, 3) for all frames from those that could be fitted to some."""
    known = [(frame, K) for frame, K in zip(frames, fitted, strict=True) if K is not None]
    notes = []
    if not known:
        known = [(0, _usual_camera(episode.image_size))]
        text = (
            f"the points that the network finds fit no pinhole camera: {USUAL_VIEW} degrees of "
            "view are assumed, and nothing here is to be relied on; was the video made by a "
            "fisheye or panoramic camera, and are these the network's weights?"
        )
        notes.append(Note("no pinhole camera", text))
    elif len(known) < len(fitted):
        text = (
            f"intrinsics could not be fitted to {len(fitted) - len(known)} of {len(fitted)} "
            "frames: taken from their neighbours"
        )
        notes.append(Note("intrinsics", text))
    at, matrices = np.array([frame for frame, _ in known]), np.stack([K for _, K in known])
    intrinsics = np.tile(np.eye(3), (episode.length, 1, 1))
    for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)):
        intrinsics[:, row, column] = np.interp(
            np.arange(episode.length), at, matrices[:, row, column]
        )
    return intrinsics, notes


def _usual_camera(size: tuple[int, int]) -> NDArray[np.float64]:
    """Intrinsics of an image of `size`, as most cameras have them."""
    width, height = size
    focal = max(size) / (2 * np.tan(np.radians(USUAL_VIEW / 2)))
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


# How much at once


def window_size(size: tuple[int, int], patch: int, device: str) -> int:
    """Views that fit into half the free memory, one of a few round numbers.

    So that the same machine gives the same windows from one day to the next.
    """
    tokens = size[0] * size[1] / patch**2
    room = _free_memory(device) / 2 - HEAD_VIEWS * tokens * HEAD_BYTES
    most = 128 if device.startswith("cuda") else 32  # A CPU would be at more for hours.
    fit = max(WINDOWS[0], min(most, room / (tokens * TRUNK_BYTES)))
    return max(n for n in WINDOWS if n <= fit)


def _free_memory(device: str) -> float:
    """Bytes, those of this process's share where it is one of several."""
    import psutil
    import torch

    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        return free / int(os.environ.get(GPU_SHARED_BY) or 1)
    share = own_threads() / len(os.sched_getaffinity(0))
    return float(psutil.virtual_memory().available * share)
