"""Sources: what a subclass says of a kind of recording, and how the installed ones are found."""

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
from importlib.metadata import entry_points
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
    in_brief,
    one_line,
)
from occgen_hub.files import MACHINE_FAULTS, MAX_SOURCE_BYTES, Version, read_bytes, sha256, version
from occgen_hub.lerobot.writer import Media

logger = logging.getLogger(__name__)

LEVELS = 3
"""Folders above a source's root in which its card is looked for: vln_n1/traj_data/<group>."""

MAX_CARD_BYTES = 1 << 20


@dataclass(frozen=True)
class EpisodeRef:
    """An episode before it is read. id: "<group>/<scene>/<trajectory>", also its place in the
    output; path: the folder or file that holds it; index: its number where one holds several.
    """

    id: str
    path: Path
    index: int = 0


@dataclass(frozen=True)
class CameraSurvey:
    """What `occgen-hub cameras` says. lines: of what was found, for a user to read; mapping: the
    text of a file for `--cameras`, to be corrected.
    """

    lines: tuple[str, ...]
    mapping: str


def id_problem(name: str) -> str | None:
    """What keeps an episode's id from being a place in the output, None if nothing does."""
    parts = name.split("/")
    if len(parts) != 3:
        return f"has {len(parts)} parts"
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        return "has a part that is no name of a folder"
    return None


class DatasetBuilder(ABC):
    """A source of episodes. A subclass says its name, lists episodes and reads one.

    version: to be changed whenever the same files give another episode, so that episodes are built
    again; schema: what it writes; engine: the name of the one that suits it when the user names
    none; takes_file: whether `root` may be a file; knows: what `--condition` may ask of every
    episode, besides depth, which `has_depth` tells; takes_archives: whether its scenes may be
    archives, each of which it reads as a tree with that scene alone; hfov: degrees that a camera
    sees from side to side, for sources that give no intrinsics, None for what the source assumes;
    license: of what was recorded, as the Hub calls it, None where the source does not say; maps:
    the attributes of `CameraMapping` that a user may give, which are then in `cameras`;
    several_cameras: whether more than one camera may be given; takes_repository: whether `root`
    may be a LeRobot dataset on the Hub; media: what a build does with images if nothing is said.
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
    hfov: float | None = None
    license: str | None = None

    def __init__(self, root: Path, cameras: Sequence[CameraMapping] = ()) -> None:
        self.root, self.cameras = root, tuple(cameras)
        self._passed_over: set[Path] = set()

    def at(self, root: Path) -> Self:
        """The same builder for a tree elsewhere, such as that of an archive's content."""
        other = copy.copy(self)
        other.root, other._passed_over = root, set()
        return other

    def pass_over(self, path: Path, error: OSError) -> None:
        """Warn, once, that something below the root cannot be looked into, and is left out.

        For `episodes`, so that one bad folder does not end a build. Raises SourceError where it is
        the root itself, MachineError where the machine is at fault.
        """
        problem = f"cannot be looked into ({error.strerror or error})"
        if error.errno in MACHINE_FAULTS:
            raise MachineError(f"{path}: {problem}; fix that and run again.") from error
        if path == self.root:
            raise SourceError(path, problem, "check its permissions") from error
        if path not in self._passed_over:
            self._passed_over.add(path)
            logger.warning("Warning: %s: %s, and is passed over.", one_line(str(path)), problem)

    @abstractmethod
    def episodes(self) -> Iterator[EpisodeRef]:
        """Every episode below `root`, sorted by id, nothing decoded."""

    @abstractmethod
    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The files that `read` makes the episode from; raises SourceError when one is missing."""

    @abstractmethod
    def read(self, ref: EpisodeRef) -> Episode:
        """The episode; raises SourceError when its files cannot be used."""

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """What is at `root`, in a few words with an article, where this source can read it.

        For errors of other sources that were given it. A few names are looked at, and small files.
        """
        return None

    def survey_cameras(self) -> CameraSurvey:
        """What the cameras of the recording are; raises UsageError where nothing can be mapped."""
        raise UsageError(f"--source {self.name}: has no columns to map to cameras.")

    def has_depth(self, ref: EpisodeRef) -> bool:
        """Whether an episode has sensor depth; looked up quickly, nothing decoded."""
        return False

    def work(self, ref: EpisodeRef) -> float:
        """About how much work an episode is, next to others: its frames times their pixels.

        A guess from headers, for sharing episodes out; nothing is decoded, and what cannot be read
        is no work. Here it is the bytes of its files.
        """
        try:
            return float(sum(path.stat().st_size for path in self.sources(ref)))
        except (OccGenError, OSError):
            return 0.0

    def footage(self, ref: EpisodeRef) -> tuple[int, tuple[int, int]] | None:
        """How many frames an episode has, and their (width, height), by its headers.

        To say beforehand what a network will take; None where that is not known.
        """
        return None

    def fingerprint(self, sources: Iterable[Path]) -> str:
        """SHA-256 over the names and contents of files, in their order.

        The names are those below the folder that all files share, so that it does not matter where
        the tree is, nor which folder of it is `root`.
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
    """SHA-256 of a file: what episodes have in common is read once."""
    return sha256(path, MAX_SOURCE_BYTES)


def builder_names() -> list[str]:
    """The sources that are installed."""
    return sorted({point.name for point in entry_points(group="occgen_hub.builders")})


def load_builder(
    name: str, root: Path, cameras: Sequence[CameraMapping] = (), *, hfov: float | None = None
) -> DatasetBuilder:
    """The builder of that name for the tree at `root`.

    hfov: degrees, see DatasetBuilder. Raises UsageError when none is installed, when what is
    installed is no builder, and when it has no use for something that `cameras` say.
    """
    kind = _builder_class(name)
    for attribute in sorted({key for camera in cameras for key in camera.said()}):
        if attribute not in kind.maps:
            raise UsageError(
                f"--{_OPTIONS.get(attribute, attribute).replace('_', '-')}: is not used by "
                f"--source {name}; leave it out."
            )
    if len(cameras) > 1 and not kind.several_cameras:
        raise UsageError(f"--camera: --source {name} takes one camera; leave the others out.")
    builder = kind(root, cameras) if cameras else kind(root)
    builder.hfov = hfov
    builder.license = license_of_folder(root)
    return builder


_OPTIONS = {"depth_unit": "depth_scale", "pose_layout": "cameras"} | dict.fromkeys(
    ("rgb", "depth", "pose", "info"), "topics"
)
"""Options of the command line, by what they say, where they are called otherwise."""


def license_of_folder(root: Path) -> str | None:
    """The licence that a dataset's card says, in the nearest README.md with one; None without one.

    Looked for in `root` and in the LEVELS folders above it, since `root` may be a part of a copy of
    a dataset on the Hub.
    """
    folder = root.resolve()
    for place in (folder, *folder.parents[:LEVELS]):
        try:
            text = read_bytes(place / "README.md", MAX_CARD_BYTES).decode()
            _, matter, _ = text.replace("\r\n", "\n").split("---\n", 2)
            said = yaml.safe_load(matter) if text.startswith("---") else None
        except (OccGenError, OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(said, dict) and (found := plain_license(said.get("license"))):
            return found
    return None


def plain_license(said: Any) -> str | None:
    """The name of a licence in a card; None where it gives none, several, or one of its own."""
    if isinstance(said, list) and len(said) == 1:
        said = said[0]
    known = isinstance(said, str) and re.fullmatch(r"[a-z0-9][a-z0-9.+-]{1,60}", said)
    return said if known and said not in ("other", "unknown") else None


def _builder_class(name: str) -> type[DatasetBuilder]:
    """The class that is installed as a source; raises UsageError where it cannot be one."""
    points = [point for point in entry_points(group="occgen_hub.builders") if point.name == name]
    if not points:
        known = ", ".join(builder_names()) or "none"
        raise UsageError(f"--source {name}: no such source; installed are {known}.")
    place = f"--source {name}: the entry point {points[0].value}"
    try:
        kind = points[0].load()
    except (ImportError, AttributeError) as error:
        said = in_brief(str(error))
        raise UsageError(f"{place} cannot be loaded ({said}); correct that package.") from error
    if not (isinstance(kind, type) and issubclass(kind, DatasetBuilder)):
        raise UsageError(f"{place} is no subclass of occgen_hub.builder.DatasetBuilder.")
    if missing := sorted(kind.__abstractmethods__):
        raise UsageError(f"{place} lacks the methods {', '.join(missing)}; write them.")
    if getattr(kind, "name", None) != name:
        found = getattr(kind, "name", None)
        raise UsageError(f"{place} has the name {found!r}; give it name = {name!r}.")
    return kind


def other_source(root: Path, name: str) -> str:
    """For the end of an error: another source that knows what is at `root`, "" if none does."""
    for other in builder_names():
        if other == name:
            continue
        try:
            found = _builder_class(other).recognise(root)
        except (OccGenError, OSError):
            continue
        if found is not None:
            return f"it is {found}: use --source {other}"
    return ""
