"""The figures of the documentation: drawings of concepts, and plots of the measurements.

    .venv/bin/python scripts/figures.py [FOLDER]     default: docs/figures

The project's own kernel follows the rays, and numbers come from the defaults and from the tables in
docs/, so that the figures match the code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, Polygon, Rectangle

from occgen_hub.config import Config
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.rays import OBSERVED, OCCUPIED
from occgen_hub.occupancy.visibility import trace

DOCS = Path(__file__).parent.parent / "docs"
SOLID, FREE, UNKNOWN, RAY = "#3b6fb6", "#e4f1d7", "#d9d9d9", "#e08214"
X, Y, Z = "#d62728", "#2ca02c", "#1f77b4"


def main(folder: Path = DOCS / "figures") -> None:
    """Draw all figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "occgen", "font.size": 11,
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"],
    }  # fmt: skip
    with mpl.rc_context(style):
        for name, draw in FIGURES.items():
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def _plain(axes: Axes, x: tuple[float, float], z: tuple[float, float]) -> Axes:
    """Axes of a drawing: metres, equal scales, no frame."""
    axes.set(xlim=x, ylim=z, aspect="equal")
    axes.axis("off")
    return axes


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, text: str = "",
    nudge: tuple[float, float] = (0, 0),
) -> None:  # fmt: skip
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, color=color, lw=2)
    )
    axes.text(
        end[0] + nudge[0], end[1] + nudge[1], text, color=color, ha="center", va="center",
        fontweight="bold",
    )  # fmt: skip


def _extent(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str,
    nudge: tuple[float, float],
) -> None:  # fmt: skip
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="<->", mutation_scale=10, color="0.35", lw=1)
    )
    middle = (np.add(start, end) / 2 + nudge).tolist()
    rotation = 90 if start[0] == end[0] else 0
    axes.text(*middle, text, color="0.25", ha="center", va="center", rotation=rotation)


def _camera(axes: Axes, place: tuple[float, float], angle: float, size: float = 0.3) -> None:
    """A camera from above or from the side: a wedge that opens in its direction, radians."""
    turned = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = np.array([[0, 0], [size, 0.55 * size], [size, -0.55 * size]]) @ turned.T
    axes.add_patch(Polygon(corners + place, closed=True, color="0.15"))


def grid() -> Figure:
    """The default grid from the side and from above, with axes and lengths."""
    config = Config()
    x0, y0, z0, x1, y1, z1 = config.pc_range
    nx, ny, nz = config.grid_shape
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    side, above = figure.subplots(1, 2, width_ratios=[1, 1])
    for axes, low, high, title in (
        (_plain(side, (z0 - 0.9, z1 + 0.5), (-y1 - 0.8, -y0 + 0.5)), y0, y1, "from the side"),
        (_plain(above, (z0 - 0.9, z1 + 0.5), (-x1 - 0.8, -x0 + 0.5)), x0, x1, "from above"),
    ):
        # Forward is to the right in both. Down the page is down in one and right in the other.
        axes.add_patch(Rectangle((z0, -high), z1 - z0, high - low, fc="#eef3fa", ec=SOLID, lw=1.5))
        lines = np.arange(0, z1 - z0 + 0.01, 0.25)
        for z in z0 + lines:
            axes.plot([z, z], [-low, -high], color=SOLID, lw=0.3, alpha=0.6)
        for v in np.arange(low, high + 0.01, 0.25):
            axes.plot([z0, z1], [-v, -v], color=SOLID, lw=0.3, alpha=0.6)
        _camera(axes, (0, 0), 0)
        _arrow(axes, (0, 0), (1.1, 0), Z, "z forward", (0.55, 0.12))
        name, color = ("y down", Y) if axes is side else ("x right", X)
        _arrow(axes, (0, 0), (0, -0.8), color, name, (0.45, 0.05))
        _extent(axes, (z0, -high - 0.2), (z1, -high - 0.2), f"{z1 - z0:g} m, {nz} cells", (0, -0.2))
        count = ny if axes is side else nx
        ends = ((z0 - 0.2, -high), (z0 - 0.2, -low))
        _extent(axes, *ends, f"{high - low:g} m, {count} cells", (-0.22, 0))
        corner = f"{'y' if axes is side else 'x'} = {low:g}, z = {z0:g}"
        axes.text(z0 + 0.05, -low + 0.15, f"cell 0 is here: {corner}", color="0.25")
        axes.plot([z0], [-low], "o", color="0.15", ms=5)
        axes.text((z0 + z1) / 2 + 0.7, -high + 0.12, "lines every 0.25 m", color="0.4", ha="center")
        axes.set_title(title, fontweight="bold")
    return figure


def visibility() -> Figure:
    """A slice of a grid with rays through cells, followed by the kernel."""
    size, shape = 0.25, (17, 1, 22)
    cells = Grid((-2.125, -0.125, -0.5), size, shape)
    solid = np.zeros((shape[0], shape[2]), bool)
    solid[:, 20] = True  # a wall
    solid[12:15, 10:12] = True  # a box
    solid[5, 13] = True  # a post
    intrinsics = np.array([[140.0, 0, 120], [0, 140.0, 0.5], [0, 0, 1]])
    state = np.where(solid, np.uint8(OCCUPIED), np.uint8(0)).reshape(-1)
    trace(cells, intrinsics, (240, 1), state)
    seen = (state.reshape(solid.shape) & OBSERVED) > 0

    figure = Figure(figsize=(8.6, 6), layout="constrained")
    axes = _plain(figure.subplots(), (-0.7, 7.4), (-2.3, 2.3))
    kinds = {
        "occupied: observed and solid": (seen & solid, SOLID),
        "free: observed, nothing there": (seen & ~solid, FREE),
        "unknown: not observed, whatever is there": (~seen, UNKNOWN),
    }
    for where, color in kinds.values():
        _draw_cells(axes, cells, where, fc=color, ec="none")
    _draw_cells(axes, cells, solid & ~seen, fill=False, ec=SOLID, lw=0.8, hatch="////")
    across = np.array(cells.lower[2] + size * np.arange(shape[2] + 1))
    down = np.array(cells.lower[0] + size * np.arange(shape[0] + 1))
    axes.hlines(down, across[0], across[-1], color="white", lw=0.6)
    axes.vlines(across, down[0], down[-1], color="white", lw=0.6)
    columns = np.append(np.arange(4, 240, 29), 131)
    for u in columns:
        _draw_ray(axes, cells, solid, (u + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0])
    _camera(axes, (0, 0), 0)
    for n, (name, (_, color)) in enumerate(kinds.items()):
        _key(axes, 5.15, 1.9 - 0.75 * n, name, fc=color, ec="0.4")
    _key(axes, 5.15, -0.35, "solid, but hidden:\nunknown", fill=False, ec=SOLID, hatch="////")
    axes.plot([5.15, 5.35], [-1.1, -1.1], color=RAY, lw=1.6)
    axes.text(5.47, -1.1, "some of the rays,\none for each pixel", va="center")
    return figure


def _draw_cells(axes: Axes, cells: Grid, where: np.ndarray, **how: object) -> None:
    """A rectangle for each run of (nx, nz) cells along z."""
    size = cells.voxel_size
    for i, row in enumerate(where):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
        for start, end in edges.reshape(-1, 2):
            corner = (cells.lower[2] + start * size, -(cells.lower[0] + (i + 1) * size))
            axes.add_patch(Rectangle(corner, (end - start) * size, size, **how))  # type: ignore[arg-type]


def _key(axes: Axes, x: float, y: float, text: str, **how: object) -> None:
    """An entry of a legend."""
    axes.add_patch(Rectangle((x, y - 0.1), 0.2, 0.2, **how))  # type: ignore[arg-type]
    first, _, rest = text.partition(": ")
    axes.text(x + 0.32, y, f"{first}:\n{rest}" if rest else first, va="center")


def _draw_ray(axes: Axes, cells: Grid, solid: np.ndarray, slope: float) -> None:
    """A ray from the camera to the first solid cell, or to the end of the grid."""
    z = np.arange(0, cells.lower[2] + cells.shape[2] * cells.voxel_size, 0.005)
    i = np.floor((slope * z - cells.lower[0]) / cells.voxel_size).astype(int)
    k = np.floor((z - cells.lower[2]) / cells.voxel_size).astype(int)
    inside = (i >= 0) & (i < solid.shape[0])
    hit = np.zeros(len(z), bool)
    hit[inside] = solid[i[inside], k[inside]]
    ends = np.flatnonzero(hit | ~inside)
    end = ends[0] if len(ends) else len(z) - 1
    axes.plot([0, z[end]], [0, -slope * z[end]], color=RAY, lw=1.4)
    if hit[end]:
        axes.plot([z[end]], [-slope * z[end]], "o", color=RAY, ms=4)


def fusion() -> Figure:
    """Two points of one frame, which two other frames support or contradict."""
    figure = Figure(figsize=(9.4, 4.6), layout="constrained")
    axes = _plain(figure.subplots(), (-0.5, 8.3), (-2.5, 2.1))
    axes.add_patch(Rectangle((5, -2), 0.18, 3.9, color=SOLID))
    axes.text(5.3, 1.7, "wall", color=SOLID, va="center", fontweight="bold")
    cameras = {"frame 1": (0.0, 0.0), "frame 2": (0.6, 1.5), "frame 3": (0.6, -1.6)}
    wall, floating = (4.97, 0.75), (3.0, -0.45)
    for name, place in cameras.items():
        _camera(axes, place, np.arctan2(-place[1] * 0.5, 4), 0.35)
        axes.text(place[0] - 0.05, place[1] + 0.3, name, ha="center")
        axes.plot([place[0], wall[0]], [place[1], wall[1]], color="#2ca02c", lw=1.3)
    axes.plot([0, floating[0]], [0, floating[1]], color="0.3", lw=1.3)
    for name in ("frame 2", "frame 3"):  # Straight through the point, to the wall.
        place = np.array(cameras[name])
        end = place + (np.array(floating) - place) * (5 - place[0]) / (floating[0] - place[0])
        axes.plot(*zip(place, end, strict=True), color=X, lw=1.3, ls=(0, (5, 3)))
        axes.plot(*end, "o", color=X, ms=4)
    axes.add_patch(Circle(wall, 0.09, color="#2ca02c", zorder=5))
    axes.add_patch(Circle(floating, 0.09, fc="white", ec=X, lw=2, zorder=5))
    axes.text(
        5.4, 0.75, "measured here by all three:\ntwo supports, no contradiction.\nIt is kept.",
        color="#1d7a1d", va="center",
    )  # fmt: skip
    axes.text(
        5.4, -1.3, "frames 2 and 3 measured the wall\nbehind the other point, so they\nsaw through "
        "it: contradictions.\nIt is left out.", color=X, va="center",
    )  # fmt: skip
    axes.plot([2.55, 2.96], [-1.7, -0.58], color="0.6", lw=0.8)
    axes.text(
        2.5, -1.75, "measured by frame 1 alone:\na floating pixel, or a person", ha="center",
        va="top", color="0.25",
    )  # fmt: skip
    return figure


def frames() -> Figure:
    """The world and the camera with its grid at two times, from above."""
    figure = Figure(figsize=(8.6, 5.1), layout="constrained")
    axes = _plain(figure.subplots(), (-1.0, 8.6), (-1.3, 4.4))
    _arrow(axes, (0, 0), (1.1, 0), "0.15", "X", (0.18, 0))
    _arrow(axes, (0, 0), (0, 1.1), "0.15", "Y", (0, 0.18))
    axes.text(-0.05, -0.3, "world", fontweight="bold", ha="center")
    path = np.array([[1.4, 0.6], [2.0, 1.2], [2.8, 1.5], [3.7, 1.6], [4.7, 1.9], [5.4, 2.5]])
    axes.plot(*path.T, color="0.5", lw=1.2, ls=":")
    for number, index, angle in ((0, 0, 0.9), (24, 4, -0.12)):
        place = path[index]
        forward = np.array([np.cos(angle), np.sin(angle)])
        right = np.array([np.sin(angle), -np.cos(angle)])
        corners = [
            place + forward * z + right * x for z, x in ((-0.5, -2), (3.5, -2), (3.5, 2), (-0.5, 2))
        ]
        corners = [place + (corner - place) * 0.62 for corner in corners]
        axes.add_patch(Polygon(corners, closed=True, fc=SOLID, alpha=0.10, ec=SOLID, lw=1.2))
        axes.add_patch(Polygon(corners, closed=True, fill=False, ec=SOLID, lw=1.2))
        _camera(axes, tuple(place), angle, 0.28)
        _arrow(axes, tuple(place), tuple(place + 1.0 * forward), Z, "z", tuple(0.15 * forward))
        _arrow(axes, tuple(place), tuple(place + 0.8 * right), X, "x", tuple(0.15 * right))
        label = place + 1.4 * forward - 0.6 * right
        axes.text(*label, f"grid of\nframe {number}", color=SOLID, ha="center", va="center")
    start, end = (0.05, 0.05), tuple(path[4] - [0.1, 0.06])
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=14, color=RAY, lw=1.6,
            connectionstyle="arc3,rad=0.3",
        )
    )  # fmt: skip
    axes.text(3.1, -0.75, "world_from_camera[24]", color=RAY, ha="center")
    axes.text(3.1, -1.15, "the camera's place and turn in the world", color="0.35", ha="center")
    axes.text(6.0, 4.1, "y of a camera points down, into the page", color=Y, ha="center")
    return figure


def tables(page: str, heading: str) -> list[list[list[str]]]:
    """The tables under a heading of a page, as rows of cells without headers."""
    text = (DOCS / page).read_text()
    section = re.split(r"^## ", text.split(f"## {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", section, flags=re.M):
        rows = [
            [cell.strip() for cell in row.strip()[1:-1].split("|")] for row in table.splitlines()
        ]
        found.append(rows[2:])
    return found


def number(text: str) -> float:
    """A number of a table, such as 1,234 or 0.5%."""
    return float(text.replace(",", "").rstrip("%x "))


METHODS = {
    "evidence": ("fusion (default)", SOLID),
    "union": ("every measured point", "#bdbdbd"),
    "OctoMap": ("OctoMap", "#9ecae1"),
    "TSDF": ("TSDF of Open3D", "#a1d99b"),
    "DUFOMap": ("DUFOMap", "#fdae6b"),
}
"""The label and the color of each method of the table of accuracy."""


def accuracy() -> Figure:
    """Distance of visible cells from the truth, by the corruption of the recording."""
    rows = tables("measurements.md", "Accuracy")[0]
    names = [row[0] for row in rows if row[0]]
    figure = Figure(figsize=(10, 7.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    at, thickness = np.arange(len(names)), 0.8 / len(METHODS)
    for n, (method, (label, color)) in enumerate(METHODS.items()):
        mine = [row for row in rows if row[1] == method]
        place = at + (n - (len(METHODS) - 1) / 2) * thickness
        far = [100 * (1 - number(row[2])) for row in mine]
        left.barh(place, far, thickness, color=color, label=label)
        right.barh(place, [number(row[4]) for row in mine], thickness, color=color)
    left.set(xlabel="visible cells with no true\nsurface in or beside them, %")
    right.set(xlabel="visible cells over 10 cm\nfrom the truth, %")
    left.set_yticks(at, names)
    left.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(METHODS), frameon=False)
    _tidy(left, right)
    return figure


def performance() -> Figure:
    """Milliseconds per frame, by rays and by cells."""
    rays, cells, _ = tables("performance.md", "Growth")
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, rows, what in ((left, rays, "rays"), (right, cells, "cells")):
        x, y = [number(row[0]) for row in rows], [number(row[1]) for row in rows]
        axes.plot(x, y, "o-", color=SOLID)
        for a, b in zip(x, y, strict=True):
            axes.annotate(f"{b:g}", (a, b), (0, 7), textcoords="offset points", ha="center")
        axes.set(xscale="log", xlabel=what, ylim=(0, 24))
        _tidy(axes)
    left.set_ylabel("ms a frame, one core")
    return figure


def _tidy(*all_axes: Axes) -> None:
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)


FIGURES: dict[str, Callable[[], Figure]] = {
    "grid": grid,
    "visibility": visibility,
    "fusion": fusion,
    "frames": frames,
    "accuracy": accuracy,
    "performance": performance,
}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
