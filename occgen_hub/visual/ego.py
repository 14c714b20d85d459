"""Render the visible occupancy from the camera, shaded by depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occgen_hub.errors import UsageError
from occgen_hub.geometry.camera import scale_intrinsics
from occgen_hub.loading import Trajectory
from occgen_hub.taxonomy import UNLABELLED, Class, load_taxonomy
from occgen_hub.visual.blend import averaged
from occgen_hub.visual.colors import FAINT, MOVING, ramp
from occgen_hub.visual.cubes import cube_faces, with_edges
from occgen_hub.visual.frames import Frame
from occgen_hub.visual.legend import Shade, color_bar, swatch
from occgen_hub.visual.offscreen import OffscreenRenderer

NEAR = 0.02

FARTHEST = 0.1
"""Position of the grid's far end on the colour ramp, so that it contrasts with the background."""

SUPERSAMPLED = 2
"""Supersampling factor: images are rendered larger by this factor and averaged."""

LIGHT = np.array([0.86, 0.86, 1.0, 0.78, 0.93, 0.93])
"""Brightness of faces towards +x, -x, +y, -y, +z, -z. y points down, so floors face -y."""


class EgoView:
    """Renders the visible occupied cells of frames from their cameras. Near cells are bright.

    Moving cells have their own colour.

    size: (width, height), pixels; images of the trajectory are scaled to it. classes: the classes
    of its cells, to colour them by class instead of depth. deepest: metres to the far end of the
    grid.
    """

    def __init__(
        self, trajectory: Trajectory, size: tuple[int, int], classes: Sequence[Class] = ()
    ) -> None:
        self._classes = classes
        width, height = trajectory.image_size
        drawn = size[0] * SUPERSAMPLED, size[1] * SUPERSAMPLED
        self._scale = drawn[0] / width, drawn[1] / height
        grid = trajectory.grid
        corner = np.abs(np.asarray(grid.lower))
        upper = np.asarray(grid.lower) + np.asarray(grid.shape) * grid.voxel_size
        self._far = float(np.linalg.norm(np.maximum(corner, np.abs(upper))))
        self.deepest = max(float(upper[2]), 2 * grid.voxel_size)
        self._stage = OffscreenRenderer(drawn, NEAR, self._far + 1)

    def __call__(self, frame: Frame) -> NDArray[np.uint8]:
        """(H, W, 3) uint8."""
        grid = frame.cells.grid
        centres = grid.centres(frame.cells.columns)
        faces = cube_faces(centres, grid.voxel_size, np.zeros(3))
        depth = centres[:, 2] / self.deepest
        darker = 1 - 0.35 * depth[:, None]
        if self._classes and frame.cells.classes is not None:
            shade = _colors(self._classes)[frame.cells.classes] * darker
        else:
            moving = frame.cells.is_moving[:, None]
            shade = np.where(moving, np.array(MOVING) * darker, self.shade(centres[:, 2]))
        light = LIGHT[::-1][faces.direction]
        colors = (shade[faces.owner] * light[:, None]).astype(np.uint8)
        K = scale_intrinsics(frame.intrinsics, *self._scale)
        self._stage.look(np.eye(4), K)
        self._stage.put_faces("occupancy", *with_edges(faces, colors, K[0, 0], grid.voxel_size))
        return averaged(self._stage.picture().rgb, SUPERSAMPLED)

    def shade(self, metres: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(n, 3) uint8 of (n,) depths."""
        depth = np.clip(metres / self.deepest, 0, 1)
        return ramp(FARTHEST + (1 - FARTHEST) * (1 - depth**0.8))

    def legend(self, text: int, *, moving: bool) -> list[Image.Image]:
        """The legend. text: its size, pixels; moving: whether there are moving cells."""
        if self._classes:
            return class_legend(self._classes, text)
        return ego_legend(self.shade, self.deepest, text, moving)

    def close(self) -> None:
        """Free the window."""
        self._stage.close()


def ego_legend(shade: Shade, deepest: float, text: int, moving: bool) -> list[Image.Image]:
    """The legend of the camera's view. Its size in pixels does not depend on the grid.

    shade: gives the colours of depths from 0 to `deepest`, metres.
    """
    items = [color_bar("occupied, by depth", {"": shade}, 0.0, deepest, text)]
    return items + ([swatch("moving", MOVING, text)] if moving else [])


def class_legend(classes: Sequence[Class], text: int) -> list[Image.Image]:
    """The colours of classes and, in grey, of cells without one."""
    named = [swatch(one.name.replace("_", " "), one.color, text) for one in classes]
    return [*named, swatch("no class", FAINT, text)]


def seen_classes(trajectory: Trajectory) -> list[Class]:
    """The classes that the cells of a trajectory have. Raises UsageError where it has no labels."""
    name = trajectory.taxonomy
    if name is None:
        raise UsageError(
            f"--color class: {trajectory.path} has no labels; leave the option out, or build from "
            "a source with label images."
        )
    seen = np.zeros(256, np.bool_)
    for classes in trajectory.label_frames():
        seen[classes] = True
    return [one for one in load_taxonomy(name).classes.values() if seen[one.id]]


def _colors(classes: Sequence[Class]) -> NDArray[np.float64]:
    """(256, 3) the colour of each class."""
    table = np.zeros((256, 3))
    table[UNLABELLED] = FAINT
    for one in classes:
        table[one.id] = one.color
    return table
