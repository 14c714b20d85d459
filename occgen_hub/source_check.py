"""A check of a source for its own tests: everything that a build needs from it."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.config import Config
from occgen_hub.engines import load_engine
from occgen_hub.episode import Episode, check_episode, near_origin
from occgen_hub.errors import OccGenError
from occgen_hub.files import is_file
from occgen_hub.fusion.conventions import check_conventions
from occgen_hub.job import list_episodes
from occgen_hub.media import read_rgb
from occgen_hub.schema import ARROW, load_schema

MAX_AWAY = 16.0
"""Mean difference of two images, of 255, above which they are not the same. JPEG changes less."""


def check_source(builder: DatasetBuilder, episodes: int = 1) -> list[Episode]:
    """Check a source as a build uses it, and return its first `episodes` episodes.

    Raises OccGenError for the first error, with the expected value. Checks ids and their order, and
    of the first `episodes` episodes the files, the fields of `Episode` with their shapes and units,
    three decoded frames, media and columns against the schema, and whether frames agree with one
    another. The returned episodes check each frame that is decoded.
    """
    listed: Any = builder.episodes()
    if not isinstance(listed, Iterable):
        problem = f"gives a {type(listed).__name__}"
        raise _wrong(builder, "episodes()", problem, "yield every EpisodeRef")
    refs = list_episodes(builder)
    ids = [ref.id for ref in refs]
    if ids != sorted(ids):
        raise _wrong(builder, "episodes()", "is not sorted by id", "yield sorted ids")
    if ids != [ref.id for ref in builder.episodes()]:
        raise _wrong(builder, "episodes()", "differs from call to call", "list the same files")
    try:
        pickle.dumps((builder, refs[0]))
    except Exception as error:
        problem = f"cannot be sent to worker processes ({error})"
        raise _wrong(builder, "the builder", problem, "keep open files out of it") from error
    return [_check_episode(builder, ref) for ref in refs[:episodes]]


def _check_episode(builder: DatasetBuilder, ref: EpisodeRef) -> Episode:
    sources: Any = builder.sources(ref)
    if not isinstance(sources, list):
        found = f"gives a {type(sources).__name__}"
        raise _wrong(builder, f"sources({ref.id})", found, "give a list of paths")
    if other := [path for path in sources if not isinstance(path, Path)]:
        raise _wrong(
            builder, f"sources({ref.id})", f"has a {type(other[0]).__name__}", "give paths"
        )
    if missing := [path for path in sources if not is_file(path)]:
        raise _wrong(
            builder, f"sources({ref.id})", f"has {missing[0]}, which is not a file", "list files"
        )
    if not sources:
        raise _wrong(builder, f"sources({ref.id})", "is empty", "list the files that read uses")
    work = builder.work(ref)
    if not (np.isfinite(work) and work >= 0):
        raise _wrong(builder, f"work({ref.id})", f"is {work}", "return a number of 0 or more")
    raw = builder.read(ref)
    if not isinstance(raw, Episode):
        raise _wrong(builder, f"read({ref.id})", f"gives a {type(raw).__name__}", "give an Episode")
    episode = check_episode(raw)
    if episode.id != ref.id:
        raise _wrong(builder, f"read({ref.id}).id", f"is {episode.id!r}", "give the ref's id")
    if len(raw.fingerprint) != 64 or raw.fingerprint != builder.read(ref).fingerprint:
        problem = "is not a SHA-256, or differs from call to call"
        raise _wrong(builder, "fingerprint", problem, "use self.fingerprint(self.sources(ref))")
    if (episode.read_depth is not None) != builder.has_depth(ref):
        problem = f"is {builder.has_depth(ref)}, but read returns the opposite"
        raise _wrong(builder, f"has_depth({ref.id})", problem, "return whether read gives depth")
    _check_files(builder, episode, sources)
    for frame in sorted({0, episode.length // 2, episode.length - 1}):
        _check_image(builder, episode, frame)
        if episode.read_labels is not None:
            episode.read_labels(frame)
        if episode.read_depth is not None:
            _check_reach(builder, episode.read_depth(frame), frame)
    if not (episode.read_depth is None or episode.world_from_camera is None):
        if episode.intrinsics is None:
            raise _wrong(builder, "intrinsics", "are missing", "give (T, 3, 3) with depth")
        _check_geometry(episode)
    return episode


def _check_reach(builder: DatasetBuilder, depth: NDArray[np.float64], frame: int) -> None:
    """Raise OccGenError if no depth of a frame is in the range of the default configuration."""
    near, far = Config().depth_range
    measured = depth[depth > 0]
    if len(measured) and not ((measured >= near) & (measured <= far)).any():
        found = f"is {np.median(measured):.3g} in the median, and never from {near} to {far}"
        raise _wrong(builder, f"read_depth({frame})", found, "give metres")


def _check_image(builder: DatasetBuilder, episode: Episode, frame: int) -> None:
    """Raise OccGenError if the image of a frame in `media` is another one than `read_rgb` gives."""
    image = episode.read_rgb(frame)
    for item in episode.media:
        if item.file == "rgb" and item.frame == frame:
            kept = item.read() if item.read else read_rgb(item.path, episode.image_size)
            if kept.shape != image.shape:
                found = f"has shape {kept.shape}"
                raise _wrong(
                    builder, f"the media rgb of frame {frame}", found, f"give {image.shape}"
                )
            away = np.abs(image.astype(np.int16) - kept).mean()
            if away > MAX_AWAY:
                found = f"differs from read_rgb({frame}) by {away:.0f} of 255 in the mean"
                raise _wrong(builder, f"the media rgb of frame {frame}", found, "give one image")


def _check_files(builder: DatasetBuilder, episode: Episode, sources: list[Path]) -> None:
    """Check media and columns against the schema, and that media are among the sources."""
    schema, known_sources = load_schema(builder.schema), set(sources)
    for item in episode.media:
        path: Any = item.path
        if not isinstance(path, Path):
            found = f"is a {type(path).__name__}"
            raise _wrong(builder, f"the media {item.path}", found, "give a pathlib.Path")
        if item.read is None and item.path not in known_sources:
            remedy = "list it, so that the episode is built again if it changes"
            raise _wrong(builder, f"the media {item.path}", "is not in sources()", remedy)
        if item.file not in schema.files or not schema.files[item.file].media:
            known = ", ".join(name for name, file in schema.files.items() if file.media)
            raise _wrong(builder, f"the media {item.file}", "is not in a schema", f"use {known}")
        if item.read is None and not is_file(item.path):
            raise _wrong(builder, f"the media {item.path}", "is not a file", "give one, or read=")
    for name, column in episode.columns.items():
        feature = column.feature
        if feature.dtype not in ARROW or not feature.shape:
            found = f"has the feature {feature.dtype} {feature.shape}"
            remedy = f"give one of {', '.join(ARROW)}, and the shape (1,) for plain numbers"
            raise _wrong(builder, f"the column {name}", found, remedy)
        if feature.dtype == "string":
            continue
        shape = () if feature.scalar else feature.shape
        values = np.asarray(column.values)
        if values.shape != (episode.length, *shape):
            found = f"has shape {values.shape}"
            raise _wrong(builder, f"the column {name}", found, f"give {(episode.length, *shape)}")
        if not np.can_cast(values.dtype, feature.dtype, "same_kind"):
            found = f"has {values.dtype} values for the feature {feature.dtype}"
            raise _wrong(builder, f"the column {name}", found, "convert the values")
        if feature.dtype.startswith("float") and not np.isfinite(values).all():
            found = "has a value that is not finite"
            raise _wrong(
                builder, f"the column {name}", found, "leave the column out, or replace it"
            )


def _check_geometry(episode: Episode) -> None:
    """Check that frames agree. Raises OccGenError with the likely cause."""
    config = Config()
    episode, _ = near_origin(episode)
    with tempfile.TemporaryDirectory(prefix="occgen-") as scratch:
        views = load_engine("rgbd").reconstruct(episode, config, Path(scratch))
    for note in check_conventions(views, episode.id, config, fps=episode.fps):
        raise OccGenError(f"{episode.id}: {note.text}.")


def _wrong(builder: DatasetBuilder, what: str, problem: str, remedy: str) -> OccGenError:
    return OccGenError(f"source {builder.name}: {what} {problem}; {remedy}.")
