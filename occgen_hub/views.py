"""Views: what an engine gives, and all that fusion needs: depth seen from known cameras."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from occgen_hub.episode import Episode, Note
from occgen_hub.errors import OccGenError
from occgen_hub.geometry.camera import intrinsics_problem, scale_intrinsics
from occgen_hub.geometry.poses import RIGID, rigidity_error
from occgen_hub.geometry.sim3 import Sim3


@dataclass(frozen=True)
class WindowRecord:
    """How a long video was put together from windows.

    size: frames of a window; scales: of each, how much larger its unit is than that of the first
    one, which is how the network's scale drifts; candidates: pairs of frames that looked like one
    place; loops: how many of them are.
    """

    size: int
    scales: tuple[float, ...]
    candidates: int = 0
    loops: int = 0


@dataclass(frozen=True)
class Views:
    """An episode of T frames as its cameras saw it. Depth is decoded when asked for.

    Attributes:
        engine: the name of the engine that found them.
        world_from_camera: (T, 4, 4) float64, OpenCV axes.
        intrinsics: (T, 3, 3) float64, pixels of the episode's images.
        image_size: (width, height) of the episode's images, pixels.
        depth_size: (width, height) of the depth maps, pixels.
        frames: (n,) int64, the numbers of the frames that have depth, ascending.
        read_depth: frame number to (h, w) float32 depth along the optical axis, 0 for none.
        read_color: frame number to (h, w, 3) uint8, RGB, of the depth map's size.
        read_confidence: frame number to (h, w) float32 in [0, 1]; None where every depth counts.
        edges: how depth maps err at the edges of objects. A sensor's pixels float between two
            surfaces; a network draws a ramp from one to the other.
        in_source_world: whether poses and depth are metres in the source's world. If not, they are
            in a world and a unit of the engine's own.
        scale: what `read_depth` is multiplied by to be in the unit of `world_from_camera`.
        windows: how they were put together; None where all frames were seen at once, or by no
            network.
        notes: what a user should know of them.

    The methods that take a frame number may be called from several threads at once.
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

    def depth(self, frame: int, confidence: float = 0.0) -> NDArray[np.float32]:
        """(h, w) float32 depth of a frame, in the unit of the poses, 0 for none.

        confidence: depth that the engine is no surer of than this counts as none.
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
        """The same views in another world."""
        return replace(
            self,
            world_from_camera=target_from_source.poses(self.world_from_camera),
            scale=self.scale * target_from_source.scale,
        )


def check_views(views: Views, episode: Episode) -> None:
    """Raise OccGenError where an engine's views cannot be those of an episode.

    Shapes, dtypes, rigid finite poses, intrinsics of a pinhole camera, and the depth of the first
    frame are looked at.
    """
    length = episode.length
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
            f"{episode.id}: the engine {views.engine} gives a pose of frame {bad[0]} that is not "
            "rigid and finite; report it to whoever made the engine."
        )
    for frame, K in enumerate(views.intrinsics):
        if problem := intrinsics_problem(K):
            raise OccGenError(
                f"{episode.id}: the engine {views.engine} gives intrinsics of frame {frame} that "
                f"no pinhole camera has: the matrix {problem}."
            )
    if len(views.frames):
        depth = views.depth(int(views.frames[0]))
        expected = views.depth_size[::-1]
        if depth.shape != expected:
            raise _wrong(episode.id, views.engine, "depth", f"has shape {depth.shape}", expected)


def _wrong(episode: str, engine: str, name: str, found: str, expected: object) -> OccGenError:
    return OccGenError(
        f"{episode}: {name} of the engine {engine} {found}, expected {expected}; report it to "
        "whoever made the engine."
    )
