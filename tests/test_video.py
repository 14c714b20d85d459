"""RGB video as a source: video files, folders of images, and the files written from them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from occgen_hub.builder import load_builder
from occgen_hub.builders.video import VideoBuilder
from occgen_hub.config import Config
from occgen_hub.episode import Episode
from occgen_hub.errors import SourceError, UsageError
from occgen_hub.job import check_paths, list_episodes
from occgen_hub.lerobot.writer import Media, TrajectoryWriter
from occgen_hub.media import (
    VideoReader,
    survey_video,
    video,
    video_facts,
    video_frames,
    write_video,
)
from occgen_hub.media.hdr import compressed, to_sdr
from occgen_hub.occupancy.grid import Grid
from occgen_hub.schema import load_schema

RED, GREEN, BLUE, WHITE = (220, 30, 30), (30, 200, 30), (30, 30, 220), (240, 240, 240)
REFERENCE = "videos/chunk-000/observation.video.trajectory/reference.mp4"
RGB = "videos/chunk-000/observation.images.rgb"


def quadrants(width: int = 96, height: int = 64) -> np.ndarray:
    """An image of red, green, blue and white quarters, in reading order."""
    image = np.empty((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = RED, GREEN
    image[height // 2 :, : width // 2], image[height // 2 :, width // 2 :] = BLUE, WHITE
    return image


def corners(image: np.ndarray) -> list[tuple[int, ...]]:
    """The colours at the centres of the four quarters, in reading order."""
    height, width = image.shape[:2]
    return [
        tuple(image[y, x].tolist())
        for y in (height // 4, 3 * height // 4)
        for x in (width // 4, 3 * width // 4)
    ]


def assert_upright(image: np.ndarray, tolerance: int = 10) -> None:
    expected = [RED, GREEN, BLUE, WHITE]
    assert np.abs(np.subtract(corners(image), expected)).max() <= tolerance, corners(image)


def numbered_frames(count: int, width: int = 96, height: int = 64) -> list[np.ndarray]:
    """Grey frames that get lighter: frame t has the value 8 t + 8, up to 30 frames."""
    return [np.full((height, width, 3), 8 * (t % 30) + 8, np.uint8) for t in range(count)]


def frame_number(frame: np.ndarray) -> int:
    return round((float(frame.mean()) - 8) / 8)


def write_recording(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: float = 10,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """Write a video. times: of the frames in milliseconds, for a variable rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    faststart = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=faststart) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for key, value in context.items():
            setattr(stream.codec_context, key, value)
        for t, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image)
            if times is not None:
                frame.pts, frame.time_base = times[t], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    """Write (a, b, c, d) into the display matrix of an mp4, as phones do."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def read(path: Path) -> Episode:
    builder = VideoBuilder(path)
    (ref,) = builder.episodes()
    return builder.read(ref)


def ids(root: Path) -> list[str]:
    return [ref.id.split("/")[1] for ref in VideoBuilder(root).episodes()]


def notes(episode: Episode) -> dict[str, str]:
    return {note.code: note.text for note in episode.notes}


def all_frames(episode: Episode) -> list[np.ndarray]:
    return [episode.read_rgb(t) for t in range(episode.length)]


def assert_fails(path: Path, problem: str, named: Path | None = None) -> None:
    """Check that reading fails with one sentence that names the file."""
    with pytest.raises(SourceError) as caught:
        all_frames(read(path))
    text = str(caught.value)
    assert problem in text
    assert str(named or path) in text
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 600


# Video files


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.m4v", "libx264"),
        ("a.mov", "libx264"),
        ("a.mkv", "libx264"),
        ("a.avi", "mpeg4"),
        ("a.webm", "libvpx-vp9"),
        ("A.MP4", "libx265"),
        ("a.mpg", "mpeg2video"),
        ("a.mts", "libx264"),
        ("a.ts", "libx264"),
        ("a.h264", "libx264"),
        ("a.hevc", "libx265"),
        ("a.wmv", "wmv2"),
        ("a.flv", "flv"),
    ],
)
def test_video_is_read_as_one_episode(name: str, codec: str, tmp_path: Path) -> None:
    fps = 25 if name in ("a.mpg", "a.h264", "a.hevc") else 10  # The default of bare streams.
    path = write_recording(tmp_path / name, [quadrants()] * 12, codec, fps=fps)

    episode = read(path)

    assert episode.id == f"custom_videos/{path.stem}/trajectory_0"
    assert (episode.length, episode.fps, episode.image_size) == (12, fps, (96, 64))
    assert episode.world_from_camera is None
    assert episode.intrinsics is None
    assert episode.read_depth is None
    assert (episode.robot_type, episode.columns) == ("unknown", {})
    assert episode.task_index.tolist() == [0] * 12
    assert len(episode.tasks) == 1
    assert not episode.notes
    frames = all_frames(episode)
    assert {frame.shape for frame in frames} == {(64, 96, 3)}
    for frame in frames:
        assert_upright(frame)
    # Only an mp4 with H.264 is used unchanged.
    assert [item.path for item in episode.media] == ([path] if name in ("a.mp4", "a.m4v") else [])


def test_frames_can_be_read_in_any_order(tmp_path: Path) -> None:
    episode = read(write_recording(tmp_path / "a.mp4", numbered_frames(30)))
    assert [frame_number(frame) for frame in all_frames(episode)] == list(range(30))
    assert [frame_number(episode.read_rgb(t)) for t in (7, 3, 29, 12, 13)] == [7, 3, 29, 12, 13]


@pytest.mark.parametrize("step", [1, 4])
def test_frames_can_be_read_from_several_threads(step: int, tmp_path: Path) -> None:
    episode = read(write_recording(tmp_path / "a.mp4", numbered_frames(30)))
    asked = range(0, 30, step)
    with ThreadPoolExecutor(12) as pool:
        assert [frame_number(frame) for frame in pool.map(episode.read_rgb, asked)] == list(asked)


@pytest.mark.parametrize(
    ("matrix", "back"),
    {
        (0, 1, -1, 0): lambda image: np.rot90(image),
        (-1, 0, 0, -1): lambda image: np.rot90(image, 2),
        (0, -1, 1, 0): lambda image: np.rot90(image, 3),
        (-1, 0, 0, 1): lambda image: image[:, ::-1],
        (1, 0, 0, -1): lambda image: image[::-1],
        (0, 1, 1, 0): lambda image: image.swapaxes(0, 1),
    }.items(),
)
def test_rotated_video_is_read_upright(
    matrix: tuple[int, int, int, int], back: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    stored = np.ascontiguousarray(back(quadrants(64, 96)))
    path = write_recording(tmp_path / "phone.mp4", [stored] * 3)
    set_display_matrix(path, matrix)

    episode = read(path)

    assert episode.image_size == (64, 96) == video_facts(path).size == survey_video(path).size
    assert not episode.media
    for frame in (*all_frames(episode), *video_frames(path), VideoReader(path, (64, 96))(1)):
        assert frame.shape == (96, 64, 3)
        assert frame.flags.c_contiguous
        assert_upright(frame)


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("libvpx-vp9", "yuv420p"), ("ffv1", "yuv444p"), ("ffv1", "gray")]
)
def test_odd_frame_sizes_are_kept(codec: str, pix_fmt: str, tmp_path: Path) -> None:
    episode = read(write_recording(tmp_path / "odd.mkv", [quadrants(481, 271)] * 2, codec, pix_fmt))
    assert episode.image_size == (481, 271)
    frame = episode.read_rgb(1)
    assert frame.shape == (271, 481, 3)
    if pix_fmt != "gray":
        assert_upright(frame)


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "tags"),
    [
        ("libx264", "yuv420p10le", {}),
        ("libx264", "yuv422p", {}),
        ("libx264rgb", "rgb24", {}),
        ("ffv1", "gray", {}),
        ("ffv1", "gray16le", {}),
        ("ffv1", "rgba64le", {}),
        ("ffv1", "yuva420p", {}),
        ("mjpeg", "yuvj420p", {"color_range": 2}),
        ("libx264", "yuv420p", {"interlaced": True}),
        ("prores_ks", "yuv422p10le", {}),
    ],
)
def test_pixel_formats_are_converted_to_rgb(
    codec: str, pix_fmt: str, tags: dict[str, Any], tmp_path: Path
) -> None:
    options = {"x264-params": "interlaced=1"} if tags.pop("interlaced", False) else {}
    path = write_recording(
        tmp_path / "a.mkv", [quadrants()] * 2, codec, pix_fmt, options=options, **tags
    )
    episode = read(path)
    assert not episode.media
    frame = episode.read_rgb(0)
    assert frame.dtype == np.uint8
    if "gray" in pix_fmt:
        assert (frame == frame[..., :1]).all()
        assert [round(c[0] / 4) for c in corners(frame)] == pytest.approx(
            [round(np.dot(c, (0.299, 0.587, 0.114)) / 4) for c in (RED, GREEN, BLUE, WHITE)], abs=2
        )
    else:
        assert_upright(frame)


@pytest.mark.parametrize(("matrix", "full"), [(1, False), (1, True), (6, True), (9, False)])
def test_colours_follow_the_colour_tags(matrix: int, full: bool, tmp_path: Path) -> None:
    path = tmp_path / "tagged.mkv"
    made = av.VideoFrame.from_ndarray(quadrants()).reformat(
        format="yuv444p", src_colorspace=5, dst_colorspace=matrix, dst_color_range=1 + full
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, 1 + full
        container.mux(stream.encode(made))
        container.mux(stream.encode())
    assert_upright(read(path).read_rgb(0), tolerance=3)


def test_non_square_pixels_are_made_square(tmp_path: Path) -> None:
    wide = write_recording(
        tmp_path / "wide.mp4", [quadrants()] * 2, sample_aspect_ratio=Fraction(4, 3)
    )
    episode = read(wide)
    assert episode.image_size == (128, 64) == video_facts(wide).size
    assert not episode.media
    assert_upright(episode.read_rgb(1))

    set_display_matrix(wide, (0, 1, -1, 0))
    assert read(wide).image_size == (64, 128)

    for ratio in (
        Fraction(136, 135),
        Fraction(1, 50),
    ):  # Nearly square, and implausible: both are treated as square.
        path = write_recording(tmp_path / "a.mp4", [quadrants()] * 2, sample_aspect_ratio=ratio)
        assert read(path).image_size == (96, 64)


def test_variable_rate_video_keeps_each_frame_at_the_average_fps(tmp_path: Path) -> None:
    times = [0, 20, 90, 130, 180, 400, 430, 450, 500, 900]
    path = write_recording(tmp_path / "vfr.mp4", numbered_frames(10), times=times)
    episode = read(path)
    assert episode.length == 10
    assert episode.fps == pytest.approx(10, abs=0.7)
    assert not episode.media
    assert "20 to 400 ms" in notes(episode)["variable rate"]
    assert [frame_number(frame) for frame in all_frames(episode)] == list(range(10))


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 24, 120, 240, Fraction(1, 2)])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_constant_frame_rates_are_read_exactly(name: str, fps: Fraction, tmp_path: Path) -> None:
    episode = read(write_recording(tmp_path / name, numbered_frames(20), fps=fps))
    assert episode.fps == pytest.approx(float(fps), rel=1e-7)
    assert not episode.notes


def test_video_of_a_single_frame_is_read(tmp_path: Path) -> None:
    episode = read(write_recording(tmp_path / "one.mp4", [quadrants()]))
    assert (episode.length, episode.fps) == (1, 10)
    assert_upright(episode.read_rgb(0))


def test_wrong_frame_count_in_the_header_is_ignored(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.avi", numbered_frames(10), "mpeg4")
    content = bytearray(path.read_bytes())
    for box, offset in ((b"avih", 24), (b"strh", 40)):  # Frame counts of file and stream.
        place = content.index(box) + 8 + offset - (0 if box == b"avih" else 8)
        content[place : place + 4] = struct.pack("<I", 4000)
    path.write_bytes(content)
    episode = read(path)
    assert (episode.length, len(all_frames(episode))) == (10, 10)


def test_frames_hidden_by_an_edit_list_are_skipped(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "trimmed.mp4", numbered_frames(20), options={"bf": "0"})
    content = bytearray(path.read_bytes())
    place = content.index(b"elst") + 16
    (step,) = struct.unpack(">I", content[content.index(b"stts") + 16 :][:4])
    content[place : place + 4] = struct.pack(">i", 5 * step)  # Start with frame 5.
    path.write_bytes(content)

    episode = read(path)

    assert video_facts(path).frames == 20
    assert episode.length == 15
    assert [frame_number(frame) for frame in all_frames(episode)] == list(range(5, 20))
    assert "states 20 frames, but 15 can be decoded" in notes(episode)["frame count"]
    assert not episode.media


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mts", "a.avi"])
def test_truncated_video_keeps_the_frames_before_the_end(name: str, tmp_path: Path) -> None:
    codec = "mpeg4" if name == "a.avi" else "libx264"
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    frames = [np.ascontiguousarray(np.roll(noise, 5 * t, 1)) for t in range(40)]
    path = write_recording(tmp_path / name, frames, codec)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])

    episode = read(path)

    assert 10 < episode.length < 36
    assert len(all_frames(episode)) == episode.length
    if name in ("a.mp4", "a.avi"):
        assert "states 40 frames" in notes(episode)["frame count"]


def test_video_that_starts_between_keyframes_begins_at_the_next_keyframe(tmp_path: Path) -> None:
    path = write_recording(
        tmp_path / "whole.mp4", numbered_frames(30), options={"g": "10", "bf": "0"}
    )
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mts"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for n, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size and n >= 4:
                packet.stream = stream
                target.mux(packet)
    episode = read(tmp_path / "late.mts")
    assert episode.length == 20
    assert [frame_number(frame) for frame in all_frames(episode)] == list(range(10, 30))


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for n in range(len(content) // 2, len(content) // 2 + 300):
        content[n] ^= 0x5A
    path.write_bytes(content)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is not a video that can be read"),
    "garbage": (lambda p: p.write_bytes(os.urandom(5000)), "is not a video that can be read"),
    "text": (lambda p: p.write_text("hello\n" * 99), "is not a video that can be read"),
    "a playlist": (
        lambda p: p.write_text("#EXTM3U\n#EXTINF:1,\na.ts\n"), "is not a video that can be read",
    ),
    "an image": (
        lambda p: Image.fromarray(quadrants()).save(p, "PNG"), "is not a video that can be read",
    ),
    "cut in its header": (
        lambda p: p.write_bytes(p.read_bytes()[:600]), "is not a video that can be read",
    ),
    "without its first part": (
        lambda p: p.write_bytes(p.read_bytes()[3000:]), "is not a video that can be read",
    ),
    "a broken link": (lambda p: (p.unlink(), p.symlink_to("nowhere")), "is missing"),
    "a pipe": (lambda p: (p.unlink(), os.mkfifo(p)), "is not a regular file"),
    "damaged in the middle": (damage_middle, "is damaged at frame"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_video_fails_with_one_sentence_and_other_videos_are_read(
    name: str, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    bad = write_recording(tmp_path / "in" / "bad.mp4", [np.roll(noise, t, 1) for t in range(20)])
    write_recording(tmp_path / "in" / "good.mp4", [quadrants()] * 2)
    change, problem = DAMAGED[name]
    change(bad)

    builder = VideoBuilder(tmp_path / "in")
    first, second = builder.episodes()

    with pytest.raises(SourceError) as caught:
        builder.read(first)
    text = str(caught.value)
    assert problem in text
    assert str(bad) in text
    assert text.endswith(".")
    assert "\n" not in text
    assert builder.read(second).length == 2


def test_file_with_only_sound_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for _ in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate = 44100
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert_fails(tmp_path / "sound.mp4", "has no video stream")


def test_video_without_frames_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.start_encoding()
    assert_fails(tmp_path / "none.mp4", "")


def test_video_that_changes_size_is_refused(tmp_path: Path) -> None:
    small = write_recording(tmp_path / "1.mpg", numbered_frames(5), "mpeg2video", fps=25)
    large = write_recording(tmp_path / "2.mpg", numbered_frames(5, 128, 96), "mpeg2video", fps=25)
    both = tmp_path / "both.mpg"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    assert_fails(both, "changes from 96 x 64 to 128 x 96 pixels at frame")


@pytest.mark.parametrize("size", [(8, 200), (200, 8)])
def test_very_small_frames_are_refused(size: tuple[int, int], tmp_path: Path) -> None:
    assert_fails(write_recording(tmp_path / "a.mkv", numbered_frames(2, *size), "ffv1"), "8")


def test_memory_does_not_grow_with_a_long_video(tmp_path: Path) -> None:
    path = write_recording(
        tmp_path / "long.mp4", numbered_frames(30, 320, 240) * 67, options={"preset": "veryfast"}
    )
    process = psutil.Process()
    episode = read(path)
    assert episode.length == 2010
    before = process.memory_info().rss
    most, seen = before, []
    for t, frame in enumerate(video_frames(path)):
        if t % 100 == 0:
            most = max(most, process.memory_info().rss - frame.nbytes)
    assert t == 2009
    for t in range(0, episode.length, 60):  # Skipped frames are not kept either.
        seen.append(frame_number(episode.read_rgb(t)))
        most = max(most, process.memory_info().rss)
    assert set(seen) == {0}
    assert most - before < 40e6


def test_real_video_is_read(real_tree: Path) -> None:
    (path,) = real_tree.rglob("observation.video.trajectory/*.mp4")
    episode = read(path)
    assert (episode.length, episode.fps, episode.image_size) == (52, 10, (480, 272))
    assert [item.path for item in episode.media] == [path]
    jpeg = next(real_tree.rglob("observation.images.rgb/30.jpg"))
    image = np.asarray(Image.open(jpeg).resize((480, 272)), np.float64)
    assert np.abs(episode.read_rgb(30) - image).mean() < 6


# Folders of images


def write_images(folder: Path, names: list[str], **options: Any) -> Path:
    """Write numbered grey images; the first is the darkest."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, numbered_frames(len(names)), strict=True):
        Image.fromarray(image).save(folder / name, **options)
    return folder


@pytest.mark.parametrize(
    "names",
    [
        [f"{n}.jpg" for n in range(8, 13)],
        [f"frame_{n}.PNG" for n in range(98, 103)],
        ["IMG_2.jpeg", "IMG_10.jpeg", "IMG_100.png"],
        ["0.5s.jpg", "0.10s.jpg", "1.0s.jpg"],
        ["a1b9.png", "a1b10.png", "a2b1.png", "a10b1.png"],
    ],
)
def test_images_are_frames_in_natural_order(names: list[str], tmp_path: Path) -> None:
    folder = write_images(tmp_path / "walk", names, quality=98)
    (folder / "notes.txt").write_text("x")
    (folder / ".9.jpg").write_text("hidden")
    (folder / "11.jpg.d").mkdir()
    episode = read(folder)
    assert episode.id == "custom_videos/walk/trajectory_0"
    assert (episode.length, episode.fps) == (len(names), 30)
    assert [frame_number(frame) for frame in all_frames(episode)] == list(range(len(names)))
    assert "30 fps is assumed" in notes(episode)["fps"]
    jpegs = all(name.lower().endswith(("jpg", "jpeg")) for name in names)
    assert [item.path.name for item in episode.media] == (names if jpegs else [])
    assert [item.frame for item in episode.media] == (list(range(len(names))) if jpegs else [])


# How a camera transforms an upright image before storing it, for each EXIF orientation.
EXIF_TRANSPOSES = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", EXIF_TRANSPOSES)
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_images_are_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    upright, way, exif = Image.fromarray(quadrants()), EXIF_TRANSPOSES[orientation], Image.Exif()
    exif[0x0112] = orientation
    stored = upright if way is None else upright.transpose(way)
    stored.save(tmp_path / f"0.{kind}", exif=exif, quality=95)

    episode = read(tmp_path)

    assert episode.image_size == (96, 64)
    assert_upright(episode.read_rgb(0))
    with Image.open(tmp_path / f"0.{kind}") as image:
        assert np.array_equal(episode.read_rgb(0), np.asarray(ImageOps.exif_transpose(image)))
    assert bool(episode.media) == (kind == "jpg" and orientation == 1)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_image_modes_are_converted_to_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(quadrants()).convert(mode)
    image.save(tmp_path / ("0.jpg" if mode == "CMYK" else "0.png"))
    episode = read(tmp_path)
    frame = episode.read_rgb(0)
    assert frame.shape == (64, 96, 3)
    assert not episode.media
    if mode in ("P", "RGBA", "CMYK"):
        assert_upright(frame, tolerance=40 if mode == "P" else 10)
    else:
        assert (frame == frame[..., :1]).all()
        grey = quadrants() @ (0.299, 0.587, 0.114)
        assert mode == "1" or np.abs(frame[..., 0] - grey).max() <= 2


def test_transparent_pixels_become_black(tmp_path: Path) -> None:
    pixels = np.dstack([quadrants(), np.full((64, 96), 255, np.uint8)])
    pixels[:32, :48, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "0.png")
    Image.fromarray(quadrants()).convert("P").save(
        tmp_path / "1.png", transparency=bytes([255] * 9)
    )
    episode = read(tmp_path)
    assert corners(episode.read_rgb(0)) == [(0, 0, 0), GREEN, BLUE, WHITE]
    assert episode.read_rgb(1).shape == (64, 96, 3)


def test_error_names_an_invalid_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["1.jpg", "2.jpg", "3.jpg"])
    bad = folder / "2.jpg"
    whole = bad.read_bytes()

    Image.new("RGB", (64, 96)).save(bad)
    assert_fails(folder, "is 64 x 96 pixels upright, 1.jpg 96 x 64", bad)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 96)).save(bad, exif=exif)
    assert read(folder).length == 3

    bad.write_bytes(whole[: len(whole) * 2 // 3])
    assert_fails(folder, "is damaged", bad)
    bad.write_bytes(b"")
    assert_fails(folder, "is not a JPEG or PNG image", bad)
    bad.unlink()
    os.mkfifo(bad)
    assert_fails(folder, "is not a regular file", bad)
    bad.unlink()
    bad.symlink_to("nowhere")
    assert_fails(folder, "is missing", bad)
    bad.unlink()
    shutil.copy(folder / "1.jpg", folder / "1.jpeg")
    assert_fails(folder, "has the same name as", folder / "1.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0II*\0" + b"\xff" * 64]
)
def test_unreadable_exif_data_are_ignored(exif: bytes, tmp_path: Path) -> None:
    Image.fromarray(quadrants()).save(tmp_path / "0.jpg", exif=exif, quality=95)
    assert_upright(read(tmp_path).read_rgb(0))


# Finding and naming


def test_videos_and_image_folders_are_found_recursively(tmp_path: Path) -> None:
    for name in ("clip.mp4", "sub/clip.mkv", "sub/deeper/a.b.mp4", ".hidden/x.mp4", "._clip.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    write_images(tmp_path / "walk", ["0.jpg"])
    write_images(tmp_path / "sub", ["cover.jpg"])
    (tmp_path / "readme.txt").write_text("x")
    assert ids(tmp_path) == ["clip", "sub_clip", "sub_deeper_a.b", "walk"]
    assert ids(tmp_path / "clip.mp4") == ["clip"]
    assert ids(tmp_path / "walk") == ["walk"]
    assert ids(tmp_path / "sub" / "..") == ids(tmp_path)


def test_episode_names_are_unique(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mov", "b.mp4", "c.mp4", "C.mp4", "d/e.mp4", "d_e.mp4", "x_mov.mp4",
                 "x.mov", "x.mp4"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = ids(tmp_path)
    assert len({name.casefold() for name in found}) == len(found) == 10
    assert found == sorted(found) == ids(tmp_path)
    assert {"a_mov", "a_mp4", "b"} <= set(found)
    assert not {"a", "c", "C", "d_e"} & set(found)
    assert sum(name.startswith("d_e_mp4_") for name in found) == 2

    (tmp_path / "a.mov").unlink()
    assert {"a"} <= set(ids(tmp_path))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("my holiday (1).mp4", "my_holiday_1"),
        ("-rf.mp4", "rf"),
        ("видео.mp4", "видео"),
        ("cafe\u0301.mp4", "café"),
        ("???.mp4", "video"),
        ("a\nb\t.mp4", "a_b"),
        ("x" * 250 + ".mp4", "x" * 120),
        ("é" * 120 + ".mp4", "é" * 60),
        ("v1.0.mp4", "v1.0"),
        (os.fsdecode(b"a\xff\xfeb.mp4"), "a_b"),
        ("..mp4", "video"),
    ],
)
def test_odd_names_become_safe_ones(name: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    if not name.startswith("."):
        assert ids(tmp_path) == [expected]
    assert ids(tmp_path / name) == [expected]


def test_video_with_a_name_that_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "plain.mp4", numbered_frames(3))
    path = path.rename(tmp_path / os.fsdecode(b"a\xff.mp4"))
    assert [frame_number(frame) for frame in video_frames(path)] == [0, 1, 2]
    assert survey_video(path).reference


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.mp4").write_bytes(b"")
    (tmp_path / "in" / "a" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "b").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "c.mp4").symlink_to(tmp_path / "in" / "a" / "x.mp4")
    assert ids(tmp_path / "in") == ["a_x", "c"]


def test_source_video_can_be_loaded_by_name(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.mp4", numbered_frames(2))
    (ref,) = list_episodes(load_builder("video", path))
    assert ref.id == "custom_videos/a/trajectory_0"


def test_input_without_videos_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("x")
    (tmp_path / "clip.mp4").write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    wrong: list[tuple[Callable[[], object], str]] = [
        (lambda: list_episodes(VideoBuilder(tmp_path / "in")), "neither videos (mp4"),
        (lambda: list_episodes(load_builder("internnav", tmp_path / "clip.mp4")),
         "is not a folder; it is a video: use --source video."),
        (lambda: list_episodes(load_builder("internnav", tmp_path / "in" / "a.txt")),
         "is not a folder; give the root of the source tree as --input, or another --source than "
         "internnav: capture, internnav"),
        (lambda: check_paths(tmp_path / "no", tmp_path / "out"), "does not exist; give the input"),
        (lambda: check_paths(Path("/dev/null"), tmp_path / "out"), "is not a folder or a file"),
        (lambda: check_paths(tmp_path / "in", tmp_path / "in" / "out"), "inside the input"),
        (lambda: check_paths(tmp_path / "in", tmp_path), "is inside the output"),
        (lambda: check_paths(tmp_path / "in", tmp_path / "loop"), "cannot be followed"),
        (lambda: check_paths(tmp_path / "clip.mp4", tmp_path / "clip.mp4"), "inside the input"),
        (lambda: check_paths(tmp_path / "clip.mp4", tmp_path / "clip.mp4" / "x"), "inside"),
    ]  # fmt: skip
    for command, problem in wrong:
        with pytest.raises(UsageError) as caught:
            command()
        assert problem in str(caught.value)
    check_paths(tmp_path / "clip.mp4", tmp_path)
    check_paths(tmp_path / "clip.mp4", tmp_path / "clip")


# Written files


def write(episode: Episode, folder: Path, media: Media = "copy") -> Path:
    """Write the media of an episode and return the path of the video."""
    schema, grid = load_schema("trajectory"), Grid.of(Config(voxel_size=0.5))
    TrajectoryWriter(folder, schema, episode, grid).write_media(media)
    video = folder / REFERENCE
    assert media == "none" or video_facts(video).frames == episode.length
    return video


@pytest.mark.parametrize("media", ["copy", "link", "none"])
def test_suitable_video_is_copied(media: Media, tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.mp4", [quadrants()] * 6)
    video = write(read(path), tmp_path / "out" / "a", media)
    assert video.exists() == (media != "none")
    if media != "none":
        assert video.read_bytes() == path.read_bytes()
        assert video.samefile(path) == (media == "link")


def write_rotated(path: Path) -> None:
    write_recording(
        path, [np.ascontiguousarray(np.rot90(quadrants()))] * 6, fps=Fraction(30000, 1001)
    )
    set_display_matrix(path, (0, 1, -1, 0))


def write_with_cover(path: Path) -> None:
    write_recording(path, [quadrants()] * 6)
    with av.open(str(path)) as source, av.open(str(path.with_name("b.mp4")), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        cover = target.add_stream("mjpeg", rate=10)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        target.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    path.with_name("b.mp4").replace(path)


RE_ENCODED: dict[str, Callable[[Path], object]] = {
    "turned": write_rotated,
    "odd size": lambda p: write_recording(p, [quadrants(97, 65)] * 6, "libvpx-vp9"),
    "4:4:4": lambda p: write_recording(p, [quadrants()] * 6, pix_fmt="yuv444p"),
    "variable rate": lambda p: write_recording(
        p, [quadrants()] * 6, times=[0, 20, 90, 130, 400, 700]
    ),
    "begins late": lambda p: write_recording(
        p, [quadrants()] * 6, times=[500 + 100 * t for t in range(6)]
    ),
    "HEVC": lambda p: write_recording(p, [quadrants()] * 6, "libx265"),
    "wide pixels": lambda p: write_recording(
        p, [quadrants()] * 6, sample_aspect_ratio=Fraction(4, 3)
    ),
    "cover": write_with_cover,
}


@pytest.mark.parametrize("name", RE_ENCODED)
def test_unsuitable_videos_are_re_encoded(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    RE_ENCODED[name](path)
    episode = read(path)
    assert episode.length == 6
    assert not episode.media

    video = write(episode, tmp_path / "out" / "a")

    survey = survey_video(video)
    assert survey.reference
    assert survey.frames == 6
    assert survey.fps == pytest.approx(episode.fps, rel=1e-7)
    width, height = episode.image_size
    assert survey.size == (width // 2 * 2, height // 2 * 2)
    for frame in video_frames(video):
        assert_upright(frame)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_video_is_encoded_from_images(kind: str, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", [f"{n}.{kind}" for n in range(8, 12)])
    video = write(read(folder), tmp_path / "out" / "a")
    assert [frame_number(frame) for frame in video_frames(video)] == [0, 1, 2, 3]
    assert survey_video(video).fps == 30
    copies = sorted((tmp_path / "out" / "a" / RGB).glob("*"))
    assert [p.name for p in copies] == (
        ["0.jpg", "1.jpg", "2.jpg", "3.jpg"] if kind == "jpg" else []
    )


def test_equal_videos_have_equal_fingerprints(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "a.mp4", [quadrants()] * 3, 10)
    one, other = (read(tmp_path / folder / "a.mp4") for folder in ("x", "y"))
    assert one.fingerprint == other.fingerprint
    write_video(tmp_path / "y" / "a.mp4", [quadrants()] * 4, 10)
    assert read(tmp_path / "y" / "a.mp4").fingerprint != one.fingerprint


# Inputs that are not one video


def write_depth_images(folder: Path, names: list[str]) -> Path:
    """Write 16-bit grey images, the format of depth."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, name in enumerate(names):
        Image.fromarray(np.full((64, 96), 10_000 + n, np.uint16)).save(folder / name)
    return folder


def test_folder_of_depth_images_is_not_a_video(tmp_path: Path) -> None:
    write_images(tmp_path / "rgb", ["0.png", "1.png"])
    write_depth_images(tmp_path / "depth", ["0.png", "1.png"])
    assert ids(tmp_path) == ["rgb"]
    with pytest.raises(UsageError, match="16-bit grey ones are depth"):
        list(VideoBuilder(tmp_path / "depth").episodes())


def test_depth_images_among_colour_images_are_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "in", ["frame_0.png", "frame_1.png"])
    write_depth_images(folder, ["zdepth_0.png"])
    assert_fails(
        folder, "is a 16-bit grey image, which is the format of depth", folder / "zdepth_0.png"
    )


def write_lerobot_v3(root: Path, held: list[tuple[int, int]], *, tables: bool = True) -> Path:
    """A LeRobot v3.0 dataset with one video file; held: (chunk, file) of each episode."""
    key, episodes = "observation.images.front", root / "meta/episodes/chunk-000"
    episodes.mkdir(parents=True)
    info = {"codebase_version": "v3.0", "total_episodes": len(held)}
    (root / "meta/info.json").write_text(json.dumps(info))
    if tables:
        columns = {
            f"videos/{key}/chunk_index": [chunk for chunk, _ in held],
            f"videos/{key}/file_index": [file for _, file in held],
        }
        pq.write_table(pa.table(columns), episodes / "file-000.parquet")
    return write_recording(root / "videos" / key / "chunk-000/file-000.mp4", numbered_frames(6))


@pytest.mark.parametrize(
    ("held", "tables", "problem"),
    [
        ([(0, 0), (0, 0), (0, 0)], True, "has 3 episodes of a LeRobot dataset"),
        ([(0, 0), (0, 1), (1, 0)], True, None),
        ([(0, 0), (0, 0)], False, "has several episodes of a LeRobot dataset"),
        ([(0, 0)], False, None),
    ],
)
def test_lerobot_video_of_several_episodes_is_refused(
    held: list[tuple[int, int]], tables: bool, problem: str | None, tmp_path: Path
) -> None:
    path = write_lerobot_v3(tmp_path / "set", held, tables=tables)
    if problem is None:
        assert read(path).length == 6
    else:
        assert_fails(path, problem)


def test_typescript_files_are_not_videos(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.ts", numbered_frames(3))
    (tmp_path / "index.ts").write_text("export const x = 1;\n" * 40)
    assert ids(tmp_path) == ["a"]


def test_gif_is_read_unless_it_lies_beside_images(tmp_path: Path) -> None:
    gif = tmp_path / "in" / "walk.gif"
    gif.parent.mkdir()
    frames = [Image.fromarray(image) for image in numbered_frames(5)]
    frames[0].save(gif, save_all=True, append_images=frames[1:], duration=100)
    episode = read(gif)
    assert (episode.length, episode.fps, episode.media) == (5, 10, ())
    assert [frame_number(frame) for frame in all_frames(episode)] == list(range(5))
    assert ids(tmp_path) == ["in_walk"]
    write_images(tmp_path / "in", ["0.jpg", "1.jpg"])
    assert ids(tmp_path) == ["in"]


LCEVC = bytes([0, 0, 0, 1, 6, 4, 8, 0xB4, 0, 0x50, 1, 2, 3, 4, 5, 0x80])
"""LCEVC enhancement data of a frame, a kind of side data that PyAV does not know."""


def insert_unknown_data(path: Path) -> None:
    """Insert `LCEVC` before each picture of a bare stream."""
    content = path.read_bytes()
    for kind in (b"\x65", b"\x41", b"\x01"):  # Key frames and others.
        for start in (b"\0\0\0\1", b"\0\0\1"):
            content = content.replace(start + kind, LCEVC + start + kind)
    path.write_bytes(content)


def test_side_data_unknown_to_pyav_is_ignored(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.h264", [quadrants()] * 4)
    insert_unknown_data(path)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        with pytest.raises(ValueError, match="is not a valid Type"):
            _ = frame.side_data
    episode = read(path)
    assert episode.length == 4
    assert_upright(episode.read_rgb(0))


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (1, 0, 0, 1)])
def test_rotation_angle_and_display_matrix_agree(
    matrix: tuple[int, int, int, int], tmp_path: Path
) -> None:
    path = write_recording(tmp_path / "a.mp4", [quadrants()])
    set_display_matrix(path, matrix)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        by_angle = video._QUARTERS.get(frame.rotation % 360, (False, False, False))
        assert by_angle == video._orientation(frame)


# HDR

BT2020 = {"color_primaries": 9, "colorspace": 9, "color_range": 1}


def pq_signal(nits: float) -> float:
    """0 to 1: the signal of SMPTE ST 2084 (PQ) for a luminance in nits."""
    light = (nits / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * light) / (1 + 18.6875 * light)) ** 78.84375


def hlg_signal(light: float) -> float:
    """0 to 1: the signal of ARIB STD-B67 (HLG) for scene light from 0 to 1."""
    if light <= 1 / 12:
        return float(np.sqrt(3 * light))
    return 0.17883277 * float(np.log(12 * light - 0.28466892)) + 0.55991073


def srgb(light: float) -> float:
    return 255 * (1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("nits", "light"), [(0, 0), (20, 20 / 203), (100, 100 / 203), (203, 0.8), (1000, 1)]
)
def test_tone_mapping_keeps_midtones_and_compresses_highlights(nits: float, light: float) -> None:
    expected = srgb(light) if light > 0.01 else 0
    signal = np.full((2, 2, 3), round(65535 * pq_signal(nits)), np.uint16)
    assert np.abs(to_sdr(signal, "PQ", wide=True).astype(float) - expected).max() <= 2
    # An HLG screen of 1000 nits shows scene light E as 1000 E^1.2 nits.
    scene = (nits / 1000) ** (1 / 1.2)
    signal = np.full((2, 2, 3), round(65535 * hlg_signal(scene)), np.uint16)
    assert np.abs(to_sdr(signal, "HLG", wide=True).astype(float) - expected).max() <= 2


def test_tone_mapping_is_monotonic() -> None:
    signal = np.repeat(np.arange(65536, dtype=np.uint16)[None, :, None], 3, axis=2)
    for kind in ("PQ", "HLG"):
        grey = to_sdr(signal, kind, wide=True)[0].astype(int)
        assert (np.diff(grey[:, 0]) >= 0).all()
        assert np.ptp(grey, axis=1).max() <= 1
        assert (grey[0].max(), grey[-1].min()) == (0, 255)


def test_tone_mapping_keeps_the_hue() -> None:
    """A BT.709 red of 100 nits, encoded in BT.2020."""
    to_2020 = np.array(
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    red = to_2020 @ (100, 10, 10)
    signal = np.array([[[round(65535 * pq_signal(nits)) for nits in red]]], np.uint16)
    expected = [srgb(nits / 203) for nits in (100, 10, 10)]
    assert np.abs(to_sdr(signal, "PQ", wide=True)[0, 0] - expected).max() <= 4


@pytest.mark.parametrize(("name", "number_", "signal"), [
    ("PQ", 16, [pq_signal(nits) for nits in (50, 203, 600)]),
    ("HLG", 18, [hlg_signal((nits / 1000) ** (1 / 1.2)) for nits in (50, 203, 600)]),
])  # fmt: skip
def test_hdr_video_is_tone_mapped_with_a_note(
    name: str, number_: int, signal: list[float], tmp_path: Path
) -> None:
    frames = [np.full((64, 96, 3), round(255 * value), np.uint8) for value in signal]
    path = write_recording(tmp_path / "a.mp4", frames, "libx265", "yuv420p10le", color_trc=number_,
                  **BT2020)  # fmt: skip
    episode = read(path)
    assert notes(episode)["hdr"] == (
        f"the video is HDR ({name}): its colours are converted to SDR (BT.709)"
    )
    assert episode.media == ()
    found = [float(frame.mean()) for frame in all_frames(episode)]
    expected = [srgb(float(compressed(np.float32([n / 203]))[0])) for n in (50, 203, 600)]
    assert np.abs(np.subtract(found, expected)).max() <= 5
    assert found[1] - found[0] > 60  # Without tone mapping, they differ less.
    made = write(episode, tmp_path / "out")
    assert survey_video(made).hdr is None


def test_sdr_video_is_not_tone_mapped(tmp_path: Path) -> None:
    path = write_recording(tmp_path / "a.mp4", [quadrants()], color_trc=1, color_primaries=1)
    episode = read(path)
    assert "hdr" not in notes(episode)
    assert [item.path for item in episode.media] == [path]
