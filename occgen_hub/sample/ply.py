"""Ground truth as PLY files: the mesh, and a scene's cloud in InternData-N1's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.scene import Scene

SPACING = 0.05  # metres between the cloud's points
SHIFT = np.array([0.013, 0.017, 0.021])  # so that no floor lies between two cubes
BAND = 0.9  # metres above the floor
STEP = 0.1  # metres: everything lower counts as floor
FLOOR, FREE, OBSTACLE, PATH = (0, 0, 128), (125, 255, 122), (102, 102, 102), (0, 0, 0)
NARROW, WIDE = 0.3, 0.6  # metres from an obstacle: between these the floor's colour runs

Bytes = NDArray[np.uint8]


def write_mesh(path: Path, scenes: Sequence[Scene]) -> None:
    """Write all scenes as one binary mesh: world coordinates, metres, double; vertex colours."""
    points, colours, triangles, start = [], [], [], 0
    for scene in scenes:
        mesh = scene.mesh
        points.append(to_world(scene, mesh.vertices))
        tint = (scene.palette.colour + scene.palette.second) / 2
        colour = np.zeros((len(mesh.vertices), 3), np.uint8)
        colour[mesh.triangles] = (tint[scene.material][:, None] * 255 + 0.5).astype(np.uint8)
        colours.append(colour)
        triangles.append(mesh.triangles + start)
        start += len(mesh.vertices)
    faces = np.concatenate(triangles)
    record = np.zeros(len(faces), np.dtype([("n", "u1"), ("v", "<i4", 3)]))
    record["n"], record["v"] = 3, faces
    vertices = _vertices(np.concatenate(points), np.concatenate(colours))
    lists = f"element face {len(faces)}\nproperty list uchar int vertex_indices\n"
    path.write_bytes(_header(len(vertices), lists) + vertices.tobytes() + record.tobytes())


def write_cloud(path: Path, scene: Scene, cloud: Floats, walked: Floats) -> None:
    """Write the path (T, 3) in the world's frame and a scene's cloud (N, 3) in the house's frame.

    The path is black and obstacles are grey. The floor changes from dark blue near obstacles over
    light blue to green where it is free.
    """
    low = cloud[:, 2] < STEP
    away, _ = cKDTree(cloud[~low, :2]).query(cloud[low, :2])
    tints = np.zeros((len(cloud), 3), np.uint8)
    tints[~low] = OBSTACLE
    tints[low] = _floor_colours(away)
    points = np.concatenate([walked, to_world(scene, cloud)])
    colours = np.concatenate([np.full((len(walked), 3), PATH, np.uint8), tints])
    path.write_bytes(_header(len(points)) + _vertices(points, colours).tobytes())


def cloud_of(scene: Scene, rng: np.random.Generator) -> Floats:
    """Points (N, 3) on the scene's surfaces in the robot's height band, in the house's frame."""
    corners = scene.mesh.vertices[scene.mesh.triangles]
    corners = corners[_in_range(scene, corners.mean(axis=1), np.ptp(corners[..., 2], axis=1) / 1.5)]
    sides = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(sides, axis=1) / 2
    count = int(area.sum() / SPACING**2 * 4)
    which = np.searchsorted(np.cumsum(area), rng.uniform(0, area.sum(), count))
    corners = corners[np.minimum(which, len(corners) - 1)]
    a, b = rng.random((2, count, 1))
    a, b = np.where(a + b > 1, 1 - a, a), np.where(a + b > 1, 1 - b, b)
    points = (
        corners[:, 0] + a * (corners[:, 1] - corners[:, 0]) + b * (corners[:, 2] - corners[:, 0])
    )
    return _downsampled(points[_in_range(scene, points, np.zeros(len(points)))])


def to_world(scene: Scene, points: NDArray[np.floating[Any]]) -> Floats:
    """Points (N, 3) from the house's frame in the world's frame, metres."""
    T = scene.world_from_house
    return np.asarray(points @ T[:3, :3].T + T[:3, 3])


def _in_range(scene: Scene, points: Floats, reach: Floats) -> NDArray[np.bool_]:
    """Which points (N, 3) are in the house and, within `reach` (N,) up or down, in the band."""
    x0, y0, x1, y1 = scene.plan.rect
    x, y, z = points.T
    # Windows are ten centimetres deep; points farther out are on the outside of the walls.
    inside = (x > x0 - 0.11) & (x < x1 + 0.11) & (y > y0 - 0.11) & (y < y1 + 0.11)
    return np.asarray(inside & (z + reach >= -1e-6) & (z - reach <= BAND))


def _downsampled(points: Floats) -> Floats:
    """The point nearest to the middle of each cube of side SPACING."""
    at = (points + SHIFT) / SPACING
    cube = np.floor(at).astype(np.int64)
    cube -= cube.min(axis=0)
    size = cube.max(axis=0) + 1
    key = (cube[:, 0] * size[1] + cube[:, 1]) * size[2] + cube[:, 2]
    off = np.linalg.norm(at - np.floor(at) - 0.5, axis=1)
    order = np.lexsort((off, key))
    first = np.concatenate([[True], np.diff(key[order]) > 0])
    return np.asarray(points[order[first]])


def _floor_colours(away: Floats) -> Bytes:
    """Colours (N, 3) of the floor by its distance from obstacles, metres."""
    v = 4 * np.minimum(away, WIDE) / (2 * WIDE)
    run = np.clip([1.5 - np.abs(v - 3), 1.5 - np.abs(v - 2), 1.5 - np.abs(v - 1)], 0, 1).T
    colours = (run * 255).astype(np.uint8)
    colours[away < NARROW] = FLOOR
    colours[away >= WIDE] = FREE
    return colours


def _vertices(points: Floats, colours: Bytes) -> NDArray[np.void]:
    record = np.zeros(len(points), np.dtype([("xyz", "<f8", 3), ("rgb", "u1", 3)]))
    record["xyz"], record["rgb"] = points, colours
    return record


def _header(vertices: int, more: str = "") -> bytes:
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"element vertex {vertices}",
        *(f"property double {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
    ]
    return ("\n".join(lines) + f"\n{more}end_header\n").encode()
