"""Classes of visible cells compared with the true mesh, on samples with labels and noise.

Part of scripts/accuracy. The true class of a visible cell is the class of the true first hit, among
all rays of the frame, that is nearest to the cell's centre. So errors of occupancy count too: a
cell in front of a surface has the class of that surface. The IoU of a class is over all frames of a
sample; mIoU is the mean over the true classes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open3d as o3d
from accuracy_metrics import View, read_truth
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occgen_hub.builder import load_builder
from occgen_hub.config import Config
from occgen_hub.engines import load_engine
from occgen_hub.episode_build import Settings, build_episode
from occgen_hub.loading import Trajectory
from occgen_hub.sample import make_sample
from occgen_hub.taxonomy import load_taxonomy

NOISE = ("kinect", "speckle")
TARGET = 0.9
"""Required mIoU of the classes of visible cells, for each seed."""


def confusion(
    sample: Path, path: Path, episode: str, frames: range | None = None
) -> NDArray[np.int64]:
    """(256, 256) number of visible cells, by true class (row) and built class (column).

    sample: has labels; path: the trajectory built from its episode; frames: only these.
    """
    trajectory = Trajectory.open(path)
    poses, K = trajectory.world_from_camera(), trajectory.intrinsics()
    truth = read_truth(sample, episode, poses)
    with np.load(sample / "ground_truth/mesh_labels.npz") as stored:
        static, person = stored["labels"], stored["person"]
    classes = np.concatenate([static, np.full(len(truth.people_faces), person)])
    counts = np.zeros((256, 256), np.int64)
    rows = zip(trajectory.visible_frames(), trajectory.label_frames(), strict=True)
    for t, (visible, found) in enumerate(rows):
        if frames is not None and t not in frames:
            continue
        corners, start = truth.vertices, len(truth.vertices)
        corners = np.concatenate([corners, truth.people_vertices[t]])
        local = (corners - truth.world_from_camera[t][:3, 3]) @ truth.world_from_camera[t][:3, :3]
        faces = np.concatenate([truth.faces, truth.people_faces + start])
        view = View(trajectory.grid, K[t], trajectory.image_size)
        hits, hit_classes = _first_hits(local, faces, classes, view)
        centres = trajectory.grid.centres(visible)
        true = hit_classes[cKDTree(hits).query(centres)[1]]
        np.add.at(counts, (true, found), 1)
    return counts


def _first_hits(
    vertices: NDArray[np.float64],
    faces: NDArray[np.int64],
    classes: NDArray[np.uint8],
    view: View,
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The first hits of the rays of a camera at the origin, (n, 3) metres, and their classes."""
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(vertices.astype(np.float32), faces.astype(np.uint32))
    rays = view.directions().reshape(-1, 3)
    both = np.concatenate([np.zeros_like(rays), rays], axis=1).astype(np.float32)
    answer = scene.cast_rays(o3d.core.Tensor(both), nthreads=1)
    depth, triangle = answer["t_hit"].numpy(), answer["primitive_ids"].numpy()
    hit = np.isfinite(depth)
    return rays[hit] * depth[hit, None], classes[triangle[hit]]


def ious(counts: NDArray[np.int64], taxonomy: str = "sample") -> dict[str, float]:
    """The IoU of each true class, by name."""
    found = {}
    for one in load_taxonomy(taxonomy).classes.values():
        if true := counts[one.id].sum():
            right = counts[one.id, one.id]
            found[one.name] = float(right / (true + counts[:, one.id].sum() - right))
    return found


def measure_labels(
    seeds: range, trajectories: int, frames: int, progress: Callable[[], object] = lambda: None
) -> dict[int, dict[str, float]]:
    """The IoU of each class and their "mean", on one sample per seed."""
    found = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            sample, out = Path(folder, "sample"), Path(folder, "out")
            make_sample(
                sample, trajectories=trajectories, frames=frames, seed=seed, noise=NOISE,
                labels=True,
            )  # fmt: skip
            builder = load_builder("internnav", sample)
            settings = Settings(Config(), load_engine("rgbd"), media="none")
            counts = np.zeros((256, 256), np.int64)
            for ref in builder.episodes():
                build_episode(builder, ref, out, settings)
                counts += confusion(sample, out / ref.id, ref.id)
            by_class = ious(counts)
            found[seed] = {"mean": float(np.mean([*by_class.values()])), **by_class}
        progress()
    return found


def show_labels(found: dict[int, dict[str, float]]) -> bool:
    """Print the figures of each seed. Returns whether all reach the target."""
    names = sorted({name for by in found.values() for name in by} - {"mean"})
    print("| class |" + "".join(f" seed {seed} |" for seed in found))
    print("| --- |" + " --- |" * len(found))
    for name in ("mean", *names):
        cells = (f" {by[name]:.3f} |" if name in by else " |" for by in found.values())
        print(f"| {name} |" + "".join(cells))
    worst = min(by["mean"] for by in found.values())
    met = worst >= TARGET
    print(f"mIoU of visible cells, least: {worst:.3f} >= {TARGET:g} {'met' if met else 'MISSED'}")
    return met
