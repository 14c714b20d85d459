"""The base of all engines with a network: RGB frames to views, in overlapping windows."""

from __future__ import annotations

import os
import re
import time
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Condition, Config
from occgen_hub.engines import Engine, Progress
from occgen_hub.engines.frames import depth_edges, network_depth, network_image, network_size
from occgen_hub.engines.keyframes import keyframes, refine_skipped
from occgen_hub.engines.loops import MIN_WINDOWS, close_loops
from occgen_hub.engines.store import FrameStore
from occgen_hub.engines.weights import Weights
from occgen_hub.engines.windows import POOR_SEAM, Assembly, Window, plan
from occgen_hub.episode import Episode, Note
from occgen_hub.errors import MachineError, OccGenError, UsageError
from occgen_hub.geometry.camera import scale_intrinsics
from occgen_hub.geometry.trajectory import interpolate_poses
from occgen_hub.prefetch import GPU_SHARED_BY, own_threads, prefetch
from occgen_hub.views import Views, WindowRecord

WINDOWS = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

DRIFT = 0.1
"""Difference between the scales of windows, as a share, from which it is noted."""

MATRIX_SHARE = 0.6
"""Speed of a network, as a share of that of a large matrix product."""

NO_CAMERAS = (
    "the network found no cameras in these frames (its poses are not finite); check the weights "
    "with 'occgen-hub weights check'."
)

DEFAULT_VIEW = 60
"""Field of view across the longer side, in degrees, if it cannot be estimated."""


@dataclass(frozen=True)
class View:
    """A network's input for one frame: the image and, if known, its depth and camera.

    image: (h, w, 3) uint8 RGB; depth: (h, w) float32 metres, 0 for none; intrinsics: (3, 3), pixels
    of that image; pose: (4, 4) world_from_camera, metres.
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float64] | None = None
    pose: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Prediction:
    """A network's prediction for n views, in a world of its own.

    world_from_camera: (n, 4, 4) float64, OpenCV axes; points: (n, h, w, 3) float32 in the cameras'
    frames, in the unit of the poses (from depth and intrinsics: `unproject`), not finite where
    there is none; confidence: (n, h, w) float32 in [0, 1]; descriptors: (n, d) float32, the mean of
    the encoder's tokens of each view, used to find loops.
    """

    world_from_camera: NDArray[np.float64]
    points: NDArray[np.float32]
    confidence: NDArray[np.float32]
    descriptors: NDArray[np.float32]


class Network(Protocol):
    """A loaded network, behind an adapter."""

    def predict(self, views: list[View]) -> Prediction:
        """Predict for views that all have the same size and the same inputs."""


@dataclass(frozen=True)
class Memory:
    """Memory that a network needs, in bytes per token.

    token: for the tokens of all views; head: for the tokens of the `views` views whose dense maps
    are computed at a time.
    """

    token: float
    head: float = 0.0
    views: int = 0


@dataclass(frozen=True)
class NetworkEstimate:
    """An estimate of what a reconstruction needs.

    frames: largest number of frames; windows: number of windows of `size` frames, of which
    neighbours share `overlap`; memory: bytes, including the weights; seconds: for the network only.
    """

    frames: int
    windows: int
    size: int
    overlap: int
    memory: float
    seconds: float


@dataclass(frozen=True)
class Attention:
    """A network's attention over the tokens of all views: the number of blocks and their width."""

    blocks: int
    width: int


@dataclass(frozen=True)
class NetworkEngine(Engine):
    """An engine with a network, which is loaded when it is first used.

    weights_file: its weights; device: "cpu", "cuda" or "cuda:0". Subclasses load the network.
    """

    weights_file: Weights
    device: str

    metric = False
    """Whether the network's unit of length is the metre."""

    patch = 14
    """Side of a patch in pixels. The sides of images are multiples of it."""

    memory = Memory(150_000)
    attention = Attention(18, 1024)

    def estimate(self, length: int, image_size: tuple[int, int], config: Config) -> NetworkEstimate:
        """Estimate frames, memory and time for `length` frames of `image_size` (width, height).

        The time is that of the network's matrix products, at the measured speed of one of them.
        """
        frames = length if config.interval == "auto" else -(-length // config.interval)
        size = self.window(image_size, config)
        windows = plan(frames, size, overlap_of(size, config))
        width, height = self.input_size(image_size, config)
        tokens = width * height / self.patch**2
        weights = self.weights_file.bytes()
        seen = len(windows[0]) * tokens
        spread = 4 * self.attention.blocks * self.attention.width * seen
        operations = len(windows) * seen * (weights / 2 + spread)  # 4 bytes each, used twice
        memory = weights + seen * self.memory.token
        memory += self.memory.views * tokens * self.memory.head
        seconds = operations / (MATRIX_SHARE * _matrix_rate(self.device))
        return NetworkEstimate(
            frames, len(windows), len(windows[0]), overlap_of(size, config), memory, seconds
        )

    @abstractmethod
    def load(self, config: Config) -> Network:
        """The loaded network, cached for further episodes."""

    def weights(self) -> dict[str, Any]:
        """The record of the weights in a dataset."""
        return self.weights_file.record()

    def uses_device(self) -> bool:
        """True."""
        return True

    def on(self, device: str | None) -> Self:
        """The same engine on another device. Raises UsageError if it cannot be used."""
        return replace(self, device=choose_device(device))

    def input_size(self, image_size: tuple[int, int], config: Config) -> tuple[int, int]:
        """(width, height) in pixels of the network's input for images of `image_size`."""
        return network_size(image_size, config.max_pixels, self.patch)

    def window(self, image_size: tuple[int, int], config: Config) -> int:
        """The number of views that the network processes at once."""
        size = self.input_size(image_size, config)
        return config.window or window_size(size, self.patch, self.device, self.memory)

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """Reconstruct depth and cameras of an episode, in the world of its first camera.

        Every `config.interval`-th frame is used, or with auto the frames in which the camera has
        moved. The poses of other frames are interpolated, and with auto refined by their images.
        Raises OccGenError if the network finds no valid cameras, or if the episode lacks a
        condition that the configuration asks for.
        """
        self.check(config)
        _check_conditions(episode, config)
        network = self.load(config)
        if config.interval == "auto":
            frames = keyframes(episode.read_rgb, episode.length)
        else:
            frames = np.arange(0, episode.length, config.interval)
        inputs = Inputs(episode, config, self.input_size(episode.image_size, config))
        size = self.window(episode.image_size, config)
        windows = plan(len(frames), size, overlap_of(size, config))
        store = FrameStore(scratch, inputs.size)
        assembly = Assembly(store, episode.image_size, metric=self.metric)
        views = inputs.views(frames)
        held: list[View] = []
        descriptors: list[NDArray[np.float32]] = []
        for number, window in enumerate(windows):
            before = len(held)
            held += [next(views) for _ in range(len(window) - before)]
            found, seen = _infer(network, held, config, self.device)
            after = 0
            if number + 1 < len(windows):
                after = window.stop - windows[number + 1].start
            assembly.add(found, before, after)
            descriptors.append(seen[before:])
            progress(len(window) - before)
            held = held[len(held) - after :]
        loops = (0, 0)
        if closes_loops(config, len(windows)):
            verifier = _LoopVerifier(network, inputs, frames, assembly, config, self.device)
            loops = close_loops(
                assembly, np.concatenate(descriptors), verifier.predict, verifier.stored
            )
        notes = _notes(self, assembly, frames, episode)
        if config.window is None and len(windows) > 1:
            text = f"reconstructed in windows of {size} frames, chosen by the free memory"
            notes.append(Note("window", text))
        poses = interpolate_poses(frames, assembly.world_from_camera, episode.length)
        intrinsics, further = _intrinsics(assembly.intrinsics, frames, episode)

        def number_of(frame: int) -> int:
            return int(np.searchsorted(frames, frame))

        def depth(frame: int) -> NDArray[np.float32]:
            return assembly.depth(number_of(frame))

        if config.interval == "auto" and len(frames) < episode.length:
            poses = refine_skipped(
                episode.read_rgb, depth, frames, poses, intrinsics, episode.image_size
            )
            text = f"{len(frames)} of {episode.length} frames were used, chosen by motion"
            notes.append(Note("keyframes", text))

        return Views(
            engine=self.name,
            world_from_camera=poses,
            intrinsics=intrinsics,
            image_size=episode.image_size,
            depth_size=inputs.size,
            frames=frames,
            read_depth=depth,
            read_color=lambda frame: store.color(number_of(frame)),
            read_confidence=lambda frame: store.confidence(number_of(frame)),
            edges="network",
            in_source_world=False,
            windows=WindowRecord(size, tuple(assembly.scales.tolist()), *loops),
            notes=(*notes, *further),
        )


def overlap_of(size: int, config: Config) -> int:
    """The number of frames that a window of `size` shares with the next, at most half of it."""
    return min(config.overlap or size // 2, size // 2)


def closes_loops(config: Config, windows: int) -> bool:
    """Whether loops are searched in a video of this many windows."""
    if config.loop_closure == "auto":
        return windows >= MIN_WINDOWS
    return bool(config.loop_closure)


@dataclass(frozen=True)
class _LoopVerifier:
    """Gives `close_loops` new predictions and stored results of views, by their numbers."""

    network: Network
    inputs: Inputs
    frames: NDArray[np.int64]
    assembly: Assembly
    config: Config
    device: str

    def predict(self, numbers: list[int]) -> Window:
        """The network's prediction for these views together."""
        views = list(self.inputs.views(self.frames[numbers]))
        found = _infer(self.network, views, self.config, self.device)[0]
        # With the rays of `stored`, so that errors of the predicted rays have no effect.
        return replace(found, local=self._points(found.local[..., 2], numbers))

    def stored(self, numbers: list[int]) -> Window:
        """The stored result for these views, in the world."""
        depth = np.stack([self.assembly.depth(number) for number in numbers])
        confidence = np.stack([self.assembly.confidence(number) for number in numbers])
        colors = np.stack([self.assembly.color(number) for number in numbers])
        points = self._points(depth, numbers)
        kept = _reliable_points(points, confidence, self.config)
        poses = self.assembly.world_from_camera[numbers]
        return Window(poses, points, kept, confidence, colors)

    def _points(self, depth: NDArray[np.float32], numbers: list[int]) -> NDArray[np.float32]:
        factors = np.divide(self.inputs.size, self.assembly.image_size)
        default = _default_camera(self.assembly.image_size)
        fitted = [self.assembly.intrinsics[number] for number in numbers]
        known = [scale_intrinsics(default if K is None else K, *factors) for K in fitted]
        return unproject(depth, np.stack(known))


def unproject(depth: NDArray[np.floating], intrinsics: NDArray[np.floating]) -> NDArray[np.float32]:
    """Points (n, h, w, 3) in the cameras' frames from (n, h, w) depth and (n, 3, 3) intrinsics.

    Pixel centres are at + 0.5. The unit is that of the depth.
    """
    height, width = depth.shape[1:]
    fx, fy, cx, cy = (
        intrinsics[:, row, column].astype(np.float32)[:, None, None]
        for row, column in ((0, 0), (1, 1), (0, 2), (1, 2))
    )
    z = depth.astype(np.float32)
    u = np.arange(width, dtype=np.float32) + np.float32(0.5)
    v = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
    return np.stack(((u - cx) / fx * z, (v - cy) / fy * z, z), axis=-1)


def choose_device(name: str | None) -> str:
    """The name of a usable device; None takes a GPU if there is one.

    Raises UsageError if the device is unknown or cannot be used.
    """
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


def _check_conditions(episode: Episode, config: Config) -> None:
    have: dict[Condition, object] = {
        "depth": episode.read_depth,
        "intrinsics": episode.intrinsics,
        "poses": episode.world_from_camera,
    }
    for condition in config.condition:
        if have[condition] is None:
            raise OccGenError(
                f"{episode.id}: --condition {condition}: the source has no {condition}; leave it "
                "out."
            )


# Inputs


class Inputs:
    """An episode's frames, decoded and resized in threads ahead of the network."""

    def __init__(self, episode: Episode, config: Config, size: tuple[int, int]) -> None:
        self.size = size
        self._episode, self._condition = episode, config.condition
        self._depth_range = config.depth_range
        self._factors = np.divide(self.size, episode.image_size)

    def views(self, frames: NDArray[np.int64]) -> Iterator[View]:
        """Yield the views of these frames, in order."""
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
            # Relative to the first camera, because float32 is too coarse far from the origin.
            pose = np.linalg.inv(episode.world_from_camera[0]) @ episode.world_from_camera[frame]
        return View(image, depth, K, pose)


def _infer(
    network: Network, views: list[View], config: Config, device: str
) -> tuple[Window, NDArray[np.float32]]:
    """The network's prediction for views, with unreliable points marked, and their descriptors."""
    try:
        found = network.predict(views)
    except RuntimeError as error:  # torch has one type for most kinds of errors.
        if "linalg" in str(error):
            raise OccGenError(NO_CAMERAS) from error
        if "memory" not in str(error).lower() and "alloc" not in str(error).lower():
            if "CUDA error" not in str(error):
                raise
            message = str(error).splitlines()[0].rstrip(".")
            raise MachineError(
                f"{device}: failed ({message}); run the same build again."
            ) from error
        raise MachineError(
            f"{len(views)} frames at once need more memory than the device {device} has free; "
            f"set a smaller window, for example --set window={max(1, len(views) // 2)}."
        ) from error
    if not np.isfinite(found.world_from_camera).all():
        raise OccGenError(NO_CAMERAS)
    colors = np.stack([view.image for view in views])
    valid = np.isfinite(found.points).all(axis=-1) & (found.points[..., 2] > 0)
    confidence = np.nan_to_num(np.where(valid, found.confidence, np.float32(0)))
    kept = _reliable_points(found.points, confidence, config)
    window = Window(found.world_from_camera, found.points, kept, confidence, colors)
    return window, found.descriptors


def _reliable_points(
    points: NDArray[np.float32], confidence: NDArray[np.float32], config: Config
) -> NDArray[np.bool_]:
    """(n, h, w) bool: points used to join and fit, which are confident and not at a depth edge."""
    kept: NDArray[np.bool_] = (confidence > config.confidence) & ~depth_edges(
        points[..., 2], config.depth_edge
    )
    return kept


# Results


def _notes(
    engine: NetworkEngine, assembly: Assembly, frames: NDArray[np.int64], episode: Episode
) -> list[Note]:
    """Notes on the quality of a reconstruction."""
    notes = []
    if len(frames) == 1 < episode.length:
        text = f"only one of {episode.length} frames was used: set a smaller interval"
        notes.append(Note("interval", text))
    if not engine.metric and episode.world_from_camera is None:
        text = (
            f"{engine.name}'s unit of length is arbitrary, not the metre; voxel_size is in that "
            "unit"
        )
        notes.append(Note("no metres", text))
    if assembly.unscaled:
        text = (
            f"{assembly.unscaled} windows share too little to estimate their relative scale and "
            "were joined without scaling; a larger overlap may help"
        )
        notes.append(Note("seam scale", text))
    if assembly.residuals and max(assembly.residuals) > POOR_SEAM:
        text = (
            f"windows join poorly: at the worst seam, points differ by "
            f"{max(assembly.residuals):.0%} of their distance; a larger window or overlap may help"
        )
        notes.append(Note("seam", text))
    least, most = float(assembly.scales.min()), float(assembly.scales.max())
    if most > (1 + DRIFT) * least:
        text = (
            f"the scale drifts along the video: windows have {least:.2f} to {most:.2f} times the "
            "unit of the first one; a larger window may help"
        )
        notes.append(Note("scale drift", text))
    return notes


def _intrinsics(
    fitted: list[NDArray[np.float64] | None], frames: NDArray[np.int64], episode: Episode
) -> tuple[NDArray[np.float64], list[Note]]:
    """(T, 3, 3) intrinsics of all frames, interpolated from those that were fitted, and notes."""
    known = [(frame, K) for frame, K in zip(frames, fitted, strict=True) if K is not None]
    notes = []
    if not known:
        known = [(0, _default_camera(episode.image_size))]
        text = (
            f"the network's points fit no pinhole camera: {DEFAULT_VIEW} degrees of view are "
            "assumed, and the result is unreliable; check whether the camera is fisheye or "
            "panoramic, and whether the weights are the network's"
        )
        notes.append(Note("no pinhole camera", text))
    elif len(known) < len(fitted):
        text = (
            f"intrinsics could not be fitted to {len(fitted) - len(known)} of {len(fitted)} "
            "frames and were taken from their neighbours"
        )
        notes.append(Note("intrinsics", text))
    at, matrices = np.array([frame for frame, _ in known]), np.stack([K for _, K in known])
    intrinsics = np.tile(np.eye(3), (episode.length, 1, 1))
    for row, column in ((0, 0), (1, 1), (0, 2), (1, 2)):
        intrinsics[:, row, column] = np.interp(
            np.arange(episode.length), at, matrices[:, row, column]
        )
    return intrinsics, notes


def _default_camera(size: tuple[int, int]) -> NDArray[np.float64]:
    """(3, 3) intrinsics of a typical camera with images of `size`, pixels."""
    width, height = size
    focal = max(size) / (2 * np.tan(np.radians(DEFAULT_VIEW / 2)))
    return np.array([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


# Size of windows


def window_size(size: tuple[int, int], patch: int, device: str, memory: Memory) -> int:
    """The largest number in `WINDOWS` of views that fit into half the free memory.

    size: (width, height), pixels. With few round numbers, a machine usually gives the same windows
    in every run.
    """
    tokens = size[0] * size[1] / patch**2
    room = _free_memory(device) / 2 - memory.views * tokens * memory.head
    limit = 128 if device.startswith("cuda") else 32  # A CPU would need hours for more.
    fit = max(WINDOWS[0], min(limit, room / (tokens * memory.token)))
    return max(n for n in WINDOWS if n <= fit)


@lru_cache
def _matrix_rate(device: str) -> float:
    """Measured floating-point operations per second of a matrix product on a device."""
    import torch

    n, kind = (1024, torch.float32) if device == "cpu" else (8192, torch.bfloat16)
    a = torch.ones(n, n, device=device, dtype=kind)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _free_memory(device: str) -> float:
    """Free memory of a device in bytes, divided by the processes that share it."""
    import psutil
    import torch

    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        return free / int(os.environ.get(GPU_SHARED_BY) or 1)
    share = own_threads() / len(os.sched_getaffinity(0))
    return float(psutil.virtual_memory().available * share)
