"""Render the scene from outside: its cloud, the path, the camera, and its visible occupancy."""

from __future__ import annotations

from weakref import ref

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from occgen_hub.geometry.cloud import Cloud, voxel_downsample
from occgen_hub.loading import Trajectory
from occgen_hub.occupancy.grid import cell_centres, cell_numbers
from occgen_hub.visual.blend import blended
from occgen_hub.visual.colors import AHEAD, INK, MOVING, PATH, SCENE, faded
from occgen_hub.visual.cubes import Faces, cube_faces, shaded
from occgen_hub.visual.frames import Frame, FrameCells
from occgen_hub.visual.heights import Heights
from occgen_hub.visual.legend import (
    BAR,
    SMALLEST,
    Overlay,
    Shade,
    color_bar,
    draw_axes,
    draw_scale_bar,
    swatch,
    text_size,
)
from occgen_hub.visual.offscreen import OffscreenRenderer
from occgen_hub.visual.viewpoint import Viewpoint, automatic

MAX_CUBES = 600_000
"""Largest number of cubes for the cloud. Larger clouds get larger cubes."""

SUPERSAMPLED = 2
"""Supersampling factor: images are rendered larger by this factor and averaged."""

GAP = 4
"""Edge, in cells, of the blocks in which the cloud between occupied cells is tinted."""

TINT = 0.8
"""Weight of the occupied cells' colour in the tinted cloud."""

BEFORE = 1.5
"""Distance, in cells, by which the cloud can be nearer than an occupied cell without hiding it."""


class WorldView:
    """Renders the frames of a trajectory from one viewpoint.

    The cloud does not change: it is drawn once with its depth, and each frame is drawn into it.
    Far from the camera, the pixels of an image are further apart than cells, so rays end in rows
    of cells. The cloud between the rows is tinted in their colour; otherwise it shows as stripes.
    size: (width, height), pixels. scale_bar: length in metres of the bar in the corner, at the
    distance of the viewpoint's target; 0 if the picture is too small for one.
    """

    def __init__(
        self, trajectory: Trajectory, size: tuple[int, int], viewpoint: Viewpoint | None = None
    ) -> None:
        self._size = size
        self._poses = trajectory.world_from_camera()
        self._image_size = trajectory.image_size
        self._voxel = trajectory.grid.voxel_size
        cloud, edge = _downsampled(trajectory.cloud(), self._voxel)
        self._occupied = _Occupied(cloud, edge, self._voxel)
        path = self._poses[:, :3, 3]
        self._heights = Heights(cloud.points, self._poses)
        self.viewpoint = viewpoint or automatic(cloud.points, self._poses, size, self._heights)
        pose = self.viewpoint.world_from_camera()
        everything = np.concatenate([cloud.points, path.astype(np.float32)])
        span = float(np.linalg.norm(everything.max(axis=0) - everything.min(axis=0)))
        self.reach = float(np.clip(0.055 * span, 0.2, 0.5))  # Length of the frustum, metres.
        forward = (everything - pose[:3, 3]) @ pose[:3, 2]
        # Tubes are 1.5 pixels wide in the middle of the scene.
        drawn = (size[0] * SUPERSAMPLED, size[1] * SUPERSAMPLED)
        K = self.viewpoint.intrinsics(drawn)
        middle = float(np.median(forward[forward > 0])) if (forward > 0).any() else 1.0
        self._line = 1.5 * SUPERSAMPLED * middle / K[1, 1]
        near = max(0.02, 0.5 * float(np.min(forward)) - 2)
        far = max(1.5 * float(np.max(forward)) + 5, 10 * near)
        self._stage = OffscreenRenderer(drawn, near, far)
        self._stage.look(pose, K)
        shown = self._heights.below_ceiling(cloud.points)
        self._draw_scenery(Cloud(cloud.points[shown], cloud.colors[shown]), edge)
        # Occupied cells coincide with cells of the cloud, and must be visible.
        self._limit = self._scenery.zbuffer_at(BEFORE * self._voxel)
        self.scale_bar = 0.0
        self._overlay = Overlay(self._marks())

    def _draw_scenery(self, cloud: Cloud, edge: float) -> None:
        """Draw the cloud, and find the face in each pixel, -1 for none."""
        numbers, first = np.unique(cell_numbers(cloud.points, edge), return_index=True)
        centres = cell_centres(numbers, edge)
        faces = cube_faces(centres, edge, np.asarray(self.viewpoint.position))
        # Colours encode the numbers of faces, without lighting or smoothing.
        code = np.arange(1, len(faces) + 1)[:, None] >> np.array([16, 8, 0]) & 255
        self._stage.put_faces("cloud", faces, code.astype(np.uint8))
        red, green, blue = np.moveaxis(self._stage.picture().rgb.astype(np.int32), -1, 0)
        shades = shaded(cloud.colors[first], faces, self._heights.axis)
        self._stage.put_faces("cloud", faces, shades)
        self._scenery = self._stage.picture()
        shown = self._scenery.zbuffer < 1
        self._face = np.where(shown, (red << 16 | green << 8 | blue) - 1, -1).astype(np.int32)
        self._stage.put_faces("cloud", Faces.none(), np.zeros((0, 3), np.uint8))
        self._gaps = _GapColors(centres, faces, self._heights, self._voxel)

    def __call__(self, frame: Frame, image: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of a frame. image: of its camera, shown on its frustum."""
        stage = self._stage
        tint = self._put_occupancy(frame)
        path = self._poses[:, :3, 3]
        stage.put_lines("behind", path[: frame.number + 1], PATH, self._line)
        stage.put_lines("ahead", path[frame.number :], AHEAD, 0.6 * self._line)
        self._put_frustum(frame, image)
        moving = stage.picture()
        picture: NDArray[np.uint8] = blended(
            moving.rgb, moving.zbuffer, self._scenery.rgb, self._limit, self._face, tint,
            SUPERSAMPLED,
        )  # fmt: skip
        self._overlay(picture)
        return picture

    def _put_occupancy(self, frame: Frame) -> NDArray[np.uint8]:
        """Draw the cells of a frame and of its past. Returns the tint of the cloud's cells."""
        numbers, among = self._occupied.of(frame)
        every = cell_centres(numbers, self._voxel)
        now = np.isin(numbers, frame.cells.moving_world_cells)
        # Moving cells of past frames are not shown, because the objects are elsewhere now. Those
        # above the ceiling are shown, because they do not hide the room.
        before = [np.zeros(0, np.int64), *(past.moving_world_cells for past in frame.past)]
        gone = np.isin(numbers, np.concatenate(before)) & ~among
        shown = now | (self._heights.below_ceiling(every) & ~gone)
        every, among, now = every[shown], among[shown], now[shown]
        colors = self._heights.colors(every)
        # Past cells between rows of the frame's own cells are tinted like the cloud.
        blocks = cell_numbers(every, GAP * self._voxel)
        between = ~among & np.isin(blocks, np.unique(blocks[among]))
        grey = faded(colors)
        mixed = grey[between] + TINT * (colors[between].astype(np.float64) - grey[between])
        colors[~among] = grey[~among]
        colors[between] = mixed.astype(np.uint8)
        colors[now] = MOVING
        faces = cube_faces(every, self._voxel, np.asarray(self.viewpoint.position))
        self._stage.put_faces("occupancy", faces, shaded(colors, faces, self._heights.axis))
        return self._gaps.tint(every[among & ~now], every[~among & ~now])

    def _put_frustum(self, frame: Frame, image: NDArray[np.uint8] | None) -> None:
        width, height = self._image_size
        K, pose = frame.intrinsics, frame.world_from_camera
        edges = np.array([(0, 0), (width, 0), (width, height), (0, height)])
        rays = np.column_stack([(edges - K[:2, 2]) / K[[0, 1], [0, 1]], np.ones(4)])
        corners = rays * self.reach @ pose[:3, :3].T + pose[:3, 3]
        eye = np.broadcast_to(pose[:3, 3], (4, 3))
        sides = np.concatenate(
            [np.stack([eye, corners], axis=1), np.stack([corners, np.roll(corners, -1, 0)], axis=1)]
        )
        self._stage.put_segments("frustum", sides, INK, 0.7 * self._line)
        if image is not None:
            self._stage.put_image("image", corners, image)

    def _marks(self) -> Image.Image:
        """The scale bar and the world's axes, (W, H) RGBA, transparent elsewhere."""
        sheet = Image.new("RGBA", self._size)
        if min(self._size) < SMALLEST:
            return sheet
        draw, text = ImageDraw.Draw(sheet), text_size(self._size[1])
        pose, (width, height) = self.viewpoint.world_from_camera(), self._size
        place = width - (BAR + 1) * text, height - text
        self.scale_bar = draw_scale_bar(draw, place, self.pixels_per_metre, text)
        draw_axes(draw, (4 * text, height - 4 * text), pose[:3, :2], text)
        return sheet

    @property
    def pixels_per_metre(self) -> float:
        """Pixels per metre at the distance of the viewpoint's target."""
        view = self.viewpoint
        distance = np.linalg.norm(np.subtract(view.target, view.position))
        return float(view.intrinsics(self._size)[0, 0] / distance)

    def legend(self, text: int, *, moving: bool) -> list[Image.Image]:
        """The legend. text: its size, pixels; moving: whether there are moving cells."""
        return world_legend(
            self._heights.shade, self._heights.high - self._heights.low, text, moving
        )

    def close(self) -> None:
        """Free the window."""
        self._stage.close()


def world_legend(shade: Shade, height: float, text: int, moving: bool) -> list[Image.Image]:
    """The legend of the world view. Its size in pixels does not depend on the scene.

    shade: gives the colours of heights from 0 to `height`, metres.
    """
    rows = {"now": shade, "past frames": lambda metres: faded(shade(metres))}
    items = [color_bar("height over the lowest cells", rows, 0.0, height, text)]
    if moving:
        items.append(swatch("moving now", MOVING, text))
    items.append(swatch("scene, in its colours", SCENE, text))
    paths = (("path", PATH), ("path to come", AHEAD), ("camera", INK))
    return items + [swatch(name, color, text, line=True) for name, color in paths]


def _downsampled(cloud: Cloud, edge: float) -> tuple[Cloud, float]:
    """A cloud with one point per cell and at most MAX_CUBES points, and the edge of the cells."""
    while len(cloud) > MAX_CUBES:
        edge *= 1.5
        cloud = voxel_downsample(cloud, edge)
    return cloud, edge


class _Occupied:
    """The cells of the world's grid that show a frame's occupancy.

    These are the cells that contain centres of the frame's cells. Because the grids are rotated
    against each other, this leaves holes, so the cells of the cloud's points in the frame's cells
    are added. edge: metres of the cloud's cells, with one point each; if they are coarser than the
    occupancy's, only centres are used.
    """

    def __init__(self, cloud: Cloud, edge: float, voxel_size: float) -> None:
        self._points = cloud.points.astype(np.float64) if edge == voxel_size else np.empty((0, 3))
        self._numbers = cell_numbers(self._points, voxel_size)
        self._known: dict[int, tuple[ref[FrameCells], NDArray[np.int64]]] = {}

    def of(self, frame: Frame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(n,) ascending numbers of the cells of a frame and of its past, and (n,) bool, True for
        its own.
        """
        # A frame is in the past of many frames, but not always of the next one.
        self._known = {key: kept for key, kept in self._known.items() if kept[0]() is not None}
        own, *older = (self._numbers_of(cells) for cells in (frame.cells, *frame.past))
        every = np.unique(np.concatenate([own, *older]))
        return every, np.isin(every, own, assume_unique=True)

    def _numbers_of(self, cells: FrameCells) -> NDArray[np.int64]:
        if id(cells) not in self._known:
            held = self._numbers[cells.contain(self._points)]
            numbers = np.unique(np.concatenate([cells.world_cells, held]))
            self._known[id(cells)] = ref(cells), numbers
        return self._known[id(cells)][1]


class _GapColors:
    """The colours of the cloud's cells between a frame's occupied cells.

    A cell is between them if its block, with an edge of GAP cells, has occupied cells. centres:
    (n, 3) of the cloud's cells, world, metres; faces: m of them; voxel_size: of the occupied cells.
    """

    def __init__(
        self, centres: NDArray[np.float32], faces: Faces, heights: Heights, voxel_size: float
    ) -> None:
        self._edge = GAP * voxel_size
        self.centres, self.owner = centres, faces.owner
        numbers = cell_numbers(centres, self._edge)
        self._blocks, block = np.unique(numbers, return_inverse=True)
        self._block = block[faces.owner]
        now = heights.colors(centres)
        share = np.full((len(faces), 1), round(255 * TINT), np.uint8)
        self._now, self._past = (
            np.concatenate([shaded(colors, faces, heights.axis), share], axis=1)
            for colors in (now, faded(now))
        )

    def tint(self, now: NDArray[np.floating], past: NDArray[np.floating]) -> NDArray[np.uint8]:
        """(m, 4) uint8: a colour for each face of the cloud, and its weight from 0 to 255.

        now, past: (k, 3) centres of the occupied cells of the frame and of past frames.
        """
        kind = np.zeros(len(self._blocks), np.uint8)
        for value, centres in enumerate((past, now), 1):
            kind[np.isin(self._blocks, cell_numbers(centres, self._edge))] = value
        of_face = kind[self._block][:, None]
        tint = np.where(of_face == 2, self._now, self._past)
        tint[of_face[:, 0] == 0] = 0
        return np.asarray(tint, np.uint8)
