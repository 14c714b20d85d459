"""Occupancy against the true mesh, on made-up rooms.

Precision: of the visible occupied cells, how many the mesh truly crosses. Recall: of the cells
that hold a ray's true first hit of the mesh, how many are visible and occupied, strictly and with
one cell of tolerance. Leaks: visible occupied cells that lie more than two cells behind the true
first hit of every ray that ends in them. The mesh is cut exactly (triangle against box), rays are
cast by Open3D; only files on disk are read, so that the whole chain is measured.

Bound: the recall, with one cell of tolerance, that the true mesh itself has when every cell that
it crosses is occupied and the same rays are followed, on some of the frames. Where a surface is
seen at a grazing angle a ray ends in the first cell of a step of the staircase that the surface
becomes, and a cell on a silhouette hides what passes beside the surface in it; so no exact
visibility finds every cell of a first hit. Recall is held to the target or to that bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open3d as o3d
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from tqdm import tqdm

from occgen_hub.builder import Settings, load_builder
from occgen_hub.config import load_config
from occgen_hub.job import Job, list_episodes
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, first_occupied, trace
from occgen_hub.runtime.build import build_dataset
from occgen_hub.sample import make_sample

TARGETS = {"precision": 0.98, "recall": 0.99, "leaks": 0.005}


@dataclass
class Counts:
    visible: int = 0
    crossed: int = 0
    hits: int = 0
    found: int = 0
    near: int = 0
    leaks: int = 0
    bound_hits: int = 0
    bound_near: int = 0
    bound_ours: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def figures(self) -> dict[str, float]:
        return {
            "precision": self.crossed / max(self.visible, 1),
            "recall": self.near / max(self.hits, 1),
            "recall_strict": self.found / max(self.hits, 1),
            "leaks": self.leaks / max(self.visible, 1),
            "recall_bound": self.bound_near / max(self.bound_hits, 1),
            "recall_of_bounded_frames": self.bound_ours / max(self.bound_hits, 1),
        }


def crosses(
    lower: NDArray[np.float64], upper: NDArray[np.float64], triangles: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(n, 3) closed boxes and (n, 3, 3) triangles, pair by pair: whether they share a point.

    Separating axes: three of the box, the triangle's normal, nine cross products (T.
    Akenine-Moller, "Fast 3D triangle-box overlap testing", 2001).
    """
    half = (upper - lower) / 2
    t = triangles - ((lower + upper) / 2)[:, None]
    edges = np.roll(t, -1, axis=1) - t
    axes = [np.broadcast_to(row, half.shape) for row in np.eye(3)]
    axes.append(np.cross(edges[:, 0], edges[:, 1]))
    axes += [
        np.cross(np.broadcast_to(row, half.shape), edges[:, n])
        for row in np.eye(3)
        for n in range(3)
    ]
    overlap = np.ones(len(half), bool)
    for axis in axes:
        along = np.einsum("nkd,nd->nk", t, axis)
        reach = (half * np.abs(axis)).sum(axis=1) + 1e-9
        overlap &= (along.min(axis=1) <= reach) & (along.max(axis=1) >= -reach)
    return overlap


def mesh_crosses(
    lower: NDArray[np.float64], size: float, triangles: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """(n, 3) lower corners of cells: whether any triangle of (m, 3, 3) crosses the cell."""
    upper = lower + size
    low, high = triangles.min(axis=1), triangles.max(axis=1)
    crossed = np.zeros(len(lower), bool)
    for start in range(0, len(lower), 512):
        part = slice(start, start + 512)
        bounds_low, bounds_high = lower[part].min(axis=0), upper[part].max(axis=0)
        near = np.flatnonzero(((low <= bounds_high) & (high >= bounds_low)).all(axis=1))
        box, triangle = np.nonzero(
            (low[None, near] <= upper[part, None]).all(axis=2)
            & (high[None, near] >= lower[part, None]).all(axis=2)
        )
        hit = crosses(lower[part][box], upper[part][box], triangles[near[triangle]])
        crossed[start + box[hit]] = True
    return crossed


def mesh_cells(
    lower: NDArray[np.float64], size: float, shape: tuple[int, ...], triangles: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The columns of all cells of a grid that a triangle of (m, 3, 3) crosses.

    Candidates are the cells near points laid over the triangles, closer than half a cell.
    """
    upper = lower + size * np.asarray(shape)
    inside = (triangles.min(axis=1) <= upper) & (triangles.max(axis=1) >= lower)
    triangles = triangles[inside.all(axis=1)]
    near = np.zeros(shape, bool)
    for a, b, c in triangles:
        steps = int(np.ceil(max(np.linalg.norm(b - a), np.linalg.norm(c - a)) / (0.45 * size)))
        s, t = np.meshgrid(np.linspace(0, 1, steps + 1), np.linspace(0, 1, steps + 1))
        keep = s + t <= 1 + 1e-9
        points = a + s[keep, None] * (b - a) + t[keep, None] * (c - a)
        cell = np.floor((points - lower) / size).astype(int)
        cell = cell[((cell >= 0) & (cell < shape)).all(axis=1)]
        near[tuple(cell.T)] = True
    candidates = np.argwhere(binary_dilation(near, np.ones((3, 3, 3))))
    crossed = candidates[mesh_crosses(lower + candidates * size, size, triangles)]
    return np.ravel_multi_index(tuple(crossed.T), shape)


def frame_counts(
    trajectory: Trajectory,
    visible: NDArray[np.integer],
    world_from_camera: NDArray[np.float64],
    K: NDArray[np.float64],
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    *,
    with_bound: bool,
) -> Counts:
    grid, (width, height) = trajectory.grid, trajectory.image_size
    size, lower = grid.voxel_size, np.asarray(grid.lower)
    local = (vertices - world_from_camera[:3, 3]) @ world_from_camera[:3, :3]

    index = np.stack(np.unravel_index(visible, grid.shape), axis=-1)
    crossed = mesh_crosses(lower + index * size, size, local[faces])

    scene = o3d.t.geometry.RaycastingScene()
    scene.add_triangles(local.astype(np.float32), faces.astype(np.uint32))
    v, u = np.mgrid[:height, :width] + 0.5
    direction = np.stack(
        [(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], axis=-1
    )
    rays = np.concatenate([np.zeros_like(direction), direction], axis=-1).astype(np.float32)
    depth = scene.cast_rays(o3d.core.Tensor(rays))["t_hit"].numpy().astype(np.float64)

    with np.errstate(invalid="ignore"):
        cell = np.floor((direction * depth[..., None] - lower) / size)
    inside = np.isfinite(depth) & ((cell >= 0) & (cell < grid.shape)).all(axis=-1)
    hits = np.unique(np.ravel_multi_index(cell[inside].astype(int).T, grid.shape))
    state = np.zeros(grid.cells, np.uint8)
    state[visible] = OCCUPIED
    near = binary_dilation(state.reshape(grid.shape), np.ones((3, 3, 3))).ravel()

    ends = first_occupied(grid, K, trajectory.image_size, state.copy())
    ended = ends >= 0
    box = lower + np.stack(np.unravel_index(ends[ended], grid.shape), axis=-1) * size
    d = direction[ended]
    with np.errstate(divide="ignore", invalid="ignore"):
        entry = np.nanmax(np.minimum(box / d, (box + size) / d), axis=1)
    behind = (entry - depth[ended]) * np.linalg.norm(d, axis=1) > 2 * size
    honest = np.unique(ends[ended][~behind])
    bound_near = 0
    if with_bound:
        perfect = np.zeros(grid.cells, np.uint8)
        perfect[mesh_cells(lower, size, grid.shape, local[faces])] = OCCUPIED
        trace(grid, K, trajectory.image_size, perfect)
        seen = (perfect == OCCUPIED | OBSERVED).reshape(grid.shape)
        bound_near = int(binary_dilation(seen, np.ones((3, 3, 3))).ravel()[hits].sum())
    return Counts(
        visible=len(visible),
        crossed=int(crossed.sum()),
        hits=len(hits),
        found=int((state[hits] > 0).sum()),
        near=int(near[hits].sum()),
        leaks=len(np.setdiff1d(visible, honest)),
        bound_hits=len(hits) if with_bound else 0,
        bound_near=bound_near,
        bound_ours=int(near[hits].sum()) if with_bound else 0,
    )


def measure(sample: Path, dataset: Path, bounds: int) -> dict[str, Counts]:
    mesh = o3d.io.read_triangle_mesh(str(sample / "ground_truth" / "mesh.ply"))
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles).astype(np.int64)
    found = trajectories(dataset)
    counts = {}
    with tqdm(unit="frame", desc="accuracy", leave=False) as bar:
        for path in found:
            trajectory = Trajectory.open(path)
            poses, intrinsics = trajectory.world_from_camera(), trajectory.intrinsics()
            ends, columns = trajectory.visible()
            total = Counts()
            bounded = set(np.linspace(0, len(poses) - 1, bounds + 2)[1:-1].astype(int).tolist())
            for t in range(len(poses)):
                visible = columns[ends[t] : ends[t + 1]]
                total += frame_counts(
                    trajectory, visible, poses[t], intrinsics[t], vertices, faces,
                    with_bound=t in bounded,
                )  # fmt: skip
                bar.update()
            counts[path.relative_to(dataset).as_posix()] = total
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=4)
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bounds", type=int, default=1, help="frames a trajectory to bound")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sample, dataset = Path(folder, "sample"), Path(folder, "dataset")
        make_sample(
            sample, trajectories=options.trajectories, frames=options.frames, seed=options.seed
        )
        builder = load_builder("internnav", sample)
        settings = Settings(load_config(None, tuple(options.settings)), media="none")
        summary = build_dataset(Job(builder, list_episodes(builder), dataset, settings))
        if summary.failures:
            print(summary.failures[0].reason, file=sys.stderr)
            return 1
        counts = measure(sample, dataset, options.bounds)
    counts["all"] = sum(counts.values(), Counts())
    print(
        f"{'trajectory':<40}{'precision':>11}{'recall':>9}{'strict':>9}{'leaks':>9}{'bound':>9}{'cells':>10}"
    )
    for name, value in counts.items():
        f = value.figures()
        print(
            f"{name:<40}{f['precision']:>11.4f}{f['recall']:>9.4f}{f['recall_strict']:>9.4f}"
            f"{f['leaks']:>9.4%}{f['recall_bound']:>9.4f}{value.visible:>10,}"
        )
    figures = {name: value.figures() for name, value in counts.items()}
    if options.json:
        options.json.write_text(
            json.dumps({"targets": TARGETS, "figures": figures}, indent=1) + "\n"
        )
    return verdict(figures["all"])


def verdict(f: dict[str, float]) -> int:
    """Say which targets are met; 1 if one is missed that could have been met."""
    missed = []
    if f["precision"] < TARGETS["precision"]:
        missed.append("precision")
    if f["leaks"] > TARGETS["leaks"]:
        missed.append("leaks")
    if f["recall"] < TARGETS["recall"]:
        ours, bound = f["recall_of_bounded_frames"], f["recall_bound"]
        print(
            f"recall {f['recall']:.4f} is under {TARGETS['recall']}. On the bounded frames it is "
            f"{ours:.4f}, and {bound:.4f} if every cell that the true mesh crosses is occupied:"
        )
        if ours < bound:
            missed.append("recall")
        else:
            print(
                "the target is beyond what these rays and cells allow, see --help and the script."
            )
    print(f"missed: {', '.join(missed)} of {TARGETS}" if missed else "nothing else was missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
