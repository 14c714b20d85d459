"""One image of one frame: the colour image, depth, and occupancy from two directions."""

from __future__ import annotations

from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from occgen_hub.errors import DatasetError
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OCCUPIED, first_occupied
from occgen_hub.visual.colors import (
    INK,
    MOVING,
    MOVING_NAME,
    PAPER,
    PATH,
    by_height,
    limits,
    ramp,
    shade_depth,
)
from occgen_hub.visual.frames import frame_title

PANEL = (640, 360)


def preview(trajectory: Trajectory, frame: int | None = None) -> Image.Image:
    """RGB, depth or cloud, occupancy from the camera, and the scene from above.

    frame: which to show; the middle one if None.
    """
    poses, intrinsics = trajectory.world_from_camera(), trajectory.intrinsics()
    frame = len(poses) // 2 if frame is None else frame
    visible, moving, observed = _occupancy(trajectory, frame, len(poses))
    K, size, grid = intrinsics[frame], trajectory.image_size, trajectory.grid

    rgb, depth = trajectory.rgb(frame), trajectory.depth(frame)
    if depth is None:
        cloud = trajectory.cloud()
        local = (cloud.points - poses[frame, :3, 3]) @ poses[frame, :3, :3]
        second = _panel(_splat(local, cloud.colors, 0.01, K, size), "reconstructed cloud")
    else:
        second = _panel(shade_depth(depth), "depth")
        if (depth > 0).any():
            low, high = limits(1 / depth[depth > 0])
            _draw_scale(second, 1 / high, 1 / low)
    first = (
        _panel(rgb, frame_title(frame, len(poses)))
        if rgb is not None
        else _panel(np.zeros((*size[::-1], 3), np.uint8), "images were left out")
    )
    cells, heights = _cells_from_camera(grid, visible, moving, K, size)
    third = _panel(
        cells,
        f"{len(visible):,} visible occupied cells, by height over the camera",
        f"{len(moving):,} moving" if trajectory.has_dynamic() else "",
    )
    if len(heights):
        _draw_scale(third, *limits(heights)[::-1])
    fourth = _above(trajectory, poses, frame, moving, observed)

    width, height = PANEL
    sheet = Image.new("RGB", (2 * width, 2 * height), PAPER)
    for n, panel in enumerate((first, second, third, fourth)):
        sheet.paste(panel, (n % 2 * width, n // 2 * height))
    return sheet


def from_above(trajectory: Trajectory, frame: int) -> Image.Image:
    """The scene from above, with the path and what a frame observed."""
    poses = trajectory.world_from_camera()
    _, moving, observed = _occupancy(trajectory, frame, len(poses))
    return _above(trajectory, poses, frame, moving, observed)


def from_camera(trajectory: Trajectory, frame: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8: the occupied cells that a frame's camera sees, by height.

    Those that move have a colour of their own.
    """
    visible, moving, _ = _occupancy(trajectory, frame, len(trajectory.world_from_camera()))
    K, size = trajectory.intrinsics()[frame], trajectory.image_size
    return _cells_from_camera(trajectory.grid, visible, moving, K, size)[0]


def _occupancy(
    trajectory: Trajectory, frame: int, length: int
) -> tuple[NDArray[np.integer], NDArray[np.integer], NDArray[np.bool_]]:
    """A frame's cells: visible occupied, those of them that move, and observed.

    (n,) and (m,) columns, and (cells,) bool.
    """
    rows = len(trajectory.row_ends("visible")) - 1
    if not frame < length == rows:
        problem = f"has {rows} rows where the parquet has {length}"
        raise DatasetError(trajectory.file("visible"), problem, REBUILD)
    visible = next(islice(trajectory.visible_frames(), frame, None))
    moving = next(islice(trajectory.dynamic_frames(), frame, None))
    packed = next(islice(trajectory.observed_packed(), frame, None), None)
    if packed is None:
        raise DatasetError(trajectory.file("observed"), f"ends before frame {frame}", REBUILD)
    return visible, moving, unpack(packed, trajectory.grid.cells)


def _panel(picture: NDArray[np.uint8] | Image.Image, title: str, moving: str = "") -> Image.Image:
    """Fit an image into a panel, with a title.

    moving: what the title says of moving cells, in their colour.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    scale = min(PANEL[0] / image.width, PANEL[1] / image.height)
    fitted = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
        Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST,
    )
    panel = Image.new("RGB", PANEL, PAPER)
    panel.paste(fitted, ((PANEL[0] - fitted.width) // 2, (PANEL[1] - fitted.height) // 2))
    draw = ImageDraw.Draw(panel)
    title += "; " if moving else ""
    end = 6 + int(draw.textlength(title))
    draw.rectangle((0, 0, end + 6 + int(draw.textlength(moving)), 18), fill=PAPER)
    draw.text((6, 3), title, fill=INK)
    draw.text((end, 3), moving, fill=MOVING)
    return panel


def _draw_scale(panel: Image.Image, top: float, foot: float) -> None:
    """Draw a colour scale in the corner of a panel, with the metres at its ends."""
    draw, (right, bottom), height = ImageDraw.Draw(panel), PANEL, 96
    labels = [f"{value:.1f} m" for value in (top, foot)]
    width = int(max(map(draw.textlength, labels)))
    left, upper = right - width - 30, bottom - height - 14
    draw.rectangle((left, upper - 6, right, bottom), fill=PAPER)
    for line, color in enumerate(ramp(np.linspace(1, 0, height))):
        draw.rectangle((left + 6, upper + line, left + 16, upper + line), fill=tuple(color))
    draw.text((left + 22, upper - 3), labels[0], fill=INK)
    draw.text((left + 22, upper + height - 10), labels[1], fill=INK)


def _cells_from_camera(
    grid: Grid,
    visible: NDArray[np.integer],
    moving: NDArray[np.integer],
    K: NDArray[np.float64],
    size: tuple[int, int],
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Draw the cells that the pixels' rays hit, as solid cubes shaded by the faces' directions.

    Also (n,) metres: how high over the camera they are, by which they have their colours, all but
    those that move.
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
    with np.errstate(divide="ignore"):
        reached = (centre - np.sign(ray) * grid.voxel_size / 2) / ray
    face = np.where(ray == 0, -np.inf, reached).argmax(axis=1)
    light = np.array([0.8, 1.0, 0.9])[face] * np.clip(1.2 - centre[:, 2] / 8, 0.5, 1.0)
    heights = -centre[:, 1]  # y points down.
    colors = np.where(np.isin(ends[hit], moving)[:, None], MOVING, by_height(heights))
    picture[hit] = (colors * light[:, None]).astype(np.uint8)
    return picture, heights


def _splat(
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
) -> Image.Image:
    """Draw from above the scene's occupied cells, this frame's observations, path and camera.

    Also what moves in the frame, which is not part of the scene.
    """
    grid = trajectory.grid
    cells = trajectory.scene_cells().astype(np.float64)
    # Up is the world axis nearest to the cameras' up (minus their y).
    mean_up = -poses[:, :3, 1].mean(axis=0)
    axis = int(np.abs(mean_up).argmax())
    sign = 1.0 if mean_up[axis] >= 0 else -1.0
    across, along = ((1, 2), (2, 0), (0, 1))[axis]
    seen_world, moving_world = (
        grid.centres(columns).astype(np.float64) @ poses[frame, :3, :3].T + poses[frame, :3, 3]
        for columns in (np.flatnonzero(observed)[::7], moving)
    )
    everything = np.concatenate([cells, seen_world, poses[:, :3, 3]])
    low, high = everything.min(axis=0), everything.max(axis=0)
    scale = min(
        (PANEL[0] - 20) / max(high[across] - low[across], 0.1),
        (PANEL[1] - 40) / max(high[along] - low[along], 0.1),
    )
    canvas = np.full((PANEL[1], PANEL[0], 3), PAPER, np.uint8)

    def place(points: NDArray[np.float64]) -> NDArray[np.intp]:
        a = (points[..., across] - (low[across] + high[across]) / 2) * scale * sign + PANEL[0] / 2
        b = PANEL[1] / 2 + 10 - (points[..., along] - (low[along] + high[along]) / 2) * scale
        return np.stack([a, b], axis=-1).round().astype(int)

    spots = np.clip(place(seen_world), 0, (PANEL[0] - 1, PANEL[1] - 1))
    canvas[spots[:, 1], spots[:, 0]] = (58, 66, 82)
    height = cells[:, axis] * sign
    # Without ceilings, which would hide the room.
    shown = height < (poses[:, axis, 3] * sign).max() + 0.6
    order = np.argsort(height[shown])
    drawn = np.concatenate([cells[shown][order], moving_world])
    spots = np.clip(place(drawn), 1, (PANEL[0] - 2, PANEL[1] - 2))
    pink = np.full((len(moving_world), 3), MOVING, np.uint8)
    colors = np.concatenate([by_height(height[shown][order]), pink])
    edge = max(1, int(np.ceil(grid.voxel_size * scale)))
    for dx, dy in np.ndindex(edge, edge):
        x, y = spots[:, 0] + dx - edge // 2, spots[:, 1] + dy - edge // 2
        canvas[np.clip(y, 0, PANEL[1] - 1), np.clip(x, 0, PANEL[0] - 1)] = colors
    image = Image.fromarray(canvas)
    draw = ImageDraw.Draw(image)
    track = [tuple(p) for p in place(poses[:, :3, 3]).tolist()]
    if len(track) > 1:
        draw.line(track, fill=PATH, width=2)
    eye = poses[frame, :3, 3]
    corners = [eye + poses[frame, :3, :3] @ np.array([x, 0, 0.5]) for x in (-0.5, 0.5)]
    draw.polygon([tuple(p) for p in place(np.stack([eye, *corners])).tolist()], outline=INK)
    panel = _panel(
        image,
        "scene from above by height; path in red; observed in grey",
        f"moving in {MOVING_NAME}" if trajectory.has_dynamic() else "",
    )
    if shown.any():
        _draw_scale(panel, *limits(height[shown])[::-1])
    return panel
