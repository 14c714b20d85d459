"""A person made of capsules: a mesh that walks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from occgen_hub.sample.materials import Array
from occgen_hub.sample.mesh import Floats, Ints, yaw_matrix

AROUND = 16  # vertices about a capsule
RINGS = 4  # of each half sphere, the equator included
STRIDE = 1.35  # metres: two steps
THIGH, SHANK, UPPER_ARM, LOWER_ARM = 0.42, 0.40, 0.28, 0.26  # metres
RADII = {
    "head": 0.1, "torso": 0.145, "upper arm": 0.048, "lower arm": 0.04, "thigh": 0.078,
    "shank": 0.055, "foot": 0.042,
}  # fmt: skip
SKIN = ((0.87, 0.68, 0.56), (0.72, 0.52, 0.4), (0.45, 0.31, 0.23))
SHIRTS = ((0.75, 0.2, 0.2), (0.2, 0.35, 0.7), (0.25, 0.5, 0.3), (0.85, 0.75, 0.4))
TROUSERS = ((0.18, 0.2, 0.3), (0.35, 0.33, 0.3), (0.28, 0.22, 0.17))
SHOES = (0.15, 0.13, 0.12)


@dataclass(frozen=True)
class PosedMesh:
    """A triangle mesh at one moment, in the house's frame."""

    vertices: Array  # (V, 3) metres
    normals: Array  # (V, 3) unit length
    colours: Array  # (V, 3), 0 to 1
    faces: NDArray[np.int32]  # (F, 3), counter-clockwise seen from outside
    labels: NDArray[np.int32]  # (F,): which person, from 0


class Figure:
    """A person about 1.7 m tall. Body axes: x ahead, y left, z up, the floor at z = 0."""

    def __init__(self, rng: np.random.Generator) -> None:
        """A person of random height and clothes."""
        self.size = float(rng.uniform(0.95, 1.04))
        skin, shirt, trousers = (c[rng.integers(len(c))] for c in (SKIN, SHIRTS, TROUSERS))
        worn = {
            "head": skin, "torso": shirt, "upper arm": shirt, "lower arm": skin,
            "thigh": trousers, "shank": trousers, "foot": SHOES,
        }  # fmt: skip
        self.names = [name for name, _, _ in _joints(0.0, 0.0)]
        end, direction, self._capsule = _capsule()
        self._end, self._direction = end, direction
        n = len(end)
        self.faces: Ints = np.concatenate([self._capsule + i * n for i in range(len(self.names))])
        plain = np.repeat([worn[name] for name in self.names], n, axis=0)
        # Some unevenness, so that clothes have a texture.
        self.colours = plain * rng.uniform(0.8, 1.2, (len(plain), 1))

    def posed(
        self, xy: Floats, heading: float, phase: float, effort: float
    ) -> tuple[Floats, Floats]:
        """Vertices (V, 3), metres, and normals (V, 3) of the figure in the house's frame.

        Args:
            xy: (2,) metres, its position.
            heading: radians, its direction.
            phase: radians, the phase of its stride.
            effort: from 0, standing, to 1, walking.
        """
        points, normals = [], []
        for name, a, b in _joints(phase, effort):
            R = _turn_to(b - a)
            normal = self._direction @ R.T
            points.append(a + self._end[:, None] * (b - a) + RADII[name] * normal)
            normals.append(normal)
        vertices = self.size * np.concatenate(points)
        vertices[:, 2] -= vertices[:, 2].min()
        R = yaw_matrix(heading)
        return vertices @ R.T + [*xy, 0.0], np.concatenate(normals) @ R.T


@dataclass(frozen=True)
class Stroll:
    """The position and motion of a figure in each frame, in the house's frame."""

    figure: Figure
    xy: Floats  # (T, 2) metres
    heading: Floats  # (T,) radians
    phase: Floats  # (T,) radians
    effort: Floats  # (T,), 0 standing to 1 walking


@dataclass(frozen=True)
class People:
    """The people of an episode."""

    strolls: tuple[Stroll, ...]

    @cached_property
    def faces(self) -> NDArray[np.int32]:
        """Triangles (F, 3) of all people, the same in each frame."""
        starts = np.cumsum([0, *(len(s.figure.colours) for s in self.strolls)])
        parts = [s.figure.faces + start for s, start in zip(self.strolls, starts, strict=False)]
        return np.asarray(np.concatenate([np.zeros((0, 3), np.int64), *parts]), np.int32)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """The person (F,) of each triangle, from 0."""
        counts = [len(s.figure.faces) for s in self.strolls]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    @cached_property
    def colours(self) -> Array:
        """Colours (V, 3) of the vertices, 0 to 1."""
        parts = [s.figure.colours for s in self.strolls]
        return np.concatenate([np.zeros((0, 3)), *parts]).astype(np.float32)

    def at(self, frame: int) -> PosedMesh:
        """All people in a frame."""
        posed = [
            s.figure.posed(s.xy[frame], s.heading[frame], s.phase[frame], s.effort[frame])
            for s in self.strolls
        ]
        vertices, normals = (
            np.concatenate([np.zeros((0, 3)), *part]).astype(np.float32)
            for part in (zip(*posed, strict=True) if posed else ((), ()))
        )
        return PosedMesh(vertices, normals, self.colours, self.faces, self.labels)


def _joints(phase: float, effort: float) -> list[tuple[str, Floats, Floats]]:
    """The axis of each capsule, from a to b, in the body's axes. Feet may be above the floor."""
    out = [
        ("head", np.array([0.0, 0, 1.56]), np.array([0.0, 0, 1.6])),
        ("torso", np.array([0.0, 0, 0.98]), np.array([0.0, 0, 1.32])),
    ]
    for side, shift in ((1, 0.0), (-1, np.pi)):
        swing = np.sin(phase + shift)
        hip = np.array([0, side * 0.09, 0.9])
        thigh = 0.42 * effort * swing
        # The knee bends while its leg swings ahead.
        shank = thigh - effort * (0.1 + 0.75 * max(0.0, np.cos(phase + shift)))
        knee = hip + THIGH * _limb_direction(thigh)
        ankle = knee + SHANK * _limb_direction(shank)
        tilt = min(0.0, 0.5 * shank)
        ahead = np.array([np.cos(tilt), 0, np.sin(tilt)])
        sole = ankle - [0, 0, 0.035]
        shoulder = np.array([0, side * 0.185, 1.38])
        arm = -0.38 * effort * swing
        elbow = shoulder + UPPER_ARM * _limb_direction(arm) + [0, side * 0.03, 0]
        hand = elbow + LOWER_ARM * _limb_direction(arm + 0.12 + 0.35 * effort)
        out += [
            ("thigh", hip, knee), ("shank", knee, ankle),
            ("foot", sole - 0.03 * ahead, sole + 0.15 * ahead),
            ("upper arm", shoulder, elbow), ("lower arm", elbow, hand),
        ]  # fmt: skip
    return out


def _limb_direction(angle: float) -> Floats:
    """The direction (3,) of a limb that hangs down and is swung ahead by `angle`, radians."""
    return np.array([np.sin(angle), 0, -np.cos(angle)])


def _turn_to(axis: Floats) -> Floats:
    """A rotation (3, 3) of z to the direction of `axis` (3,), in or near the x-z plane."""
    z = axis / np.linalg.norm(axis)
    x = np.cross([0.0, 1.0, 0.0], z)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z], axis=1)


def _capsule() -> tuple[Floats, Floats, Ints]:
    """A capsule's end (V,), 0 or 1, and outward direction (V, 3) of each vertex, and its faces."""
    lower = np.linspace(-np.pi / 2, 0, RINGS + 1)[1:]
    latitude = np.concatenate([lower, -lower[::-1]])
    angle = np.arange(AROUND) * 2 * np.pi / AROUND
    c, s = np.cos(latitude)[:, None], np.sin(latitude)[:, None]
    rows = np.stack(np.broadcast_arrays(c * np.cos(angle), c * np.sin(angle), s), -1)
    end = np.repeat([0.0, 1.0], RINGS * AROUND)
    direction = np.concatenate([rows.reshape(-1, 3), [[0, 0, -1], [0, 0, 1]]])
    i, j = np.meshgrid(np.arange(len(latitude) - 1), np.arange(AROUND), indexing="ij")
    a, b = (i * AROUND + j).ravel(), (i * AROUND + (j + 1) % AROUND).ravel()
    ring, after = np.arange(AROUND), (np.arange(AROUND) + 1) % AROUND
    last = (len(latitude) - 1) * AROUND
    bottom, top = np.full(AROUND, len(end)), np.full(AROUND, len(end) + 1)
    faces = np.concatenate(
        [
            np.stack([a, b, b + AROUND], 1), np.stack([a, b + AROUND, a + AROUND], 1),
            np.stack([bottom, after, ring], 1), np.stack([top, last + ring, last + after], 1),
        ]
    )  # fmt: skip
    return np.concatenate([end, [0.0, 1.0]]), direction, faces
