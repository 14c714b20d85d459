"""Engines of networks: RGB frames in, views out, window after window, whichever network it is."""

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
from occgen_hub.engines.loops import LEAST_WINDOWS, close_loops
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
"""Scales of windows that differ by more than this share are told."""

MATRIX_SHARE = 0.6
"""Of the rate of a large product of matrices, what a network reaches as a whole."""

NO_CAMERAS = (
    "the network finds no cameras in these frames (its poses are not finite); check the weights "
    "with 'occgen-hub weights check'."
)

USUAL_VIEW = 60
"""Degrees across the longer side, where nothing tells."""


@dataclass(frozen=True)
class View:
    """A frame as a network takes it: image (h, w, 3) uint8, and what is known of it besides.

    depth: (h, w) float32 metres; intrinsics: (3, 3), pixels of that image; pose: (4, 4).
    """

    image: NDArray[np.uint8]
    depth: NDArray[np.float32] | None = None
    intrinsics: NDArray[np.float64] | None = None
    pose: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Prediction:
    """What any network gives for n views at once, in a world of its own.

    world_from_camera: (n, 4, 4) float64, OpenCV axes; points: (n, h, w, 3) float32 in the cameras'
    frames, in the unit of the poses (a network that gives depth and intrinsics: `unprojected`);
    confidence: (n, h, w) float32 in [0, 1]; looks: (n, d) float32, the mean of the encoder's tokens
    of each view, by which loops are found. What is not finite counts as not seen.
    """

    world_from_camera: NDArray[np.float64]
    points: NDArray[np.float32]
    confidence: NDArray[np.float32]
    looks: NDArray[np.float32]


class Network(Protocol):
    """A loaded network, behind an adapter."""

    def predict(self, views: list[View]) -> Prediction:
        """What it makes of views of one size, all with the same things known."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a network takes: of each token of all views, and of each token of some views.

    token: while all views are looked at; head: of `views` views, whose maps are made at a time.
    """

    token: float
    head: float = 0.0
    views: int = 0


@dataclass(frozen=True)
class Outlook:
    """What a reconstruction will take.

    frames: to be looked at, at most; windows: how many, of `size` frames that share `overlap`;
    memory: bytes, with the weights; seconds: an estimate, of the network alone.
    """

    frames: int
    windows: int
    size: int
    overlap: int
    memory: float
    seconds: float


@dataclass(frozen=True)
class Attention:
    """Of a network's tokens over all views: how many blocks, and how wide. It grows with both."""

    blocks: int
    width: int


@dataclass(frozen=True)
class NetworkEngine(Engine):
    """A network with weights, on a device. It is loaded when first used.

    found: its weights. A subclass says what kind of network it is.
    """

    found: Weights
    device: str

    metric = False
    """Whether the network knows metres."""

    patch = 14
    """Pixels: the sides of images are multiples of it."""

    memory = Memory(150_000)
    attention = Attention(18, 1024)

    def outlook(self, length: int, image_size: tuple[int, int], config: Config) -> Outlook:
        """What a video of `length` frames of `image_size` will take on this device.

        The time is that of the network's products of matrices, at the rate of one that is timed.
        """
        frames = length if config.interval == "auto" else -(-length // config.interval)
        size = self.window(image_size, config)
        windows = plan(frames, size, overlap_of(size, config))
        width, height = self.input_size(image_size, config)
        tokens = width * height / self.patch**2
        weights = self.found.bytes()
        seen = len(windows[0]) * tokens
        spread = 4 * self.attention.blocks * self.attention.width * seen
        operations = len(windows) * seen * (weights / 2 + spread)  # 4 bytes each, used twice
        memory = weights + seen * self.memory.token
        memory += self.memory.views * tokens * self.memory.head
        seconds = operations / (MATRIX_SHARE * _matrix_rate(self.device))
        return Outlook(
            frames, len(windows), len(windows[0]), overlap_of(size, config), memory, seconds
        )

    @abstractmethod
    def load(self, config: Config) -> Network:
        """The network, kept for the episodes to come."""

    def weights(self) -> dict[str, Any]:
        """What a dataset records of the weights."""
        return self.found.record()

    def uses_device(self) -> bool:
        """Always."""
        return True

    def on(self, device: str | None) -> Self:
        """The same network there; raises UsageError where that cannot be."""
        return replace(self, device=choose_device(device))

    def input_size(self, image_size: tuple[int, int], config: Config) -> tuple[int, int]:
        """(width, height) of an image of `image_size` as the network takes it."""
        return network_size(image_size, config.max_pixels, self.patch)

    def window(self, image_size: tuple[int, int], config: Config) -> int:
        """How many views the network looks at at once."""
        size = self.input_size(image_size, config)
        return config.window or window_size(size, self.patch, self.device, self.memory)

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """Depth and cameras of an episode's frames, in the world of its first camera.

        Every `config.interval`-th frame is used, or with auto those in which the camera has moved;
        the others' cameras are interpolated, and with auto refined by what they show. Raises
        OccGenError where what the network finds is no camera's, or a condition is not there.
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
        looks: list[NDArray[np.float32]] = []
        for number, window in enumerate(windows):
            before = len(held)
            held += [next(views) for _ in range(len(window) - before)]
            found, seen = _infer(network, held, config, self.device)
            after = 0
            if number + 1 < len(windows):
                after = window.stop - windows[number + 1].start
            assembly.add(found, before, after)
            looks.append(seen[before:])
            progress(len(window) - before)
            held = held[len(held) - after :]
        loops = (0, 0)
        if closes_loops(config, len(windows)):
            looker = _Looker(network, inputs, frames, assembly, config, self.device)
            loops = close_loops(assembly, np.concatenate(looks), looker.look, looker.remembered)
        notes = _notes(self, assembly, frames, episode)
        if config.window is None and len(windows) > 1:
            text = f"reconstructed in windows of {size} frames, by the memory that was free"
            notes.append(Note("window", text))
        poses = interpolate_poses(frames, assembly.world_from_camera, episode.length)
        intrinsics, further = _intrinsics(assembly.intrinsics, frames, episode)

        def place(frame: int) -> int:
            return int(np.searchsorted(frames, frame))

        def depth(frame: int) -> NDArray[np.float32]:
            return assembly.depth(place(frame))

        if config.interval == "auto" and len(frames) < episode.length:
            poses = refine_skipped(
                episode.read_rgb, depth, frames, poses, intrinsics, episode.image_size
            )
            text = f"{len(frames)} of {episode.length} frames were reconstructed from, by motion"
            notes.append(Note("keyframes", text))

        return Views(
            engine=self.name,
            world_from_camera=poses,
            intrinsics=intrinsics,
            image_size=episode.image_size,
            depth_size=inputs.size,
            frames=frames,
            read_depth=depth,
            read_color=lambda frame: store.color(place(frame)),
            read_confidence=lambda frame: store.confidence(place(frame)),
            edges="network",
            in_source_world=False,
            windows=WindowRecord(size, tuple(assembly.scales.tolist()), *loops),
            notes=(*notes, *further),
        )


def overlap_of(size: int, config: Config) -> int:
    """Frames that a window of `size` shares with the next: half of it at most."""
    return min(config.overlap or size // 2, size // 2)


def closes_loops(config: Config, windows: int) -> bool:
    """Whether loops are looked for in a video of so many windows."""
    if config.loop_closure == "auto":
        return windows >= LEAST_WINDOWS
    return bool(config.loop_closure)


@dataclass(frozen=True)
class _Looker:
    """Looks at views again, to verify loops."""

    network: Network
    inputs: Inputs
    frames: NDArray[np.int64]
    assembly: Assembly
    config: Config
    device: str

    def look(self, places: list[int]) -> Window:
        """What the network makes of the views of these numbers, at once."""
        views = list(self.inputs.views(self.frames[places]))
        found = _infer(self.network, views, self.config, self.device)[0]
        # Along the rays of `remembered`, so that what a network errs in them makes no difference.
        return replace(found, local=self._points(found.local[..., 2], places))

    def remembered(self, places: list[int]) -> Window:
        """What was made of them before, in the world."""
        depth = np.stack([self.assembly.depth(place) for place in places])
        confidence = np.stack([self.assembly.confidence(place) for place in places])
        colors = np.stack([self.assembly.color(place) for place in places])
        points = self._points(depth, places)
        kept = _kept(points, confidence, self.config)
        poses = self.assembly.world_from_camera[places]
        return Window(poses, points, kept, confidence, colors)

    def _points(self, depth: NDArray[np.float32], places: list[int]) -> NDArray[np.float32]:
        factors = np.divide(self.inputs.size, self.assembly.image_size)
        usual = _usual_camera(self.assembly.image_size)
        fitted = [self.assembly.intrinsics[place] for place in places]
        known = [scale_intrinsics(usual if K is None else K, *factors) for K in fitted]
        return unprojected(depth, np.stack(known))


def unprojected(
    depth: NDArray[np.floating], intrinsics: NDArray[np.floating]
) -> NDArray[np.float32]:
    """(n, h, w) depth and (n, 3, 3) intrinsics to (n, h, w, 3) points in the cameras' frames.

    Pixel centres are at + 0.5.
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
    """The device of that name, None for a GPU if there is one; UsageError where it is not there."""
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
                f"{episode.id}: --condition {condition}: the source has none; leave it out."
            )


# What goes into a network


class Inputs:
    """An episode's frames, decoded and resized ahead of the network."""

    def __init__(self, episode: Episode, config: Config, size: tuple[int, int]) -> None:
        self.size = size
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


def _infer(
    network: Network, views: list[View], config: Config, device: str
) -> tuple[Window, NDArray[np.float32]]:
    """What the network makes of views, with what is not to be believed marked, and their looks."""
    try:
        found = network.predict(views)
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
    if not np.isfinite(found.world_from_camera).all():
        raise OccGenError(NO_CAMERAS)
    colors = np.stack([view.image for view in views])
    there = np.isfinite(found.points).all(axis=-1) & (found.points[..., 2] > 0)
    confidence = np.nan_to_num(np.where(there, found.confidence, np.float32(0)))
    kept = _kept(found.points, confidence, config)
    window = Window(found.world_from_camera, found.points, kept, confidence, colors)
    return window, found.looks


def _kept(
    points: NDArray[np.float32], confidence: NDArray[np.float32], config: Config
) -> NDArray[np.bool_]:
    """(n, h, w) which points to join and fit by: sure, and not at an edge of depth."""
    kept: NDArray[np.bool_] = (confidence > config.confidence) & ~depth_edges(
        points[..., 2], config.depth_edge
    )
    return kept


# What comes out


def _notes(
    engine: NetworkEngine, assembly: Assembly, frames: NDArray[np.int64], episode: Episode
) -> list[Note]:
    """What a user should know of a reconstruction."""
    notes = []
    if len(frames) == 1 < episode.length:
        text = f"one of {episode.length} frames was looked at: set a smaller interval"
        notes.append(Note("interval", text))
    if not engine.metric and episode.world_from_camera is None:
        text = (
            f"{engine.name}'s unit of length is its own, not the metre, and so is that of "
            "voxel_size here"
        )
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


def window_size(size: tuple[int, int], patch: int, device: str, memory: Memory) -> int:
    """Views that fit into half the free memory, one of a few round numbers.

    So that the same machine gives the same windows from one day to the next.
    """
    tokens = size[0] * size[1] / patch**2
    room = _free_memory(device) / 2 - memory.views * tokens * memory.head
    most = 128 if device.startswith("cuda") else 32  # A CPU would be at more for hours.
    fit = max(WINDOWS[0], min(most, room / (tokens * memory.token)))
    return max(n for n in WINDOWS if n <= fit)


@lru_cache
def _matrix_rate(device: str) -> float:
    """Floating-point operations a second of a product of matrices there."""
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
    """Bytes, those of this process's share where it is one of several."""
    import psutil
    import torch

    if device.startswith("cuda"):
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
        return free / int(os.environ.get(GPU_SHARED_BY) or 1)
    share = own_threads() / len(os.sched_getaffinity(0))
    return float(psutil.virtual_memory().available * share)
