"""One image of one frame: the colour image, depth, and occupancy from two directions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from occgen_hub.errors import DatasetError
from occgen_hub.fusion.registration import outlines
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied
from occgen_hub.visual.colors import (
    INK,
    MOVING,
    PAPER,
    PATH,
    by_height,
    limits,
    ramp,
    shade_depth,
)
from occgen_hub.visual.cubes import EDGES
from occgen_hub.visual.frames import frame_title
from occgen_hub.visual.heights import world_up
from occgen_hub.visual.legend import (
    BAR,
    color_bar,
    draw_axes,
    draw_scale_bar,
    fit_text,
    strip,
    swatch,
    write,
)

PANEL = (640, 360)
TEXT = 12
HEAD = 22
"""Height of a panel's title, in pixels. The legend is below the picture."""

OBSERVED = (58, 66, 82)
MAX_OBSERVED = 200_000
"""Observed cells that are drawn from above."""

OUTLINE = (0, 229, 255)
CLEAR = 7
"""Size of a cell, in pixels, from which its edges are drawn."""


def preview(trajectory: Trajectory, frame: int | None = None) -> Image.Image:
    """RGB, depth or cloud, occupancy from the camera, and the scene from above.

    frame: its number, None for the middle one.
    """
    poses, intrinsics = trajectory.world_from_camera(), trajectory.intrinsics()
    frame = len(poses) // 2 if frame is None else frame
    visible, moving, observed = _occupancy(trajectory, frame, len(poses))
    K, size = intrinsics[frame], trajectory.image_size

    rgb, depth = trajectory.rgb(frame), trajectory.depth(frame)
    if depth is None:
        cloud = trajectory.cloud()
        local = (cloud.points - poses[frame, :3, 3]) @ poses[frame, :3, :3]
        second = _panel(_draw_points(local, cloud.colors, 0.01, K, size), "reconstructed cloud")
    else:
        second = _panel(shade_depth(depth), "depth", _depth_legend(depth))
    title, legend = frame_title(frame, len(poses)), []
    if rgb is None:
        rgb, title = np.zeros((*size[::-1], 3), np.uint8), "images were left out"
    elif depth is not None:
        rgb = np.where(_drawn_outlines(depth)[..., None], np.array(OUTLINE, np.uint8), rgb)
        legend.append(swatch("outlines in the depth", OUTLINE, TEXT, line=True))
    first = _panel(rgb, title, legend)
    third = _cells_panel(trajectory, frame, visible, moving)
    fourth = _above(trajectory, poses, frame, moving, observed)

    width, height = PANEL
    sheet = Image.new("RGB", (2 * width, 2 * height), PAPER)
    for n, panel in enumerate((first, second, third, fourth)):
        sheet.paste(panel, (n % 2 * width, n // 2 * height))
    return sheet


def _cells_panel(
    trajectory: Trajectory,
    frame: int,
    visible: NDArray[np.integer],
    moving: NDArray[np.integer],
    size: tuple[int, int] = PANEL,
) -> Image.Image:
    K, image_size = trajectory.intrinsics()[frame], trajectory.image_size
    cells, heights = _cells_from_camera(trajectory.grid, visible, moving, K, image_size)
    grid = trajectory.grid
    reach = grid.lower[2] + grid.shape[2] * grid.voxel_size
    title = f"from the camera: {len(visible):,} visible occupied cells, up to {reach:g} m ahead"
    legend = [_bar("height over the camera", *limits(heights))] if len(heights) else []
    if trajectory.has_dynamic():
        title += f", {len(moving):,} of them moving"
        legend.append(swatch("moving", MOVING, TEXT))
    return _panel(cells, title, legend, size)


def _drawn_outlines(depth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(H, W) bool: where to draw the outlines in the depth over the image."""
    found = outlines(depth)
    if len(depth) > PANEL[1]:  # Two pixels wide, to be seen when the picture is made smaller.
        found[:, 1:] |= found[:, :-1]
        found[1:] |= found[:-1]
    return found


def _depth_legend(depth: NDArray[np.float64]) -> list[Image.Image]:
    """The legend of `shade_depth`. Black means no depth."""
    legend = [swatch("not measured", (0, 0, 0), TEXT)] if (depth <= 0).any() else []
    if (depth > 0).any():
        low, high = limits(1 / depth[depth > 0])

        def shade(metres: NDArray[np.float64]) -> NDArray[np.uint8]:
            return ramp((1 / metres - low) / max(high - low, 1e-9))

        legend.insert(0, color_bar("depth", {"": shade}, 1 / high, 1 / low, TEXT))
    return legend


def _bar(title: str, low: float, high: float) -> Image.Image:
    """The legend of `by_height`."""
    shades = {"": lambda metres: ramp((metres - low) / max(high - low, 1e-6))}
    return color_bar(title, shades, low, high, TEXT)


def from_above(trajectory: Trajectory, frame: int, size: tuple[int, int] = PANEL) -> Image.Image:
    """The scene from above, with the path and what a frame observed. size: (width, height)."""
    poses = trajectory.world_from_camera()
    _, moving, observed = _occupancy(trajectory, frame, len(poses))
    return _above(trajectory, poses, frame, moving, observed, size)


def cells_panel(trajectory: Trajectory, frame: int, size: tuple[int, int] = PANEL) -> Image.Image:
    """`from_camera` with its legend. size: (width, height)."""
    visible, moving, _ = _occupancy(trajectory, frame, len(trajectory.world_from_camera()))
    return _cells_panel(trajectory, frame, visible, moving, size)


def from_camera(trajectory: Trajectory, frame: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the occupied cells that a frame's camera sees, coloured by height.

    Moving cells have their own colour.
    """
    visible, moving, _ = _occupancy(trajectory, frame, len(trajectory.world_from_camera()))
    K, size = trajectory.intrinsics()[frame], trajectory.image_size
    return _cells_from_camera(trajectory.grid, visible, moving, K, size)[0]


def _occupancy(
    trajectory: Trajectory, frame: int, length: int
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.bool_]]:
    """A frame's (n,) columns of visible occupied cells, (m,) columns of moving ones among them,
    and (cells,) bool of observed cells.
    """
    rows = len(trajectory.row_ends("visible")) - 1
    if not frame < length == rows:
        problem = f"has {rows} rows, but the table has {length}"
        raise DatasetError(trajectory.file("visible"), problem, REBUILD)
    visible = next(islice(trajectory.visible_frames(), frame, None))
    moving = next(islice(trajectory.dynamic_frames(), frame, None))
    packed = next(islice(trajectory.observed_packed(), frame, None), None)
    if packed is None:
        raise DatasetError(trajectory.file("observed"), f"ends before frame {frame}", REBUILD)
    return visible, moving, unpack(packed, trajectory.grid.cells)


def _panel(
    picture: NDArray[np.uint8] | Image.Image,
    title: str,
    legend: Sequence[Image.Image] = (),
    size: tuple[int, int] = PANEL,
) -> Image.Image:
    """A picture fitted into a panel, between its title and its legend."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    width, height = _picture_size(legend, size)
    scale = min(width / image.width, height / image.height)
    fitted = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
        Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST,
    )
    panel = Image.new("RGB", size, PAPER)
    panel.paste(fitted, ((width - fitted.width) // 2, HEAD + (height - fitted.height) // 2))
    draw = ImageDraw.Draw(panel)
    write(draw, (6, HEAD // 2), fit_text(title, width - 12, TEXT), INK, TEXT)
    if legend:
        panel.paste(strip(legend, width, TEXT), (0, HEAD + height))
    return panel


def _picture_size(legend: Sequence[Image.Image], size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) left for a panel's picture. The legend has at least one line."""
    foot = max(strip(legend, size[0], TEXT).height if legend else 0, round(3.2 * TEXT))
    return size[0], size[1] - HEAD - foot


def _cells_from_camera(
    grid: Grid,
    visible: NDArray[np.integer],
    moving: NDArray[np.integer],
    K: NDArray[np.float64],
    size: tuple[int, int],
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw the cells that the pixels' rays hit, as solid cubes shaded by the faces' directions.

    Also returns their (n,) heights above the camera, metres, which determine the colours of cells
    that do not move.
    """
    state = np.zeros(grid.cells, np.uint8)
    state[visible] = OCCUPIED
    ends = first_occupied(grid, K, size, state)
    picture = np.full((size[1], size[0], 3), PAPER, np.uint8)
    hit = ends >= 0
    if not hit.any():
        return picture, np.empty(0)
    centre = grid.centres(ends[hit]).astype(np.float64)
    v, u = np.nonzero(hit)
    ray = np.stack([(u + 0.5 - K[0, 2]) / K[0, 0], (v + 0.5 - K[1, 2]) / K[1, 1]], axis=-1)
    ray = np.concatenate([ray, np.ones((len(ray), 1))], axis=1)
    # A ray enters a cell through the last of the faces whose planes it crosses.
    half = grid.voxel_size / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        reached = (centre - np.sign(ray) * half) / ray
    reached = np.where(ray == 0, -np.inf, reached)
    face = reached.argmax(axis=1)
    light = np.array([0.8, 1.0, 0.9])[face] * np.clip(1.2 - centre[:, 2] / 8, 0.5, 1.0)
    # Distance from the middle of the face, along the two axes of the face.
    place = np.abs(ray * reached.max(axis=1)[:, None] - centre)
    place[np.arange(len(face)), face] = 0
    pixel = centre[:, 2] / K[0, 0]
    edge = (place.max(axis=1) > half - 0.6 * pixel) & (2 * half > CLEAR * pixel)
    light[edge] *= EDGES
    heights = -centre[:, 1]  # y points down.
    colors = np.where(np.isin(ends[hit], moving)[:, None], MOVING, by_height(heights))
    picture[hit] = (colors * light[:, None]).astype(np.uint8)
    return picture, heights


def _draw_points(
    points: NDArray[np.floating],
    colors: NDArray[np.uint8],
    edge: float,
    K: NDArray[np.float64],
    size: tuple[int, int],
) -> NDArray[np.uint8]:
    """Draw points of the camera's frame as squares of `edge` metres, far ones first."""
    width, height = size
    picture = np.full((height, width, 3), PAPER, np.uint8)
    front = points[:, 2] > 0.05
    points, colors = points[front], colors[front]
    order = np.argsort(-points[:, 2])
    x, y, z = points[order].T
    light = np.clip(1.15 - z / 6, 0.35, 1.0)
    shaded = (colors[order] * light[:, None]).astype(np.uint8)
    reach = np.maximum(0.5 * edge / z, 0.5 / K[0, 0])
    left = np.clip(np.floor(K[0, 0] * (x / z - reach) + K[0, 2]), 0, width).astype(int)
    right = np.clip(np.ceil(K[0, 0] * (x / z + reach) + K[0, 2]), 0, width).astype(int)
    top = np.clip(np.floor(K[1, 1] * (y / z - reach) + K[1, 2]), 0, height).astype(int)
    foot = np.clip(np.ceil(K[1, 1] * (y / z + reach) + K[1, 2]), 0, height).astype(int)
    for a, b, c, d, color in zip(top, foot, left, right, shaded, strict=True):
        picture[a:b, c:d] = color
    return picture


def _above(
    trajectory: Trajectory,
    poses: NDArray[np.float64],
    frame: int,
    moving: NDArray[np.integer],
    observed: NDArray[np.bool_],
    size: tuple[int, int] = PANEL,
) -> Image.Image:
    """Draw the scene's occupied cells from above, with the frame's observations, path and camera.

    The picture is turned by a multiple of 90 degrees, so that the camera looks up rather than down.
    Moving cells of the frame, which are not part of the scene, are drawn as well.
    """
    grid = trajectory.grid
    cells = trajectory.scene_cells().astype(np.float64)
    up = world_up(cells, poses)
    plan = _plan(up, poses[frame, :3, 2])
    seen = np.flatnonzero(observed)
    seen = seen[:: max(1, len(seen) // MAX_OBSERVED)]
    seen_world, moving_world = (
        grid.centres(columns).astype(np.float64) @ poses[frame, :3, :3].T + poses[frame, :3, 3]
        for columns in (seen, moving)
    )
    heights = cells @ up
    # Ceilings are left out, because they would hide the room.
    shown = heights < (poses[:, :3, 3] @ up).max() + 0.6
    if shown.any():
        heights -= np.percentile(heights[shown], 2)
    legend = [_bar("height over the lowest cells", *limits(heights[shown]))] if shown.any() else []
    legend += [swatch("observed", OBSERVED, TEXT), swatch("path", PATH, TEXT, line=True)]
    legend.append(swatch("camera", INK, TEXT, line=True))
    if trajectory.has_dynamic():
        legend.append(swatch("moving", MOVING, TEXT))
    everything = np.concatenate([cells, seen_world, poses[:, :3, 3]]) @ plan.T
    low, high = everything.min(axis=0), everything.max(axis=0)
    width, height = _picture_size(legend, size)
    scale = min(np.array([width - 20, height - 16]) / np.maximum(high - low, 0.1))
    canvas, middle = np.full((height, width, 3), PAPER, np.uint8), np.array([width, height]) / 2

    def place(points: NDArray[np.float64]) -> NDArray[np.intp]:
        away = (points @ plan.T - (low + high) / 2) * np.array([scale, -scale])
        return np.asarray((away + middle).round().astype(int))

    last = (width - 1, height - 1)
    edge = max(1, int(np.ceil(grid.voxel_size * scale)))
    spots = place(seen_world) - edge // 2
    for dx, dy in np.ndindex(edge, edge):
        x, y = np.clip(spots + np.array([dx, dy]), 0, last).T
        canvas[y, x] = OBSERVED
    order = np.argsort(heights[shown])
    drawn = np.concatenate([cells[shown][order], moving_world])
    pink = np.full((len(moving_world), 3), MOVING, np.uint8)
    colors = np.concatenate([by_height(heights[shown][order]), pink])
    spots = place(drawn) - edge // 2
    for dx, dy in np.ndindex(edge, edge):
        x, y = np.clip(spots + np.array([dx, dy]), 0, last).T
        rim = edge >= CLEAR and (dx == 0 or dy == 0)
        canvas[y, x] = colors * EDGES if rim else colors
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    track = [tuple(p) for p in place(poses[:, :3, 3]).tolist()]
    if len(track) > 1:
        draw.line(track, fill=PATH, width=2)
    eye = poses[frame, :3, 3]
    corners = [eye + poses[frame, :3, :3] @ np.array([x, 0, 0.5]) for x in (-0.5, 0.5)]
    draw.polygon([tuple(p) for p in place(np.stack([eye, *corners])).tolist()], outline=INK)
    draw_scale_bar(draw, (width - (BAR + 1) * TEXT, height - TEXT), scale, TEXT)
    draw_axes(draw, (5 * TEXT, height - 5 * TEXT), plan.T * (1, -1), TEXT)
    return _panel(image, "scene from above", legend, size)


def _plan(up: NDArray[np.float64], forward: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, 3): the world's directions to the right and to the top of a picture from above.

    They are along world axes, as far as `up` is. forward: (3,), the top is the axis closest to it.
    """
    level = np.eye(3) - np.outer(np.eye(3) @ up, up)
    axes = np.concatenate([level, -level])[np.abs(np.tile(up, 2)).argsort(kind="stable")[:4]]
    top = axes[(axes @ forward).argmax()]
    top /= np.linalg.norm(top)
    return np.stack([np.cross(top, up), top])
