"""A furnished house as one mesh, with the material of each triangle, and its pose in the world."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.sample.furnish import CELL, FloorMap, Placed, furnish
from occgen_hub.sample.house import Plan, draw_plan, shell
from occgen_hub.sample.materials import Palette
from occgen_hub.sample.mesh import Floats, Mesh, join, yaw_matrix
from occgen_hub.taxonomy import load_taxonomy

LIGHT_HEIGHT = 2.1  # metres: just under the ceiling lamp's shade
TAXONOMY = "sample"  # of the houses' labels
PITCH = 19.0  # metres between the houses' centres, so that none meet however they are turned


@dataclass(frozen=True)
class Scene:
    """A house in its own frame: metres, z up, the floor at z = 0, the origin at its middle."""

    plan: Plan
    placed: tuple[Placed, ...]
    mesh: Mesh
    material: NDArray[np.int32]  # (F,): into `palette`
    part: NDArray[np.int32]  # (F,): into `part_yaw` and `part_position`
    label: NDArray[np.uint8]  # (F,): classes of the taxonomy "sample"
    part_yaw: Floats  # (P,)
    part_position: Floats  # (P, 3)
    palette: Palette
    lights: Floats  # (rooms, 3)
    world_from_house: Floats  # (4, 4)

    def floor(self) -> FloorMap:
        """The free floor."""
        floor = FloorMap(self.plan)
        for p in self.placed:
            if p.furniture.blocks:
                floor = floor.covered(p.rect)
        return floor


def build_scene(seed: int, number: int) -> Scene:
    """House `number` of a seed. It does not depend on other houses."""
    rng = np.random.default_rng([seed, number, 0])
    plan = draw_plan(rng)
    walls = shell(plan, rng)
    pieces = [(mesh, material, 0) for mesh, material, _ in walls]
    classes = [name for _, _, names in walls for name in names]
    placed = furnish(plan, rng)
    for i, p in enumerate(placed):
        pieces += [(m.moved(p.yaw, p.position), mat, i + 1) for m, mat in p.furniture.pieces]
        for (mesh, _), name in zip(p.furniture.pieces, p.furniture.classes(), strict=True):
            classes += [name] * len(mesh.triangles)
    taxonomy = load_taxonomy(TAXONOMY)
    counts = [len(mesh.triangles) for mesh, _, _ in pieces]
    middles = [((r.rect[0] + r.rect[2]) / 2, (r.rect[1] + r.rect[3]) / 2) for r in plan.rooms]
    return Scene(
        plan=plan,
        placed=tuple(placed),
        mesh=_single(join([mesh for mesh, _, _ in pieces])),
        material=np.repeat(np.arange(len(pieces), dtype=np.int32), counts),
        part=np.repeat(np.array([part for _, _, part in pieces], np.int32), counts),
        label=np.array([taxonomy.id_of(name) for name in classes], np.uint8),
        part_yaw=np.array([0.0] + [p.yaw for p in placed]),
        part_position=np.array([(0.0, 0.0, 0.0)] + [p.position for p in placed]),
        palette=Palette([material for _, material, _ in pieces]),
        lights=np.array([(x, y, LIGHT_HEIGHT) for x, y in middles]),
        world_from_house=_world_from_house(number, rng),
    )


def room_map(scene: Scene) -> tuple[Floats, NDArray[np.int8]]:
    """The low corner and a map of the nearest room to each 5 cm cell of the house."""
    from scipy import ndimage

    floor = FloorMap(scene.plan)
    cells = np.indices(floor.free.shape).reshape(2, -1).T
    room = np.full(floor.free.size, -1, np.int8)
    xy = floor.centres(cells)
    for i, r in enumerate(scene.plan.rooms):
        x0, y0, x1, y1 = r.rect
        room[(xy[:, 0] > x0) & (xy[:, 0] < x1) & (xy[:, 1] > y0) & (xy[:, 1] < y1)] = i
    rooms = room.reshape(floor.free.shape)
    nearest = ndimage.distance_transform_edt(rooms < 0, CELL, False, True)
    return floor.low, rooms[tuple(nearest)]


def _world_from_house(number: int, rng: np.random.Generator) -> Floats:
    """Pose of a house. Houses are on a grid four wide, with random rotations and floor heights."""
    out = np.eye(4)
    out[:3, :3] = yaw_matrix(rng.uniform(-np.pi, np.pi))
    out[:2, 3] = (number % 4 - 1.5) * PITCH, (number // 4 - 1) * PITCH
    out[:3, 3] += (*rng.uniform(-1, 1, 2), rng.uniform(-3, 3))
    return out


def _single(mesh: Mesh) -> Mesh:
    """The mesh with corners rounded to float32, since rays are traced in float32."""
    return Mesh(mesh.vertices.astype(np.float32).astype(np.float64), mesh.triangles, mesh.normals)
