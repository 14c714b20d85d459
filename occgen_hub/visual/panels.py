"""Three images of a frame side by side: the recording, the world, the occupancy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from occgen_hub.visual.colors import FAINT, INK, PAPER
from occgen_hub.visual.legend import SMALLEST, fit_text, strip, text_size, write

BEHIND = (32, 34, 39)
HEADER = 0.06
"""Fraction of the height for titles, and for the line at the bottom."""

TITLES = ("input", "world: cloud, path, occupancy", "occupancy, from the camera")

Items = Callable[[int], list[Image.Image]]
"""Returns the items of a legend for a text size in pixels."""


def legend_height(width: int, height: int, items: Items) -> int:
    """The even height in pixels of a picture's legend. 0 if it would fill the picture."""
    if min(width, height) < SMALLEST:
        return 0
    text = text_size(height)
    return (strip(items(text), width, text).height + 1) // 2 * 2


def with_legend(
    picture: NDArray[np.uint8], size: tuple[int, int], legend: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    """(H, W, 3) of `size` (width, height): a picture with its legend at the bottom."""
    sheet = np.full((size[1], size[0], 3), PAPER, np.uint8)
    foot = size[1] - (0 if legend is None else len(legend))
    top, left = (foot - picture.shape[0]) // 2, (size[0] - picture.shape[1]) // 2
    sheet[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    if legend is not None:
        sheet[foot:] = legend
    return sheet


def legend_picture(width: int, height: int, total: int, items: Items) -> NDArray[np.uint8] | None:
    """(height, width, 3) uint8 of a legend, None if `height` is 0.

    total: the height of the whole picture, which determines the text size.
    """
    if not height:
        return None
    sheet = Image.new("RGB", (width, height), PAPER)
    text = text_size(total)
    sheet.paste(strip(items(text), width, text), (0, 0))
    return np.asarray(sheet)


class Panels:
    """The layout of the three images. size: (width, height) of the whole, pixels.

    The world's picture is rendered to fit. Images keep their aspect ratio. legends: of the world
    and of the occupancy, with any scale: only their size is used.
    """

    def __init__(
        self, size: tuple[int, int], image_size: tuple[int, int], legends: tuple[Items, Items]
    ) -> None:
        width, height = self.size = size
        self._strip = max(round(HEADER * height), 18)
        gap = max(4, width // 240)
        box_width = (width - 4 * gap) // 3
        shown = box_width if height >= SMALLEST else 0
        self.legend_height = max(legend_height(shown, height, items) for items in legends)
        box_height = height - 2 * self._strip - self.legend_height
        if box_height < box_width // 4:
            self.legend_height, box_height = 0, height - 2 * self._strip
        self._boxes = [(gap + n * (box_width + gap), self._strip) for n in range(3)]
        self.world_size = (box_width, box_height)
        scale = min(box_width / image_size[0], box_height / image_size[1])
        self.image_size = (
            max(1, int(image_size[0] * scale)), max(1, int(image_size[1] * scale)),
        )  # fmt: skip
        self._sheet = self._empty()

    def _empty(self) -> Image.Image:
        sheet = Image.new("RGB", self.size, PAPER)
        draw = ImageDraw.Draw(sheet)
        for title, (left, top) in zip(TITLES, self._boxes, strict=True):
            right, foot = left + self.world_size[0] - 1, top + self.world_size[1] - 1
            draw.rectangle((left, top, right, foot), fill=BEHIND)
            size = self._text(0.6)
            shown = fit_text(title, self.world_size[0], size)
            write(draw, (left, top - self._strip // 2), shown, INK, size)
        return sheet

    def _text(self, part: float) -> int:
        return max(9, min(round(part * self._strip), 28))

    def explain(self, world: Items, occupancy: Items) -> None:
        """Draw the legends of the world and of the occupancy, once for all frames."""
        for (left, top), items in zip(self._boxes[1:], (world, occupancy), strict=True):
            drawn = legend_picture(self.world_size[0], self.legend_height, self.size[1], items)
            if drawn is not None:
                self._sheet.paste(Image.fromarray(drawn), (left, top + self.world_size[1]))

    def __call__(
        self,
        image: NDArray[np.uint8] | None,
        world: NDArray[np.uint8],
        occupancy: NDArray[np.uint8],
        line: str,
    ) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 from the three images, and a text for the bottom line."""
        sheet = self._sheet.copy()
        draw = ImageDraw.Draw(sheet)
        for picture, (left, top) in zip((image, world, occupancy), self._boxes, strict=True):
            if picture is None:
                foot = top + self.world_size[1] - 1
                write(draw, (left + 12, (top + foot) // 2), "images were left out", FAINT, 16)
                continue
            shown = Image.fromarray(picture)
            if picture is image:
                shown = shown.resize(self.image_size, Image.Resampling.BILINEAR)
            x = left + (self.world_size[0] - shown.width) // 2
            y = top + (self.world_size[1] - shown.height) // 2
            sheet.paste(shown, (x, y))
        foot, size = self.size[1] - self._strip // 2, self._text(0.5)
        line = fit_text(line, self.size[0] - 2 * self._boxes[0][0], size)
        write(draw, (self._boxes[0][0], foot), line, FAINT, size)
        return np.asarray(sheet)
