"""Videos, decoded at a bounded cost and with errors that name the file."""

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
    MEND,
    RESTORE,
    brief,
    check_pixels,
    damaged,
)
from occgen_hub.media.hdr import Transfer, is_wide, to_sdr, transfer

if TYPE_CHECKING:
    import av

SQUARE = 0.01
"""Pixels whose sides differ by less are square: encoders that scale a little say such things."""

STRETCH = 4
"""Beyond it, no camera's pixels are out of square: whatever says so is wrong."""

ON_TIME = 1e-4
"""Seconds; LeRobot's own tolerance for the time of a frame that it asks for."""


@dataclass(frozen=True)
class VideoFacts:
    """size: (width, height), upright; fps: frames a second, 0 if unknown; frames: how many."""

    size: tuple[int, int]
    fps: float
    frames: int


def video_facts(path: Path) -> VideoFacts:
    """Size, rate and number of frames, the frames counted by their packets, not by the header."""
    with _video(path) as container:
        stream = _stream(container)
        rate = stream.average_rate or stream.guessed_rate
        size, frames, first = (stream.width, stream.height), 0, None
        try:
            for packet in container.demux(stream):
                frames += packet.size > 0
                if first is None:
                    with suppress(*_video_damage()):  # It is the reader's to say.
                        first = next(iter(stream.decode(packet)), None)
                        size = _Upright(stream).size(first) if first is not None else size
        except _video_damage() as error:
            raise damaged(path, error) from None
    return VideoFacts(size, float(rate) if rate else 0.0, frames)


def stated_pixels(path: Path) -> float:
    """Pixels of all frames of a video, as its header has it: a guess. Raises SourceError."""
    with _video(path) as container:
        stream = _stream(container)
        frames = float(stream.frames)
        if not frames and container.duration and stream.average_rate:
            frames = container.duration / 1e6 * float(stream.average_rate)
        pixels = stream.width * stream.height
    return min(max(frames, 1.0), 1e9) * pixels


@dataclass(frozen=True)
class VideoSurvey(VideoFacts):
    """Facts of the frames that the decoder really gives, each of them looked at.

    stated: how many the header speaks of, 0 if of none; steps: the shortest and longest time
    between frames, seconds, None where not known; hdr: how it is HDR, None where it is not;
    reference: whether the file is already what `write_video` makes: an mp4 of H.264 and 4:2:0,
    upright, no HDR, with these frames, frame n at n / fps.
    """

    stated: int
    steps: tuple[float, float] | None
    hdr: Transfer | None
    reference: bool


def survey_video(path: Path) -> VideoSurvey:
    """Decode a video from end to end, making no RGB of its frames.

    Nothing less tells how many there are: packets, headers and durations may all say another
    number. Raises SourceError where a frame is damaged or of another size, or where there are none
    or too many.
    """
    with _video(path) as container:
        survey = _surveyed(container, path)
    shown = survey.reference and video_facts(path).frames == survey.frames  # None left unseen.
    return replace(survey, reference=shown)


def _surveyed(container: av.container.InputContainer, path: Path) -> VideoSurvey:
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
        raise SourceError(path, "holds no frame that can be decoded", RESTORE)
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
        raise SourceError(path, text, "cut it there, and give both parts")
    if n >= MAX_TABLE_ROWS:
        text = f"has more than {MAX_TABLE_ROWS} frames, more than an episode has"
        raise SourceError(path, text, "cut it into parts")


def _is_plain(container: av.container.InputContainer) -> bool:
    """Whether a file, as far as its headers tell, is an mp4 that browsers play."""
    brand = container.metadata.get("major_brand", "")
    codec = _stream(container).codec_context.name
    mp4 = "mp4" in container.format.name.split(",") and brand.strip() != "qt"
    return mp4 and codec == "h264" and len(container.streams.video) == 1


def _ascending(times: list[float | None]) -> list[float]:
    """The times of all frames, seconds, or none of them if they are no times."""
    known = [time for time in times if time is not None]
    sound = len(known) == len(times) and all(after > before for before, after in pairwise(known))
    return known if sound else []


def _average_rate(stream: av.VideoStream, times: list[float]) -> float:
    """Frames a second by the frames' own times, or the stated rate where it says the same."""
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    if len(times) < 2:
        return stated
    span, steps = times[-1] - times[0], len(times) - 1
    if stated > 0 and abs(span - steps / stated) < 1 / stated:
        return stated
    return steps / span


def video_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """(H, W, 3) uint8 RGB frames in order, one in memory at a time, upright, of square pixels."""
    return (picture() for picture in _pictures(path))


def _pictures(path: Path) -> Iterator[Callable[[], NDArray[np.uint8]]]:
    """Functions that make the frames, in order, for those who do not want all of them."""
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
    """The frames of a video as the decoder gives them; raises SourceError where one is damaged.

    What comes before the first keyframe is passed over, since a recording may begin anywhere, and
    so is what the end of the file cuts.
    """
    stream = _stream(container)
    stream.thread_type = "AUTO"
    upright, seen, spoilt = _Upright(stream), 0, False
    damage = _video_damage()  # Not when it is asked for: the interpreter may be ending then.
    try:
        for packet in _from_keyframe(container.demux(stream), path):
            for frame in stream.decode(packet):
                spoilt = spoilt or (frame.is_corrupt and seen > 0)
                if frame.is_corrupt:
                    continue
                if spoilt:
                    raise SourceError(path, f"is damaged at frame {seen}", MEND)
                check_pixels(path, *upright.size(frame))
                seen += 1
                yield frame
    except damage as error:
        problem = f"is damaged at frame {seen} or soon after ({brief(error)})"
        raise SourceError(path, problem, MEND) from None


def _from_keyframe(packets: Iterable[av.Packet], path: Path) -> Iterator[av.Packet]:
    """Packets from the first keyframe on, the last of them left out if it is cut.

    Told by the packets, not by what the decoder makes of them: how soon that errs depends on its
    threads.
    """
    begun = cut = False
    for packet in packets:
        if packet.size and cut:
            raise SourceError(path, "is damaged (its packets are cut)", MEND)
        begun = begun or packet.is_keyframe
        cut = cut or (begun and packet.size > 0 and packet.is_corrupt)
        if not packet.size or (begun and not cut):
            yield packet


class _Upright:
    """Makes (H, W, 3) uint8 RGB of a stream's frames, as a player would show them.

    Turned as the display matrix says, since phones record sideways; of square pixels, wider or
    narrower where the stream's are not, since cameras and networks see no others; with the
    frame's own colour matrix and range, and HDR as SDR.
    """

    def __init__(self, stream: av.VideoStream) -> None:
        from av.video.reformatter import VideoReformatter

        stated = float(stream.sample_aspect_ratio or 1)
        believed = abs(stated - 1) > SQUARE and 1 / STRETCH <= stated <= STRETCH
        self._aspect = stated if believed else 1.0
        self._reformatter = VideoReformatter()
        self._hdr, self._wide = transfer(stream), is_wide(stream)
        self._rotation: int | None = None
        self._turn = (False, False, False)

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB."""
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
        """(width, height) of what would be made of a frame."""
        size = (self._width(frame), frame.height)
        return size[::-1] if self._turned(frame)[0] else size

    def untouched(self, frame: av.VideoFrame) -> bool:
        """Whether a frame is upright and of square pixels as it is."""
        return self._width(frame) == frame.width and not any(self._turned(frame))

    def _turned(self, frame: av.VideoFrame) -> tuple[bool, bool, bool]:
        """`_turn`, looked up where the rotation is new: the look ties a frame into a circle of
        references, so that it is freed late.
        """
        if frame.rotation != self._rotation:
            self._rotation, self._turn = frame.rotation, _turn(frame)
        return self._turn

    def _width(self, frame: av.VideoFrame) -> int:
        return max(1, round(frame.width * self._aspect))


_UNTAGGED, BT601, LIMITED, _FULL = 2, 6, 1, 2
"""AVCOL_SPC_UNSPECIFIED and AVCOL_SPC_SMPTE170M; AVCOL_RANGE_MPEG and AVCOL_RANGE_JPEG."""

_DEFAULT = 5
"""swscale's own matrix: for RGB, which has none, and unlike the frame's, or PyAV heeds neither."""


def _colours(frame: av.VideoFrame) -> dict[str, int]:
    """A frame's matrix and range, for PyAV, which by itself takes every frame for BT.601."""
    if frame.colorspace == _UNTAGGED and frame.color_range != _FULL:
        return {}
    return {
        "src_colorspace": frame.colorspace,
        "dst_colorspace": _DEFAULT,
        "src_color_range": frame.color_range,
    }


def _turn(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """Whether to swap the axes of a frame, and then to reverse x and y, by its display matrix.

    x' = a x + c y and y' = b x + d y, where the matrix is a, b, u, c, d, v, ... as mp4 has it.
    """
    try:
        data = cast("Buffer | None", frame.side_data.get("DISPLAYMATRIX"))
    except ValueError:  # Something beside it that PyAV does not know, as a second view has.
        return _QUARTERS.get(frame.rotation % 360, (False, False, False))
    if data is None:
        return False, False, False
    a, b, _, c, d, *_ = np.frombuffer(data, np.int32).tolist()
    swap = abs(b) + abs(c) > abs(a) + abs(d)
    return (True, c < 0, b < 0) if swap else (False, a < 0, d < 0)


_QUARTERS = {90: (True, False, True), 180: (False, True, True), 270: (True, True, False)}
"""`_turn` by the degrees that PyAV works out of a matrix, which knows of no mirrors."""


Frames = Iterator[Callable[[], NDArray[Any]]]
"""Functions that make frames, in order, for those who do not want all of them."""


class SequentialReader:
    """Frames by number, of what gives them in order only, such as a video.

    They are best asked for in order; going far back starts over. Threads may ask at once: the
    lowest of the numbers that wait comes first, and frames that were passed over are kept for a
    while.

    path: what to name where frames are missing; start: gives the frames from number 0 on.
    """

    KEPT = 32

    def __init__(self, path: Path, start: Callable[[], Frames]) -> None:
        self._path, self._start = path, start
        self._next = 0
        self._frames = start()
        self._passed: dict[int, Callable[[], NDArray[Any]]] = {}
        self._turn = threading.Condition()
        self._waiting: list[int] = []
        self._busy = False

    def __call__(self, number: int) -> NDArray[Any]:
        """The frame of that number."""
        with self._turn:
            self._waiting.append(number)
            try:
                self._turn.wait_for(lambda: not self._busy and number == min(self._waiting))
            finally:  # Or the others would wait for one who has left.
                self._waiting.remove(number)
            self._busy = True
        try:
            return self._picture(number)()
        finally:
            with self._turn:
                self._busy = False
                self._turn.notify_all()

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
    """Frames of a video by number, see `SequentialReader`."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._size = size
        self._read = SequentialReader(path, partial(_pictures, path))

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, upright, resized to the size asked for."""
        return _resized(self._read(number), self._size)


def frames_at(path: Path, times: NDArray[np.float64], tolerance: float, *, grey: bool) -> Frames:
    """The frames that a video shows at some times, from the first of these on.

    times: (n,) seconds, ascending; tolerance: seconds that a frame may be off. Frames are (H, W, 3)
    uint8 RGB, upright; with `grey` they are (H, W) uint16, the codes of a grey video of over 8
    bits. Only the part of the file around the times is decoded, unless a decoder that begins there
    loses frames. Raises SourceError where no frame is near a time.
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
            # No earlier: where files were joined, a decoder that begins before may lose the next.
            with suppress(*_video_damage()):  # Then it is decoded from where it stands.
                container.seek(round(times[0] / stream.time_base), stream=stream)
        shown = _decoded(container, path)
        frame, following = next(shown, None), next(shown, None)
        for time in times.tolist():
            while following is not None and _nearer(following, frame, time):
                frame, following = following, next(shown, None)
            if frame is None or frame.time is None or abs(frame.time - time) > tolerance:
                raise SourceError(path, f"has no frame at {time:.3f} s", RESTORE)
            as_color = partial(_converted, upright, frame, path)
            yield partial(_codes, frame, path) if grey else as_color


def _nearer(frame: av.VideoFrame, than: av.VideoFrame | None, time: float) -> bool:
    """Whether a frame is as near to a time as the one before it, or nearer."""
    if frame.time is None or than is None or than.time is None:
        return True
    return abs(frame.time - time) <= abs(than.time - time)


def _codes(frame: av.VideoFrame, path: Path) -> NDArray[np.uint16]:
    """(H, W) uint16: the first plane of a frame, as it is stored."""
    if not frame.format.name.endswith("le") or frame.format.components[0].bits <= 8:
        problem = f"is no video of depth: its pixels are {frame.format.name}"
        raise SourceError(path, problem, "name another column of depth")
    plane = frame.planes[0]
    rows = np.frombuffer(plane, np.uint16).reshape(-1, plane.line_size // 2)
    return np.array(rows[: frame.height, : frame.width])


class SeekingVideo:
    """Frames of a video by number, each decoded from the keyframe before it, or from the last."""

    def __init__(self, path: Path, size: tuple[int, int]) -> None:
        self._path, self._size = path, size
        self._container = _video(path)
        self._stream = _stream(self._container)
        self._stream.codec_context.thread_count = 1  # Loaders have their own processes.
        self._upright = _Upright(self._stream)
        with self._damage():
            packets = _from_keyframe(self._container.demux(self._stream), path)
            known = [(p.pts, p.is_keyframe, p.is_discard) for p in packets if p.size]
        if any(time is None for time, *_ in known):
            raise SourceError(path, "has frames without a time", MEND)
        # A video that was cut may begin after its keyframe, which is there, and not shown.
        self._times = sorted(t for t, _, discarded in known if t is not None and not discarded)
        self._keys = sorted(t for t, key, _ in known if t is not None and key)
        self._frames: Iterator[av.VideoFrame] = iter(())
        self._last: int | None = None

    def __call__(self, number: int) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB, upright, resized to the size asked for."""
        if number >= len(self._times):
            raise SourceError(self._path, f"ends before frame {number}", RESTORE)
        with self._damage():
            frame = self._upright(self._decoded(self._times[number]))
        return _resized(frame, self._size)

    def _decoded(self, time: int) -> av.VideoFrame:
        """The frame of that time, in the stream's units."""
        key = self._keys[max(0, bisect_right(self._keys, time) - 1)]
        # From the last frame on, unless a keyframe is nearer. The first time may be shown by a
        # decoder that needs more than the keyframe: then all of it is decoded.
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
        raise SourceError(self._path, "is damaged", MEND)

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Has what goes wrong in decoding name the video."""
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
"""Files that hold their own frames: no playlist, which would have other files opened."""


def _video(path: Path) -> av.container.InputContainer:
    import av

    if not path.is_file():
        raise SourceError(path, "is missing", ABSENT)
    try:
        container = av.open(f"file:{path}", container_options=_CONTAINERS)
    except _video_damage() as error:
        raise SourceError(
            path, f"is not a video that can be read ({brief(error)})", RESTORE
        ) from None
    try:
        _check_video(container, path)
    except BaseException:
        container.close()
        raise
    return container


def _check_video(container: av.container.InputContainer, path: Path) -> None:
    if not container.streams.video:
        raise SourceError(path, "holds no video", RESTORE)
    stream = _stream(container)
    if getattr(stream, "codec_context", None) is None:
        raise SourceError(path, "is of no codec that can be read", RESTORE)
    check_pixels(path, stream.width, stream.height)
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # Should it change midway.


def _stream(container: av.container.InputContainer) -> av.VideoStream:
    """The video itself, where there is a cover or a thumbnail beside it."""
    best = container.streams.best("video")
    return container.streams.video[0] if best is None else cast("av.VideoStream", best)
