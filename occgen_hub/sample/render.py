"""Render a scene by ray tracing: colour, and exact depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.sample.figure import PosedMesh
from occgen_hub.sample.furnish import CELL
from occgen_hub.sample.house import HEIGHT
from occgen_hub.sample.materials import Array
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.scene import TAXONOMY, Scene, room_map
from occgen_hub.taxonomy import load_taxonomy

Bytes = NDArray[np.uint8]
SKY = (0.75, 0.85, 0.95)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera, pixels; pixel (u, v) has its centre at (u + 0.5, v + 0.5)."""

    width: int
    height: int
    fx: float
    fy: float

    @property
    def K(self) -> Floats:  # noqa: N802, the field's name for it
        """The intrinsic matrix (3, 3); the principal point is the image's middle."""
        return np.array(
            [[self.fx, 0, self.width / 2], [0, self.fy, self.height / 2], [0, 0, 1]], np.float64
        )

    def rays(self) -> Floats:
        """Directions (H*W, 3) through the pixel centres, OpenCV axes, one metre long along z."""
        v, u = np.mgrid[: self.height, : self.width]
        K = self.K.astype(np.float32).astype(np.float64)  # as rounded in the file
        x = (u.ravel() + 0.5 - K[0, 2]) / K[0, 0]
        y = (v.ravel() + 0.5 - K[1, 2]) / K[1, 1]
        return np.stack([x, y, np.ones_like(x)], axis=1)


class Renderer:
    """Traces rays in one scene, in the house's own frame, where float32 is finest."""

    def __init__(self, scene: Scene) -> None:
        """Make the tree of the scene's triangles."""
        import open3d

        self._o3d: Any = open3d
        self._tensor = self._o3d.core.Tensor
        self.scene = scene
        self.tracer = self._tracer(scene.mesh.vertices, scene.mesh.triangles)
        self.normals = scene.mesh.normals.astype(np.float32)
        self.curved = (np.ptp(scene.mesh.normals, axis=1) > 1e-6).any(axis=1)
        self.person = load_taxonomy(TAXONOMY).id_of("person")
        self.low, self.rooms = room_map(scene)
        self.walls = np.array([r.rect for r in scene.plan.rooms], np.float32)

    def distance(self, points: Floats) -> Array:
        """The distance of points (N, 3) to the nearest surface, metres."""
        found = self.tracer.compute_distance(self._tensor(points.astype(np.float32)))
        return np.asarray(found.numpy(), np.float32)

    def range(self, origins: Floats, directions: Floats) -> Array:
        """The distance to the first hit of each ray, in units of its direction (N, 3)."""
        rays = np.concatenate([origins, directions], axis=1).astype(np.float32)
        return np.asarray(self._cast(self.tracer, rays)["t_hit"], np.float32)

    def picture(
        self, camera: Camera, house_from_camera: Floats, people: PosedMesh | None = None
    ) -> tuple[Bytes, Array, Bytes]:
        """The view of a camera whose pose (4, 4) has OpenCV axes, with people if there are any.

        Returns:
            colour (H, W, 3); depth (H, W) along the optical axis in metres, inf without a hit; and
            classes (H, W), 0 without a hit.
        """
        R, t = house_from_camera[:3, :3], house_from_camera[:3, 3]
        direction = (camera.rays() @ R.T).astype(np.float32)
        rays = np.concatenate(
            [np.broadcast_to(t.astype(np.float32), direction.shape), direction], 1
        )
        moving = self._tracer(people.vertices, people.faces) if people else None
        hit = self._cast(self.tracer, rays)
        depth = hit["t_hit"]
        colour = np.full((len(rays), 3), SKY, np.float32)
        if people:
            met = self._cast(moving, rays)
            front = np.flatnonzero(met["t_hit"] < depth)
            depth[front] = met["t_hit"][front]
            hit["primitive_ids"][front] = 0  # Any value: their colour is set below.
        seen = np.flatnonzero(np.isfinite(depth))
        label = np.zeros(len(rays), np.uint8)
        label[seen] = self.scene.label[hit["primitive_ids"][seen]]
        colour[seen] = self._shade(
            rays[seen], depth[seen], hit["primitive_ids"][seen].astype(np.int64),
            hit["primitive_uvs"][seen], min(camera.fx, camera.fy), moving,
        )  # fmt: skip
        if people:
            label[front] = self.person
            colour[front] = self._shade_people(
                people, rays[front], depth[front], met["primitive_ids"][front].astype(np.int64),
                met["primitive_uvs"][front], moving,
            )  # fmt: skip
        shape = (camera.height, camera.width)
        picture = (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)
        return picture.reshape(*shape, 3), depth.reshape(shape), label.reshape(shape)

    def _tracer(self, vertices: NDArray[Any], triangles: NDArray[Any]) -> Any:
        # One thread builds the tree, so that it is the same tree each time.
        tracer = self._o3d.t.geometry.RaycastingScene(nthreads=1)
        tracer.add_triangles(
            self._tensor(vertices.astype(np.float32)), self._tensor(triangles.astype(np.uint32))
        )
        return tracer

    def _cast(self, tracer: Any, rays: Array) -> dict[str, NDArray[Any]]:
        answer = tracer.cast_rays(self._tensor(rays))
        return {k: answer[k].numpy() for k in ("t_hit", "primitive_ids", "primitive_uvs")}

    def _shade(
        self,
        rays: Array,
        depth: Array,
        triangle: NDArray[np.int64],
        uv: Array,
        focal: float,
        moving: Any,
    ) -> Array:
        """Lit colours (N, 3) at the hits of rays (N, 6). moving: tracer of people, for shadows."""
        scene, direction = self.scene, rays[:, 3:]
        point = rays[:, :3] + depth[:, None] * direction
        normal = self.normals[triangle, 0]
        bent = np.flatnonzero(self.curved[triangle])
        corners, b = self.normals[triangle[bent]], uv[bent]
        share = np.stack([1 - b.sum(axis=1), b[:, 0], b[:, 1]], axis=1)
        normal[bent] = np.einsum("nij,ni->nj", corners, share)
        normal[bent] /= np.linalg.norm(normal[bent], axis=1, keepdims=True)

        u, v = self._on_object(point, self.normals[triangle, 0], scene.part[triangle])
        facing = np.abs(np.einsum("ij,ij->i", normal, direction))
        blur = depth / focal / np.maximum(facing / _length(direction), 0.1)
        material = scene.material[triangle]
        albedo = scene.palette.colours(material, u, v, blur)
        light = self._light(point, normal, moving)
        light[scene.palette.glows[material]] = 1.0
        # Colours are as on screen; squares and roots are near enough to a screen's gamma.
        return np.asarray(np.sqrt(albedo**2 * light[:, None]))

    def _shade_people(
        self,
        people: PosedMesh,
        rays: Array,
        depth: Array,
        triangle: NDArray[np.int64],
        uv: Array,
        moving: Any,
    ) -> Array:
        """Lit colours (N, 3) of the people hit by rays (N, 6)."""
        corners = people.faces[triangle]
        share = np.stack([1 - uv.sum(axis=1), uv[:, 0], uv[:, 1]], axis=1)
        normal = np.einsum("nij,ni->nj", people.normals[corners], share)
        normal /= _length(normal)[:, None]
        albedo = np.einsum("nij,ni->nj", people.colours[corners], share)
        light = self._light(rays[:, :3] + depth[:, None] * rays[:, 3:], normal, moving)
        return np.asarray(np.sqrt(np.clip(albedo, 0, 1) ** 2 * light[:, None]))

    def _on_object(
        self, point: Array, normal: Array, part: NDArray[np.int32]
    ) -> tuple[Array, Array]:
        """Surface coordinates (N,), metres, in the object's axes, seen from its main face."""
        yaw = self.scene.part_yaw.astype(np.float32)[part]
        q = point - self.scene.part_position.astype(np.float32)[part]
        c, s = np.cos(yaw), np.sin(yaw)
        x, y = c * q[:, 0] + s * q[:, 1], c * q[:, 1] - s * q[:, 0]
        nx, ny = c * normal[:, 0] + s * normal[:, 1], c * normal[:, 1] - s * normal[:, 0]
        nz = np.abs(normal[:, 2])
        level = (nz >= np.abs(nx)) & (nz >= np.abs(ny))
        side = ~level & (np.abs(nx) > np.abs(ny))
        return np.where(side, y, x), np.where(level, y, q[:, 2])

    def _light(self, point: Array, normal: Array, moving: Any) -> Array:
        """Brightness of each point (N,): light of its room's lamp, and ambient light."""
        off = point + normal * np.float32(2e-3)
        cell = ((off[:, :2] - self.low.astype(np.float32)) / CELL).astype(np.int64)
        cell = np.clip(cell, 0, np.array(self.rooms.shape) - 1)
        room = self.rooms[cell[:, 0], cell[:, 1]]
        to_lamp = self.scene.lights.astype(np.float32)[room] - off
        rays = np.concatenate([off, to_lamp], axis=1)
        hidden = self.tracer.test_occlusions(self._tensor(rays), 0.0, 0.999).numpy()
        if moving is not None:
            # Triangles beside a point of a round body must not shade it.
            hidden = hidden | moving.test_occlusions(self._tensor(rays), 0.01, 0.999).numpy()
        far = _length(to_lamp)
        cosine = np.clip(np.einsum("ij,ij->i", normal, to_lamp) / far, 0, 1)
        lamp = np.where(hidden, 0.25, 1.0) * cosine / (0.6 + 0.22 * far**2)
        return np.asarray(self._ambient(off, normal, room) + lamp, np.float32)

    def _ambient(self, point: Array, normal: Array, room: NDArray[np.int8]) -> Array:
        """Ambient light, which decreases towards the edges and corners of a room."""
        x0, y0, x1, y1 = self.walls[room].T
        x, y, z = point.T
        near = (np.minimum(x - x0, x1 - x), np.minimum(y - y0, y1 - y), np.minimum(z, HEIGHT - z))
        least, most = np.minimum(near[0], near[1]), np.maximum(near[0], near[1])
        # A surface's own wall does not darken it, so the second nearest counts.
        second = np.maximum(np.minimum(most, np.maximum(least, near[2])), 0)
        open_ = 1 - 0.45 * np.exp(-second / 0.22)
        return np.asarray(open_ * (0.5 + 0.08 * normal[:, 2] + 0.06 * normal[:, 0]), np.float32)


def _length(vectors: Array) -> Array:
    return np.asarray(np.sqrt(np.einsum("ij,ij->i", vectors, vectors)), np.float32)
