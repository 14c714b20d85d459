"""Pieces of furniture as solids: x across, y from the back to the front, z up from the floor.

Touching parts overlap slightly, and feet extend slightly into the floor, so that no two faces
coincide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occgen_hub.sample.house import HEIGHT, Piece
from occgen_hub.sample.materials import Colour, Material
from occgen_hub.sample.mesh import Mesh, box, cylinder, ellipsoid, join, turned

SUNK = -0.01  # where feet end, metres
Rng = np.random.Generator

OAK = Material("wood", (0.72, 0.53, 0.34), (0.56, 0.38, 0.22))
WALNUT = Material("wood", (0.45, 0.3, 0.2), (0.31, 0.2, 0.13))
WHITE = Material("wood", (0.88, 0.86, 0.82), (0.8, 0.77, 0.72))
METAL = Material("plain", (0.34, 0.35, 0.37))
STEEL = Material("plain", (0.68, 0.69, 0.7))
CLOTHS: tuple[tuple[Colour, Colour], ...] = (
    ((0.32, 0.43, 0.52), (0.24, 0.33, 0.42)),
    ((0.62, 0.3, 0.25), (0.5, 0.22, 0.19)),
    ((0.45, 0.5, 0.36), (0.36, 0.41, 0.29)),
    ((0.75, 0.68, 0.56), (0.63, 0.56, 0.45)),
    ((0.45, 0.38, 0.5), (0.36, 0.3, 0.42)),
)

FRONTS: tuple[tuple[Colour, Colour], ...] = (
    ((0.82, 0.79, 0.7), (0.74, 0.71, 0.62)),
    ((0.36, 0.46, 0.5), (0.29, 0.38, 0.42)),
    ((0.5, 0.56, 0.45), (0.42, 0.48, 0.37)),
    ((0.7, 0.5, 0.32), (0.57, 0.39, 0.23)),
)


CLASSES = {
    "sofa": "sofa", "armchair": "chair", "coffee table": "table", "dining table": "table",
    "bookcase": "bookshelf", "television": "cabinet", "bed": "bed", "nightstand": "cabinet",
    "wardrobe": "cabinet", "desk": "table", "kitchen counter": "counter", "fridge": "refrigerator",
    "floor lamp": "lamp", "potted plant": "plant", "boxes": "objects", "rug": "rug",
    "picture": "picture", "ceiling lamp": "lamp",
}  # fmt: skip
"""The class of furniture in the taxonomy "sample", by its name."""

OTHER_CLASSES = {
    "coffee table": dict.fromkeys((1, 2, 3, 4), "objects"),
    "dining table": {1: "chair", **dict.fromkeys((2, 3, 4, 5), "objects")},
    "television": {2: "television", 3: "television"},
    "nightstand": {2: "lamp", 3: "lamp"},
    "desk": {2: "objects", 3: "chair", 4: "television"},
    "kitchen counter": {5: "objects"},
}
"""The classes of pieces that differ from the class of the furniture, by their positions."""


@dataclass(frozen=True)
class Furniture:
    """A piece of furniture. The centre of its footprint is at the origin."""

    name: str
    size: tuple[float, float, float]  # across, deep, high; metres
    pieces: tuple[Piece, ...]
    blocks: bool = True  # False for what one walks over or under

    def classes(self) -> list[str]:
        """The class of each piece."""
        others = OTHER_CLASSES.get(self.name, {})
        return [others.get(n, CLASSES[self.name]) for n in range(len(self.pieces))]


def sofa(rng: Rng) -> Furniture:
    """Two or three seats."""
    n = int(rng.integers(2, 4))
    w, d = 0.68 * n + 0.36, 0.9
    cloth = _cloth(rng, 0.16)
    body = [
        box((-w / 2 + 0.02, -d / 2 + 0.05, 0.1), (w / 2 - 0.02, d / 2 - 0.03, 0.32)),
        box((-w / 2 + 0.16, -d / 2, 0.13), (w / 2 - 0.16, -d / 2 + 0.2, 0.8)),
        box((-w / 2, -d / 2 + 0.02, 0.12), (-w / 2 + 0.18, d / 2, 0.6)),
        box((w / 2 - 0.18, -d / 2 + 0.02, 0.12), (w / 2, d / 2, 0.6)),
    ]
    x = (np.arange(n) - (n - 1) / 2) * 0.68
    seats = [ellipsoid((a, 0.1, 0.38), (0.335, 0.36, 0.1), 0.35) for a in x]
    backs = [ellipsoid((a, -0.18, 0.62), (0.32, 0.12, 0.24), 0.45) for a in x]
    pillow = ellipsoid((x[0], 0.0, 0.6), (0.2, 0.08, 0.17), 0.5)
    legs = _legs(w - 0.2, d - 0.2, 0.14, 0.05)
    return _furniture(
        "sofa", (w, d, 0.86),
        (join(body), cloth), (join(seats + backs), cloth), (pillow, _cloth(rng, 0.06)),
        (legs, WALNUT),
    )  # fmt: skip


def armchair(rng: Rng) -> Furniture:
    """One deep seat."""
    cloth = _cloth(rng, 0.12)
    body = [
        box((-0.38, -0.36, 0.12), (0.38, 0.36, 0.34)),
        box((-0.3, -0.4, 0.15), (0.3, -0.24, 0.86)),
        box((-0.42, -0.38, 0.14), (-0.28, 0.38, 0.58)),
        box((0.28, -0.38, 0.14), (0.42, 0.38, 0.58)),
    ]
    cushions = [
        ellipsoid((0, 0.08, 0.4), (0.29, 0.3, 0.1), 0.35),
        ellipsoid((0, -0.2, 0.66), (0.26, 0.11, 0.24), 0.45),
    ]
    legs = _legs(0.66, 0.62, 0.16, 0.05)
    return _furniture(
        "armchair", (0.84, 0.8, 0.9), (join(body), cloth), (join(cushions), cloth), (legs, OAK)
    )


def coffee_table(rng: Rng) -> Furniture:
    """Low, with a vase, books and a bowl on it."""
    w, d, h = rng.uniform(0.9, 1.15), 0.56, 0.42
    top = box((-w / 2, -d / 2, h - 0.045), (w / 2, d / 2, h))
    shelf = box((-w / 2 + 0.045, -d / 2 + 0.045, 0.13), (w / 2 - 0.045, d / 2 - 0.045, 0.155))
    legs = _legs(w - 0.1, d - 0.1, h - 0.03, 0.055)
    stack = [box((-w * 0.36, -0.12, h - 0.005), (-w * 0.36 + 0.24, 0.06, h + 0.045))]
    stack.append(box((-w * 0.35, -0.1, h + 0.04), (-w * 0.35 + 0.2, 0.05, h + 0.075)))
    bowl = turned([(0.05, h - 0.005), (0.12, h + 0.07), (0.105, h + 0.07)], (w * 0.1, 0.08))
    return _furniture(
        "coffee table", (w, d, h + 0.3), (join([top, legs, shelf]), _wood(rng)),
        (join(stack), Material("books", second=(0.9, 0.88, 0.8), seed=_seed(rng))),
        (bowl, Material("plain", (0.75, 0.5, 0.3))), *_vase(rng, (w * 0.33, -0.07), h),
    )  # fmt: skip


def dining_table(rng: Rng) -> Furniture:
    """A table with a chair at each long side's places and a fruit bowl."""
    w, d, h = rng.uniform(1.25, 1.45), 0.82, 0.75
    timber = _wood(rng)
    top = box((-w / 2, -d / 2, h - 0.04), (w / 2, d / 2, h))
    apron = box((-w / 2 + 0.08, -d / 2 + 0.08, h - 0.12), (w / 2 - 0.08, d / 2 - 0.08, h - 0.03))
    legs = _legs(w - 0.14, d - 0.14, h - 0.02, 0.065)
    chairs = [
        _chair(timber).moved(yaw, (x, y, 0))
        for x in (-w / 4, w / 4)
        for y, yaw in ((-0.62, 0.0), (0.62, np.pi))
    ]
    bowl = turned([(0.06, h - 0.005), (0.15, h + 0.08), (0.13, h + 0.08)])
    fruit = [ellipsoid((x, y, h + 0.1), (0.045,) * 3) for x, y in ((0.05, 0), (-0.04, 0.05))]
    return _furniture(
        "dining table", (w, 1.75, h + 0.15), (join([top, apron, legs]), timber),
        (join(chairs), timber), (bowl, STEEL),
        (join(fruit), Material("plain", (0.85, 0.45, 0.15))), *_vase(rng, (w * 0.3, 0.1), h),
    )  # fmt: skip


def bookcase(rng: Rng) -> Furniture:
    """Open shelves with books, boxes and vases."""
    w, d, h = rng.uniform(0.85, 1.2), 0.32, rng.uniform(1.6, 2.0)
    frame = [box((x, -d / 2, SUNK), (x + 0.03, d / 2, h)) for x in (-w / 2, w / 2 - 0.03)]
    frame.append(
        box((-w / 2 + 0.02, -d / 2 + 0.004, 0.01), (w / 2 - 0.02, -d / 2 + 0.03, h - 0.01))
    )
    levels = np.linspace(0.06, h - 0.04, 6)
    for z in levels:
        frame.append(
            box((-w / 2 + 0.02, -d / 2 + 0.015, z), (w / 2 - 0.02, d / 2 - 0.006, z + 0.03))
        )
    rows: list[Mesh] = []
    boxes: list[Mesh] = []
    for z in levels[:-1] + 0.025:
        x = -w / 2 + 0.04
        while x < w / 2 - 0.2:
            width, height = rng.uniform(0.1, 0.3), rng.uniform(0.17, 0.25)
            front = d / 2 - rng.uniform(0.03, 0.08)
            end = min(x + width, w / 2 - 0.04)
            item = box((x, -d / 2 + 0.025, z), (end, front, z + height))
            (boxes if not boxes or rng.random() < 0.2 else rows).append(item)
            x = end + rng.choice([0.006, 0.05])
    return _furniture(
        "bookcase", (w, d, h), (join(frame), _wood(rng)),
        (join(rows), Material("books", second=(0.92, 0.86, 0.66), seed=_seed(rng))),
        (join(boxes), _cloth(rng, 0.05)),
    )  # fmt: skip


def sideboard(rng: Rng) -> Furniture:
    """A low cabinet with doors and a television on it."""
    w, d, h = rng.uniform(1.3, 1.6), 0.42, 0.5
    body = box((-w / 2, -d / 2, 0.08), (w / 2, d / 2 - 0.02, h))
    doors = [
        box((x + 0.015, d / 2 - 0.03, 0.11), (x + w / 3 - 0.015, d / 2, h - 0.03))
        for x in (-w / 2, -w / 6, w / 6)
    ]
    base = box((-w / 2 + 0.05, -d / 2 + 0.05, SUNK), (w / 2 - 0.05, d / 2 - 0.07, 0.1))
    stand = join([
        box((-0.16, -0.12, h - 0.005), (0.16, 0.08, h + 0.02)),
        box((-0.05, -0.05, h + 0.01), (0.05, -0.01, h + 0.12)),
    ])  # fmt: skip
    tv = box((-0.5, -0.055, h + 0.08), (0.5, -0.015, h + 0.68))
    area = (-0.5, h + 0.08, 0.5, h + 0.68)
    timber = _wood(rng)
    lighter = Material("wood", timber.second, timber.colour, seed=_seed(rng))
    return _furniture(
        "television", (w, d, h + 0.7), (join([body, base]), timber), (join(doors), lighter),
        (stand, METAL), (tv, Material("screen", (0.07, 0.08, 0.1), (0.3, 0.45, 0.6), area=area)),
    )  # fmt: skip


def bed(rng: Rng) -> Furniture:
    """A double bed with a headboard, a duvet and pillows."""
    w, d = 1.5, 2.1
    frame = [
        box((-w / 2, -d / 2 + 0.03, 0.14), (w / 2, d / 2, 0.3)),
        box((-w / 2 - 0.03, -d / 2, SUNK), (w / 2 + 0.03, -d / 2 + 0.05, 1.0)),
    ]
    legs = _legs(w - 0.12, d - 0.2, 0.18, 0.07)
    mattress = ellipsoid((0, 0.03, 0.38), (w / 2 - 0.02, d / 2 - 0.06, 0.15), 0.2, 32)
    duvet = ellipsoid((0, 0.33, 0.43), (w / 2 + 0.03, d / 2 - 0.32, 0.17), 0.2, 32)
    pillows = [ellipsoid((x, -0.73, 0.56), (0.3, 0.2, 0.09), 0.55) for x in (-0.36, 0.36)]
    white = Material("fabric", (0.9, 0.89, 0.86), (0.8, 0.8, 0.8), 0.07)
    return _furniture(
        "bed", (w + 0.06, d, 1.0), (join([*frame, legs]), _wood(rng)), (mattress, white),
        (duvet, _cloth(rng, 0.22)), (join(pillows), white),
    )  # fmt: skip


def nightstand(rng: Rng) -> Furniture:
    """A small cabinet with a lamp."""
    body = box((-0.22, -0.2, 0.1), (0.22, 0.19, 0.5))
    drawers = [box((-0.2, 0.18, z), (0.2, 0.205, z + 0.16)) for z in (0.12, 0.31)]
    legs = _legs(0.34, 0.3, 0.13, 0.05)
    lamp = join([cylinder(0.07, 0.495, 0.52), cylinder(0.02, 0.51, 0.72)])
    shade = turned([(0.14, 0.7), (0.09, 0.9)])
    return _furniture(
        "nightstand", (0.44, 0.42, 0.92), (join([body, legs]), _wood(rng)),
        (join(drawers), WHITE), (lamp, METAL), (shade, Material("glow", (0.97, 0.9, 0.74))),
    )  # fmt: skip


def wardrobe(rng: Rng) -> Furniture:
    """Tall, with panelled doors and knobs."""
    n = int(rng.integers(2, 4))
    w, d, h = 0.5 * n, 0.58, 2.05
    body = box((-w / 2, -d / 2, SUNK), (w / 2, d / 2 - 0.03, h))
    doors, panels, knobs = [], [], []
    for i in range(n):
        a = -w / 2 + 0.5 * i
        doors.append(box((a + 0.01, d / 2 - 0.04, 0.1), (a + 0.49, d / 2 - 0.008, h - 0.05)))
        panels += [
            box((a + 0.09, d / 2 - 0.02, z0), (a + 0.41, d / 2, z1))
            for z0, z1 in ((0.2, 0.9), (1.0, h - 0.15))
        ]
        knobs.append(ellipsoid((a + 0.45, d / 2 + 0.012, 1.0), (0.02,) * 3, n=10))
    timber = _wood(rng)
    lighter = Material("wood", timber.second, timber.colour, seed=_seed(rng))
    return _furniture(
        "wardrobe", (w, d + 0.03, h), (join([body, *doors]), timber), (join(panels), lighter),
        (join(knobs), METAL),
    )  # fmt: skip


def desk(rng: Rng) -> Furniture:
    """A desk with a monitor, a keyboard and a chair pushed up to it."""
    w, h = rng.uniform(1.2, 1.5), 0.74
    back, front = -0.6, 0.08
    timber = _wood(rng)
    parts = [
        box((-w / 2, back, h - 0.035), (w / 2, front, h)),
        box((w / 2 - 0.4, back + 0.05, 0.05), (w / 2 - 0.04, front - 0.05, h - 0.03)),
        box((w / 2 - 0.37, back + 0.08, SUNK), (w / 2 - 0.07, front - 0.08, 0.06)),
        box((-w / 2 + 0.03, back + 0.03, SUNK), (-w / 2 + 0.07, front - 0.03, h - 0.03)),
    ]
    drawers = [
        box((w / 2 - 0.38, front - 0.06, z), (w / 2 - 0.06, front - 0.035, z + 0.19))
        for z in (0.07, 0.28, 0.49)
    ]
    stand = join([
        box((-0.3, back + 0.12, h - 0.005), (-0.05, back + 0.3, h + 0.015)),
        box((-0.2, back + 0.18, h + 0.01), (-0.15, back + 0.22, h + 0.2)),
    ])  # fmt: skip
    area = (-0.45, h + 0.12, 0.1, h + 0.46)
    monitor = box((-0.45, back + 0.21, h + 0.12), (0.1, back + 0.245, h + 0.46))
    keys = box((-0.4, back + 0.42, h - 0.005), (0.02, back + 0.56, h + 0.02))
    chair = _chair(METAL).moved(np.pi, (-0.15, 0.25, 0))
    return _furniture(
        "desk", (w, 1.2, h + 0.5), (join(parts), timber), (join(drawers), WHITE),
        (join([stand, keys]), METAL), (chair, _cloth(rng, 0.06)),
        (monitor, Material("screen", (0.1, 0.11, 0.13), (0.75, 0.8, 0.85), area=area)),
    )  # fmt: skip


def kitchen_counter(rng: Rng) -> Furniture:
    """Cabinets under a worktop with a hob, a pot and a kettle; cupboards above."""
    n = int(rng.integers(3, 5))
    w, d, h = 0.6 * n, 0.62, 0.9
    body = box((-w / 2, -d / 2, 0.1), (w / 2, d / 2 - 0.04, h - 0.03))
    plinth = box((-w / 2 + 0.02, -d / 2 + 0.02, SUNK), (w / 2 - 0.02, d / 2 - 0.1, 0.12))
    top = box((-w / 2 - 0.01, -d / 2 - 0.005, h - 0.04), (w / 2 + 0.01, d / 2, h))
    doors, handles = [], []
    for i in range(n):
        a = -w / 2 + 0.6 * i
        doors.append(box((a + 0.008, d / 2 - 0.05, 0.13), (a + 0.592, d / 2 - 0.02, h - 0.06)))
        doors.append(box((a + 0.008, -0.005, 1.42), (a + 0.592, 0.02, 2.08)))
        handles.append(box((a + 0.2, d / 2 - 0.03, h - 0.15), (a + 0.4, d / 2 + 0.005, h - 0.12)))
        handles.append(box((a + 0.2, 0.01, 1.46), (a + 0.4, 0.045, 1.49)))
    upper = box((-w / 2, -d / 2, 1.4), (w / 2, 0.0, 2.1))
    hob = box((-w / 2 + 0.1, -0.2, h - 0.005), (-w / 2 + 0.62, 0.22, h + 0.008))
    at = (-w / 2 + 0.25, 0.0)
    pot = [cylinder(0.11, h + 0.004, h + 0.15, at), cylinder(0.115, h + 0.14, h + 0.165, at)]
    kettle = turned([(0.09, h - 0.005), (0.1, h + 0.06), (0.05, h + 0.2)], (w / 2 - 0.25, -0.05))
    jars = [cylinder(0.05, h - 0.005, h + 0.16, (x, -0.15)) for x in (0.05, 0.2, 0.35)]
    front = Material("wood", *FRONTS[int(rng.integers(len(FRONTS)))], seed=_seed(rng))
    stone = Material("tiles", (0.3, 0.3, 0.32), (0.34, 0.34, 0.35), 0.3)
    return _furniture(
        "kitchen counter", (w + 0.02, d + 0.02, 2.1), (join([body, plinth, upper]), WHITE),
        (join(doors), front), (top, stone), (join([*handles, *pot, kettle]), STEEL),
        (hob, METAL), (join(jars), Material("plain", (0.8, 0.6, 0.42))),
    )  # fmt: skip


def fridge(rng: Rng) -> Furniture:
    """Two doors, and notes stuck to it."""
    body = box((-0.3, -0.31, SUNK), (0.3, 0.26, 1.8))
    doors = [box((-0.295, 0.25, z0), (0.295, 0.31, z1)) for z0, z1 in ((0.06, 0.62), (0.635, 1.79))]
    handles = [box((-0.26, 0.3, z0), (-0.225, 0.34, z1)) for z0, z1 in ((0.4, 0.58), (0.7, 1.1))]
    note = box((0.02, 0.3, 1.2), (0.2, 0.316, 1.45))
    area = (0.02, 1.2, 0.2, 1.45)
    art = Material("picture", (0.9, 0.85, 0.6), (0.5, 0.7, 0.9), seed=_seed(rng), area=area)
    return _furniture(
        "fridge", (0.6, 0.66, 1.8), (join([body, *doors]), Material("plain", (0.82, 0.83, 0.84))),
        (join(handles), METAL), (note, art),
    )  # fmt: skip


def floor_lamp(rng: Rng) -> Furniture:
    """A pole with a shade."""
    pole = join([cylinder(0.15, SUNK, 0.03), cylinder(0.018, 0.02, 1.5)])
    shade = turned([(0.2, 1.4), (0.13, 1.68)])
    return _furniture(
        "floor lamp", (0.4, 0.4, 1.7), (pole, METAL), (shade, Material("glow", (0.98, 0.9, 0.72)))
    )


def plant(rng: Rng) -> Furniture:
    """A pot with a stem and leaves."""
    pot = turned([(0.12, SUNK), (0.17, 0.3), (0.19, 0.3), (0.19, 0.35), (0.16, 0.35)])
    stems = [cylinder(0.02, 0.3, 0.9)]
    leaves = []
    for i in range(14):
        angle, z = i * 2.4, 0.6 + 0.05 * i + rng.uniform(-0.03, 0.03)
        one = ellipsoid((0.12, 0, 0), (0.13, 0.06, 0.035), n=12).moved(0, (0, 0, z))
        leaves.append(one.moved(angle, (0, 0, 0)))
    clay = Material("plain", (0.7, 0.42, 0.3))
    green = Material("leaf", (0.25, 0.45, 0.2), seed=_seed(rng))
    return _furniture(
        "potted plant", (0.5, 0.5, 1.3), (pot, clay), (join(stems), WALNUT), (join(leaves), green)
    )


def boxes(rng: Rng) -> Furniture:
    """Two cardboard boxes, one on the other."""
    lower = box((-0.25, -0.2, SUNK), (0.25, 0.2, 0.34))
    upper = box((-0.17, -0.14, 0.335), (0.17, 0.14, 0.58)).moved(rng.uniform(-0.3, 0.3), (0, 0, 0))
    card = Material("wood", (0.72, 0.56, 0.4), (0.66, 0.5, 0.35))
    area = (-0.3, 0.0, 0.3, 0.6)
    printed = Material("picture", (0.72, 0.55, 0.38), (0.66, 0.5, 0.34), 0.1, _seed(rng), area)
    return _furniture("boxes", (0.5, 0.42, 0.58), (lower, card), (upper, printed))


def rug_of(width: float, depth: float, rng: Rng) -> Furniture:
    """A thin rug to lie under other things."""
    mat = box((-width / 2, -depth / 2, SUNK / 2), (width / 2, depth / 2, 0.012))
    a, b = CLOTHS[int(rng.integers(len(CLOTHS)))][0], CLOTHS[int(rng.integers(len(CLOTHS)))][0]
    pale = (min(a[0] + 0.3, 1.0), min(a[1] + 0.3, 1.0), min(a[2] + 0.25, 1.0))
    area = (-width / 2, -depth / 2, width / 2, depth / 2)
    material = Material("rug", pale, b, float(rng.uniform(0.05, 0.12)), _seed(rng), area)
    return Furniture("rug", (width, depth, 0.012), ((mat, material),), blocks=False)


def wall_picture(rng: Rng) -> Furniture:
    """A framed painting whose middle is at z = 0; its back is at the wall."""
    w, h = rng.uniform(0.5, 1.0), rng.uniform(0.45, 0.75)
    canvas = box((-w / 2, -0.018, -h / 2), (w / 2, 0.004, h / 2))
    bars = [
        box((-w / 2 - 0.03, -0.02, s - 0.03), (w / 2 + 0.03, 0.018, s + 0.03))
        for s in (-h / 2, h / 2)
    ]
    bars += [
        box((s - 0.03, -0.019, -h / 2 + 0.02), (s + 0.03, 0.016, h / 2 - 0.02))
        for s in (-w / 2, w / 2)
    ]
    colours = rng.uniform(0.4, 0.95, (2, 3))
    material = Material(
        "picture", tuple(colours[0].tolist()), tuple(colours[1].tolist()), 0.1, _seed(rng),
        (-w / 2, -h / 2, w / 2, h / 2),
    )  # fmt: skip
    return Furniture(
        "picture", (w + 0.06, 0.04, h + 0.06), ((canvas, material), (join(bars), _wood(rng))), False
    )


def ceiling_lamp(rng: Rng) -> Furniture:
    """A pendant. Its light source is just below it."""
    cord = join([cylinder(0.06, HEIGHT - 0.03, HEIGHT + 0.01), cylinder(0.016, 2.3, HEIGHT)])
    shade = turned([(0.19, 2.15), (0.17, 2.22), (0.07, 2.32)])
    glow = Material("glow", (0.98, 0.94, 0.84))
    return Furniture("ceiling lamp", (0.4, 0.4, HEIGHT), ((cord, METAL), (shade, glow)), False)


def _furniture(name: str, size: tuple[float, float, float], *pieces: Piece) -> Furniture:
    return Furniture(name, size, pieces)


def _legs(w: float, d: float, top: float, thick: float) -> Mesh:
    """Four upright legs whose middles span w by d."""
    t = thick / 2
    return join([
        box((x - t, y - t, SUNK), (x + t, y + t, top))
        for x in (-w / 2, w / 2) for y in (-d / 2, d / 2)
    ])  # fmt: skip


def _chair(_: Material) -> Mesh:
    """A chair that looks along +y."""
    backrest = [box((-0.19, -0.215, z), (0.19, -0.185, z + 0.1)) for z in (0.58, 0.76)]
    posts = [box((x - 0.02, -0.22, 0.42), (x + 0.02, -0.18, 0.9)) for x in (-0.18, 0.18)]
    seat = box((-0.21, -0.21, 0.43), (0.21, 0.21, 0.465))
    return join([_legs(0.36, 0.36, 0.44, 0.045), seat, *posts, *backrest])


def _vase(rng: Rng, at: tuple[float, float], z: float) -> list[Piece]:
    """A vase with a bunch in it, standing at height z."""
    outline = [(0.04, z - 0.005), (0.06, z + 0.05), (0.03, z + 0.13), (0.04, z + 0.16)]
    flowers = [
        ellipsoid((at[0] + dx, at[1] + dy, z + 0.22 + dz), (0.05, 0.05, 0.05), n=10)
        for dx, dy, dz in ((0, 0, 0.02), (0.05, 0.02, 0), (-0.03, 0.05, -0.01), (-0.02, -0.05, 0))
    ]
    hue = rng.uniform(0.3, 0.9, 3)
    petals = Material("leaf", tuple(hue.tolist()), seed=_seed(rng))
    return [(turned(outline, at), Material("plain", (0.4, 0.55, 0.65))), (join(flowers), petals)]


def _wood(rng: Rng) -> Material:
    base = (OAK, WALNUT, WHITE)[int(rng.integers(3))]
    return Material("wood", base.colour, base.second, seed=_seed(rng))


def _cloth(rng: Rng, scale: float) -> Material:
    return Material("fabric", *CLOTHS[int(rng.integers(len(CLOTHS)))], scale, _seed(rng))


def _seed(rng: Rng) -> int:
    return int(rng.integers(1 << 16))
