"""Views: the output of an engine and the input of fusion, depth maps with their cameras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from occgen_hub.episode import Episode, Note, depth_problem
from occgen_hub.errors import OccGenError
from occgen_hub.geometry.camera import intrinsics_problem, scale_intrinsics
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.geometry.sim3 import Sim3


@dataclass(frozen=True)
class WindowRecord:
    """How the windows of a long video were joined.

    size: frames per window; scales: of each window relative to the first one, which shows the drift
    of scale; candidates: number of pairs of frames that looked like a loop; loops: number of loops
    that were closed.
    """

    size: int
    scales: tuple[float, ...]
    candidates: int = 0
    loops: int = 0


@dataclass(frozen=True)
class Views:
    """Depth and cameras of an episode of T frames. Depth is decoded on demand.

    Attributes:
        engine: the name of the engine that made them.
        world_from_camera: (T, 4, 4) float64, OpenCV axes.
        intrinsics: (T, 3, 3) float64, pixels of the episode's images.
        image_size: (width, height) of the episode's images, pixels.
        depth_size: (width, height) of the depth maps, pixels.
        frames: (n,) int64, the numbers of the frames that have depth, ascending.
        read_depth: frame number to (h, w) float32 depth along the optical axis, 0 for none.
        read_color: frame number to (h, w, 3) uint8, RGB, of the depth map's size.
        read_confidence: frame number to (h, w) float32 in [0, 1]; None for full confidence.
        edges: the type of errors at depth edges. With a sensor, single pixels lie between two
            surfaces; a network connects the surfaces by a ramp.
        in_source_world: whether poses and depth are metres in the source's world. If not, they have
            a world and a unit of the engine.
        scale: factor from `read_depth` to the unit of `world_from_camera`.
        windows: how windows were joined; None if all frames were processed at once.
        notes: for the user.
        read_labels: frame number to (H, W) uint8 classes of the pixels of the episode's images, 0
            for none; None without labels.

    The methods that take a frame number are thread-safe.
    """

    engine: str
    world_from_camera: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    image_size: tuple[int, int]
    depth_size: tuple[int, int]
    frames: NDArray[np.int64]
    read_depth: Callable[[int], NDArray[np.float32]]
    read_color: Callable[[int], NDArray[np.uint8]]
    read_confidence: Callable[[int], NDArray[np.float32]] | None = None
    edges: Literal["sensor", "network"] = "sensor"
    in_source_world: bool = True
    scale: float = 1.0
    windows: WindowRecord | None = None
    notes: tuple[Note, ...] = ()
    read_labels: Callable[[int], NDArray[np.uint8]] | None = None

    def depth(self, frame: int, confidence: float = 0.0) -> NDArray[np.float32]:
        """(h, w) float32 depth of a frame, in the unit of the poses, 0 for none.

        confidence: depth with at most this confidence is set to 0.
        """
        depth = np.ascontiguousarray(self.read_depth(frame), np.float32)
        if self.read_confidence is not None and confidence > 0:
            depth = np.where(self.read_confidence(frame) > confidence, depth, np.float32(0))
        scaled: NDArray[np.float32] = depth * np.float32(self.scale)
        return scaled

    def depth_intrinsics(self, frame: int) -> NDArray[np.float64]:
        """(3, 3) float64 intrinsics in pixels of the depth map."""
        if self.depth_size == self.image_size:
            own: NDArray[np.float64] = self.intrinsics[frame]
            return own
        width, height = np.divide(self.depth_size, self.image_size)
        return scale_intrinsics(self.intrinsics[frame], width, height)

    def moved(self, target_from_source: Sim3) -> Views:
        """The views in another world."""
        return replace(
            self,
            world_from_camera=target_from_source.poses(self.world_from_camera),
            scale=self.scale * target_from_source.scale,
        )


def check_views(views: Views, episode: Episode) -> Views:
    """Check an engine's views, and return them with readers that check each frame.

    Engines may come from other packages, and compiled code does not check bounds. Raises
    OccGenError if shapes or dtypes are wrong, frames are not ascending, poses are not rigid and
    finite, intrinsics are not of a pinhole camera, depth is not finite and at least 0, or
    confidence is not in [0, 1]. The returned depth is float32.
    """
    if not isinstance(views, Views):
        raise OccGenError(
            f"{episode.id}: the engine returned a {type(views).__name__}, expected "
            "occgen_hub.views.Views; report it to the authors of the engine."
        )
    length, wrong = episode.length, partial(_wrong, episode.id, views.engine)
    frames = views.frames
    if not (isinstance(frames, np.ndarray) and frames.ndim == 1 and frames.dtype.kind in "iu"):
        found = f"is {getattr(frames, 'dtype', type(frames).__name__)}"
        raise wrong("frames", found, "int64 (n,)")
    if len(frames) and not (frames[0] >= 0 and frames[-1] < length and (np.diff(frames) > 0).all()):
        raise wrong("frames", "is out of range or not ascending", f"numbers from 0 to {length - 1}")
    if views.edges not in ("sensor", "network"):
        raise wrong("edges", f"is {views.edges!r}", "sensor or network")
    fields: list[tuple[str, NDArray[Any], tuple[int, ...]]] = [
        ("world_from_camera", views.world_from_camera, (length, 4, 4)),
        ("intrinsics", views.intrinsics, (length, 3, 3)),
    ]
    for name, array, shape in fields:
        if array.shape != shape or array.dtype != np.float64:
            raise _wrong(episode.id, views.engine, name, f"is {array.dtype} {array.shape}", shape)
    error = rigidity_error(views.world_from_camera)
    if (bad := np.flatnonzero(~(error <= RIGID))).size:
        raise OccGenError(
            f"{episode.id}: the engine {views.engine} returned a pose for frame {bad[0]} that is "
            "not rigid and finite; report it to the authors of the engine."
        )
    for frame, K in enumerate(views.intrinsics):
        if problem := intrinsics_problem(K, views.image_size):
            raise OccGenError(
                f"{episode.id}: the engine {views.engine} returned invalid intrinsics for frame "
                f"{frame}: the matrix {problem}; report it to the authors of the engine."
            )
    shape = views.depth_size[::-1]
    read_confidence = views.read_confidence

    def depth(frame: int) -> NDArray[np.float32]:
        name, values = f"read_depth({frame})", np.asarray(views.read_depth(frame))
        if values.dtype.kind != "f" or values.shape != shape:
            raise wrong(name, f"is {values.dtype} {values.shape}", f"float32 {shape}")
        with np.errstate(over="ignore"):  # Becomes infinite, which is an error below.
            values = values.astype(np.float32, copy=False)
        if problem := depth_problem(values):
            raise wrong(name, problem, "finite depth, 0 for none")
        return values

    def color(frame: int) -> NDArray[np.uint8]:
        image = np.asarray(views.read_color(frame))
        if image.dtype != np.uint8 or image.shape != (*shape, 3):
            found = f"is {image.dtype} {image.shape}"
            raise wrong(f"read_color({frame})", found, f"uint8 {(*shape, 3)}")
        return image

    def confidence(frame: int) -> NDArray[np.float32]:
        assert read_confidence is not None
        name, values = f"read_confidence({frame})", np.asarray(read_confidence(frame))
        if values.dtype.kind != "f" or values.shape != shape:
            raise wrong(name, f"is {values.dtype} {values.shape}", f"float32 {shape}")
        if not (values.min(initial=0) >= 0 and values.max(initial=0) <= 1):
            raise wrong(name, "has NaN or values outside [0, 1]", "values in [0, 1]")
        return values

    return replace(
        views,
        read_depth=depth,
        read_color=color,
        read_confidence=None if read_confidence is None else confidence,
    )


def _wrong(episode: str, engine: str, name: str, found: str, expected: object) -> OccGenError:
    return OccGenError(
        f"{episode}: {name} of the engine {engine} {found}, expected {expected}; report it to the "
        "authors of the engine."
    )
