"""Sources: what a subclass says of a kind of recording, and how the installed ones are found."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar

from occgen_hub.config import Condition
from occgen_hub.engines import AUTO
from occgen_hub.episode import Episode
from occgen_hub.errors import MachineError, OccGenError, SourceError, UsageError
from occgen_hub.files import MACHINE_FAULTS, printable, sha256

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeRef:
    """An episode before it is read. id: "<group>/<scene>/<trajectory>", also its place in the
    output; path: the folder or file that holds it; index: its number where one holds several.
    """

    id: str
    path: Path
    index: int = 0


class DatasetBuilder(ABC):
    """A source of episodes. A subclass says its name, lists episodes and reads one.

    schema: what it writes; engine: the name of the one that suits it when the user names none;
    takes_file: whether `root` may be a file; knows: what `--condition` may ask of every episode,
    besides depth, which `has_depth` tells.
    """

    name: ClassVar[str]
    schema: ClassVar[str] = "trajectory"
    engine: ClassVar[str] = AUTO
    takes_file: ClassVar[bool] = False
    knows: ClassVar[tuple[Condition, ...]] = ("intrinsics", "poses")

    def __init__(self, root: Path) -> None:
        self.root = root
        self._passed_over: set[Path] = set()

    def pass_over(self, path: Path, error: OSError) -> None:
        """Warn, once, that something below the root cannot be looked into, and is left out.

        For `episodes`, so that one bad folder does not end a build. Raises SourceError where it is
        the root itself, MachineError where the machine is at fault.
        """
        problem = f"cannot be looked into ({error.strerror or error})"
        if error.errno in MACHINE_FAULTS:
            raise MachineError(f"{path}: {problem}; mend that and run again.") from error
        if path == self.root:
            raise SourceError(path, problem, "check its permissions") from error
        if path not in self._passed_over:
            self._passed_over.add(path)
            logger.warning("Warning: %s: %s, and is passed over.", printable(str(path)), problem)

    @abstractmethod
    def episodes(self) -> Iterator[EpisodeRef]:
        """Every episode below `root`, sorted by id, nothing decoded."""

    @abstractmethod
    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The files that `read` makes the episode from; raises SourceError when one is missing."""

    @abstractmethod
    def read(self, ref: EpisodeRef) -> Episode:
        """The episode; raises SourceError when its files cannot be used."""

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
                content = sha256(path)
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


def builder_names() -> list[str]:
    """The sources that are installed."""
    return sorted({point.name for point in entry_points(group="occgen_hub.builders")})


def load_builder(name: str, root: Path) -> DatasetBuilder:
    """The builder of that name for the tree at `root`; raises UsageError when none is installed."""
    for point in entry_points(group="occgen_hub.builders"):
        if point.name == name:
            builder: DatasetBuilder = point.load()(root)
            return builder
    known = ", ".join(builder_names()) or "none"
    raise UsageError(f"--source {name}: no such source; installed are {known}.")
