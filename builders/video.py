"""RGB video: a file, a folder of images, or a folder of such files and folders.

Each video file, and each folder with images and no video, is an episode. There are no poses, depth
or intrinsics: an engine with a network estimates them. Folders of depth images, which are 16-bit
grey, are skipped.
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef, other_source
from occgen_hub.episode import Episode, MediaFile, Note, Task
from occgen_hub.errors import OccGenError, SourceError, UsageError
from occgen_hub.files import MAX_TABLE_ROWS, is_file, natural_key, opened, read_json, read_parquet
from occgen_hub.kinds import check_not_lerobot
from occgen_hub.media import (
    ImageSequence,
    VideoReader,
    VideoSurvey,
    picture_facts,
    read_picture,
    stated_pixels,
    survey_video,
    video_facts,
)

TRANSPORT_STREAM = ".ts"
"""Suffix of MPEG transport streams, and of TypeScript programs."""

ANIMATION = ".gif"
"""Suffix of a format that is a video on its own, and a preview beside images."""

VIDEOS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".3gp", ".mpg", ".mpeg", ".mts", ".m2ts"),
    *(".wmv", ".flv", ".h264", ".h265", ".hevc", TRANSPORT_STREAM, ANIMATION),
)
IMAGES = (".jpg", ".jpeg", ".png")

GROUP, TRAJECTORY = "custom_videos", "trajectory_0"

NAME_BYTES = 120
"""Limit of a name made from a path. File systems allow 255."""

SIDES = (16, 16384)
"""Smallest and largest width and height in pixels that reference.mp4 can have."""

FPS = (0.01, 1000.0)
"""Range of plausible frame rates."""

DEFAULT_FPS = 30.0

UNEVEN = 0.1
"""Largest difference between time steps of a constant rate, as a share of the average step. The
rounding of containers that count milliseconds is allowed too."""


@dataclass(frozen=True)
class Footage:
    """The frames of an episode. size: (width, height), upright; read: (H, W, 3) uint8 by number."""

    size: tuple[int, int]
    length: int
    fps: float
    read: Callable[[int], NDArray[np.uint8]]
    media: tuple[MediaFile, ...]
    notes: tuple[Note, ...]


class VideoBuilder(DatasetBuilder):
    """Reads videos and folders of images."""

    name = "video"
    takes_file = True
    knows = ()

    def episodes(self) -> Iterator[EpisodeRef]:
        """Every video and every folder of images, sorted by id. Raises UsageError for none.

        If the root is a file, it is used whatever its suffix is.
        """
        whole = is_file(self.root)
        found = [self.root] if whole else list(_find(self.root, self.skip_unlisted))
        if not whole:
            check_not_lerobot(self.root, found or [self.root])
        if not found:
            raise UsageError(
                f"{self.root}: has neither videos ({_listed(VIDEOS)}) nor images "
                f"({_listed(IMAGES)}; 16-bit grey ones are depth, which --source capture reads "
                "together with colour); "
                + (
                    other_source(self.root, self.name)
                    or "give a video, a folder of videos or a folder of images as --input"
                )
                + "."
            )
        for name, path in sorted(_named(self.root, found).items()):
            yield EpisodeRef(f"{GROUP}/{name}/{TRAJECTORY}", path)

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Recognise a video, or a folder with videos or colour images."""
        if is_file(root):
            return "a video" if _is_video(root) else None
        found = next(_find(root, lambda *_: None), None)
        return None if found is None else "a folder of videos or images"

    def work(self, ref: EpisodeRef) -> float:
        """Frames times pixels, from the header of the video or of the first image."""
        try:
            if not ref.path.is_dir():
                return stated_pixels(ref.path)
            images = _images(ref.path)
            return float(len(images) * prod(picture_facts(images[0]).size))
        except OccGenError:
            return 0.0

    def footage(self, ref: EpisodeRef) -> tuple[int, tuple[int, int]] | None:
        """The number of frames and their size, without decoding."""
        try:
            if not ref.path.is_dir():
                facts = video_facts(ref.path)
                return facts.frames, facts.size
            images = _images(ref.path)
            return len(images), picture_facts(images[0]).size
        except OccGenError:
            return None

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The video, or the images in the order of their numbers."""
        if ref.path.is_dir():
            return _images(ref.path)
        opened(ref.path).close()
        return [ref.path]

    def read(self, ref: EpisodeRef) -> Episode:
        """One episode, without poses, intrinsics and depth."""
        sources = self.sources(ref)
        if not ref.path.is_dir():
            _check_one_episode(ref.path)
        footage = _image_footage(sources) if ref.path.is_dir() else _video_footage(ref.path)
        if not SIDES[0] <= min(footage.size) <= max(footage.size) <= SIDES[1]:
            width, height = footage.size
            problem = (
                f"is {width} x {height} pixels, and sides must be {_listed(SIDES, ' to ')} pixels"
            )
            raise SourceError(sources[0], problem, "scale it, or move it out of the input")
        return Episode(
            id=ref.id,
            length=footage.length,
            fps=footage.fps,
            robot_type="unknown",
            image_size=footage.size,
            read_rgb=footage.read,
            tasks=(Task("explore the scene"),),
            task_index=np.zeros(footage.length, np.int64),
            columns={},
            media=footage.media,
            fingerprint=self.fingerprint(sources),
            notes=footage.notes,
        )


# Finding the files


def _find(root: Path, skip_unlisted: Callable[[Path, OSError], None]) -> Iterator[Path]:
    """Yield videos, and folders with images and no videos, at any depth. Hidden ones are skipped.

    Images beside videos are covers and thumbnails. Links to folders are followed, each folder once.
    Folders that cannot be listed are passed to `skip_unlisted`.
    """

    def unlisted(error: OSError) -> None:
        skip_unlisted(Path(error.filename), error)

    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(root, followlinks=True, onerror=unlisted):
        try:
            stat = Path(parent).stat()
        except OSError as error:
            skip_unlisted(Path(parent), error)
            folders.clear()
            continue
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        videos = [name for name in sorted(names) if _is_video(Path(parent, name))]
        images = sorted(name for name in names if _is(name, IMAGES))
        if images and all(_is(name, (ANIMATION,)) for name in videos):
            if not _is_depth(Path(parent, images[0])):
                yield Path(parent)
            continue
        yield from (Path(parent, name) for name in videos)


def _unlisted(error: OSError) -> None:
    raise SourceError(
        error.filename, f"cannot be listed ({error.strerror})", "check its permissions"
    ) from error


def _is(name: str, suffixes: tuple[str, ...]) -> bool:
    """Whether a file name has one of the suffixes and is not hidden."""
    return not name.startswith(".") and name.lower().endswith(suffixes)


def _is_video(path: Path) -> bool:
    """Whether a file is a video, by its name and, for `.ts`, by its first bytes."""
    if not _is(path.name, VIDEOS):
        return False
    if not _is(path.name, (TRANSPORT_STREAM,)):
        return True
    try:
        with opened(path) as file:
            start = file.read(_PACKET + 1)
    except (OccGenError, OSError):
        return True  # The error is reported when it is read.
    return len(start) <= _PACKET or start[0] == start[_PACKET] == _SYNC


_PACKET, _SYNC = 188, 0x47
"""Size of a packet of a transport stream in bytes, and its first byte."""


def _is_depth(path: Path) -> bool:
    """Whether an image is depth, by its header. False if it cannot be read."""
    try:
        return _is(path.name, (".png",)) and picture_facts(path).depth
    except OccGenError:
        return False


def _images(folder: Path) -> list[Path]:
    """The images of a folder in natural order of their names, in which 10 comes after 9."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if _is(e.name, IMAGES) and not e.is_dir()]
    except OSError as error:
        _unlisted(error)
    paths = [folder / name for name in sorted(names, key=natural_key)]
    if not paths:
        raise SourceError(
            folder, "no longer has images", "restore them, or move it out of the input"
        )
    if len(paths) > MAX_TABLE_ROWS:
        problem = f"has {len(paths)} images, more than an episode can have"
        raise SourceError(folder, problem, "split it into several folders")
    stems: dict[str, Path] = {}
    for path in paths:
        if (other := stems.setdefault(path.stem, path)) != path:
            raise SourceError(path, f"has the same name as {other.name}", "keep one of the two")
    return paths


# Naming the episodes


def _named(root: Path, paths: list[Path]) -> dict[str, Path]:
    """Unique names, safe in any file system, for paths below a root or for the root itself.

    A name is the path without its suffix. If paths share a name, they keep their suffixes; if they
    still do, some digits of their checksums are appended. A name depends on no other paths but
    those that share it.
    """
    levels = dict.fromkeys(paths, 0)
    while True:
        names = {path: _name(root, path, level) for path, level in levels.items()}
        count = Counter(name.casefold() for name in names.values())
        shared = [path for path, name in names.items() if count[name.casefold()] > 1]
        if all(levels[path] == 2 for path in shared):
            return {name: path for path, name in names.items()}
        levels.update({path: min(levels[path] + 1, 2) for path in shared})


def _name(root: Path, path: Path, level: int) -> str:
    """A path's name. level: 0 without its suffix, 1 with it, 2 with a checksum as well."""
    within = path.relative_to(root) if path != root else Path(_own_name(root))
    whole = within if level or path.is_dir() else within.with_suffix("")
    text = unicodedata.normalize("NFC", "_".join(whole.parts))
    safe = re.sub(r"[^\w.-]+" if not level else r"[^\w-]+", "_", text).strip("._-")
    safe = safe.encode()[:NAME_BYTES].decode(errors="ignore") or "video"
    if level < 2:
        return safe
    return f"{safe}_{hashlib.sha256(os.fsencode(within)).hexdigest()[:8]}"


def _own_name(path: Path) -> str:
    return path.name if path.name not in ("", "..") else path.resolve().name


def _listed(items: tuple[object, ...], between: str = ", ") -> str:
    return between.join(str(item).removeprefix(".") for item in items)


# The frames


def _check_one_episode(path: Path) -> None:
    """Raise SourceError for a video of a LeRobot dataset that has several episodes."""
    folder = next((parent for parent in path.parents if parent.name == "videos"), None)
    if folder is None or not (folder.parent / "meta/info.json").is_file():
        return
    try:
        info = read_json(folder.parent / "meta/info.json")
    except SourceError:
        return  # It may belong to something else.
    if not str(info.get("codebase_version")).startswith("v3") or info.get("total_episodes") == 1:
        return
    try:
        count = _episodes_in(folder, path)
    except SourceError:
        count = None
    if count is None or count > 1:
        number = "several" if count is None else str(count)
        problem = f"has {number} episodes of a LeRobot dataset, one after another"
        remedy = "give the dataset's folder to --source lerobot"
        raise SourceError(path, problem, remedy)


def _episodes_in(folder: Path, path: Path) -> int | None:
    """The number of episodes in a file of LeRobot's folder of videos; None if unknown."""
    key = "/".join(path.relative_to(folder).parts[:-2])
    number = re.fullmatch(r"chunk-([0-9]+)/file-([0-9]+)\..*", "/".join(path.parts[-2:]))
    tables = sorted((folder.parent / "meta/episodes").glob("*/*.parquet"))
    names = [f"videos/{key}/chunk_index", f"videos/{key}/file_index"]
    if number is None or not tables:
        return None
    count = 0
    for table in map(read_parquet, tables):
        if not set(names) <= set(table.column_names):
            return None
        rows = zip(*(table[name].to_pylist() for name in names), strict=True)
        count += sum(row == (int(number[1]), int(number[2])) for row in rows)
    return count


def _video_footage(path: Path) -> Footage:
    survey = survey_video(path)
    fps, notes = _rate(survey)
    if survey.hdr is not None:
        text = f"the video is HDR ({survey.hdr}): its colours are converted to SDR (BT.709)"
        notes.append(Note("hdr", text))
    if survey.stated not in (0, survey.frames):
        text = (
            f"the header states {survey.stated} frames, but {survey.frames} can be decoded; these "
            "are used"
        )
        notes.append(Note("frame count", text))
    # Otherwise the writer of the episode encodes a new video.
    reference = survey.reference and fps == round(survey.fps, 6)
    media = (MediaFile("video", path),) if reference else ()
    reader = VideoReader(path, survey.size)
    return Footage(survey.size, survey.frames, fps, reader, media, tuple(notes))


def _rate(survey: VideoSurvey) -> tuple[float, list[Note]]:
    """The average frame rate, since the dataset has a constant one."""
    if not FPS[0] <= survey.fps <= FPS[1]:
        text = f"the video has no usable frame rate: {DEFAULT_FPS:g} fps is assumed"
        return DEFAULT_FPS, [Note("fps", text)]
    fps = round(survey.fps, 6)
    shortest, longest = survey.steps or (0.0, 0.0)
    if longest - shortest <= max(UNEVEN / fps, 0.0011):
        return fps, []
    text = (
        f"the time between frames varies from {1000 * shortest:.3g} to {1000 * longest:.3g} ms: "
        f"every frame is used once, at the average of {fps:g} fps"
    )
    return fps, [Note("variable rate", text)]


def _image_footage(paths: list[Path]) -> Footage:
    facts = [picture_facts(path) for path in paths]
    size = facts[0].size
    for path, own in zip(paths, facts, strict=True):
        if own.depth:
            problem = "is a 16-bit grey image, which is the format of depth"
            remedy = (
                "move depth away, use --source capture for colour with depth, or save it with 8 "
                "bits if it is not depth"
            )
            raise SourceError(path, problem, remedy)
        if own.size != size:
            problem = (
                f"is {own.size[0]} x {own.size[1]} pixels upright, {paths[0].name} "
                f"{size[0]} x {size[1]}"
            )
            raise SourceError(path, problem, "use a separate folder for each image size")
    images = ImageSequence(paths, size, read_picture)
    media = tuple(
        MediaFile("rgb", path, frame, partial(images.check, frame))
        for frame, path in enumerate(paths)
    )
    return Footage(
        size=size,
        length=len(paths),
        fps=DEFAULT_FPS,
        read=images,
        media=media if all(own.plain for own in facts) else (),
        notes=(Note("fps", f"images have no frame rate: {DEFAULT_FPS:g} fps is assumed"),),
    )
