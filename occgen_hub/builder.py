"""The base class of sources, and how the installed ones are found."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.config import Condition
from occgen_hub.engines import AUTO
from occgen_hub.episode import Episode
from occgen_hub.errors import (
    MachineError,
    OccGenError,
    SourceError,
    UsageError,
    one_line,
)
from occgen_hub.files import MACHINE_FAULTS, MAX_SOURCE_BYTES, Version, read_bytes, sha256, version
from occgen_hub.lerobot.writer import Media
from occgen_hub.plugins import load_plugin, plugin_names

logger = logging.getLogger(__name__)

LEVELS = 3
"""Number of folders above a source's root to search for its card: vln_n1/traj_data/<group>."""

MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class EpisodeRef:
    """An episode before it is read. id: "<group>/<scene>/<trajectory>", also its path in the
    output; path: its folder or file; index: its number, if there are several at this path.
    """

    id: str
    path: Path
    index: int = 0


@dataclass(frozen=True)
class CameraSurvey:
    """The output of `occgen-hub cameras`. lines: a description of what was found, for the user;
    mapping: the text of a file for `--cameras`, to be corrected.
    """

    lines: tuple[str, ...]
    mapping: str


def id_problem(name: str) -> str | None:
    """Why an episode's id is not a valid path in the output. None if it is."""
    parts = name.split("/")
    if len(parts) != 3:
        return f"has {len(parts)} parts"
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return "has a part that is not a valid folder name"
    return None


class DatasetBuilder(ABC):
    """A source of episodes. A subclass has a name, lists episodes and reads one.

    version: to be changed whenever the same files give another episode, so that episodes are built
    again; schema: of its datasets; engine: the name of the default engine; takes_file: whether
    `root` may be a file; knows: the inputs for `--condition` that all episodes have, besides depth
    (see `has_depth`); takes_archives: whether scenes may be archives, each of which it reads as a
    tree with only that scene; hfov: horizontal field of view, degrees, for sources without
    intrinsics, None for the source's default; license: of the recording, by the Hub's name, if a
    README.md in or above `root` states none, None if unknown; maps: the attributes of
    `CameraMapping` that a user may set, in `cameras`; several_cameras: whether there may be more
    than one camera; takes_repository: whether `root` may be a LeRobot dataset on the Hub; media:
    the default of `--media`; about: for the dataset's card, in Markdown: where the recordings come
    from, and where their licences are.
    """

    name: ClassVar[str]
    version: ClassVar[str] = "1"
    schema: ClassVar[str] = "trajectory"
    engine: ClassVar[str] = AUTO
    takes_file: ClassVar[bool] = False
    knows: ClassVar[tuple[Condition, ...]] = ("intrinsics", "poses")
    maps: ClassVar[tuple[str, ...]] = ()
    several_cameras: ClassVar[bool] = False
    takes_archives: ClassVar[bool] = False
    takes_repository: ClassVar[bool] = False
    media: ClassVar[Media] = "copy"
    about: ClassVar[str] = ""
    hfov: float | None = None
    license: str | None = None

    def __init__(self, root: Path, cameras: Sequence[CameraMapping] = ()) -> None:
        self.root, self.cameras = root, tuple(cameras)
        self._skipped: set[Path] = set()

    def at(self, root: Path) -> Self:
        """The same builder for another root, such as the content of an archive."""
        other = copy.copy(self)
        other.root, other._skipped = root, set()
        return other

    def skip_unlisted(self, path: Path, error: OSError) -> None:
        """Warn, once, that something below the root cannot be listed and is skipped.

        For `episodes`, so that one bad folder does not end a build. Raises SourceError for the root
        itself, and MachineError for a fault of the machine.
        """
        problem = f"cannot be listed ({error.strerror or error})"
        if error.errno in MACHINE_FAULTS:
            raise MachineError(f"{path}: {problem}; fix that and run again.") from error
        if path == self.root:
            raise SourceError(path, problem, "check its permissions") from error
        if path not in self._skipped:
            self._skipped.add(path)
            logger.warning("Warning: %s: %s, and is skipped.", one_line(str(path)), problem)

    @abstractmethod
    def episodes(self) -> Iterator[EpisodeRef]:
        """Every episode below `root`, sorted by id, without decoding."""

    @abstractmethod
    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The files that `read` uses. Raises SourceError if one is missing."""

    @abstractmethod
    def read(self, ref: EpisodeRef) -> Episode:
        """Read an episode. Raises SourceError if its files are invalid."""

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """Describe `root` in a few words with an article, if this source can read it, else None.

        It is used in errors of other sources, and checks only a few names and small files.
        """
        return None

    def survey_cameras(self) -> CameraSurvey:
        """A survey of the recording's cameras. Raises UsageError if nothing can be mapped."""
        raise UsageError(f"--source {self.name}: has no columns to map to cameras.")

    def has_depth(self, ref: EpisodeRef) -> bool:
        """Whether an episode has sensor depth, by a quick check without decoding."""
        return False

    def work(self, ref: EpisodeRef) -> float:
        """Estimate the work of an episode relative to others: frames times pixels.

        An estimate from headers, without decoding, for distributing episodes. 0 for unreadable
        files. By default, the bytes of its files.
        """
        try:
            return float(sum(path.stat().st_size for path in self.sources(ref)))
        except (OccGenError, OSError):
            return 0.0

    def footage(self, ref: EpisodeRef) -> tuple[int, tuple[int, int]] | None:
        """The number of frames of an episode and their (width, height), from its headers.

        It is used to estimate the cost of a network. None if unknown.
        """
        return None

    def fingerprint(self, sources: Iterable[Path]) -> str:
        """SHA-256 over the names and contents of files, in order.

        Names are relative to the common folder of all files, so the result does not depend on the
        location of the tree or the choice of `root`.
        """
        paths = list(sources)
        shared = os.path.commonpath([path.parent for path in paths])
        digest = hashlib.sha256()
        for path in paths:
            try:
                content = _checksum(path, version(path))
            except OSError as error:
                raise SourceError(
                    path, f"cannot be read ({error.strerror})", "restore it from the source"
                ) from error
            digest.update(
                f"{path.relative_to(shared).as_posix()}\0{content}\n".encode(
                    errors="surrogateescape"
                )
            )
        return digest.hexdigest()


@lru_cache(maxsize=4096)
def _checksum(path: Path, version: Version) -> str:
    """SHA-256 of a file, cached, because episodes share files."""
    return sha256(path, MAX_SOURCE_BYTES)


def builder_names() -> list[str]:
    """The names of the installed sources."""
    return plugin_names("source")


def load_builder(
    name: str,
    root: Path | str,
    cameras: Sequence[CameraMapping] = (),
    *,
    hfov: float | None = None,
) -> DatasetBuilder:
    """The builder with this name for the tree at `root`.

    hfov: degrees, see DatasetBuilder. Raises UsageError if it is not installed or not a builder, or
    if it does not use a setting in `cameras`.
    """
    kind, root = _builder_class(name), Path(root)
    for attribute in sorted({key for camera in cameras for key in camera.as_json()}):
        if attribute not in kind.maps:
            raise UsageError(
                f"{_OPTIONS.get(attribute, f'--{attribute}').replace('_', '-')}: is not used by "
                f"--source {name}; leave it out, or choose a source that uses it, such as --source "
                "capture."
            )
    if len(cameras) > 1 and not kind.several_cameras:
        raise UsageError(f"--camera: --source {name} takes one camera; leave the others out.")
    builder = kind(root, cameras) if cameras else kind(root)
    builder.hfov = hfov
    builder.license = license_of_folder(root) or kind.license
    return builder


_OPTIONS = {
    "depth_unit": "--depth-unit or --depth-scale",
    "pose_layout": "--cameras",
} | dict.fromkeys(("rgb", "depth", "pose", "info"), "--topics")
"""Options of the command line whose names differ from the attributes."""


def license_of_folder(root: Path) -> str | None:
    """The licence in the nearest README.md with one, or None.

    Searches `root` and LEVELS folders above it, since `root` may be a part of a copy of a dataset
    on the Hub.
    """
    folder = root.resolve()
    for place in (folder, *folder.parents[:LEVELS]):
        try:
            text = read_bytes(place / "README.md", MAX_CARD_BYTES).decode()
            _, matter, _ = text.replace("\r\n", "\n").split("---\n", 2)
            metadata = yaml.safe_load(matter) if text.startswith("---") else None
        except (OccGenError, OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(metadata, dict) and (found := plain_license(metadata.get("license"))):
            return found
    return None


def plain_license(value: Any) -> str | None:
    """The name of the licence in a card. None for none, several, or a custom one."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    known = isinstance(value, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,60}", value)
    return value if known and value not in ("other", "unknown") else None


def _builder_class(name: str) -> type[DatasetBuilder]:
    """The class that is installed as a source. Raises UsageError if it is not valid."""
    kind, place = load_plugin("source", name)
    if not (isinstance(kind, type) and issubclass(kind, DatasetBuilder)):
        raise UsageError(f"{place} is not a subclass of occgen_hub.builder.DatasetBuilder.")
    if missing := sorted(kind.__abstractmethods__):
        raise UsageError(f"{place} lacks the methods {', '.join(missing)}; write them.")
    if getattr(kind, "name", None) != name:
        found = getattr(kind, "name", None)
        raise UsageError(f"{place} has the name {found!r}; give it name = {name!r}.")
    return kind


def other_source(root: Path, name: str) -> str:
    """The end of an error that names the other sources that recognise `root`, or ""."""
    recognised = []
    for other in builder_names():
        if other == name:
            continue
        try:
            found = _builder_class(other).recognise(root)
        except Exception:  # Sources of other packages may raise anything.
            continue
        if found is not None:
            recognised.append(f"it is {found}: use --source {other}")
    return ", or ".join(recognised)
