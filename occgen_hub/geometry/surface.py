"""Fill small holes of a point cloud along a reconstructed surface."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occgen_hub.geometry.cloud import Cloud, voxel_downsample

REACH = 2.0
"""Half the width of the widest hole that is filled, in voxels. In the sample houses, 0.02 % of the
occupied cells of 2 cm then lie more than a cell from the true mesh; with 3, up to 0.3 %."""
GAP = 0.5
"""Smallest distance of added points from measured ones, in voxels. Nearer points would only add a
second layer of cells."""
RIM = 0.25
"""Distance by which the rim of a surface may grow, in voxels. With 0, filled holes keep a seam."""

NEIGHBOURS = 16
DEPTHS = (5, 11)
"""Depth of the octree. Open3D uses at least 5; 11 bounds memory, and spans 37 m with 2 cm cells."""
BATCH = 1 << 20
"""Number of samples of the surface in memory. Triangles with more get a coarser spacing."""


def poisson_surface(
    cloud: Cloud,
    camera_centres: NDArray[np.float64],
    voxel_size: float,
    density_cut: float = 0.0,
) -> Cloud:
    """Return `cloud` with added points that fill its holes of up to 2 * REACH voxels.

    cloud: finite points in the world; camera_centres: (T, 3) float64, metres, the positions of the
    cameras that saw them, at least one; voxel_size: edge of the cells, metres; density_cut: share
    of the surface's vertices to remove, those with the fewest points nearby. The added points have
    a spacing of half a voxel and the colours of the nearest measured points. The result does not
    depend on the number of threads.

    The surface is a screened Poisson reconstruction (M. Kazhdan, H. Hoppe, "Screened Poisson
    surface reconstruction", 2013). Such a surface also closes doorways and encloses unseen space.
    The usual remedy, to remove the tenth with the lowest density, keeps much of such surface if
    more than a tenth is unseen, and opens the holes again if all is seen. So the surface is only
    used within a morphological closing of the measured points along it, by REACH voxels: dilation
    and erosion cover the holes among the points but do not grow beyond their rims. All measured
    points are kept, since a reconstruction loses objects that are thinner than its cells.

    Normals are oriented towards the nearest camera, because a fused cloud does not record which
    camera saw a point. If the nearest camera stood behind a wall, holes in that wall may stay open.

    A cloud without area (under ten points, or all on a line) is returned unchanged.
    """
    points = cloud.points.astype(np.float64)
    if len(points) < 10 or not _has_area(points):
        return cloud
    centre = points.mean(axis=0)  # Open3D reconstructs in single precision.
    points -= centre
    tree = cKDTree(points)
    vertices, triangles = _reconstruct(points, camera_centres - centre, voxel_size, density_cut)
    filling = _closing(tree, vertices, triangles, voxel_size)
    colors = cloud.colors[tree.query(filling)[1]]
    filled = Cloud((filling + centre).astype(np.float32), colors)
    added = voxel_downsample(filled, voxel_size / 2)
    return Cloud(
        np.concatenate([cloud.points, added.points]), np.concatenate([cloud.colors, added.colors])
    )


def _has_area(points: NDArray[np.float64]) -> bool:
    """Whether (n, 3) points extend in two directions by more than rounding to float32."""
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    return bool(spread[1] > 1e-4 * spread[0])


def _reconstruct(
    points: NDArray[np.float64],
    camera_centres: NDArray[np.float64],
    voxel_size: float,
    density_cut: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(V, 3) vertices and (F, 3) triangles of the surface through (n, 3) points.

    It uses one thread: with more, the result differs between runs, and Open3D crashed at times.
    """
    import open3d

    o3d: Any = open3d  # Its stubs do not describe its compiled parts.
    cloud = o3d.geometry.PointCloud(o3d.utility.Vector3dVector(points))
    scale = 1.1
    depth = math.ceil(math.log2(scale * np.ptp(points, axis=0).max() / voxel_size))
    with _quiet(), o3d.utility.VerbosityContextManager(o3d.utility.VerbosityLevel.Error):
        cloud.estimate_normals(o3d.geometry.KDTreeSearchParamKNN(NEIGHBOURS))
        normals = _facing(np.asarray(cloud.normals), points, camera_centres)
        cloud.normals = o3d.utility.Vector3dVector(normals)
        mesh, densities = o3d.geometry.TriangleMesh.create_from_point_cloud_poisson(
            cloud, depth=min(max(depth, DEPTHS[0]), DEPTHS[1]), scale=scale, n_threads=1
        )
        if density_cut > 0:
            density = np.asarray(densities)
            mesh.remove_vertices_by_mask(density < np.quantile(density, density_cut))
    return np.asarray(mesh.vertices), np.asarray(mesh.triangles).astype(np.int64)


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard this process's output to the standard error stream.

    PoissonRecon in Open3D writes warnings there at any verbosity.
    """
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def _facing(
    normals: NDArray[np.float64], points: NDArray[np.float64], camera_centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(n, 3) normals of (n, 3) points, oriented towards the nearest of (T, 3) cameras."""
    _, nearest = cKDTree(camera_centres).query(points)
    away = ((camera_centres[nearest] - points) * normals).sum(axis=1) < 0
    return np.where(away[:, None], -normals, normals)


def _closing(
    measured: cKDTree,
    vertices: NDArray[np.float64],
    triangles: NDArray[np.int64],
    voxel_size: float,
) -> NDArray[np.float64]:
    """(n, 3) samples of the surface that lie in holes of the measured points."""
    reach, beyond = REACH * voxel_size, (REACH + 1) * voxel_size
    near = np.isfinite(_distance(measured, vertices, beyond))
    triangles = triangles[near[triangles].any(axis=1)]
    within: list[NDArray[np.float64]] = [np.empty((0, 3))]
    outside: list[NDArray[np.float64]] = [np.empty((0, 3))]
    for samples in _samples(vertices, triangles, voxel_size / 2):
        distance = _distance(measured, samples, beyond)
        within.append(samples[(distance > GAP * voxel_size) & (distance <= reach)])
        outside.append(samples[(distance > reach) & (distance <= beyond)])
    filling = np.concatenate(within)
    to_outside = _distance(cKDTree(np.concatenate(outside)), filling, reach)
    return filling[to_outside >= reach - RIM * voxel_size]


def _distance(tree: cKDTree, points: NDArray[np.float64], farthest: float) -> NDArray[np.float64]:
    """(n,) distance from each point to the nearest in the tree; infinite beyond `farthest`."""
    distance: NDArray[np.float64] = tree.query(points, distance_upper_bound=farthest)[0]
    return distance


def _samples(
    vertices: NDArray[np.float64],
    triangles: NDArray[np.int64],
    spacing: float,
) -> Iterator[NDArray[np.float64]]:
    """(n, 3) float64 samples of triangles, in batches.

    A triangle is divided into equal parts with edges of at most `spacing` (metres), whose centroids
    are the samples. Its points are within two thirds of the spacing of a sample.
    """
    corners = vertices[triangles]
    edge = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(axis=1)
    cuts = np.clip(np.ceil(edge / spacing), 1, math.isqrt(BATCH)).astype(np.int64)
    for n in np.unique(cuts):
        weights = _centroids(int(n))
        alike = np.flatnonzero(cuts == n)
        for part in np.array_split(alike, math.ceil(len(alike) * len(weights) / BATCH)):
            yield np.einsum("sk,tkd->tsd", weights, vertices[triangles[part]]).reshape(-1, 3)


def _centroids(n: int) -> NDArray[np.float64]:
    """(n * n, 3) barycentric centroids of the parts of a triangle with edges divided into n."""
    corners = np.indices((n, n)).reshape(2, -1).T
    diagonal = corners.sum(axis=1)
    upright, inverted = corners[diagonal < n] + 1 / 3, corners[diagonal < n - 1] + 2 / 3
    first_two = np.concatenate([upright, inverted]) / n
    return np.concatenate([first_two, 1 - first_two.sum(axis=1, keepdims=True)], axis=1)
