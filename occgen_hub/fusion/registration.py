"""A check that depth and images show the same view."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_gradient_magnitude, label

from occgen_hub.episode import Episode, Note

OUTLINED = 0.08
"""Bend of the inverse depth, as a fraction of it, from which a pixel is on an outline."""

SPECK = 12
"""Number of connected pixels below which an outline is noise."""

FRAMES = 12
LAST_FRAME = 120
"""Later frames are not read, because a video is decoded from its beginning."""

LONGEST = 640
"""Longest side in pixels. Larger images are reduced by a whole number."""

SCALES = 1.04 ** np.arange(-10, 11)
"""Scales of the depth that are tried, from 0.68 to 1.48. Cameras of one device differ by up to 1.4
in focal length."""

RANGE = 0.05
"""Largest shift that is tried, as a share of the width."""

REGISTERED = 0.006
"""Largest shift, as a share of the width, that counts as registered: noise moves outlines."""

CLEAR = 1.3
"""How much stronger than elsewhere the edges at the outlines must be, to find where they fit."""

MARGIN = 0.8
"""The excess over 1 at the depth's own place must be below this share of that of the best place."""

MIN_FRAMES, MIN_PIXELS = 4, 500
"""Numbers of frames, and of pixels on outlines in all of them, below which nothing is concluded."""


def outlines(depth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(H, W) bool: the edges of near surfaces, which are edges of the image too.

    depth: (H, W) metres, 0 for none. Inverse depth is linear on a plane, so a second difference
    shows where a surface ends.
    """
    inverse = np.divide(1.0, depth, out=np.full_like(depth, np.nan), where=depth > 0)
    found = np.zeros(depth.shape, np.bool_)
    for edge, near in ((found, inverse), (found.T, inverse.T)):
        bend = 2 * near[:, 1:-1] - near[:, :-2] - near[:, 2:]
        edge[:, 1:-1] |= bend > OUTLINED * near[:, 1:-1]  # False without depth, which is NaN.
    pieces, _ = label(found, np.ones((3, 3)))
    kept: NDArray[np.bool_] = found & (np.bincount(pieces.ravel())[pieces] >= SPECK)
    return kept


@dataclass(frozen=True)
class Registration:
    """Where outlines of the depth fit the images best.

    own: the mean strength of edges at the outlines, relative to places around them; best: the same
    at the best place; scale, shift: of the depth about the centre of the image, and (x, y) pixels,
    to get there.
    """

    own: float
    best: float
    scale: float
    shift: tuple[int, int]

    def off(self, width: int) -> bool:
        """Whether the best place is clearly not the depth's own. width: of the images, pixels."""
        moved = self.scale != 1 or max(map(abs, self.shift)) > max(2.0, REGISTERED * width)
        return moved and self.best >= CLEAR and self.own - 1 < MARGIN * (self.best - 1)


def registration_notes(episode: Episode) -> list[Note]:
    """A note if the depth of an episode is not registered to its images."""
    found = registration(episode)
    width = episode.image_size[0]
    if found is None or not found.off(width):
        return []
    scaled = "" if found.scale == 1 else f"scaled by {found.scale:.2f} and "
    text = (
        f"outlines in the depth match the images best if they are {scaled}shifted by "
        f"{found.shift[0]}, {found.shift[1]} pixels (x, y): depth seems not to be aligned to "
        "colour, or the intrinsics are those of another camera; see docs/troubleshooting.md"
    )
    return [Note("depth not aligned", text)]


def registration(episode: Episode) -> Registration | None:
    """Compare outlines of the depth with edges of the images, in up to `FRAMES` frames.

    None without depth, or with too few frames, outlines or edges.
    """
    if episode.read_depth is None or episode.length < MIN_FRAMES:
        return None
    step = -(-max(episode.image_size) // LONGEST)
    last = min(episode.length - 1, LAST_FRAME)
    score: NDArray[np.complexfloating] | float = 0.0
    pixels, reach, size = np.zeros(len(SCALES)), 0, (0, 0)
    for frame in np.unique(np.linspace(0, last, FRAMES).astype(int)):
        edges = _edges(episode.read_rgb(int(frame))[step // 2 :: step, step // 2 :: step])
        marked = outlines(episode.read_depth(int(frame))[step // 2 :: step, step // 2 :: step])
        reach = max(1, round(RANGE * edges.shape[1]))
        size = tuple(fft.next_fast_len(n, real=True) for n in edges.shape)
        masks = np.stack([_scaled(marked, scale, reach) for scale in SCALES])
        pixels += masks.sum(axis=(1, 2))
        score = score + fft.rfft2(edges, size) * np.conj(fft.rfft2(masks, size))
    own = len(SCALES) // 2
    if pixels[own] < MIN_PIXELS:
        return None
    # The correlation for shifts from -reach to reach, divided by that at most places.
    maps = np.roll(fft.irfft2(score, size), (reach, reach), (1, 2))
    maps = maps[:, : 2 * reach + 1, : 2 * reach + 1]
    usual = np.median(maps, axis=(1, 2), keepdims=True)
    if usual[own] < 1e-6 * pixels[own]:
        return None  # The images have hardly any edges.
    maps = maps / np.maximum(usual, 1e-6)
    maps[pixels < pixels[own] / 4] = 0  # Most outlines are outside the image.
    near = slice(reach - 2, reach + 3)
    n, y, x = np.unravel_index(int(maps.argmax()), maps.shape)
    return Registration(
        own=float(maps[own, near, near].max()),
        best=float(maps[n, y, x]),
        scale=float(SCALES[n]),
        shift=(step * (int(x) - reach), step * (int(y) - reach)),
    )


def _edges(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W) strength of edges from 0 to 1. The strongest are equal, so that none dominates."""
    grey = rgb.mean(axis=2, dtype=np.float64)
    strength: NDArray[np.float64] = gaussian_gradient_magnitude(grey, 1.0)
    return np.minimum(strength / (np.percentile(strength, 95) + 1e-6), 1.0)


def _scaled(marked: NDArray[np.bool_], scale: float, reach: int) -> NDArray[np.float32]:
    """Marked pixels after scaling about the centre, without those less than `reach` from a side."""
    mask = np.zeros(marked.shape, np.float32)
    places = np.argwhere(marked)
    middle = (np.array(marked.shape) - 1) / 2
    places = np.rint((places - middle) * scale + middle).astype(np.int64)
    inside = ((places >= reach) & (places < np.array(marked.shape) - reach)).all(axis=1)
    mask[tuple(places[inside].T)] = 1
    return mask
