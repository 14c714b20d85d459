"""Three images of a frame side by side: the recording, the world, the occupancy."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from occgen_hub.visual.colors import INK, MOVING, PAPER

FAINT = (150, 154, 162)
BEHIND = (32, 34, 39)
HEADER = 0.075
"""Share of the height for titles, and for the line at the bottom."""


class Panels:
    """The layout of the three images. size: (width, height) of the whole, pixels.

    The world's picture is made to fit; images keep their own shape. moving: whether cells move,
    whose colour then is in the titles.
    """

    def __init__(
        self, size: tuple[int, int], image_size: tuple[int, int], *, moving: bool = False
    ) -> None:
        width, height = self.size = size
        self._moving = moving
        self._strip = max(round(HEADER * height), 12)
        gap = max(4, width // 240)
        box_width = (width - 4 * gap) // 3
        box_height = height - 2 * self._strip
        self._boxes = [(gap + n * (box_width + gap), self._strip) for n in range(3)]
        self.world_size = (box_width, box_height)
        scale = min(box_width / image_size[0], box_height / image_size[1])
        self.image_size = (
            max(1, int(image_size[0] * scale)), max(1, int(image_size[1] * scale)),
        )  # fmt: skip

    def __call__(
        self,
        image: NDArray[np.uint8] | None,
        world: NDArray[np.uint8],
        occupancy: NDArray[np.uint8],
        line: str,
    ) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 from the three images, and a text for the bottom line."""
        sheet = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        titles = ("input", "world: cloud, path, occupancy", "occupancy, by depth")
        for picture, title, (left, top) in zip(
            (image, world, occupancy), titles, self._boxes, strict=True
        ):
            right, foot = left + self.world_size[0] - 1, top + self.world_size[1] - 1
            draw.rectangle((left, top, right, foot), fill=BEHIND)
            place = (left, top - self._strip // 2)
            end = _write(draw, place, title, INK, 0.42 * self._strip)
            if self._moving and title != titles[0]:
                _write(draw, (end, place[1]), ", moving cells", MOVING, 0.42 * self._strip)
            if picture is None:
                _write(draw, (left + 12, (top + foot) // 2), "images were left out", FAINT, 16)
                continue
            shown = Image.fromarray(picture)
            if picture is image:
                shown = shown.resize(self.image_size, Image.Resampling.BICUBIC)
            x = left + (self.world_size[0] - shown.width) // 2
            y = top + (self.world_size[1] - shown.height) // 2
            sheet.paste(shown, (x, y))
        foot = self.size[1] - self._strip // 2
        _write(draw, (self._boxes[0][0], foot), line, FAINT, 0.4 * self._strip)
        return np.asarray(sheet)


def with_legend(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Add a legend for the colour of moving cells to a corner of an (H, W, 3) image."""
    sheet = Image.fromarray(picture)
    draw, size = ImageDraw.Draw(sheet), max(9, round(0.03 * sheet.height))
    width = draw.textlength("moving", font=_font(size))
    top = sheet.height - 2 * size
    draw.rectangle((0, top, 3.5 * size + width, sheet.height), fill=PAPER)
    square = (0.75 * size, top + 0.5 * size, 1.75 * size, top + 1.5 * size)
    draw.rectangle(square, fill=MOVING)
    _write(draw, (round(2.5 * size), top + size), "moving", INK, size)
    return np.asarray(sheet)


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    color: tuple[int, int, int],
    size: float,
) -> int:
    """Draw text from its left end; returns the pixel where it ends."""
    font = _font(max(9, round(size)))
    draw.text(place, text, fill=color, font=font, anchor="lm")
    return round(place[0] + draw.textlength(text, font=font))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
