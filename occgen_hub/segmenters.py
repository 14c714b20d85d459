"""Segmenters: RGB in, label image out, for sources without labels. Found through entry points."""

from __future__ import annotations

import threading
import zlib
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from occgen_hub.episode import Episode
from occgen_hub.errors import OccGenError
from occgen_hub.plugins import open_plugin
from occgen_hub.taxonomy import load_taxonomy


class Segmenter(ABC):
    """Labels images. It loads weights when first used, so it can be sent to other processes.

    name: of its entry point; taxonomy: the name of its labels' taxonomy, see `occgen_hub.taxonomy`.
    """

    name: str
    taxonomy: str

    def record(self) -> dict[str, Any]:
        """Everything that determines its labels, as JSON, such as a checksum of its weights."""
        return {"name": self.name}

    def on(self, device: str | None) -> Self:
        """The same segmenter on another device; None for a GPU if there is one."""
        return self

    @abstractmethod
    def segment(self, image: NDArray[np.uint8]) -> NDArray[np.integer]:
        """(H, W) classes of the pixels of an (H, W, 3) uint8 RGB image, 0 for none.

        Equal images must give equal classes. It is called from one thread at a time.
        """


def load_segmenter(name: str, weights: Path | None = None, device: str | None = None) -> Segmenter:
    """Open the segmenter with that name. Raises UsageError if there is none."""
    segmenter: Segmenter = open_plugin("segmenter", name, Segmenter, weights, device)
    load_taxonomy(segmenter.taxonomy)
    return segmenter


def with_labels(episode: Episode, segmenter: Segmenter | None) -> Episode:
    """The episode with labels: its own, or those that a segmenter makes from its images.

    Label images are made once and kept compressed, a few kB each. The episodes in `beside` get
    labels too. Without a segmenter, the episode is returned unchanged.
    """
    if segmenter is None:
        return episode
    beside = tuple(with_labels(other, segmenter) for other in episode.beside)
    if episode.read_labels is not None:
        return replace(episode, beside=beside)
    taxonomy, turn = load_taxonomy(segmenter.taxonomy), threading.Lock()
    width, height = episode.image_size
    kept: dict[int, bytes] = {}

    def labels(frame: int) -> NDArray[np.uint8]:
        with turn:
            if frame not in kept:
                kept[frame] = zlib.compress(made(frame).tobytes(), 1)
        pixels = np.frombuffer(zlib.decompress(kept[frame]), np.uint8)
        return pixels.reshape(height, width)

    def made(frame: int) -> NDArray[np.uint8]:
        image = np.asarray(segmenter.segment(episode.read_rgb(frame)))
        problem = f"gives {image.dtype} of shape {image.shape}"
        if image.shape == (height, width):
            try:
                return taxonomy.checked(image)
            except ValueError as error:
                problem = str(error)
        raise OccGenError(
            f"{episode.id}: the segmenter {segmenter.name} {problem} for frame {frame}; it has to "
            f"give ids of {taxonomy.name} {(height, width)}; report it to its authors."
        )

    return replace(episode, read_labels=labels, taxonomy=taxonomy.name, beside=beside)
