"""Render a trajectory as a video, or one of its frames as an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.media import VideoWriter
from occgen_hub.prefetch import background
from occgen_hub.taxonomy import Class
from occgen_hub.visual.colors import ramp
from occgen_hub.visual.ego import EgoView, class_legend, ego_legend, seen_classes
from occgen_hub.visual.frames import Frame, frame_title, frames
from occgen_hub.visual.output_paths import atomic_output
from occgen_hub.visual.panels import Items, Panels, legend_height, legend_picture, with_legend
from occgen_hub.visual.viewpoint import Viewpoint
from occgen_hub.visual.world import WorldView, world_legend

View = Literal["world", "ego", "panels"]
LARGEST = 3840
"""Largest side in pixels. Twice as many are rendered, which graphics cards support."""


@dataclass(frozen=True)
class RenderOptions:
    """Options for rendering a trajectory.

    size: (width, height), pixels, None for the view's default; viewpoint: of the world, None to
    choose it automatically; history_len, history_step: past frames whose occupancy is shown in
    the world; color: of the cells in the camera's view.
    """

    view: View = "panels"
    size: tuple[int, int] | None = None
    viewpoint: Viewpoint | None = None
    history_len: int = 10
    history_step: int = 2
    color: Literal["depth", "class"] = "depth"

    def fitted(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) of its images in pixels, even as videos need.

        Raises UsageError if the requested size is invalid.
        """
        if self.size is not None:
            if any(n % 2 or not 64 <= n <= LARGEST for n in self.size):
                width, height = self.size
                raise UsageError(
                    f"--size {width}x{height}: give even numbers from 64 to {LARGEST}."
                )
            return self.size
        if self.view == "ego":
            scale = min(1280 / image_size[0], 960 / image_size[1])
            width, height = (max(64, round(n * scale / 2) * 2) for n in image_size)
            return width, height
        return (1280, 720) if self.view == "world" else (1920, 540)


class _Renderer(Protocol):
    def __call__(self, frame: Frame, image: NDArray[np.uint8] | None) -> NDArray[np.uint8]: ...


def pictures(trajectory: Trajectory, options: RenderOptions) -> Iterator[NDArray[np.uint8]]:
    """Yield (H, W, 3) uint8 of each frame in order, rendered on demand.

    Raises UsageError if this machine cannot render, DatasetError if a file is invalid.
    """
    yield from _drawn(trajectory, options, 0, None)


def _drawn(
    trajectory: Trajectory, options: RenderOptions, start: int, stop: int | None
) -> Iterator[NDArray[np.uint8]]:
    images = trajectory.images()
    length, shown = (0, False) if options.view == "ego" else (options.history_len, True)
    with _renderer(trajectory, options) as renderer:
        for frame in islice(frames(trajectory, length, options.history_step), start, stop):
            yield renderer(frame, images(frame.number) if shown else None)


@contextmanager
def _renderer(trajectory: Trajectory, options: RenderOptions) -> Iterator[_Renderer]:
    size, moving = options.fitted(trajectory.image_size), trajectory.has_dynamic()
    classes: list[Class] = []
    if options.color == "class":
        if options.view == "world":
            raise UsageError(
                "--color class: is of the camera's view; choose --view ego or panels, or leave it "
                "out."
            )
        classes = seen_classes(trajectory)
    if options.view == "world":
        foot = legend_height(*size, _world_legend_layout(moving))
        with closing(WorldView(trajectory, (size[0], size[1] - foot), options.viewpoint)) as world:
            strip = legend_picture(size[0], foot, size[1], partial(world.legend, moving=moving))
            yield lambda frame, image: with_legend(world(frame, image), size, strip)
    elif options.view == "ego":
        foot = legend_height(*size, _camera_legend_layout(moving, classes))
        inner = _fit_inside(trajectory.image_size, (size[0], size[1] - foot))
        with closing(EgoView(trajectory, inner, classes)) as ego:
            strip = legend_picture(size[0], foot, size[1], partial(ego.legend, moving=moving))
            yield lambda frame, _: with_legend(ego(frame), size, strip)
    else:
        legends = _world_legend_layout(moving), _camera_legend_layout(moving, classes)
        panels = Panels(size, trajectory.image_size, legends)
        name = trajectory_id(trajectory)
        count, fps = len(trajectory.world_from_camera()), rate(trajectory)
        with (
            closing(WorldView(trajectory, panels.world_size, options.viewpoint)) as world,
            closing(EgoView(trajectory, panels.image_size, classes)) as ego,
        ):
            panels.explain(partial(world.legend, moving=moving), partial(ego.legend, moving=moving))

            def draw(frame: Frame, image: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
                line = (
                    f"{name}  \u00b7  {frame_title(frame.number, count)}  \u00b7  "
                    f"{frame.number / fps:.1f} s  \u00b7  "
                    f"{len(frame.cells.columns):,} visible occupied cells"
                )
                if moving:
                    line += f", {len(frame.cells.moving):,} of them moving"
                return panels(image, world(frame, image), ego(frame), line)

            yield draw


def _world_legend_layout(moving: bool) -> Items:
    """A legend of the same size as the world's, for the layout."""
    return lambda text: world_legend(ramp, 1.0, text, moving)


def _camera_legend_layout(moving: bool, classes: Sequence[Class]) -> Items:
    if classes:
        return partial(class_legend, classes)
    return lambda text: ego_legend(ramp, 1.0, text, moving)


def _fit_inside(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The largest (width, height) with an image's aspect ratio that fits into `size`."""
    scale = min(size[0] / image_size[0], size[1] / image_size[1])
    width, height = (max(1, round(n * scale)) for n in image_size)
    return width, height


def trajectory_id(trajectory: Trajectory) -> str:
    """The id of a trajectory, from its path."""
    return "/".join(trajectory.path.resolve().parts[-3:])


def rate(trajectory: Trajectory) -> float:
    """The frame rate."""
    fps = trajectory.info().get("fps")
    if not isinstance(fps, int | float) or not 0.001 <= fps <= 1000:
        raise DatasetError(trajectory.file("info"), "has no valid fps", REBUILD)
    return float(fps)


def render(
    trajectory: Trajectory,
    place: Path,
    options: RenderOptions,
    *,
    fps: float | None = None,
    frame: int | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write an mp4 of all frames, or a PNG of frame `number`, None for the middle one.

    The mp4 is H.264, 4:2:0, with its index first, so that browsers can stream it. fps: None for
    the trajectory's. Raises UsageError if the name has another suffix or cannot be written, and
    the errors of `pictures`.
    """
    count = len(trajectory.world_from_camera())
    if place.suffix.lower() == ".png":
        number = count // 2 if frame is None else frame
        if number >= count:
            raise UsageError(f"--frame {number}: there are {count} frames, numbered from 0.")
        (drawn,) = _drawn(trajectory, options, number, number + 1)
        with atomic_output(place) as unfinished:
            Image.fromarray(drawn).save(unfinished, "PNG", optimize=True)
        return
    if place.suffix.lower() != ".mp4" or frame is not None:
        raise UsageError(f"{place}: give a name that ends in .mp4 or, for one frame, in .png.")
    with (
        atomic_output(place) as unfinished,
        VideoWriter(unfinished, fps or rate(trajectory)) as video,
        background(video.append) as encode,  # Encodes while the next image is rendered.
    ):
        for done, picture in enumerate(pictures(trajectory, options), 1):
            encode(picture)
            progress(done, count)
