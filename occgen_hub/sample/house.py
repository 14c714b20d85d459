"""The plan of a house with rooms, doorways and windows, and the mesh of its shell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.sample.blocks import EMPTY, Box, surface
from occgen_hub.sample.materials import Material
from occgen_hub.sample.mesh import Floats, Mesh, flat

HEIGHT = 2.6  # metres, floor to ceiling
INNER, OUTER = 0.12, 0.2  # wall thickness, metres
DOOR_HEIGHT = 2.05
CASING = (0.07, 0.018)  # width and thickness of the frame about a doorway
SKIRTING = (0.08, 0.014)  # height and thickness
WALL, TRIM, PANE, SILL = 1, 2, 3, 4  # what a cell of the shell is made of
FRAME, BARS, THRESHOLD = 5, 6, 7  # as TRIM about doorways, as TRIM in windows, as SILL in doorways

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in metres, in the house's frame
Piece = tuple[Mesh, Material]


@dataclass(frozen=True)
class Room:
    """A room: its inside."""

    name: str
    rect: Rect


@dataclass(frozen=True)
class Opening:
    """A doorway or a window: the part of a wall that it replaces."""

    rect: Rect
    axis: int  # the horizontal axis that leads through it
    rooms: tuple[int, ...]  # on the low and the high side; one for a window
    side: int = 0  # of a window: where outside is, -1 or 1


@dataclass(frozen=True)
class Plan:
    """A house from above. Its centre is at the origin."""

    rect: Rect  # inside of the outer walls
    rooms: tuple[Room, ...]
    doors: tuple[Opening, ...]
    windows: tuple[Opening, ...]

    def room_at(self, x: float, y: float) -> int:
        """The number of the room at a point, -1 in a wall, in a doorway or outside."""
        for i, room in enumerate(self.rooms):
            x0, y0, x1, y1 = room.rect
            if x0 < x < x1 and y0 < y < y1:
                return i
        return -1


def draw_plan(rng: np.random.Generator) -> Plan:
    """A house of three or four rooms in two columns, joined by doorways."""
    w, d = rng.uniform(8.8, 10.2) / 2, rng.uniform(7.2, 8.4) / 2
    a = rng.uniform(-0.08, 0.08) * w
    rects: list[Rect] = []
    for x0, x1, split in ((-w, a - INNER / 2, True), (a + INNER / 2, w, rng.random() < 0.6)):
        if split:
            b = rng.uniform(-0.12, 0.12) * d
            rects += [(x0, -d, x1, b - INNER / 2), (x0, b + INNER / 2, x1, d)]
        else:
            rects.append((x0, -d, x1, d))
    largest = max(range(len(rects)), key=lambda i: _area(rects[i]))
    names = [str(n) for n in rng.permutation(["bedroom", "kitchen", "study"])]
    rooms = tuple(
        Room("living room" if i == largest else names.pop(), r) for i, r in enumerate(rects)
    )
    plan_rect = (-w, -d, w, d)
    doors = _draw_doors(rooms, rng)
    windows = tuple(_draw_window(i, r.rect, plan_rect, rng) for i, r in enumerate(rooms))
    return Plan(plan_rect, rooms, doors, windows)


def shell(plan: Plan, rng: np.random.Generator) -> list[tuple[Mesh, Material, list[str]]]:
    """Floors, walls, ceilings, frames and windows: for each material a mesh, and the class of each
    of its triangles in the taxonomy "sample".
    """
    corners, outward, label, into = surface(_boxes(plan))
    finishes = [_finishes(room, rng) for room in plan.rooms]
    trim = Material("plain", (0.9, 0.89, 0.86))
    sill = Material("wood", (0.62, 0.45, 0.3), (0.5, 0.34, 0.22))
    outside = Material("plaster", (0.7, 0.62, 0.55))
    groups: dict[int, Material] = {0: trim, 1: sill, 2: outside}
    key = np.where((label == SILL) | (label == THRESHOLD), 1, 0)
    room = np.array([plan.room_at(x, y) for x, y, _ in into])
    x0, y0, x1, y1 = plan.rect
    beyond = (into[:, :2] < (x0, y0)) | (into[:, :2] > (x1, y1))
    under = (into[:, 2] < 0) | (into[:, 2] > HEIGHT)
    for i, finish in enumerate(finishes):
        for k, (direction, material) in enumerate(finish.items()):
            mine = (label == WALL) & (room == i) & (np.sign(outward[:, 2]) == direction)
            key[mine] = 10 + 3 * i + k
            groups[10 + 3 * i + k] = material
    key[(beyond.any(axis=1) & (label == WALL)) | under] = 2
    for i, window in enumerate(plan.windows):
        key[(label == PANE + 10 * (i + 1))] = 100 + i
        groups[100 + i] = _outdoors(window, rng)
    classes = _classes(label, outward)
    return [
        (_quads(corners[key == k]), m, [*classes[key == k]] * 2)
        for k, m in sorted(groups.items())
        if (key == k).any()
    ]


def _classes(label: NDArray[np.int64], outward: NDArray[np.int8]) -> NDArray[np.str_]:
    """(Q,) the class of each face, by its material and direction."""
    names = {TRIM: "wall", SILL: "window", FRAME: "door", BARS: "window", THRESHOLD: "floor"}
    facing = np.array(["ceiling", "wall", "floor"])[np.sign(outward[:, 2]).astype(int) + 1]
    classes = np.where(label > max(names), "window", facing)
    for made_of, name in names.items():
        classes[label == made_of] = name
    return classes


def _area(r: Rect) -> float:
    return (r[2] - r[0]) * (r[3] - r[1])


def _draw_doors(rooms: tuple[Room, ...], rng: np.random.Generator) -> tuple[Opening, ...]:
    """A doorway in each wall that two rooms share for long enough."""
    doors = []
    for i, first in enumerate(rooms):
        for j in range(i + 1, len(rooms)):
            for axis in (0, 1):
                a, b = first.rect, rooms[j].rect
                across = 1 - axis
                lo = max(a[across], b[across]) + 0.55
                hi = min(a[across + 2], b[across + 2]) - 0.55
                if abs(b[axis] - a[axis + 2] - INNER) > 1e-6 or hi - lo < 1.0:
                    continue
                width = rng.uniform(0.95, 1.02)
                at = rng.uniform(lo, hi - width)
                rect = _rect(axis, (a[axis + 2], b[axis]), (at, at + width))
                doors.append(Opening(rect, axis, (i, j)))
    return tuple(doors)


def _draw_window(number: int, room: Rect, house: Rect, rng: np.random.Generator) -> Opening:
    """A window in the longest outer wall of the room."""
    sides = [
        (room[3 - axis] - room[1 - axis], axis, side)
        for axis in (0, 1)
        for side in (-1, 1)
        if abs(room[axis + 1 + side] - house[axis + 1 + side]) < 1e-6
    ]
    length, axis, side = max(sides)
    width = min(rng.uniform(1.2, 1.8), length - 1.0)
    at = room[1 - axis] + rng.uniform(0.5, length - width - 0.5)
    wall = room[axis + 1 + side]
    depth = (wall - OUTER, wall) if side < 0 else (wall, wall + OUTER)
    return Opening(_rect(axis, depth, (at, at + width)), axis, (number,), side)


def _rect(axis: int, through: tuple[float, float], across: tuple[float, float]) -> Rect:
    """The rectangle that spans `through` along `axis` and `across` along the other."""
    if axis == 0:
        return through[0], across[0], through[1], across[1]
    return across[0], through[0], across[1], through[1]


def _grow(r: Rect, x: float, y: float) -> Rect:
    return r[0] - x, r[1] - y, r[2] + x, r[3] + y


def _block(r: Rect, z0: float, z1: float, what: int) -> Box:
    return (r[0], r[1], z0), (r[2], r[3], z1), what


def _boxes(plan: Plan) -> list[Box]:
    """What to fill and what to cut away, in order."""
    boxes = [_block(_grow(plan.rect, OUTER, OUTER), -0.15, HEIGHT + 0.15, WALL)]
    height, thick = SKIRTING
    for room in plan.rooms:
        boxes.append(_block(room.rect, 0, height, TRIM))
        boxes.append(_block(_grow(room.rect, -thick, -thick), 0, height, EMPTY))
        boxes.append(_block(room.rect, height, HEIGHT, EMPTY))
    for door in plan.doors:
        boxes += _doorway(door)
    for i, window in enumerate(plan.windows):
        boxes += _window(window, PANE + 10 * (i + 1))
    return boxes


def _doorway(door: Opening) -> list[Box]:
    """A frame that protrudes from the wall, the opening, and a threshold."""
    wide, thick = CASING
    frame = (thick, wide) if door.axis == 0 else (wide, thick)
    cut = (thick, 0.0) if door.axis == 0 else (0.0, thick)
    return [
        _block(_grow(door.rect, *frame), 0, DOOR_HEIGHT + wide, FRAME),
        _block(_grow(door.rect, *cut), 0, DOOR_HEIGHT, EMPTY),
        _block(door.rect, 0, 0.006, THRESHOLD),
    ]


def _window(window: Opening, pane: int) -> list[Box]:
    """A niche with a protruding sill, a pane at its back and a cross of bars in front of it."""
    axis, side = window.axis, window.side
    inner, outer = (1, 0) if side < 0 else (0, 1)
    wall = window.rect[axis + 2 * inner], window.rect[axis + 2 * outer]
    along = window.rect[1 - axis], window.rect[3 - axis]
    middle = (along[0] + along[1]) / 2

    def slab(near: float, far: float, a: float, b: float, z0: float, z1: float, what: int) -> Box:
        through = sorted((wall[0] + side * near, wall[0] + side * far))
        return _block(_rect(axis, (through[0], through[1]), (a, b)), z0, z1, what)

    return [
        slab(-0.06, 0.10, along[0] - 0.06, along[1] + 0.06, 0.92, 0.95, SILL),
        slab(0, 0.10, *along, 0.95, 2.15, EMPTY),
        slab(0.09, 0.10, *along, 0.95, 2.15, pane),
        slab(0.06, 0.10, along[0], along[0] + 0.05, 0.95, 2.15, BARS),
        slab(0.06, 0.10, along[1] - 0.05, along[1], 0.95, 2.15, BARS),
        slab(0.06, 0.10, *along, 0.95, 1.0, BARS),
        slab(0.06, 0.10, *along, 2.1, 2.15, BARS),
        slab(0.06, 0.10, middle - 0.02, middle + 0.02, 0.95, 2.15, BARS),
        slab(0.06, 0.10, *along, 1.6, 1.64, BARS),
    ]


def _finishes(room: Room, rng: np.random.Generator) -> dict[int, Material]:
    """The materials of a room by direction of the faces: 1 floor, 0 walls, -1 ceiling."""
    seed = int(rng.integers(1 << 16))
    floors = {
        "kitchen": Material("tiles", (0.82, 0.79, 0.73), (0.55, 0.5, 0.47), 0.33, seed),
        "bedroom": Material("carpet", (0.62, 0.55, 0.47), (0.52, 0.47, 0.42), 0.1, seed),
        "study": Material("planks", (0.5, 0.34, 0.22), (0.38, 0.25, 0.16), 0.14, seed),
        "living room": Material("planks", (0.74, 0.56, 0.37), (0.62, 0.45, 0.29), 0.12, seed),
    }
    tints = [(0.88, 0.84, 0.74), (0.74, 0.82, 0.84), (0.78, 0.84, 0.74), (0.88, 0.77, 0.72)]
    tint = np.array(tints[rng.integers(len(tints))]) + rng.uniform(-0.03, 0.03, 3)
    darker = tint * rng.uniform(0.8, 0.88)
    kind = str(rng.choice(["plaster", "striped", "damask"]))
    scale = {"plaster": 0.1, "striped": 0.24, "damask": 0.3}[kind]
    wall = Material(kind, _colour(tint), _colour(darker), scale, seed + 1)
    return {1: floors[room.name], 0: wall, -1: Material("plaster", (0.93, 0.93, 0.91))}


def _outdoors(window: Opening, rng: np.random.Generator) -> Material:
    r, across = window.rect, 1 - window.axis
    area = (r[across], 0.95, r[across + 2], 2.15)
    return Material("outdoors", (0.62, 0.78, 0.95), seed=int(rng.integers(1 << 16)), area=area)


def _colour(c: Floats) -> tuple[float, float, float]:
    return float(c[0]), float(c[1]), float(c[2])


def _quads(corners: Floats) -> Mesh:
    """Faces (Q, 4, 3) as triangles that share their corners."""
    points, index = np.unique(corners.reshape(-1, 3).round(6), axis=0, return_inverse=True)
    q = index.reshape(-1, 4)
    return flat(points, np.concatenate([q[:, [0, 1, 2]], q[:, [0, 2, 3]]]))
