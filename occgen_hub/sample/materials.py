"""Procedural textures: the colour of a point from its position on its object."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Colour = tuple[float, float, float]

TEXEL = 0.0025  # metres
TILE = 1024  # texels: the noise repeats after 2.56 m


@dataclass(frozen=True)
class Material:
    """The material of a surface. Colours are in 0..1 as on screen."""

    kind: str
    colour: Colour = (0.8, 0.8, 0.8)
    second: Colour = (0.5, 0.5, 0.5)
    scale: float = 0.1  # metres: the width of a plank, a tile, a stripe
    seed: int = 0
    area: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # of a picture: u0, v0, u1, v1


@dataclass(frozen=True)
class Points:
    """N points of one material, and its properties."""

    u: Array  # metres along the surface; across for a wall
    v: Array  # metres along the surface; up for a wall
    blur: Array  # metres a pixel covers: detail finer than that fades
    colour: Array  # (1, 3)
    second: Array  # (1, 3)
    scale: Array  # (1,)
    seed: NDArray[np.uint32]  # (1,)
    area: Array  # (1, 4)


Texture = Callable[[Points], Array]


@cache
def noise_tile() -> Array:
    """Periodic cloud noise (TILE, TILE), mean 0, deviation 1."""
    rng = np.random.default_rng(20240)
    f = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None]) * TILE
    spectrum = np.fft.rfft2(rng.standard_normal((TILE, TILE))) / np.maximum(f, 3.0) ** 1.15
    spectrum[0, 0] = 0
    tile = np.fft.irfft2(spectrum, (TILE, TILE))
    return np.asarray(tile / tile.std(), np.float32)


def noise(u: Array, v: Array, seed: NDArray[np.uint32]) -> Array:
    """Cloud noise at (u, v) metres. The seed shifts it."""
    i = (np.floor(u / TEXEL).astype(np.int64) + seed * np.int64(379)) % TILE
    j = (np.floor(v / TEXEL).astype(np.int64) + seed * np.int64(613)) % TILE
    return np.asarray(noise_tile()[j, i])


def random_value(i: Array, j: Array, seed: NDArray[np.uint32]) -> Array:
    """A deterministic pseudo-random number in 0..1 for each cell (i, j)."""
    h = i.astype(np.int64).astype(np.uint32) * np.uint32(374761393)
    h += j.astype(np.int64).astype(np.uint32) * np.uint32(668265263)
    h += seed * np.uint32(2246822519)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(1274126177)
    h ^= h >> np.uint32(16)
    return (h >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def mix(a: Array, b: Array, share: Array) -> Array:
    """`a` with `share` (N,) of `b`, as (N, 3); either may be one colour (1, 3)."""
    return a + (b - a) * share[:, None]


def detail_visibility(p: Points, detail: float | NDArray[np.floating[Any]]) -> Array:
    """Visibility of detail of this size, metres: 1 nearby, 0 if a pixel covers it."""
    return np.clip(1.6 - p.blur / detail, 0, 1).astype(np.float32)


def plain(p: Points) -> Array:
    """One colour, faintly clouded."""
    return p.colour * (1 + 0.03 * noise(p.u, p.v, p.seed))[:, None]


def plaster(p: Points) -> Array:
    """A painted wall: faint brush clouds, wide and fine."""
    wide = noise(p.u * 0.4, p.v * 0.4, p.seed)
    fine = noise(p.u * 3, p.v * 3, p.seed) * detail_visibility(p, 0.01)
    return p.colour * (1 + 0.03 * wide + 0.025 * fine)[:, None]


def striped(p: Points) -> Array:
    """Wallpaper in upright stripes of two widths."""
    phase = (p.u / p.scale) % 1
    share = ((phase < 0.5) * 1.0 + ((phase > 0.68) & (phase < 0.74)) * 0.8).astype(np.float32)
    return mix(plaster(p), p.second, share * detail_visibility(p, p.scale / 4))


def damask(p: Points) -> Array:
    """Wallpaper with a flower in each lozenge."""
    row = np.floor(p.v / p.scale)
    x = (p.u / p.scale + 0.5 * (row % 2)) % 1 - 0.5
    y = (p.v / p.scale) % 1 - 0.5
    r, angle = np.hypot(x, y), np.arctan2(y, x)
    petal = r < 0.22 + 0.11 * np.cos(5 * angle)
    heart = r < 0.07
    share = (petal & ~heart).astype(np.float32) * detail_visibility(p, p.scale / 5)
    return mix(plaster(p), p.second, share * 0.85)


def planks(p: Points) -> Array:
    """Floor boards along u, with joints and grain."""
    row = np.floor(p.v / p.scale)
    along = p.u / 1.1 + random_value(row, row, p.seed)
    tone = random_value(np.floor(along), row, p.seed)
    grain = noise(p.u * 0.35, p.v * 3 + tone * 7, p.seed) * detail_visibility(p, 0.02)
    y, x = (p.v / p.scale) % 1, along % 1
    joint = (np.minimum(y, 1 - y) * p.scale < 0.002) | (np.minimum(x, 1 - x) * 1.1 < 0.002)
    base = mix(p.colour, p.second, tone)
    return np.asarray(
        base * (1 + 0.1 * grain - 0.45 * joint * detail_visibility(p, 0.012))[:, None], np.float32
    )


def tiles(p: Points) -> Array:
    """Square tiles in two tones with grout between, marbled."""
    i, j = np.floor(p.u / p.scale), np.floor(p.v / p.scale)
    x, y = (p.u / p.scale) % 1, (p.v / p.scale) % 1
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y)) * p.scale
    base = mix(p.colour, p.second, ((i + j) % 2).astype(np.float32))
    tone = 0.12 * (random_value(i, j, p.seed) - 0.5) + 0.05 * noise(p.u, p.v, p.seed)
    grout = (edge < 0.004) * detail_visibility(p, 0.02)
    return np.asarray(base * (1 + tone - 0.35 * grout)[:, None], np.float32)


def carpet(p: Points) -> Array:
    """Short pile, mottled in two tones."""
    pile = noise(p.u * 4, p.v * 4, p.seed) * detail_visibility(p, 0.012)
    patch = np.clip(0.5 + 0.4 * noise(p.u, p.v, p.seed + np.uint32(5)), 0, 1)
    return mix(p.colour, p.second, patch) * (1 + 0.09 * pile)[:, None]


def rug(p: Points) -> Array:
    """Stripes of many widths in the two colours and others between, with a woven border."""
    s, t = _in_area(p)
    stripe = np.floor(p.v / p.scale)
    pick = random_value(stripe, stripe, p.seed)
    third = random_value(stripe, stripe * 3, p.seed)
    colour = mix(p.colour, p.second, pick)
    colour = mix(colour, colour[:, [2, 0, 1]], (third > 0.6) * np.float32(0.7))
    zigzag = np.abs((p.u / 0.12) % 1 - 0.5) * 0.08 + (p.v % p.scale) < p.scale * 0.62
    colour = colour * (1 - 0.25 * zigzag * detail_visibility(p, 0.03))[:, None]
    border = np.minimum(np.minimum(s, 1 - s), np.minimum(t, 1 - t)) < 0.05
    return (
        mix(colour, p.second, border * np.float32(0.9))
        * (1 + 0.06 * noise(p.u * 4, p.v * 4, p.seed) * detail_visibility(p, 0.01))[:, None]
    )


def wood(p: Points) -> Array:
    """Grain along u."""
    grain = noise(p.u * 0.3, p.v * 3, p.seed)
    ring = np.sin((p.v + 0.02 * grain) * 140).astype(np.float32) * detail_visibility(p, 0.03)
    return mix(p.colour, p.second, np.clip(0.35 + 0.2 * grain + 0.15 * ring, 0, 1))


def fabric(p: Points) -> Array:
    """Cloth in a check of two tones, with a weave."""
    x, y = (p.u / p.scale) % 1 < 0.28, (p.v / p.scale) % 1 < 0.28
    share = (x.astype(np.float32) + y) * 0.4 * detail_visibility(p, p.scale / 3)
    weave = noise(p.u * 5, p.v * 5, p.seed) * detail_visibility(p, 0.008)
    return mix(p.colour, p.second, share) * (1 + 0.05 * weave)[:, None]


def books(p: Points) -> Array:
    """Spines side by side along u, each with its colour and a label."""
    i = np.floor(p.u / 0.034)
    a, b, c = (random_value(i, i * k, p.seed) for k in (1, 2, 3))
    x = (p.u / 0.034) % 1
    spine = np.stack([0.25 + 0.6 * a, 0.2 + 0.5 * b, 0.2 + 0.5 * c], axis=1)
    label = (np.abs((p.v - 0.04 * b) % 0.33 - 0.16) < 0.02) & (x > 0.2) & (x < 0.8)
    spine = mix(spine, p.second, label * detail_visibility(p, 0.02))
    return np.asarray(
        spine * (1 - 0.5 * ((x < 0.08) | (x > 0.92)) * detail_visibility(p, 0.015))[:, None],
        np.float32,
    )


def leaf(p: Points) -> Array:
    """Leaves, lighter along their veins."""
    vein = np.abs(np.sin(p.u * 60 + p.v * 35)) < 0.25
    tone = 0.15 * noise(p.u * 3, p.v * 3, p.seed) + 0.2 * vein * detail_visibility(p, 0.03)
    return np.asarray(p.colour * (1 + tone)[:, None], np.float32)


def picture(p: Points) -> Array:
    """A painting of hills and suns, different for each seed."""
    s, t = _in_area(p)
    zero = np.zeros_like(s)
    r = [random_value(zero + k, zero, p.seed) for k in range(8)]
    sky = mix(p.colour, p.second, np.clip(t + 0.1 * noise(p.u * 2, p.v * 2, p.seed), 0, 1))
    for k in range(3):
        ridge = 0.62 - 0.2 * k + 0.09 * np.sin(s * (5 + 7 * r[k]) + 9 * r[k + 1])
        hill = np.stack([0.2 + 0.6 * r[k], 0.25 + 0.5 * r[k + 2], 0.15 + 0.5 * r[k + 4]], 1)
        stroke = 1 + 0.12 * noise(p.u * 2, p.v * 5, p.seed + np.uint32(k))
        sky = np.where((t < ridge)[:, None], hill * stroke[:, None], sky)
    sun = np.hypot(s - 0.2 - 0.6 * r[6], t - 0.78) < 0.1
    return mix(sky, np.array([0.96, 0.8, 0.35], np.float32) + zero[:, None], sun.astype(np.float32))


def outdoors(p: Points) -> Array:
    """A garden seen through a window: sky, clouds, trees and a lawn."""
    s, t = _in_area(p)
    cloud = np.clip(noise(p.u * 0.8, p.v * 1.6, p.seed) * 0.6, 0, 1)
    sky = mix(p.colour * (0.85 + 0.15 * t)[:, None], np.ones_like(p.colour), cloud)
    crown = 0.52 + 0.1 * np.sin(s * 9 + p.seed % 7) + 0.05 * noise(p.u * 2, p.v * 2, p.seed)
    foliage = (
        np.array([0.25, 0.42, 0.2], np.float32)
        * (1 + 0.3 * noise(p.u * 2, p.v * 2, p.seed))[:, None]
    )
    view = np.where((t < crown)[:, None], foliage, sky)
    lawn = (
        np.array([0.45, 0.6, 0.3], np.float32)
        * (1 + 0.12 * noise(p.u * 3, p.v * 3, p.seed))[:, None]
    )
    return np.where((t < 0.25)[:, None], lawn, view).astype(np.float32)


def screen(p: Points) -> Array:
    """A dark display with a bright panel on it."""
    s, t = _in_area(p)
    panel = (s > 0.1) & (s < 0.55) & (t > 0.3) & (t < 0.8)
    lines = (p.v / 0.03) % 1 < 0.4
    return mix(p.colour, p.second, (panel & lines).astype(np.float32) * detail_visibility(p, 0.02))


TEXTURES: dict[str, Texture] = {
    "plain": plain, "plaster": plaster, "striped": striped, "damask": damask, "planks": planks,
    "tiles": tiles, "carpet": carpet, "rug": rug, "wood": wood, "fabric": fabric, "books": books,
    "leaf": leaf, "picture": picture, "outdoors": outdoors, "screen": screen, "glow": plain,
}  # fmt: skip
GLOWING = ("glow", "outdoors")  # these show their own colour, independent of light
KINDS = tuple(TEXTURES)


class Palette:
    """The materials of a house as arrays, to look up by number."""

    def __init__(self, materials: Sequence[Material]) -> None:
        """Number the materials in the order given."""
        self.kind = np.array([KINDS.index(m.kind) for m in materials], np.uint8)
        self.colour = np.array([m.colour for m in materials], np.float32)
        self.second = np.array([m.second for m in materials], np.float32)
        self.scale = np.array([m.scale for m in materials], np.float32)
        self.seed = np.array([m.seed for m in materials], np.uint32)
        self.area = np.array([m.area for m in materials], np.float32)
        self.glows = np.array([m.kind in GLOWING for m in materials])

    def colours(self, material: NDArray[np.int32], u: Array, v: Array, blur: Array) -> Array:
        """The unlit colours (N, 3) in 0..1 of points (N,); u, v and blur in metres."""
        out = np.zeros((len(material), 3), np.float32)
        order = np.argsort(material.astype(np.int16), kind="stable")
        numbers, starts = np.unique(material[order], return_index=True)
        for m, at in zip(numbers, np.split(order, starts[1:]), strict=True):
            one = slice(m, m + 1)
            points = Points(
                u[at], v[at], blur[at], self.colour[one], self.second[one], self.scale[one],
                self.seed[one], self.area[one],
            )  # fmt: skip
            out[at] = TEXTURES[KINDS[self.kind[m]]](points)
        return np.clip(out, 0, 1)


def _in_area(p: Points) -> tuple[Array, Array]:
    """The position of a point in its picture, 0..1 to the right and up."""
    u0, v0, u1, v1 = p.area.T
    return (p.u - u0) / (u1 - u0), (p.v - v0) / (v1 - v0)
