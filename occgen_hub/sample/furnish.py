"""Place furniture in the rooms of a plan: against walls, away from doors, with space to walk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from occgen_hub.sample import furniture as make
from occgen_hub.sample.furniture import Furniture
from occgen_hub.sample.house import Opening, Plan, Rect, Room

CELL = 0.05  # metres: the floor map's
WALK = 0.45  # metres that must be free about a walker's middle
GAP = 0.03  # metres between furniture and a wall, past the skirting
Bools = NDArray[np.bool_]
Maker = Callable[[np.random.Generator], Furniture]

AGAINST_WALLS: dict[str, tuple[Maker, ...]] = {
    "living room": (
        make.sofa, make.sideboard, make.bookcase, make.armchair, make.floor_lamp, make.plant,
        make.bookcase, make.armchair,
    ),
    "bedroom": (make.bed, make.wardrobe, make.nightstand, make.plant, make.armchair, make.boxes),
    "kitchen": (make.kitchen_counter, make.fridge, make.sideboard, make.plant, make.boxes),
    "study": (
        make.desk, make.bookcase, make.bookcase, make.armchair, make.floor_lamp, make.boxes,
        make.plant,
    ),
}  # fmt: skip
IN_THE_MIDDLE: dict[str, tuple[Maker, ...]] = {
    "living room": (make.coffee_table, make.dining_table),
    "kitchen": (make.dining_table,),
    "bedroom": (),
    "study": (),
}


@dataclass(frozen=True)
class Placed:
    """A piece of furniture and its position in the house's frame."""

    furniture: Furniture
    room: int
    yaw: float  # radians
    position: tuple[float, float, float]  # metres

    @property
    def rect(self) -> Rect:
        """The rectangle that it covers on the floor."""
        w, d, _ = self.furniture.size
        c, s = abs(np.cos(self.yaw)), abs(np.sin(self.yaw))
        x, y = (c * w + s * d) / 2, (s * w + c * d) / 2
        cx, cy, _ = self.position
        return cx - x, cy - y, cx + x, cy + y


class FloorMap:
    """The free 5 cm cells of the floor, by index (ix, iy). Cell (0, 0) is at the low corner."""

    def __init__(self, plan: Plan) -> None:
        """The floor of a house without its furniture."""
        self.low = np.array(plan.rect[:2]) - 0.3
        shape = np.ceil((np.array(plan.rect[2:]) + 0.3 - self.low) / CELL).astype(int)
        self.free: Bools = np.zeros(tuple(shape), bool)
        for rect in [r.rect for r in plan.rooms]:
            self._paint(rect, True)
        for door in plan.doors:
            self._paint(_reach(door, 0.1), True)

    def covered(self, rect: Rect) -> FloorMap:
        """The map with a rectangle occupied."""
        out = object.__new__(FloorMap)
        out.low, out.free = self.low, self.free.copy()
        out._paint(rect, False)
        return out

    def clearance(self) -> NDArray[np.float64]:
        """Metres from each cell's middle to the near edge of the nearest occupied cell."""
        d = ndimage.distance_transform_edt(self.free)
        return np.asarray(np.maximum(d - 0.5, 0) * CELL, np.float64)

    def centres(self, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """The middles (N, 2), metres, of cells (N, 2)."""
        return self.low + (cells + 0.5) * CELL

    def _paint(self, rect: Rect, free: bool) -> None:
        middles = [self.low[a] + (np.arange(n) + 0.5) * CELL for a, n in enumerate(self.free.shape)]
        inside = [(m > rect[a]) & (m < rect[a + 2]) for a, m in enumerate(middles)]
        self.free[np.ix_(*inside)] = free


def furnish(plan: Plan, rng: np.random.Generator) -> list[Placed]:
    """Furniture for every room, with a free path between all doorways."""
    placed: list[Placed] = []
    floor = FloorMap(plan)
    for number, room in enumerate(plan.rooms):
        wanted = [(m, True) for m in AGAINST_WALLS[room.name]]
        middle = [(m, False) for m in IN_THE_MIDDLE[room.name]]
        for maker, at_wall in wanted[:2] + middle + wanted[2:]:
            thing = maker(rng)
            for _ in range(24):
                place = _at_wall if at_wall else _in_the_middle
                candidate = place(thing, number, room, rng)
                if candidate is None or not _fits(candidate, plan, placed):
                    continue
                after = floor.covered(candidate.rect)
                if _walkable(after, plan):
                    placed.append(candidate)
                    floor = after
                    break
        placed += _rug(number, room, placed, rng)
        placed += _lamp(number, room, rng)
    return placed + _pictures(plan, placed, rng)


def _at_wall(thing: Furniture, number: int, room: Room, rng: np.random.Generator) -> Placed | None:
    """A position with the back against a wall of the room, often in a corner."""
    side = int(rng.integers(4))
    x0, y0, x1, y1 = room.rect
    w, d, _ = thing.size
    length = x1 - x0 if side % 2 == 0 else y1 - y0
    spare = length / 2 - w / 2 - GAP
    if spare < 0:
        return None
    along = rng.uniform(-spare, spare)
    if rng.random() < 0.4:
        along = spare * rng.choice([-1, 1])
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    back = d / 2 + GAP
    # At side 0, the low y wall, the front faces +y. Each further side is a quarter turn.
    x, y = (
        (cx + along, y0 + back), (x1 - back, cy + along),
        (cx - along, y1 - back), (x0 + back, cy - along),
    )[side]  # fmt: skip
    return Placed(thing, number, side * np.pi / 2, (x, y, 0.0))


def _in_the_middle(
    thing: Furniture, number: int, room: Room, rng: np.random.Generator
) -> Placed | None:
    x0, y0, x1, y1 = room.rect
    reach = max(thing.size[:2]) / 2 + 0.3
    if x1 - x0 < 2 * reach or y1 - y0 < 2 * reach:
        return None
    x, y = rng.uniform((x0 + reach, y0 + reach), (x1 - reach, y1 - reach))
    return Placed(thing, number, float(rng.integers(4)) * np.pi / 2, (x, y, 0.0))


def _fits(candidate: Placed, plan: Plan, placed: list[Placed]) -> bool:
    """Whether it is clear of other objects, doorways and, if high, windows."""
    if any(_overlap(candidate.rect, p.rect, 0.06) for p in placed if p.furniture.blocks):
        return False
    if any(_overlap(candidate.rect, _reach(door, 1.0), 0.1) for door in plan.doors):
        return False
    high = candidate.furniture.size[2] > 0.85
    return not (high and any(_overlap(candidate.rect, _reach(w, 0.3), 0.02) for w in plan.windows))


def _walkable(floor: FloorMap, plan: Plan) -> bool:
    """Whether a walker can pass every doorway."""
    regions, _ = ndimage.label(floor.clearance() > WALK - 0.06, structure=np.ones((3, 3)))
    numbers = set()
    for door in plan.doors:
        middle = np.array([(door.rect[0] + door.rect[2]) / 2, (door.rect[1] + door.rect[3]) / 2])
        for side in (-0.5, 0.0, 0.5):
            at = middle.copy()
            at[door.axis] += side
            i, j = ((at - floor.low) / CELL).astype(int)
            # A doorway's middle may be next to the only row of cells that keeps the distance.
            numbers.add(int(regions[i - 1 : i + 2, j - 1 : j + 2].max()))
    return len(numbers) == 1 and 0 not in numbers


def _rug(number: int, room: Room, placed: list[Placed], rng: np.random.Generator) -> list[Placed]:
    """A rug under the middle of the room, inside its walls and clear of tall legs' edges."""
    if room.name == "kitchen":
        return []
    x0, y0, x1, y1 = room.rect
    w, d = min(2.2, x1 - x0 - 1.0), min(1.5, y1 - y0 - 1.0)
    tables = [p for p in placed if p.room == number and p.furniture.name == "coffee table"]
    x, y = tables[0].position[:2] if tables else ((x0 + x1) / 2, (y0 + y1) / 2)
    x = float(np.clip(x, x0 + w / 2 + 0.1, x1 - w / 2 - 0.1))
    y = float(np.clip(y, y0 + d / 2 + 0.1, y1 - d / 2 - 0.1))
    return [Placed(make.rug_of(w, d, rng), number, 0.0, (x, y, 0.0))]


def _lamp(number: int, room: Room, rng: np.random.Generator) -> list[Placed]:
    x0, y0, x1, y1 = room.rect
    return [Placed(make.ceiling_lamp(rng), number, 0.0, ((x0 + x1) / 2, (y0 + y1) / 2, 0.0))]


def _pictures(plan: Plan, placed: list[Placed], rng: np.random.Generator) -> list[Placed]:
    """Pictures on bare walls, some over low furniture."""
    hung: list[Placed] = []
    tall = [p for p in placed if p.furniture.size[2] > 1.0 and p.furniture.blocks]
    for number, room in enumerate(plan.rooms):
        for _ in range(14):
            thing = make.wall_picture(rng)
            spot = _at_wall(thing, number, room, rng)
            if spot is None:
                continue
            # Its back is three millimetres in front of the wall.
            front = np.array([-np.sin(spot.yaw), np.cos(spot.yaw)])
            x, y = np.array(spot.position[:2]) - front * (GAP - 0.003)
            spot = Placed(thing, number, spot.yaw, (x, y, rng.uniform(1.45, 1.6)))
            others = [p.rect for p in tall + hung]
            openings = [_reach(o, 0.1) for o in (*plan.doors, *plan.windows)]
            if not any(_overlap(spot.rect, r, 0.15) for r in others + openings):
                hung.append(spot)
    return hung


def _reach(opening: Opening, by: float) -> Rect:
    """An opening's rectangle, extended on both sides of the wall."""
    x, y = (by, 0.0) if opening.axis == 0 else (0.0, by)
    r = opening.rect
    return r[0] - x, r[1] - y, r[2] + x, r[3] + y


def _overlap(a: Rect, b: Rect, margin: float) -> bool:
    return (
        a[0] < b[2] + margin and b[0] < a[2] + margin
        and a[1] < b[3] + margin and b[1] < a[3] + margin
    )  # fmt: skip
