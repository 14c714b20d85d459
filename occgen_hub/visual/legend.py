"""Legends of pictures: colour bars in metres, swatches, scale bars and axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from occgen_hub.visual.colors import INK, PAPER

Color = tuple[int, int, int]
Shade = Callable[[NDArray[np.float64]], NDArray[np.uint8]]
"""A function from (n,) metres to (n, 3) colours."""

SMALLEST = 240
"""Side in pixels below which images have no legend, because it would fill them."""

BAR = 11
"""Width of a colour bar and largest length of a scale bar, in text sizes."""

AXES = {"x": (240, 96, 84), "y": (110, 205, 96), "z": (92, 150, 255)}


def text_size(height: int) -> int:
    """Text size in pixels for an image of that height, legible at a width of 1280 pixels."""
    return int(np.clip(round(0.022 * height), 12, 28))


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all pictures."""
    return ImageFont.load_default(size)


def color_bar(
    title: str, rows: dict[str, Shade], low: float, high: float, size: int
) -> Image.Image:
    """Colour bars from `low` to `high` metres, with ticks below and names beside.

    rows: colours by name, which may be empty; size: of the text, pixels.
    """
    high = max(high, low + 1e-3)
    label = max(_width(name, size) for name in rows)
    left, bar, thick = (
        _width(title, size) + size // 2,
        BAR * size,
        round((0.8 if len(rows) == 1 else 1.15) * size),
    )
    spare = 2 * size  # Labels at the ends stick out.
    width = left + spare // 2 + bar + max(spare // 2, label + size // 2)
    patch = Image.new("RGB", (width, thick * len(rows) + round(1.3 * size)), PAPER)
    draw, start = ImageDraw.Draw(patch), left + spare // 2
    write(draw, (0, patch.height // 2), title, INK, size)
    metres = low + (np.arange(bar) + 0.5) / bar * (high - low)
    for n, (name, shade) in enumerate(rows.items()):
        line = np.broadcast_to(shade(metres), (thick - 1, bar, 3))
        patch.paste(Image.fromarray(np.ascontiguousarray(line)), (start, n * thick))
        write(draw, (start + bar + size // 2, n * thick + thick // 2), name, INK, size)
    ticks = _ticks(low, high)
    for tick in ticks:
        x, y = start + round((tick - low) / (high - low) * bar), len(rows) * thick
        draw.line((x, y - 2, x, y + 2), fill=INK)
        text = f"{tick:g} m" if tick == ticks[-1] else f"{tick:g}"
        draw.text((x, y + 2), text, fill=INK, font=font(size), anchor="mt")
    return patch


def swatch(name: str, color: Color, size: int, *, line: bool = False) -> Image.Image:
    """A square, or a line, in a colour, with its name."""
    patch = Image.new("RGB", (2 * size + _width(name, size), round(1.3 * size)), PAPER)
    draw, middle = ImageDraw.Draw(patch), patch.height // 2
    half = max(1, size // 8) if line else size // 2
    draw.rectangle((0, middle - half, round(1.2 * size), middle + half), fill=color)
    write(draw, (round(1.6 * size), middle), name, INK, size)
    return patch


def strip(items: Sequence[Image.Image], width: int, size: int) -> Image.Image:
    """Items side by side on a strip of that width, in several lines if needed."""
    lines: list[list[Image.Image]] = [[]]
    gap, used = 2 * size, 0
    for item in items:
        if lines[-1] and used + item.width > width:
            lines.append([])
            used = 0
        lines[-1].append(item)
        used += item.width + gap
    heights = [max((item.height for item in line), default=0) for line in lines]
    margin = size // 2
    sheet = Image.new("RGB", (width, sum(heights) + margin * (len(lines) + 1)), PAPER)
    y = margin
    for line, height in zip(lines, heights, strict=True):
        x = margin
        for item in line:
            sheet.paste(item, (x, y + (height - item.height) // 2))
            x += item.width + gap
        y += height + margin
    return sheet


class Overlay:
    """Marks to draw onto many pictures of the same size. marks: RGBA."""

    def __init__(self, marks: Image.Image) -> None:
        box = marks.getbbox() or (0, 0, 0, 0)
        left, top, right, foot = box
        self._where = slice(top, foot), slice(left, right)
        part = np.asarray(marks.crop(box), np.float32)
        self._share = part[..., 3:] / 255
        self._color = part[..., :3] * self._share

    def __call__(self, picture: NDArray[np.uint8]) -> None:
        """Draw them onto an (H, W, 3) picture."""
        under = picture[self._where]
        under[...] = under * (1 - self._share) + self._color


def draw_scale_bar(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], pixels_per_metre: float, size: int
) -> float:
    """Draw a horizontal bar of a round length, with lower left end `place`. Returns its metres."""
    metres = round_length(BAR * size / pixels_per_metre)
    (x, y), length = place, round(metres * pixels_per_metre)
    tick = size // 3
    for color, width in ((PAPER, 5), (INK, 2)):
        draw.line((x, y, x + length, y), fill=color, width=width)
        for end in (x, x + length):
            draw.line((end, y - tick, end, y + tick), fill=color, width=width)
    draw_outlined_text(draw, (x + length / 2, y - tick - 2), f"{metres:g} m", INK, size, "mb")
    return metres


def draw_axes(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    directions: NDArray[np.floating],
    size: int,
) -> None:
    """Draw the world's axes x, y and z from `place`.

    directions: (3, 2) of each unit axis in the picture, y down. Axes along the line of sight are
    short, and have no name if they are too short for one.
    """
    ends = np.asarray(place) + 3.0 * size * directions
    lengths = np.linalg.norm(ends - place, axis=1)
    for color, end, length in zip(AXES.values(), ends, lengths, strict=True):
        if length >= 2:
            draw.line((*place, *end), fill=PAPER, width=6)
            draw.line((*place, *end), fill=color, width=3)
    for n, (name, color) in enumerate(AXES.items()):
        if lengths[n] < 0.6 * size:
            continue
        x, y = ends[n] + 0.6 * size * (ends[n] - place) / lengths[n]
        # If two axes end close to each other, their names are on different sides.
        for other in np.flatnonzero(np.linalg.norm(ends - ends[n], axis=1) < 1.5 * size):
            if other != n and lengths[other] >= 0.6 * size:
                right = (ends[n][0], n) > (ends[other][0], other)
                x += 0.7 * size if right else -0.7 * size
        draw_outlined_text(draw, (x, y), name, color, size, "mm")


def draw_outlined_text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    color: Color,
    size: int,
    anchor: str = "lm",
) -> None:
    """Write a line of text that is legible on any picture."""
    draw.text(
        place, text, fill=color, font=font(size), anchor=anchor, stroke_width=2, stroke_fill=PAPER
    )


def write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, color: Color, size: float
) -> int:
    """Write a line of text, anchored at its left end, centred vertically. Returns its end."""
    face = font(max(9, round(size)))
    draw.text(place, text, fill=color, font=face, anchor="lm")
    return round(place[0] + draw.textlength(text, font=face))


def fit_text(text: str, width: float, size: int) -> str:
    """A line of text, cut to at most `width` pixels."""
    if _width(text, size) <= width:
        return text
    while text and _width(f"{text}\u2026", size) > width:
        text = text[:-1]
    return f"{text}\u2026"


def round_length(most: float) -> float:
    """The largest length of 1, 2 or 5 times a power of ten, at most `most`, metres."""
    power = 10.0 ** np.floor(np.log10(most))
    factor = next(f for f in (5, 2, 1) if f * power <= most * (1 + 1e-9))
    return float(f"{factor * power:.6g}")


def _ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers of metres in a range."""
    step = round_length((high - low) / 2)
    first = int(np.ceil(low / step - 1e-9))
    last = int(np.floor(high / step + 1e-9))
    return [float(f"{n * step:.6g}") for n in range(first, last + 1)]


def _width(text: str, size: int) -> int:
    return int(np.ceil(font(size).getlength(text)))
