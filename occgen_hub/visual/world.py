"""Render the scene from outside: its cloud, the path, the camera, and its visible occupancy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.cloud import Cloud, voxel_downsample
from occgen_hub.loading import Trajectory
from occgen_hub.occupancy.grid import cell_centres, cell_numbers, scene_grid
from occgen_hub.visual.blend import blended
from occgen_hub.visual.colors import INK, MOVING, PATH
from occgen_hub.visual.cubes import Faces, cube_faces, lit
from occgen_hub.visual.frames import Frame, FrameCells
from occgen_hub.visual.heights import Heights
from occgen_hub.visual.offscreen import Picture, Stage
from occgen_hub.visual.viewpoint import Viewpoint, automatic

MAX_CUBES = 600_000
"""Largest number of cubes for the cloud. Larger clouds get larger cubes."""

SUPERSAMPLED = 2
"""Supersampling factor: images are rendered larger by this factor and averaged."""

AHEAD = (120, 62, 56)
"""Colour of the future part of the path."""

OWN, PAST = 0.15, 0.6
"""How much of the cloud's own colour shows in the occupancy of a frame, and of those before it."""


class WorldView:
    """Renders the frames of a trajectory from one viewpoint.

    The cloud does not change: it is drawn once, with its depth, and what moves is drawn into it.
    size: (width, height), pixels.
    """

    def __init__(
        self, trajectory: Trajectory, size: tuple[int, int], viewpoint: Viewpoint | None = None
    ) -> None:
        self._size = size
        self._poses = trajectory.world_from_camera()
        self._image_size = trajectory.image_size
        self._voxel = trajectory.grid.voxel_size
        cloud, edge = _thinned(trajectory.cloud(), self._voxel)
        self._true = _TrueColors(cloud, edge)
        self._occupied = _Occupied(cloud, edge, self._voxel)
        path = self._poses[:, :3, 3]
        self.viewpoint = viewpoint or automatic(cloud.points, self._poses, size)
        pose = self.viewpoint.world_from_camera()
        everything = np.concatenate([cloud.points, path.astype(np.float32)])
        span = float(np.linalg.norm(everything.max(axis=0) - everything.min(axis=0)))
        self.reach = float(np.clip(0.055 * span, 0.2, 0.5))  # Length of the frustum, metres.
        self._heights = Heights(cloud.points, self._poses)
        forward = (everything - pose[:3, 3]) @ pose[:3, 2]
        # Tubes are 1.5 pixels wide in the middle of the scene.
        drawn = (size[0] * SUPERSAMPLED, size[1] * SUPERSAMPLED)
        K = self.viewpoint.intrinsics(drawn)
        middle = float(np.median(forward[forward > 0])) if (forward > 0).any() else 1.0
        self._line = 1.5 * SUPERSAMPLED * middle / K[1, 1]
        near = max(0.02, 0.5 * float(np.min(forward)) - 2)
        far = max(1.5 * float(np.max(forward)) + 5, 10 * near)
        self._stage = Stage(drawn, near, far)
        self._stage.look(pose, K)
        self._scenery = self._drawn_scenery(cloud, edge)
        # Occupied cells lie in those of the cloud, and are what is to be seen of the two.
        self._limit = self._scenery.zbuffer_at(0.6 * self._voxel)

    def _drawn_scenery(self, cloud: Cloud, edge: float) -> Picture:
        shown = self._heights.below_ceiling(cloud.points)
        centres = scene_grid(cloud.points[shown], edge).centres
        colors, _ = self._true.of(centres)
        faces = cube_faces(centres, edge, np.asarray(self.viewpoint.position))
        self._stage.put_faces("cloud", faces, lit(colors, faces, self._heights.axis))
        scenery = self._stage.picture()
        self._stage.put_faces("cloud", Faces.none(), np.zeros((0, 3), np.uint8))
        return scenery

    def __call__(self, frame: Frame, image: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 of a frame; image: what its camera saw, shown on its frustum."""
        stage = self._stage
        self._put_occupancy(frame)
        path = self._poses[:, :3, 3]
        stage.put_lines("behind", path[: frame.number + 1], PATH, self._line)
        stage.put_lines("ahead", path[frame.number :], AHEAD, 0.6 * self._line)
        self._put_frustum(frame, image)
        moving = stage.picture()
        picture: NDArray[np.uint8] = blended(
            moving.rgb, moving.zbuffer, self._scenery.rgb, self._limit, SUPERSAMPLED
        )
        return picture

    def _put_occupancy(self, frame: Frame) -> None:
        numbers, among = self._occupied.of(frame)
        every = cell_centres(numbers, self._voxel)
        now = np.isin(numbers, frame.cells.moving_world_cells)
        # What moves is where it is now, and where it was in the past frames no more. It is shown as
        # high as it is: unlike a ceiling it hides no room.
        before = [np.zeros(0, np.int64), *(past.moving_world_cells for past in frame.past)]
        gone = np.isin(numbers, np.concatenate(before)) & ~among
        shown = now | (self._heights.below_ceiling(every) & ~gone)
        every, among, now = every[shown], among[shown], now[shown]
        colors = self._heights.colors(every).astype(np.float32)
        true, known = self._true.of(every)
        share = np.where(among, OWN, PAST) * known
        colors += share[:, None] * (true - colors)
        colors[now] = MOVING
        faces = cube_faces(every, self._voxel, np.asarray(self.viewpoint.position))
        self._stage.put_faces(
            "occupancy", faces, lit(colors.astype(np.uint8), faces, self._heights.axis)
        )

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

    def close(self) -> None:
        """Free the window."""
        self._stage.close()


def _thinned(cloud: Cloud, edge: float) -> tuple[Cloud, float]:
    """A cloud with one point per cell and at most MAX_CUBES points, and the edge of the cells."""
    while len(cloud) > MAX_CUBES:
        edge *= 1.5
        cloud = voxel_downsample(cloud, edge)
    return cloud, edge


class _Occupied:
    """The cells of the world's grid that show a frame's occupancy.

    Those that centres of its cells lie in and, as cells that are turned against one another leave
    holes so, those of the cloud's points in its cells. edge: metres of the cloud's own cells, one
    point in each; where they are coarser than the occupancy's, centres have to do.
    """

    def __init__(self, cloud: Cloud, edge: float, voxel_size: float) -> None:
        self._points = cloud.points.astype(np.float64) if edge == voxel_size else np.empty((0, 3))
        self._numbers = cell_numbers(self._points, voxel_size)
        self._known: dict[int, tuple[FrameCells, NDArray[np.int64]]] = {}

    def of(self, frame: Frame) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """(n,) numbers, ascending, of the cells of a frame and of its past, and (n,) whether they
        are its own.
        """
        cells = (frame.cells, *frame.past)
        self._known = {
            id(each): self._known.get(id(each)) or self._worked_out(each) for each in cells
        }
        own = self._known[id(frame.cells)][1]
        every = np.unique(np.concatenate([numbers for _, numbers in self._known.values()]))
        return every, np.isin(every, own, assume_unique=True)

    def _worked_out(self, cells: FrameCells) -> tuple[FrameCells, NDArray[np.int64]]:
        held = self._numbers[cells.hold(self._points)]
        return cells, np.unique(np.concatenate([cells.world_cells, held]))


class _TrueColors:
    """The colours of the cells with edges of `edge` metres that contain a cloud's points."""

    def __init__(self, cloud: Cloud, edge: float) -> None:
        self._edge = edge
        self._keys, first = np.unique(cell_numbers(cloud.points, edge), return_index=True)
        self._colors = cloud.colors[first]

    def of(self, points: NDArray[np.floating]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """(n, 3) colours of the cells that contain (n, 3) points, and (n,) whether they exist."""
        if not len(self._keys):
            return np.zeros((len(points), 3), np.uint8), np.zeros(len(points), np.bool_)
        numbers = cell_numbers(points, self._edge)
        place = np.searchsorted(self._keys, numbers).clip(max=len(self._keys) - 1)
        return self._colors[place], self._keys[place] == numbers
