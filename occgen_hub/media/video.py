"""Reading of videos, with bounded time and memory, and with errors that name the file."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Buffer, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occgen_hub.errors import SourceError
from occgen_hub.files import ABSENT, MAX_TABLE_ROWS
from occgen_hub.media.decode_errors import (
    DAMAGE,
    MAX_PIXELS,
    REENCODE,
    RESTORE,
    check_pixels,
    damaged,
    short_message,
)
from occgen_hub.media.hdr import Transfer, is_wide, to_sdr, transfer

if TYPE_CHECKING:
    import av

SQUARE = 0.01
"""Deviation of the pixel aspect ratio from 1 that is ignored, since scaling may cause it."""

STRETCH = 4
"""Largest plausible pixel aspect ratio. Larger ones are ignored."""

ON_TIME = 1e-4
"""Tolerance for the time of a frame in seconds, that of LeRobot."""


@dataclass(frozen=True)
class VideoFacts:
    """Facts of a video. size: (width, height) when upright; fps: 0 if unknown; frames: count."""

    size: tuple[int, int]
    fps: float
    frames: int


def video_facts(path: Path) -> VideoFacts:
    """Size, rate and number of frames, counted by packets and not from the header.

    Raises SourceError.
    """
    with _video(path) as container:
        stream = _stream(container)
        rate = stream.average_rate or stream.guessed_rate
        size, frames, first = (stream.width, stream.height), 0, None
        try:
            for packet in container.demux(stream):
                frames += packet.size > 0
                if first is None:
                    with suppress(*_video_damage()):  # Reported when the frame is read.
                        first = next(iter(stream.decode(packet)), None)
                        size = _Upright(stream).size(first) if first is not None else size
        except _video_damage() as error:
            raise damaged(path, error) from None
    return VideoFacts(size, float(rate) if rate else 0.0, frames)


def stated_pixels(path: Path) -> float:
    """The number of pixels in all frames, estimated from the header. Raises SourceError."""
    with _video(path) as container:
        stream = _stream(container)
        frames = float(stream.frames)
        if not frames and container.duration and stream.average_rate:
            frames = container.duration / 1e6 * float(stream.average_rate)
        pixels = stream.width * stream.height
    return min(max(frames, 1.0), 1e9) * pixels


@dataclass(frozen=True)
class VideoSurvey(VideoFacts):
    """Facts of a video from decoding all its frames.

    stated: number of frames in the header, 0 if it has none; steps: shortest and longest time
    between frames in seconds, None if unknown; hdr: transfer function of HDR, None for SDR;
    reference: whether the file is like those of `write_video`: an mp4 with H.264 and 4:2:0,
    upright, no HDR, with exactly these frames, frame n at n / fps.
    """

    stated: int
    steps: tuple[float, float] | None
    hdr: Transfer | None
    reference: bool


def survey_video(path: Path) -> VideoSurvey:
    """Decode a whole video, without conversion to RGB, and return facts on its frames.

    This is the only reliable way to count frames: the numbers in packets, headers and durations may
    differ. Raises SourceError if a frame is damaged or has another size, or if there are no frames
    or too many.
    """
    with _video(path) as container:
        survey = _survey(container, path)
    all_shown = survey.reference and video_facts(path).frames == survey.frames
    return replace(survey, reference=all_shown)


def _survey(container: av.container.InputContainer, path: Path) -> VideoSurvey:
    stream, plain = _stream(container), _is_plain(container)
    upright = _Upright(stream)
    size: tuple[int, int] | None = None
    times: list[float | None] = []
    for frame in _decoded(container, path):
        size = size or upright.size(frame)
        _check_frame(frame, len(times), upright.size(frame), size, path)
        times.append(frame.time)
        plain = plain and frame.format.name == "yuv420p" and upright.untouched(frame)
    if size is None:
        raise SourceError(path, "has no frame that can be decoded", RESTORE)
    known = _ascending(times)
    fps = _average_rate(stream, known)
    steps = [after - before for before, after in pairwise(known)]
    on_time = bool(known) and all(abs(t * fps - n) <= ON_TIME * fps for n, t in enumerate(known))
    hdr = transfer(stream)
    return VideoSurvey(
        size=size,
        fps=fps,
        frames=len(times),
        stated=stream.frames,
        steps=(min(steps), max(steps)) if steps else None,
        hdr=hdr,
        reference=plain and hdr is None and on_time and fps > 0,
    )


def _check_frame(
    frame: av.VideoFrame, n: int, own: tuple[int, int], size: tuple[int, int], path: Path
) -> None:
    if own != size:
        text = f"changes from {size[0]} x {size[1]} to {own[0]} x {own[1]} pixels at frame {n}"
        raise SourceError(path, text, "split it there and use the parts")
    if n >= MAX_TABLE_ROWS:
        text = f"has more than {MAX_TABLE_ROWS} frames, the limit of an episode"
        raise SourceError(path, text, "split it into parts")


def _is_plain(container: av.container.InputContainer) -> bool:
    """Whether a file is an mp4 that browsers play, according to its headers."""
    brand = container.metadata.get("major_brand", "")
    codec = _stream(container).codec_context.name
    mp4 = "mp4" in container.format.name.split(",") and brand.strip() != "qt"
    return mp4 and codec == "h264" and len(container.streams.video) == 1


def _ascending(times: list[float | None]) -> list[float]:
    """The times of all frames in seconds, or an empty list if they are missing or not ascending."""
    known = [time for time in times if time is not None]
    valid = len(known) == len(times) and all(after > before for before, after in pairwise(known))
    return known if valid else []


def _average_rate(stream: av.VideoStream, times: list[float]) -> float:
    """The frame rate from the frames' times, or the stated rate if both agree."""
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    if len(times) < 2:
        return stated
    span, steps = times[-1] - times[0], len(times) - 1
    if stated > 0 and abs(span - steps / stated) < 1 / stated:
        return stated
    return steps / span


def video_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Yield (H, W, 3) uint8 RGB frames, upright, with square pixels. Raises SourceError."""
    return (picture() for picture in _pictures(path))


def _pictures(path: Path) -> Iterator[Callable[[], NDArray[np.uint8]]]:
    """Yield, for each frame, a function that converts it, so that frames can be skipped."""
    with _video(path) as container:
        upright = _Upright(_stream(container))
        for frame in _decoded(container, path):
            yield partial(_converted, upright, frame, path)


def _converted(upright: _Upright, frame: av.VideoFrame, path: Path) -> NDArray[np.uint8]:
    try:
        return upright(frame)
    except _video_damage() as error:
        raise damaged(path, error) from None


def _decoded(container: av.container.InputContainer, path: Path) -> Iterator[av.VideoFrame]:
    """Yield the frames of a video. Raises SourceError if one is damaged.

    Frames before the first keyframe are skipped, since a recording may start anywhere, and so is an
    incomplete frame at the end of the file.
    """
    stream = _stream(container)
    stream.thread_type = "AUTO"
    upright, seen, corrupt = _Upright(stream), 0, False
    damage = _video_damage()  # Imported now, because the generator may end with the interpreter.
    try:
        for packet in _from_keyframe(container.demux(stream), path):
            for frame in stream.decode(packet):
                corrupt = corrupt or (frame.is_corrupt and seen > 0)
                if frame.is_corrupt:
                    continue
                if corrupt:
                    raise SourceError(path, f"is damaged at frame {seen}", REENCODE)
                check_pixels(path, *upright.size(frame))
                seen += 1
                yield frame
    except damage as error:
        problem = f"is damaged at frame {seen} or soon after ({short_message(error)})"
        raise SourceError(path, problem, REENCODE) from None


def _from_keyframe(packets: Iterable[av.Packet], path: Path) -> Iterator[av.Packet]:
    """Yield packets from the first keyframe on, without a truncated last packet.

    This checks packets and not decoded frames, because when the decoder reports an error depends on
    its threads.
    """
    started = truncated = False
    for packet in packets:
        if packet.size and truncated:
            raise SourceError(path, "is damaged (it has truncated packets)", REENCODE)
        started = started or packet.is_keyframe
        truncated = truncated or (started and packet.size > 0 and packet.is_corrupt)
        if not packet.size or (started and not truncated):
            yield packet


class _Upright:
    """Converts a stream's frames to (H, W, 3) uint8 RGB, as a player shows them.

    Frames are rotated by the display matrix, resized to square pixels, converted with their own
    colour matrix and range, and HDR is tone-mapped to SDR.
    """

    def __init__(self, stream: av.VideoStream) -> None:
        from av.video.reformatter import VideoReformatter

        stated = float(stream.sample_aspect_ratio or 1)
        plausible = abs(stated - 1) > SQUARE and 1 / STRETCH <= stated <= STRETCH
        self._aspect = stated if plausible else 1.0
        self._reformatter = VideoReformatter()
        self._hdr, self._wide = transfer(stream), is_wide(stream)
        self._rotation: int | None = None
        self._orientation = (False, False, False)

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """Convert a frame to (H, W, 3) uint8 RGB."""
        width, colours = self._width(frame), _colours(frame)
        depth = "rgb24" if self._hdr is None else "rgb48le"
        flat = self._reformatter.reformat(frame, width=width, format=depth, **colours).to_ndarray()
        if self._hdr is None:
            pixels = np.asarray(flat, np.uint8)
        else:
            pixels = to_sdr(np.asarray(flat, np.uint16), self._hdr, wide=self._wide)
        swap, flip_x, flip_y = self._turned(frame)
        pixels = pixels.swapaxes(0, 1) if swap else pixels
        return np.ascontiguousarray(pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1])

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """(width, height) of a frame after conversion."""
        size = (self._width(frame), frame.height)
        return size[::-1] if self._turned(frame)[0] else size

    def untouched(self, frame: av.VideoFrame) -> bool:
        """Whether a frame is upright and has square pixels already."""
        return self._width(frame) == frame.width and not any(self._turned(frame))

    def _turned(self, frame: av.VideoFrame) -> tuple[bool, bool, bool]:
        """`_orientation`, cached by rotation.

        Reading the display matrix puts a frame into a reference cycle, which frees it late.
        """
        if frame.rotation != self._rotation:
            self._rotation, self._orientation = frame.rotation, _orientation(frame)
        return self._orientation

    def _width(self, frame: av.VideoFrame) -> int:
        return max(1, round(frame.width * self._aspect))


_UNTAGGED, BT601, LIMITED, _FULL = 2, 6, 1, 2
"""AVCOL_SPC_UNSPECIFIED and AVCOL_SPC_SMPTE170M; AVCOL_RANGE_MPEG and AVCOL_RANGE_JPEG."""

_DEFAULT = 5
"""swscale's default matrix, for RGB. It must differ from the frame's, or PyAV ignores both."""


def _colours(frame: av.VideoFrame) -> dict[str, int]:
    """A frame's colour matrix and range for PyAV, which assumes BT.601 by default."""
    if frame.colorspace == _UNTAGGED and frame.color_range != _FULL:
        return {}
    return {
        "src_colorspace": frame.colorspace,
        "dst_colorspace": _DEFAULT,
        "src_color_range": frame.color_range,
    }


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether to swap the axes of a frame, and then whether to flip x and y, by its display matrix.

    x' = a x + c y and y' = b x + d y, where the matrix is a, b, u, c, d, v, ... as in mp4.
    """
    try:
        data = cast("Buffer | None", frame.side_data.get("DISPLAYMATRIX"))
    except ValueError:  # Other side data that PyAV does not know, as in stereo video.
        return _QUARTERS.get(frame.rotation % 360, (False, False, False))
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if swap else (False, a < 0, d < 0)


_QUARTERS = {90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}
"""`_orientation` by the rotation in degrees that PyAV computes from a matrix, without mirroring."""


Frames = Iterator[Callable[[], NDArray[Any]]]
"""Functions that convert the frames, in order, so that frames can be skipped."""


class SequentialReader:
    """Frames by number from a sequential source, such as a video.

    Ascending numbers are fast; going far back starts from the beginning. Several threads may read:
    the lowest waiting number is served first, and the last `KEPT` skipped frames are kept.

    path: the file for errors; start: returns the frames from number 0 on.
    """

    KEPT = 32

    def __init__(self, path: Path, start: Callable[[], Frames]) -> None:
        self._path, self._start = path, start
        self._next = 0
        self._frames = start()
        self._passed: dict[int, Callable[[], NDArray[Any]]] = {}
        self._orientation = threading.Condition()
        self._waiting: list[int] = []
        self._busy = False

    def __call__(self, number: int) -> NDArray[Any]:
        """The frame with that number. Raises SourceError if there are fewer."""
        with self._orientation:
            self._waiting.append(number)
            try:
                self._orientation.wait_for(lambda: not self._busy and number == min(self._waiting))
            finally:  # Also on an interruption, or the other threads would wait forever.
                self._waiting.remove(number)
            self._busy = True
        try:
            return self._picture(number)()
        finally:
            with self._orientation:
                self._busy = False
                self._orientation.notify_all()

    def _picture(self, number: int) -> Callable[[], NDArray[Any]]:
        if number in self._passed:
            return self._passed.pop(number)
        if number < self._next:
            self._next, self._frames = 0, self._start()
        for picture in self._frames:
            self._next += 1
            self._passed.pop(self._next - 1 - self.KEPT, None)
            if self._next > number:
                return picture
            self._passed[self._next - 1] = picture
        raise SourceError(self._path, f"ends before frame {number}", RESTORE)


class VideoReader:
    """Frames of a video by number, read sequentially (see `SequentialReader`)."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._size = size
        self._read = SequentialReader(path, partial(_pictures, path))

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """The frame as (H, W, 3) uint8 RGB, upright, resized to `size`."""
        return _resized(self._read(number), self._size)


def frames_at(path: Path, times: NDArray[np.float64], tolerance: float, *, grey: bool) -> Frames:
    """Yield the frames that a video shows at given times.

    times: (n,) seconds, ascending; tolerance: largest difference in seconds. Frames are (H, W, 3)
    uint8 RGB, upright; with `grey` they are (H, W) uint16, the values of a grey video of over 8
    bits. Only the part of the file around the times is decoded, unless the decoder loses frames
    there. Raises SourceError if a time has no frame.
    """
    done = 0
    try:
        for picture in _frames_at(path, times, tolerance, grey=grey, seek=True):
            yield picture
            done += 1
    except SourceError:
        yield from _frames_at(path, times[done:], tolerance, grey=grey, seek=False)


def _frames_at(
    path: Path, times: NDArray[np.float64], tolerance: float, *, grey: bool, seek: bool
) -> Frames:
    with _video(path) as container:
        stream = _stream(container)
        upright = _Upright(stream)
        if seek and times[0] > 0 and stream.time_base is not None:
            # Not earlier, because in joined files a decoder that starts earlier may lose frames.
            with suppress(*_video_damage()):  # Without seeking, it is decoded from the start.
                container.seek(round(times[0] / stream.time_base), stream=stream)
        shown = _decoded(container, path)
        frame, following = next(shown, None), next(shown, None)
        for time in times.tolist():
            while following is not None and _is_nearer(following, frame, time):
                frame, following = following, next(shown, None)
            if frame is None or frame.time is None or abs(frame.time - time) > tolerance:
                raise SourceError(path, f"has no frame at {time:.3f} s", RESTORE)
            as_color = partial(_converted, upright, frame, path)
            yield partial(_depth_codes, frame, path) if grey else as_color


def _is_nearer(frame: av.VideoFrame, than: av.VideoFrame | None, time: float) -> bool:
    """Whether a frame is at least as near to a time as the one before it."""
    if frame.time is None or than is None or than.time is None:
        return True
    return abs(frame.time - time) <= abs(than.time - time)


def _depth_codes(frame: av.VideoFrame, path: Path) -> NDArray[np.uint16]:
    """(H, W) uint16: the first plane of a frame, as stored."""
    if not frame.format.name.endswith("le") or frame.format.components[0].bits <= 8:
        problem = f"is not a depth video: its pixels are {frame.format.name}"
        raise SourceError(path, problem, "name another column of depth")
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)
    return np.array(rows[: frame.height, : frame.width])


class SeekingVideo:
    """Frames of a video by number, in any order, decoded from the nearest keyframe before."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._path, self._size = path, size
        self._container = _video(path)
        self._stream = _stream(self._container)
        self._stream.codec_context.thread_count = 1  # Data loaders use processes instead.
        self._upright = _Upright(self._stream)
        with self._damage():
            packets = _from_keyframe(self._container.demux(self._stream), path)
            known = [(p.pts, p.is_keyframe, p.is_discard) for p in packets if p.size]
        if any(time is None for time, *_ in known):
            raise SourceError(path, "has frames without a time", REENCODE)
        # A trimmed video may begin after its keyframe, which is in the file but not shown.
        self._times = sorted(t for t, _, discarded in known if t is not None and not discarded)
        self._keys = sorted(t for t, key, _ in known if t is not None and key)
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._last: int | None = None

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """The frame as (H, W, 3) uint8 RGB, upright, resized to `size`. Raises SourceError."""
        if number >= len(self._times):
            raise SourceError(self._path, f"ends before frame {number}", RESTORE)
        with self._damage():
            frame = self._upright(self._decoded(self._times[number]))
        return _resized(frame, self._size)

    def _decoded(self, time: int) -> av.VideoFrame:
        """The frame at a time, in the stream's units."""
        key = self._keys[max(0, bisect_right(self._keys, time) - 1)]
        # Continue from the last frame, unless a keyframe is nearer. If the decoder needs more than
        # the keyframe, decode from the beginning.
        ahead = self._last is not None and key <= self._last < time
        for start in (None,) * ahead + (key, self._times[0]):
            if start is not None:
                self._container.seek(start, stream=self._stream)
                self._frames = self._container.decode(self._stream)
            for frame in self._frames:
                self._last = frame.pts
                if frame.pts is not None and frame.pts >= time:
                    break
            else:
                continue
            if frame.pts == time and not frame.is_corrupt:
                return frame
        self._last = None
        raise SourceError(self._path, "is damaged", REENCODE)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Translate errors of decoding into a SourceError that names the video."""
        try:
            yield
        except _video_damage() as error:
            self._last = None
            raise damaged(self._path, error) from None


def _resized(frame: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    image = Image.fromarray(frame)
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(image)


def _video_damage() -> tuple[type[Exception], ...]:
    import av

    return (*DAMAGE, av.FFmpegError)


_CONTAINERS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv,gif,h264,"
    "hevc",
}
"""Allowed formats. Playlists are excluded, because they open other files."""


def _video(path: Path) -> av.container.InputContainer:
    import av

    if not path.is_file():
        raise SourceError(path, "is missing", ABSENT)
    try:
        container = av.open(f"file:{path}", container_options=_CONTAINERS)
    except _video_damage() as error:
        raise SourceError(
            path, f"is not a video that can be read ({short_message(error)})", RESTORE
        ) from None
    try:
        _check_video(container, path)
    except BaseException:
        container.close()
        raise
    return container


def _check_video(container: av.container.InputContainer, path: Path) -> None:
    if not container.streams.video:
        raise SourceError(path, "has no video stream", RESTORE)
    stream = _stream(container)
    if getattr(stream, "codec_context", None) is None:
        raise SourceError(path, "has an unknown codec", RESTORE)
    check_pixels(path, stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # The size may change midway.


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    """The main video stream, not a cover or a thumbnail."""
    best = container.streams.best("video")
    return container.streams.video[0] if best is None else cast("av.VideoStream", best)
