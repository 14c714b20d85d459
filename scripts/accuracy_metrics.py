"""Accuracy metrics of a frame's cells against the true meshes, and of a whole built dataset.

A part of scripts/accuracy. Everything is measured in the frame of the true camera: the true mesh,
and the people of that moment, are moved there by the true pose, and the frame's cells are taken as
they are stored, in the camera's grid. So nothing depends on where a method puts its world.

- exact: visible occupied cells that the truth crosses (triangle against box, exactly).
- near: those that the truth crosses, or one of whose 26 neighbours it crosses.
- within_2cm: visible cells whose centre is within 2 cm of the truth.
- ghosts: visible cells whose centre is more than 10 cm from the truth.
- recall: of the cells that hold a ray's true first hit, those that have a visible occupied cell
  within one cell; recall_strict: that are one.
- leaks: visible cells that lie more than two cells behind the true first hit of every ray that ends
  in them.
- false_free: of the cells that are observed and not occupied, those that the truth crosses;
  false_free_alone: that it crosses where no visible occupied cell is within one cell.
- people: recall of the cells of first hits on people, in their own frame; none without people.
- thin: recall of the cells of first hits on what is narrower than 4 cm in the image, see
  `thin_pixels`; people do not count.
- recall_bound, recall_bounded: on some of the frames, the recall that the true mesh itself has when
  every cell that it crosses is occupied and the same rays are followed, and the method's own recall
  there. Where a surface is seen at a grazing angle a ray ends in the first cell of a step of the
  staircase that the surface becomes, and a cell on a silhouette hides what passes beside the
  surface in it; so no exact visibility finds every cell of a first hit.

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
from accuracy_cells import beside, crossed_cells, thin_pixels
from numpy.typing import NDArray

from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.occupancy.codec import unpack
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import OBSERVED, OCCUPIED, first_occupied, trace
from occgen_hub.prefetch import own_threads

NEAR, GHOST = 0.02, 0.1
"""Metres between a cell's centre and the truth: within the first it is right, beyond the second it
is a ghost."""

THIN, FALLS_AWAY = 0.04, 0.05
"""Metres: the width below which objects are thin, and the depth jump at a surface's edge."""

RANGES = (0.0, 1.0, 2.0, 3.5)
INCIDENCES = (0.0, 45.0, 70.0, 90.0)

Counts = Counter[str]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """The result of a method for one frame, in the camera's grid.

    visible: (n,) columns of the visible occupied cells; observed: (ceil(cells / 8),) uint8,
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
        """(H, W, 3) of the rays through the pixels' centres, of depth 1."""
        v, u = np.mgrid[: self.size[1], : self.size[0]] + 0.5
        x, y = (u - self.K[0, 2]) / self.K[0, 0], (v - self.K[1, 2]) / self.K[1, 1]
        return np.stack([x, y, np.ones_like(u)], axis=-1)


@dataclass(frozen=True)
class FrameTruth:
    """The ground truth of one frame in its true camera's frame, and the hits of its rays.

    crossed: packed bits of the cells that the truth crosses, of the grid and a layer around it;
    scene: of the triangles, None without any; the others are (H, W), of the first hits: depth
    (metres along the optical axis, infinite for none), cosine of incidence, on a person, thin.
    """

    crossed: NDArray[np.uint8]
    scene: o3d.t.geometry.RaycastingScene | None
    depth: Floats
    cosine: Floats
    person: NDArray[np.bool_]
    thin: NDArray[np.bool_]

    @classmethod
    def of(cls, view: View, triangles: Floats, person: NDArray[np.bool_] | None = None) -> Self:
        """Of (m, 3, 3) triangles, metres, OpenCV axes; person: (m,) which of them are of people."""
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
        """(nx + 2, ny + 2, nz + 2) bool: the cells that the truth crosses, with a layer around the
        grid, as a neighbour of a cell at its edge lies there.
        """
        shape = np.asarray(grid.shape) + 2
        bits: NDArray[np.bool_] = np.unpackbits(self.crossed, count=shape.prod()).astype(np.bool_)
        return bits.reshape(shape)


@dataclass(frozen=True)
class Truth:
    """The ground truth of a trajectory, world metres.

    vertices: (V, 3), faces: (F, 3) of what stands still; world_from_camera: (T, 4, 4) the true
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
    """Those of (m, 3, 3) triangles that reach into a grid or its surroundings.

    What lies outside cannot stop a ray that ends inside, as a grid is convex and holds its camera.
    """
    lower = np.asarray(grid.lower)
    upper = lower + np.asarray(grid.shape) * grid.voxel_size
    margin = GHOST + 2 * grid.voxel_size
    low, high = triangles.min(axis=1), triangles.max(axis=1)
    kept: Floats = triangles[((low <= upper + margin) & (high >= lower - margin)).all(axis=1)]
    return kept


def read_truth(sample: Path, episode: str, recorded: Floats) -> Truth:
    """The truth of an episode of a sample.

    recorded: (T, 4, 4) its poses in the dataset, which are the true ones where the sample has no
    file of true poses for it.
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


def frame_counts(view: View, truth: FrameTruth, seen: Seen, *, with_bound: bool = False) -> Counts:
    """The counts from which figures are computed, per frame. They can be added up."""
    grid, size = view.grid, view.grid.voxel_size
    lower, shape = np.asarray(grid.lower), np.asarray(grid.shape)
    around = truth.around(grid)
    crossed = np.ascontiguousarray(around[1:-1, 1:-1, 1:-1])
    occupied = np.zeros(grid.cells, np.bool_)
    occupied[seen.visible] = True

    free = unpack(seen.observed, grid.cells) & ~occupied
    visible = np.asarray(seen.visible, np.int64)
    place = np.stack(np.unravel_index(visible, grid.shape), axis=-1)
    near = beside(around, np.ravel_multi_index((place + 1).T, tuple(shape + 2)))
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
        false_free_alone=int((~beside(occupied.reshape(grid.shape), free_crossed)).sum()),
    )

    # The true first hits, and where the rays of the method end.
    directions, depth, cosine = view.directions(), truth.depth, truth.cosine
    ends = first_occupied(grid, view.K, view.size, occupied.astype(np.uint8) * OCCUPIED)
    ended = ends >= 0
    behind = _entries(grid, ends[ended], directions[ended]) - depth[ended]
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
    found = beside(occupied.reshape(grid.shape), hits)
    counts["hits"], counts["recall"] = len(hits), int(found.sum())
    counts["recall_strict"] = int(occupied[hits].sum())
    angle = _mean_of_cells(hit_of_ray, np.degrees(np.arccos(cosine[inside])), hits)
    _count_bins(counts, "recall", found, grid.centres(hits)[:, 2], angle)
    for name, rays in (("people", truth.person), ("thin", truth.thin)):
        of_kind = np.isin(hits, hit_of_ray[rays[inside]])
        counts[f"{name}_hits"], counts[name] = int(of_kind.sum()), int(found[of_kind].sum())

    if with_bound:
        perfect = crossed.ravel() * np.uint8(OCCUPIED)
        trace(grid, view.K, view.size, perfect)
        best = (perfect == OCCUPIED | OBSERVED).reshape(grid.shape)
        counts["bound_hits"], counts["bound"] = len(hits), int(beside(best, hits).sum())
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
    """(H, W) each: depth of the first hit (infinite for none), cosine of incidence, on a person."""
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


def _entries(grid: Grid, columns: NDArray[np.integer], directions: Floats) -> Floats:
    """(n,) depth at which rays from the camera, (n, 3) of depth 1, enter the cells (n,)."""
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
    """(n,) mean of the values in each wanted cell, NaN if there are none."""
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
    **dict.fromkeys(("false_free", "false_free_alone"), "free"),
    "people": "people_hits",
    "thin": "thin_hits",
}
"""The count that is the denominator of each figure."""


def figures(counts: Counts) -> dict[str, float]:
    """The figures from the counts of frames, without those whose denominator is 0."""
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
    """The truth of a sample, each frame worked out once for all methods that are measured on it."""

    sample: Path
    _frames: dict[tuple[str, int], FrameTruth] = field(default_factory=dict)

    def counts(
        self,
        episode: str,
        recorded: Floats,
        views: list[View],
        seen: Iterable[Seen],
        bounds: int = 0,
        frames: Iterable[int] | None = None,
        progress: Callable[[], object] = lambda: None,
    ) -> Counts:
        """The counts of a method for the frames of an episode, added up.

        recorded: (T, 4, 4) the episode's poses, which are the true ones where the sample has no
        file of true poses; views: the frames' cameras; bounds: on how many frames recall's bound is
        measured; frames: numbers of those to measure, all if None; progress: called after each.
        """
        truth = read_truth(self.sample, episode, recorded)
        wanted = set(range(len(views)) if frames is None else frames)
        bounded = set(np.linspace(0, len(views) - 1, bounds + 2)[1:-1].astype(int).tolist())

        def one(t: int, frame: Seen) -> Counts:
            numba.set_num_threads(1)  # Of this thread's calls.
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
    """Counts of each trajectory of a dataset that was built from a sample, by its id.

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
            stored(trajectory),
            bounds,
            frames,
            progress,
        )
    return counts


def stored(trajectory: Trajectory) -> Iterator[Seen]:
    """Yield the occupancy of each frame of a built trajectory, in order."""
    rows = zip(trajectory.visible_frames(), trajectory.observed_packed(), strict=True)
    for visible, observed in rows:
        yield Seen(visible, observed)


def evaluate(
    sample: Path, dataset: Path, frames: Iterable[int] | None = None
) -> dict[str, dict[str, float]]:
    """The figures of each trajectory of a dataset built from a sample, by its id, and of "all".

    frames: numbers of those to measure, all if None.
    """
    counts = measure(SampleTruth(sample), dataset, frames=frames)
    found = {name: figures(value) for name, value in counts.items()}
    return {**found, "all": figures(sum(counts.values(), Counts()))}
