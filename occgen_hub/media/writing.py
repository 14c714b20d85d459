"""Writing of videos. Equal frames give equal bytes."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from occgen_hub.media.video import BT601, LIMITED

if TYPE_CHECKING:
    import av

SAME_BYTES = "threads=1:bframes=0:mbtree=0:rc-lookahead=0"
"""Options that make x264 reproducible: its output depends on the number of threads, and its
lookahead reads uninitialised memory."""


class VideoWriter:
    """Writes (H, W, 3) uint8 RGB frames as H.264 that plays in a browser.

    Odd sizes lose a row or a column, since yuv420p needs even ones; a single row or column is
    repeated. Equal frames give equal bytes.
    The file is complete when it is closed.
    """

    def __init__(self, path: Path, fps: float) -> None:
        import av

        self._rate = Fraction(fps).limit_denominator(1001)
        faststart = {"movflags": "faststart"}
        self._container = av.open(f"file:{path}", "w", format="mp4", options=faststart)
        self._stream: av.VideoStream | None = None

    def append(self, image: NDArray[np.uint8]) -> None:
        """Encode the next frame, (H, W, 3) uint8 RGB."""
        import av

        for axis in (0, 1):
            if image.shape[axis] == 1:
                image = image.repeat(2, axis)
        height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
        if self._stream is None:
            self._stream = self._add_stream(width, height)
        picture = np.ascontiguousarray(image[:height, :width])
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def _add_stream(self, width: int, height: int) -> av.VideoStream:
        options = {"crf": "18", "x264-params": SAME_BYTES}
        stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # The matrix that swscale uses. Without a tag, players assume another one for large frames.
        stream.codec_context.colorspace, stream.codec_context.color_range = BT601, LIMITED
        return stream

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def __enter__(self) -> Self:
        """For `with`."""
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Finish the file; after an error, leave it incomplete."""
        if kind is None:
            self.close()
        else:
            self._container.close()


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Write (H, W, 3) uint8 RGB frames with a `VideoWriter`."""
    with VideoWriter(path, fps) as video:
        for image in frames:
            video.append(image)
