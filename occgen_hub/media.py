"""Images and videos, decoded at a bounded cost and with errors that name the file."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from occgen_hub.errors import SourceError
from occgen_hub.files import opened

if TYPE_CHECKING:
    import av

MAX_PIXELS = 1 << 26
"""64 megapixels: over any camera's frame, under what would fill a machine's memory."""

SAME_BYTES = "threads=1:bframes=0:mbtree=0:rc-lookahead=0"
"""x264's output depends on its threads, and its looking ahead reads memory that it never set."""

RESTORE = "restore it from the source or leave this trajectory out"


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) from an image's header, nothing decoded."""
    with _opened(path) as image:
        return image.size


def read_rgb(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of an image that has to be of `size` (width, height)."""
    with _opened(path, size) as image:
        try:
            return np.asarray(image.convert("RGB"))
        except _DAMAGE as error:
            raise _damaged(path, error) from None


def read_depth(path: Path, size: tuple[int, int]) -> NDArray[np.uint16]:
    """(H, W) uint16 of a 16-bit grey image that has to be of `size` (width, height)."""
    with _opened(path, size) as image:
        if image.mode not in ("I;16", "I;16B", "I"):
            raise SourceError(
                path,
                f"is not a 16-bit grey image (its mode is {image.mode})",
                "save depth as 16-bit PNG, 10,000 units a metre",
            )
        try:
            values = np.asarray(image)
        except _DAMAGE as error:
            raise _damaged(path, error) from None
    if values.dtype != np.uint16:
        if values.min() < 0 or values.max() > 65535:
            raise SourceError(path, "has values beyond 16 bits", RESTORE)
        values = values.astype(np.uint16)
    return values


@contextmanager
def _opened(path: Path, size: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """A JPEG or PNG of `size`, its header read; no other of Pillow's many formats is tried."""
    with opened(path) as file:
        try:
            image = Image.open(file, formats=("JPEG", "PNG"))
        except UnidentifiedImageError:
            raise SourceError(path, "is not a JPEG or PNG image", RESTORE) from None
        except (*_DAMAGE, Image.DecompressionBombError) as error:
            raise _damaged(path, error) from None
        if image.width * image.height > MAX_PIXELS:
            raise SourceError(path, f"claims {image.width} x {image.height} pixels", RESTORE)
        if size is not None and image.size != size:
            text = f"is {image.width} x {image.height} pixels, expected {size[0]} x {size[1]}"
            raise SourceError(path, text, RESTORE)
        yield image


_DAMAGE = (OSError, SyntaxError, ValueError, EOFError)
"""What Pillow raises in the middle of a damaged file."""


def _damaged(path: Path, error: BaseException) -> SourceError:
    return SourceError(path, f"is damaged ({_brief(error)})", RESTORE)


def _brief(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error)
    text = said.splitlines()[0] if said else type(error).__name__
    return text.split(": '")[0].rstrip(".")[:120]


@dataclass(frozen=True)
class VideoFacts:
    """size: (width, height); fps: frames a second; frames: how many there are."""

    size: tuple[int, int]
    fps: float
    frames: int


def video_facts(path: Path) -> VideoFacts:
    """Size, rate and number of frames, the frames counted by their packets, not by the header."""
    with _video(path) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        size = (stream.width, stream.height)
        try:
            frames = sum(1 for packet in container.demux(stream) if packet.size)
        except _video_damage() as error:
            raise _damaged(path, error) from None
    return VideoFacts(size, float(rate) if rate else 0.0, frames)


def video_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """(H, W, 3) uint8 RGB frames in order, one in memory at a time."""
    with _video(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        try:
            for frame in container.decode(video=0):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
        except _video_damage() as error:
            raise _damaged(path, error) from None


class VideoReader:
    """Frames of a video by number, best asked for in order; going far back starts over.

    Frames that were passed over are kept for a while, for threads that ask a little out of order.
    """

    KEPT = 16

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._path, self._size = path, size
        self._next = 0
        self._frames = video_frames(path)
        self._passed: dict[int, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, resized to the size asked for."""
        with self._lock:
            if number in self._passed:
                return self._resized(self._passed.pop(number))
            if number < self._next:
                self._next, self._frames = 0, video_frames(self._path)
            for frame in self._frames:
                self._next += 1
                if self._next > number:
                    return self._resized(frame)
                self._passed[self._next - 1] = frame
                self._passed.pop(self._next - 1 - self.KEPT, None)
        raise SourceError(self._path, f"ends before frame {number}", RESTORE)

    def _resized(self, frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(frame)
        if image.size != self._size:
            image = image.resize(self._size, Image.Resampling.BILINEAR)
        return np.asarray(image)


def write_video(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """H.264 that plays in a browser, from (H, W, 3) uint8 RGB frames.

    Odd sizes lose a row or a column, which yuv420p cannot have. Equal frames give equal bytes.
    """
    import av

    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = None
        for image in frames:
            height, width = image.shape[0] // 2 * 2, image.shape[1] // 2 * 2
            if stream is None:
                rate = Fraction(fps).limit_denominator(1001)
                options = {"crf": "18", "x264-params": SAME_BYTES}
                stream = container.add_stream("libx264", rate=rate, options=options)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            picture = np.ascontiguousarray(image[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        if stream is not None:
            container.mux(stream.encode())


def _video_damage() -> tuple[type[Exception], ...]:
    import av

    return (*_DAMAGE, av.FFmpegError)


_CONTAINERS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg",
}
"""Files that hold their own frames: no playlist, which would have other files opened."""


def _video(path: Path) -> av.container.InputContainer:
    import av

    if not path.is_file():
        raise SourceError(path, "is missing", RESTORE)
    try:
        container = av.open(f"file:{path}", options=_CONTAINERS)
    except _video_damage() as error:
        raise SourceError(
            path, f"is not a video that can be read ({_brief(error)})", RESTORE
        ) from None
    if not container.streams.video:
        container.close()
        raise SourceError(path, "holds no video", RESTORE)
    stream = container.streams.video[0]
    if getattr(stream, "codec_context", None) is None:
        container.close()
        raise SourceError(path, "is of no codec that can be read", RESTORE)
    if not 0 < stream.width * stream.height <= MAX_PIXELS:
        container.close()
        raise SourceError(path, f"claims {stream.width} x {stream.height} pixels", RESTORE)
    return container
