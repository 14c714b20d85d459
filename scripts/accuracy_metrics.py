"""Accuracy metrics of a frame's cells against the true meshes, and of a whole built dataset.

Part of scripts/accuracy. Everything is measured in the frame of the true camera: the true pose
moves the true mesh and the people of that moment there, and the frame's cells are used as stored,
in the camera's grid. So the results do not depend on a method's world frame.

- exact: visible occupied cells that the truth crosses (exact test of triangle and box).
- near: visible cells where the truth crosses the cell or one of its 26 neighbours.
- within_2cm: visible cells with a centre within 2 cm of the truth.
- ghosts: visible cells with a centre more than 10 cm from the truth.
- recall: of the cells with a ray's true first hit, those with a visible occupied cell within one
  cell; recall_strict: those that are visible and occupied themselves.
- leaks: visible cells more than two cells behind the true first hit of every ray that ends in them.
- false_free: of the observed cells that are not occupied, those that the truth crosses;
  false_free_alone: those of them without a visible occupied cell within one cell.
- hidden_free: of the observed cells that are not occupied, those that are behind a surface: in the
  truth, the camera's rays reach no cell within one cell.
- free_recall: of the cells that the camera's rays reach in the truth and that it does not cross,
  those that are observed and not occupied.
- people: recall of the cells of first hits on people, in their own frame; absent without people.
- thin: recall of the cells of first hits on objects narrower than 4 cm in the image, see
  `thin_pixels`; people are excluded.
- recall_bound: on some of the frames, the recall of the true mesh itself, when every cell that it
  crosses is occupied and the same rays are followed; recall_bounded: the method's recall on these
  frames. No exact visibility finds every cell of a first hit, for two reasons. A surface at a
  grazing angle becomes a staircase, and a ray ends in the first cell of a step. A cell on a
  silhouette also stops rays that pass the surface without touching it.

near and recall are also counted by range (metres along the optical axis) and by incidence (degrees
between a ray and the true surface's normal, averaged over the rays that end in a cell).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Self

import numba
import numpy as np
import open3d as o3d
from accuracy_cells import crossed_cells, near_set_cells, thin_pixels
from numpy.typing import NDArray

from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, first_occupied, trace
from occgen_hub.prefetch import own_threads

NEAR, GHOST = 0.02, 0.1
"""Distances of a cell's centre from the truth, metres: a cell within the first is correct, a cell
beyond the second is a ghost."""

THIN, FALLS_AWAY = 0.04, 0.05
"""The width below which objects are thin, and the depth jump at a surface's edge, metres."""

RANGES = (0.0, 1.0, 2.0, 3.5)
INCIDENCES = (0.0, 45.0, 70.0, 90.0)

Counts = Counter[str]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class FrameResult:
    """The result of a method for one frame, in the camera's grid.

    visible: (n,) numbers of the visible occupied cells; observed: (ceil(cells / 8),) uint8,
    `np.packbits` of the observed cells, free and occupied.
    """

    visible: NDArray[np.integer]
    observed: NDArray[np.uint8]


@dataclass(frozen=True)
class View:
    """A frame's camera. K: (3, 3), pixels; size: (width, height) of the image."""

    grid: Grid
    K: Floats
    size: tuple[int, int]

    def directions(self) -> Floats:
        """(H, W, 3) directions of the rays through the pixel centres, with depth 1."""
        v, u = np.mgrid[: self.size[1], : self.size[0]] + 0.5
        x, y = (u - self.K[0, 2]) / self.K[0, 0], (v - self.K[1, 2]) / self.K[1, 1]
        return np.stack([x, y, np.ones_like(u)], axis=-1)


@dataclass(frozen=True)
class FrameTruth:
    """The ground truth of one frame in the frame of its true camera, and its first hits.

    crossed: packed bits of the cells that the truth crosses, in the grid and one layer around it;
    scene: of the triangles, None without any. The others are (H, W) and describe the first hits:
    depth (metres along the optical axis, infinite for none), cosine of incidence, whether the hit
    is on a person, whether it is thin.
    """

    crossed: NDArray[np.uint8]
    scene: o3d.t.geometry.RaycastingScene | None
    depth: Floats
    cosine: Floats
    person: NDArray[np.bool_]
    thin: NDArray[np.bool_]

    @classmethod
    def of(cls, view: View, triangles: Floats, person: NDArray[np.bool_] | None = None) -> Self:
        """From (m, 3, 3) triangles, metres, OpenCV axes; person: (m,) those of people."""
        if person is None:
            person = np.zeros(len(triangles), np.bool_)
        grid, size = view.grid, view.grid.voxel_size
        lower, shape = np.asarray(grid.lower) - size, tuple(np.asarray(grid.shape) + 2)
        crossed = np.packbits(crossed_cells(lower, size, shape, triangles))
        scene = _scene(triangles)
        depth, cosine, on_person = _first_hits(scene, person, view.directions())
        thin = thin_pixels(depth, view.K[0, 0], view.K[1, 1], THIN, FALLS_AWAY) & ~on_person
        return cls(crossed, scene, depth, cosine, on_person, thin)

    def around(self, grid: Grid) -> NDArray[np.bool_]:
        """(nx + 2, ny + 2, nz + 2) bool: the cells that the truth crosses. The extra layer around
        the grid has the neighbours of cells at its edge.
        """
        shape = np.asarray(grid.shape) + 2
        bits: NDArray[np.bool_] = np.unpackbits(self.crossed, count=shape.prod()).astype(np.bool_)
        return bits.reshape(shape)


@dataclass(frozen=True)
class Truth:
    """The ground truth of a trajectory, world metres.

    vertices: (V, 3) and faces: (F, 3) of the static mesh; world_from_camera: (T, 4, 4) the true
    poses, OpenCV axes; people_vertices: (T, P, 3) and people_faces: (Q, 3), empty without people.
    """

    vertices: Floats
    faces: NDArray[np.int64]
    world_from_camera: Floats
    people_vertices: Floats
    people_faces: NDArray[np.int64]

    def frame(self, t: int, view: View) -> FrameTruth:
        """The ground truth of frame t in its camera's frame."""
        pose = self.world_from_camera[t]
        parts, person = [], []
        for moving, vertices, faces in (
            (False, self.vertices, self.faces),
            (True, self.people_vertices[t], self.people_faces),
        ):
            local = (vertices - pose[:3, 3]) @ pose[:3, :3]
            near = _around(view.grid, local[faces])
            parts.append(near)
            person.append(np.full(len(near), moving))
        return FrameTruth.of(view, np.concatenate(parts), np.concatenate(person))


def _around(grid: Grid, triangles: Floats) -> Floats:
    """The (m, 3, 3) triangles that reach into a grid or its surroundings.

    Triangles outside cannot stop a ray that ends inside: a grid is convex and contains its camera.
    """
    lower = np.asarray(grid.lower)
    upper = lower + np.asarray(grid.shape) * grid.voxel_size
    margin = GHOST + 2 * grid.voxel_size
    low, high = triangles.min(axis=1), triangles.max(axis=1)
    kept: Floats = triangles[((low <= upper + margin) & (high >= lower - margin)).all(axis=1)]
    return kept


def read_truth(sample: Path, episode: str, recorded: Floats) -> Truth:
    """Read the truth of an episode of a sample.

    recorded: (T, 4, 4) its poses in the dataset. They are the true poses if the sample has no file
    of true poses for the episode.
    """
    mesh = o3d.io.read_triangle_mesh(str(sample / "ground_truth" / "mesh.ply"))
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.triangles).astype(np.int64)
    people = np.zeros((len(recorded), 0, 3)), np.zeros((0, 3), np.int64)
    path = sample / "ground_truth" / f"{episode}.npz"
    if not path.exists():
        return Truth(vertices, faces, recorded, *people)
    with np.load(path) as stored:
        if "people_vertices" in stored and stored["people_vertices"].size:
            people = (
                stored["people_vertices"].astype(np.float64),
                stored["people_faces"].astype(np.int64),
            )
        return Truth(vertices, faces, stored["world_from_camera"].astype(np.float64), *people)


def frame_counts(
    view: View, truth: FrameTruth, seen: FrameResult, *, with_bound: bool = False
) -> Counts:
    """The counts of one frame from which figures are computed. Counts can be summed."""
    grid, size = view.grid, view.grid.voxel_size
    lower, shape = np.asarray(grid.lower), np.asarray(grid.shape)
    around = truth.around(grid)
    crossed = np.ascontiguousarray(around[1:-1, 1:-1, 1:-1])
    occupied = np.zeros(grid.cells, np.bool_)
    occupied[seen.visible] = True

    free = unpack(seen.observed, grid.cells) & ~occupied
    visible = np.asarray(seen.visible, np.int64)
    place = np.stack(np.unravel_index(visible, grid.shape), axis=-1)
    near = near_set_cells(around, np.ravel_multi_index((place + 1).T, tuple(shape + 2)))
    centres = lower + (place + 0.5) * size
    distance = _distances(truth.scene, centres)
    free_crossed = np.flatnonzero(crossed.ravel() & free)
    counts = Counts(
        visible=len(visible),
        exact=int(crossed.ravel()[visible].sum()),
        near=int(near.sum()),
        within_2cm=int((distance <= NEAR).sum()),
        ghosts=int((distance > GHOST).sum()),
        free=int(free.sum()),
        false_free=len(free_crossed),
        false_free_alone=int((~near_set_cells(occupied.reshape(grid.shape), free_crossed)).sum()),
    )
    perfect = crossed.ravel() * np.uint8(OCCUPIED)
    trace(grid, view.K, view.size, perfect)
    reached, open_cells = (perfect & OBSERVED) > 0, perfect == OBSERVED
    near_reached = near_set_cells(reached.reshape(grid.shape), np.flatnonzero(free))
    counts["hidden_free"] = int((~near_reached).sum())
    counts["open"], counts["free_recall"] = int(open_cells.sum()), int((open_cells & free).sum())

    # The true first hits, and the ends of the method's rays.
    directions, depth, cosine = view.directions(), truth.depth, truth.cosine
    ends = first_occupied(grid, view.K, view.size, occupied.astype(np.uint8) * OCCUPIED)
    ended = ends >= 0
    behind = _entry_depths(grid, ends[ended], directions[ended]) - depth[ended]
    behind *= np.linalg.norm(directions[ended], axis=-1)
    honest = np.unique(ends[ended][~(behind > 2 * size)])
    counts["leaks"] = len(np.setdiff1d(visible, honest))
    angle = _mean_of_cells(ends[ended], np.degrees(np.arccos(cosine[ended])), visible)
    _count_bins(counts, "near", near, centres[:, 2], angle)

    with np.errstate(invalid="ignore"):
        cell = np.floor((directions * depth[..., None] - lower) / size)
    inside = np.isfinite(depth) & ((cell >= 0) & (cell < shape)).all(axis=-1)
    hit_of_ray = np.ravel_multi_index(cell[inside].astype(np.int64).T, grid.shape)
    hits = np.unique(hit_of_ray)
    found = near_set_cells(occupied.reshape(grid.shape), hits)
    counts["hits"], counts["recall"] = len(hits), int(found.sum())
    counts["recall_strict"] = int(occupied[hits].sum())
    angle = _mean_of_cells(hit_of_ray, np.degrees(np.arccos(cosine[inside])), hits)
    _count_bins(counts, "recall", found, grid.centres(hits)[:, 2], angle)
    for name, rays in (("people", truth.person), ("thin", truth.thin)):
        of_kind = np.isin(hits, hit_of_ray[rays[inside]])
        counts[f"{name}_hits"], counts[name] = int(of_kind.sum()), int(found[of_kind].sum())

    if with_bound:
        best = (perfect == OCCUPIED | OBSERVED).reshape(grid.shape)
        counts["bound_hits"], counts["bound"] = len(hits), int(near_set_cells(best, hits).sum())
        counts["bounded"] = int(found.sum())
    return counts


def _scene(triangles: Floats) -> o3d.t.geometry.RaycastingScene | None:
    if not len(triangles):
        return None
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    corners = np.ascontiguousarray(triangles.reshape(-1, 3), np.float32)
    scene.add_triangles(corners, np.arange(len(corners), dtype=np.uint32).reshape(-1, 3))
    return scene


def _distances(scene: o3d.t.geometry.RaycastingScene | None, points: Floats) -> Floats:
    """(n,) metres from (n, 3) points to the nearest triangle."""
    if scene is None:
        return np.full(len(points), np.inf)
    query = o3d.core.Tensor(np.ascontiguousarray(points, np.float32))
    distances: Floats = scene.compute_distance(query, nthreads=1).numpy().astype(np.float64)
    return distances


def _first_hits(
    scene: o3d.t.geometry.RaycastingScene | None,
    of_person: NDArray[np.bool_],
    directions: Floats,
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """First hits, (H, W) each: depth (infinite for none), cosine of incidence, on a person."""
    if scene is None:
        none = np.full(directions.shape[:2], np.inf)
        return none, np.ones_like(none), np.zeros(none.shape, np.bool_)
    rays = np.concatenate([np.zeros_like(directions), directions], axis=-1).astype(np.float32)
    answer = scene.cast_rays(o3d.core.Tensor(rays), nthreads=1)
    depth = answer["t_hit"].numpy().astype(np.float64)
    hit = np.isfinite(depth)
    normals = answer["primitive_normals"].numpy().astype(np.float64)
    cosine = np.abs((normals * directions).sum(-1)) / np.linalg.norm(directions, axis=-1)
    person = np.zeros(depth.shape, np.bool_)
    person[hit] = of_person[answer["primitive_ids"].numpy()[hit]]
    return depth, np.clip(np.where(hit, cosine, 1.0), 0, 1), person


def _entry_depths(grid: Grid, columns: NDArray[np.integer], directions: Floats) -> Floats:
    """(n,) depth at which rays from the camera, (n, 3) with depth 1, enter the (n,) cells."""
    size = grid.voxel_size
    box = np.asarray(grid.lower) + np.stack(np.unravel_index(columns, grid.shape), axis=-1) * size
    with np.errstate(divide="ignore", invalid="ignore"):
        entries: Floats = np.nanmax(
            np.minimum(box / directions, (box + size) / directions), axis=1, initial=0.0
        )
    return entries


def _mean_of_cells(
    cells: NDArray[np.integer], values: Floats, wanted: NDArray[np.integer]
) -> Floats:
    """(n,) mean of the values in each wanted cell, NaN without values."""
    wanted_order = np.argsort(wanted)
    place = np.searchsorted(wanted, cells, sorter=wanted_order)
    place = np.minimum(place, max(len(wanted) - 1, 0))
    if not len(wanted):
        return np.zeros(0)
    place = wanted_order[place]
    known = wanted[place] == cells
    total = np.bincount(place[known], values[known], len(wanted))
    with np.errstate(invalid="ignore"):
        mean: Floats = total / np.bincount(place[known], minlength=len(wanted))
    return mean


def _count_bins(
    counts: Counts, name: str, right: NDArray[np.bool_], ranges: Floats, angles: Floats
) -> None:
    """Count a figure by range and by incidence."""
    for kind, edges, values in (("range", RANGES, ranges), ("incidence", INCIDENCES, angles)):
        for low, high in pairwise(edges):
            last = high == edges[-1]
            with np.errstate(invalid="ignore"):
                inside = (values >= low) & ((values <= high) if last else (values < high))
            label = f"{name} {kind} {low:g}-{high:g}"
            counts[f"{label} all"] += int(inside.sum())
            counts[label] += int(right[inside].sum())


OF = {
    **dict.fromkeys(("exact", "near", "within_2cm", "ghosts", "leaks"), "visible"),
    **dict.fromkeys(("recall", "recall_strict"), "hits"),
    **dict.fromkeys(("false_free", "false_free_alone", "hidden_free"), "free"),
    "free_recall": "open",
    "people": "people_hits",
    "thin": "thin_hits",
}
"""The denominator of each figure."""


def figures(counts: Counts) -> dict[str, float]:
    """Compute the figures from counts. Figures with a denominator of 0 are omitted."""
    found = {name: counts[name] / counts[of] for name, of in OF.items() if counts[of]}
    for label in sorted(counts):
        if label.endswith(" all") and counts[label]:
            name = label.removesuffix(" all")
            found[name] = counts[name] / counts[label]
    if counts["bound_hits"]:
        found["recall_bound"] = counts["bound"] / counts["bound_hits"]
        found["recall_bounded"] = counts["bounded"] / counts["bound_hits"]
    found["visible_cells"] = float(counts["visible"])
    return found


@dataclass
class SampleTruth:
    """The truth of a sample. Each frame is computed once and shared by all methods."""

    sample: Path
    _frames: dict[tuple[str, int], FrameTruth] = field(default_factory=dict)

    def counts(
        self,
        episode: str,
        recorded: Floats,
        views: list[View],
        seen: Iterable[FrameResult],
        bounds: int = 0,
        frames: Iterable[int] | None = None,
        progress: Callable[[], object] = lambda: None,
    ) -> Counts:
        """The sum of a method's counts over the frames of an episode.

        recorded: (T, 4, 4) the episode's poses, used as the true poses if the sample has no file
        of them; views: the frames' cameras; bounds: number of frames on which recall's bound is
        measured; frames: the frames to measure, all if None; progress: called after each frame.
        """
        truth = read_truth(self.sample, episode, recorded)
        wanted = set(range(len(views)) if frames is None else frames)
        bounded = set(np.linspace(0, len(views) - 1, bounds + 2)[1:-1].astype(int).tolist())

        def one(t: int, frame: FrameResult) -> Counts:
            numba.set_num_threads(1)  # Applies to calls from this thread.
            if (episode, t) not in self._frames:
                self._frames[episode, t] = truth.frame(t, views[t])
            found = frame_counts(views[t], self._frames[episode, t], frame, with_bound=t in bounded)
            progress()
            return found

        with ThreadPoolExecutor(own_threads()) as pool:
            jobs = [pool.submit(one, t, frame) for t, frame in enumerate(seen) if t in wanted]
            return sum((job.result() for job in jobs), Counts())


def measure(
    truth: SampleTruth,
    dataset: Path,
    bounds: int = 0,
    frames: Iterable[int] | None = None,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Counts]:
    """The counts of each trajectory, by id, of a dataset built from a sample.

    The other arguments are those of `SampleTruth.counts`.
    """
    counts = {}
    for path in trajectories(dataset):
        trajectory = Trajectory.open(path)
        name = path.relative_to(dataset).as_posix()
        views = [View(trajectory.grid, K, trajectory.image_size) for K in trajectory.intrinsics()]
        counts[name] = truth.counts(
            name,
            trajectory.world_from_camera(),
            views,
            stored_results(trajectory),
            bounds,
            frames,
            progress,
        )
    return counts


def stored_results(trajectory: Trajectory) -> Iterator[FrameResult]:
    """Yield the occupancy of each frame of a built trajectory, in order."""
    rows = zip(trajectory.visible_frames(), trajectory.observed_packed(), strict=True)
    for visible, observed in rows:
        yield FrameResult(visible, observed)


def evaluate(
    sample: Path, dataset: Path, frames: Iterable[int] | None = None
) -> dict[str, dict[str, float]]:
    """The figures of each trajectory, by id, and of "all", of a dataset built from a sample.

    frames: the frames to measure, all if None.
    """
    counts = measure(SampleTruth(sample), dataset, frames=frames)
    found = {name: figures(value) for name, value in counts.items()}
    return {**found, "all": figures(sum(counts.values(), Counts()))}
