"""Frames as files: JPEG colour, 16-bit PNG depth, and H.264 video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]
UNITS = 10_000  # depth units a metre
VIDEO_FPS = 10
BLOCK = 16  # the encoder needs whole blocks of this many pixels
# The same frames give the same bytes: one thread, and no lookahead of x264, which reads memory that
# it never set (MALLOC_PERTURB_ changes its output).
SAME_BYTES = "threads=1:bframes=0:mbtree=0:rc-lookahead=0"
GREY_RANGE = 6.5535  # metres: white in the depth video


def depth_units(depth: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """Round depth (H, W) in metres to the PNG's unit; 0 for none or beyond its range."""
    units = np.rint(depth.astype(np.float64) * UNITS)
    return np.where(units <= 65535, units, 0).astype(np.uint16)


def write_colour(path: Path, colour: Bytes) -> None:
    """An RGB image (H, W, 3) as JPEG."""
    Image.fromarray(colour).save(path, quality=95)


def write_depth(path: Path, units: NDArray[np.uint16]) -> None:
    """Depth (H, W) as a 16-bit greyscale PNG."""
    Image.fromarray(units).save(path, compress_level=3)


def write_label(path: Path, classes: Bytes) -> None:
    """Classes (H, W) as an 8-bit greyscale PNG."""
    Image.fromarray(classes).save(path, compress_level=3)


def depth_picture(units: NDArray[np.uint16]) -> Bytes:
    """Depth (H, W) as a grey image (H, W, 3)."""
    grey = (units * (255 / (GREY_RANGE * UNITS))).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


class Video:
    """An mp4 to which frames are added. They are scaled so that sides are whole blocks."""

    def __init__(self, path: Path, width: int, height: int) -> None:
        """Create the file for frames of this size, pixels."""
        import av

        self._av: Any = av
        self._file: Any = av.open(f"file:{path}", "w", format="mp4")
        self._stream: Any = self._file.add_stream("libx264", rate=VIDEO_FPS)
        self._stream.width = -(-width // BLOCK) * BLOCK
        self._stream.height = -(-height // BLOCK) * BLOCK
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1
        self._stream.options = {"preset": "veryfast", "crf": "20", "x264-params": SAME_BYTES}

    def add(self, picture: Bytes) -> None:
        """Add a frame (H, W, 3)."""
        image = Image.fromarray(picture)
        size = (self._stream.width, self._stream.height)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        frame = self._av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
        self._file.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Write the remaining frames of the encoder, and close the file."""
        self._file.mux(self._stream.encode())
        self._file.close()
