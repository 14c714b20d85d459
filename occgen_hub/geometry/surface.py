"""Small holes of a cloud, closed along the surface that its points lie on."""

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
"""Voxels: half the width of the widest hole that is closed. In the made-up houses 0.02 % of the
occupied cells of 2 cm then lie farther than a cell from the true mesh; with 3, up to 0.3 %."""
GAP = 0.5
"""Voxels: nearer to a measured point there is no hole, only a second layer of cells to gain."""
RIM = 0.25
"""Voxels by which a rim may grow all the same; without, closed holes would keep a seam."""

NEIGHBOURS = 16
DEPTHS = (5, 11)
"""Of the octree: Open3D always fills it to 5; 11 bounds memory, and spans 37 m at cells of 2 cm."""
BATCH = 1 << 20
"""Samples of the surface held at a time; a triangle that takes more is cut more coarsely."""


def poisson_surface(
    cloud: Cloud,
    camera_centres: NDArray[np.float64],
    voxel_size: float,
    density_cut: float = 0.0,
) -> Cloud:
    """`cloud`, followed by points that close its holes of up to 2 * REACH voxels.

    cloud: finite points in the world; camera_centres: (T, 3) float64, metres, where the cameras
    that saw them stood, at least one; voxel_size: metres, edge of the cells that points will
    occupy; density_cut: share of the surface's vertices, those that the fewest points support, to
    leave out. Of the added points there is one in each voxel of half that edge, in the colour of
    the nearest measured ones. Equal input gives equal bytes, whatever the number of threads.

    The surface is a screened Poisson reconstruction (M. Kazhdan, H. Hoppe, "Screened Poisson
    surface reconstruction", 2013). It spans doorways too, and closes behind all that is unseen.
    The usual remedy, a density cut of a tenth, leaves much of that when more than a tenth is
    unseen, and opens the holes again when all is seen. So, cut or not, the surface is used where
    a morphological closing along it, by REACH voxels, reaches from the measured points: dilated
    and eroded again, they cover the holes among them and do not grow beyond their rims. Measured
    points all stay, since a reconstruction wears away what is thinner than its cells.

    Normals are turned towards the nearest camera, because a fused cloud does not remember which
    one saw a point. Where the nearest stood behind a wall, that wall's holes may stay open.

    A cloud without area (under ten points, or all on one line) is returned as it is.
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
    """Whether (n, 3) points spread in two directions, by more than rounding to float32."""
    spread = np.linalg.svd(points - points.mean(axis=0), compute_uv=False)
    return bool(spread[1] > 1e-4 * spread[0])


def _reconstruct(
    points: NDArray[np.float64],
    camera_centres: NDArray[np.float64],
    voxel_size: float,
    density_cut: float,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(V, 3) vertices and (F, 3) triangles of the surface through (n, 3) points.

    One thread: with more the bytes differ from run to run, and Open3D has been seen to crash.
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
    """Let nothing of this process reach the standard error stream.

    PoissonRecon, inside Open3D, writes its warnings there whatever the verbosity.
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
    """(n, 3) normals of (n, 3) points, each turned towards the nearest of (T, 3) cameras."""
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
    """(n,) metres from each point to the nearest in the tree; infinite beyond `farthest`."""
    distance: NDArray[np.float64] = tree.query(points, distance_upper_bound=farthest)[0]
    return distance


def _samples(
    vertices: NDArray[np.float64],
    triangles: NDArray[np.int64],
    spacing: float,
) -> Iterator[NDArray[np.float64]]:
    """(n, 3) float64 samples of triangles, in batches.

    A triangle is cut into equal parts with edges of `spacing` (metres) at most; their centroids are
    the samples. No point of it is farther from one than two thirds of the spacing.
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
    """(n * n, 3) barycentric coordinates of the parts of a triangle whose edges are cut into n."""
    corners = np.indices((n, n)).reshape(2, -1).T
    diagonal = corners.sum(axis=1)
    upright, inverted = corners[diagonal < n] + 1 / 3, corners[diagonal < n - 1] + 2 / 3
    first_two = np.concatenate([upright, inverted]) / n
    return np.concatenate([first_two, 1 - first_two.sum(axis=1, keepdims=True)], axis=1)
