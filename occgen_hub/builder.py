"""One episode, from its source to the files of its trajectory; what every source shares."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from occgen_hub.config import Condition, Config
from occgen_hub.engines import AUTO, Auto, Engine
from occgen_hub.episode import Episode, Note, Scene
from occgen_hub.errors import MachineError, OccGenError, SourceError, UsageError
from occgen_hub.files import (
    MACHINE_FAULTS,
    dump_json,
    flush,
    flush_tree,
    printable,
    read_json,
    sha256,
)
from occgen_hub.lerobot.writer import Media, Provenance, TrajectoryWriter
from occgen_hub.occupancy.frames import observe_each
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.visibility import FrameOccupancy
from occgen_hub.scene import settle
from occgen_hub.schema import Schema, load_schema

logger = logging.getLogger(__name__)

Stage = Literal["reconstructed", "built"]
Progress = Callable[[Stage, int], None]
"""Called with what was done to how many frames since the last call."""


@dataclass(frozen=True)
class EpisodeRef:
    """An episode before it is read. id: "<group>/<scene>/<trajectory>", also its place in the
    output; path: the folder or file that holds it; index: its number where one holds several.
    """

    id: str
    path: Path
    index: int = 0


@dataclass(frozen=True)
class Settings:
    """How to build: the configuration, the engine, the media.

    overwrite: build also what is there; retry_failed: also what failed before and is unchanged.
    """

    config: Config = field(default_factory=lambda: Config())
    engine: Engine = field(default_factory=Auto)
    media: Media = "copy"
    overwrite: bool = False
    retry_failed: bool = False


@dataclass(frozen=True)
class Built:
    """What became of an episode. seconds: time spent in each stage."""

    id: str
    status: Literal["built", "present"]
    frames: int
    notes: tuple[Note, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


class ChangedError(SourceError):
    """A file of the source changed while it was read; the next run finds it as it is then."""


@dataclass(frozen=True)
class Found:
    """An episode that is read and reconstructed, and has yet to be written.

    stamps: of its sources before they were read; reason: why it is built, "is not there" if so;
    clock: the seconds spent on it.
    """

    ref: EpisodeRef
    episode: Episode
    scene: Scene
    provenance: Provenance
    sources: list[Path]
    stamps: list[tuple[int, int]]
    reason: str | None
    clock: Stopwatch


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

    def provenance(self, engine: Engine, settings: Settings) -> Provenance:
        """What is recorded of how an episode was built."""
        return Provenance(self.name, engine.name, engine.weights(), settings.config, settings.media)

    def build(
        self, ref: EpisodeRef, out: Path, settings: Settings, progress: Progress = lambda *_: None
    ) -> Built:
        """Build one episode into `out / ref.id`, unless what it would build is there already.

        The trajectory is written aside and moved into place when whole. Raises OccGenError; then
        nothing is left under the final name that was not there before.
        """
        found = self.find(ref, out, settings, progress)
        return found if isinstance(found, Built) else self.write(found, out, progress)

    def find(
        self, ref: EpisodeRef, out: Path, settings: Settings, progress: Progress = lambda *_: None
    ) -> Found | Built:
        """The first half of `build`: read an episode and reconstruct it, unless it is there.

        It may run in another thread than `write`, which writes the episode before it meanwhile.
        """
        place = out / ref.id
        clear_leftovers(place)
        check_replaceable(place, load_schema(self.schema))
        engine = settings.engine.for_episode(ref.id, has_depth=self.has_depth(ref))
        provenance = self.provenance(engine, settings)
        reason = None
        if not settings.overwrite:  # Comparing may mean reading all sources.
            reason, stamp = self._compare(ref, out, provenance)
            if reason is None:
                _remember(place, stamp)
                return Built(ref.id, "present", 0)

        clock = Stopwatch()
        sources = self.sources(ref)
        stamps = _stamps(sources)
        with clock("read"):
            episode = self.read(ref)
        with clock("reconstruct"):
            found = engine.reconstruct(
                episode, settings.config, lambda frames: progress("reconstructed", frames)
            )
            scene = settle(episode, found, settings.config)
        return Found(ref, episode, scene, provenance, sources, stamps, reason, clock)

    def write(self, found: Found, out: Path, progress: Progress = lambda *_: None) -> Built:
        """The second half of `build`: occupancy, visibility, and every file."""
        ref, episode, clock = found.ref, found.episode, found.clock
        schema = load_schema(self.schema)
        with staged(out / ref.id, clock) as folder:
            _write(folder, schema, episode, found.scene, found.provenance, clock, progress)
            if _stamps(found.sources) != found.stamps:
                raise ChangedError(ref.path, "changed while it was read", "run the build again")
            check_replaceable(out / ref.id, schema)
            _remember(folder, source_stamp(found.sources))
        notes = (*episode.notes, *found.scene.notes)
        if found.reason not in (None, "is not there"):
            notes = (Note("built again", f"what was there {found.reason}: built again"), *notes)
        return Built(ref.id, "built", episode.length, notes, clock.seconds)

    def state(self, ref: EpisodeRef, settings: Settings) -> str:
        """What an episode would be built from, as a SHA-256: its files, the settings, our version.

        Of the files it takes names, sizes and times of change: whatever happens to one, also to its
        permissions, changes it, and nothing is read. Where there is nothing to build from, why not.
        """
        try:
            engine = settings.engine.for_episode(ref.id, has_depth=self.has_depth(ref))
            schema, sources = load_schema(self.schema), self.sources(ref)
            stats = [(path, path.stat()) for path in sources]
            files: list[object] = [
                [os.path.relpath(path, ref.path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
                for path, stat in stats
            ]
            given = self.provenance(engine, settings).record(schema, ref.id, "")
        except (OccGenError, OSError) as error:
            files, given = [str(error)], {"config": settings.config.model_dump(mode="json")}
        said = dump_json([version("occgen-hub"), given, files])
        return hashlib.sha256(said.encode()).hexdigest()

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

    def outdated(self, ref: EpisodeRef, out: Path, settings: Settings) -> str | None:
        """Why `out / ref.id` is not what building would give, as far as its record tells.

        None if it is; "is not there" if there is nothing. Raises as `check_replaceable` does.
        """
        check_replaceable(out / ref.id, load_schema(self.schema))
        engine = settings.engine.for_episode(ref.id, has_depth=self.has_depth(ref))
        return self._compare(ref, out, self.provenance(engine, settings))[0]

    def _compare(
        self, ref: EpisodeRef, out: Path, provenance: Provenance
    ) -> tuple[str | None, int]:
        """`outdated`, and the stamp of the sources (0 if it does not come to that)."""
        place, schema = out / ref.id, load_schema(self.schema)
        mark = place / schema.path("record")
        if not place.exists():
            return "is not there", 0
        try:
            record = read_json(mark)
            recorded = str(record["source"]["fingerprint"])
            files = list(record["files"])
        except (SourceError, KeyError, TypeError):
            return "has no usable record", 0
        # Recorded before a setting was there, a configuration stands for that setting's default.
        record["config"] = {**Config().model_dump(mode="json"), **record["config"]}
        expected = provenance.record(schema, ref.id, recorded)
        for key, value in {"weights": None, **expected}.items():
            if record.get(key) != value:
                return f"was built with another {key}{_difference(record.get(key), value)}", 0
        if not all((place / name).is_file() for name in files):
            return "lacks files", 0
        sources = self.sources(ref)
        stamp = source_stamp(sources)
        if stamp == place.stat().st_mtime_ns or self.fingerprint(sources) == recorded:
            return None, stamp
        return "was built from a source that has changed", 0


def _difference(was: object, now: object) -> str:
    """In brackets what differs between two values, or two mappings, of a record."""
    if not isinstance(was, dict) or not isinstance(now, dict):
        return f" ({was}, now {now})"
    parts = [f"{k} {was.get(k)}, now {v}" for k, v in now.items() if was.get(k) != v]
    return f" ({'; '.join(parts)[:200]})" if parts else ""


class Stopwatch:
    """Adds up the seconds spent in named stages; a stage inside another does not count for that."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._within: list[float] = []

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        self._within.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            own = elapsed - self._within.pop()
            self.seconds[stage] = self.seconds.get(stage, 0.0) + own
            if self._within:
                self._within[-1] += elapsed

    def add(self, other: Stopwatch) -> None:
        """Count what another thread timed, beside this one's."""
        for stage, spent in other.seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent


def _write(
    folder: Path,
    schema: Schema,
    episode: Episode,
    scene: Scene,
    provenance: Provenance,
    clock: Stopwatch,
    progress: Progress,
) -> None:
    grid = Grid.of(provenance.config)
    writer = TrajectoryWriter(folder, schema, episode, grid)
    beside, turn, over = Stopwatch(), threading.Lock(), threading.Event()

    def tables() -> None:
        with turn:
            if not over.is_set():
                _write_scene(writer, scene, provenance.config, beside)

    try:
        with ThreadPoolExecutor(1) as pool:  # So that cores have work where the other has none.
            written = pool.submit(tables)
            with clock("write occupancy"):
                writer.write_occupancy(frames_occupancy(episode, scene, grid, clock, progress))
            written.result()
    finally:
        # An interruption while the thread starts leaves it unknown to the pool; the folder must not
        # be cleared before it has ended, or else it may not begin.
        with turn:
            over.set()
    clock.add(beside)
    with clock("write media"):
        writer.write_media(provenance.media)
    with clock("checksums"):
        writer.finish(provenance, scene)


def _write_scene(writer: TrajectoryWriter, scene: Scene, config: Config, clock: Stopwatch) -> None:
    with clock("write scene"):
        writer.write_scene(scene, config)
        writer.write_tables(scene)


def frames_occupancy(
    episode: Episode,
    scene: Scene,
    grid: Grid,
    clock: Stopwatch,
    progress: Progress = lambda *_: None,
) -> Iterator[FrameOccupancy]:
    """Occupancy and visibility of each frame of an episode, in order."""
    frames = observe_each(
        grid,
        scene.cloud.points,
        scene.world_from_camera,
        # As they will be written, so that a reader who traces the same rays sees the same.
        scene.intrinsics.astype(np.float32).astype(np.float64),
        episode.image_size,
    )
    while (frame := _next(frames, clock)) is not None:
        yield frame
        progress("built", 1)


def _next(frames: Iterator[FrameOccupancy], clock: Stopwatch) -> FrameOccupancy | None:
    """The next frame, the wait for it counted as occupancy."""
    with clock("occupancy"):
        return next(frames, None)


def check_replaceable(place: Path, schema: Schema) -> None:
    """Raise UsageError where a trajectory's place holds something that no build wrote.

    What a build wrote has a record, be it a damaged one. An empty folder may be replaced as well.
    """
    if not os.path.lexists(place) or os.path.lexists(place / schema.path("record")):
        return
    with suppress(OSError):
        if not place.is_symlink() and not any(place.iterdir()):
            return
    kind = "folder" if place.is_dir() else "file"
    raise UsageError(
        f"{place}: is a {kind} that occgen-hub did not build (it has no {schema.path('record')}), "
        "and is left as it is; choose another --output, or move it away."
    )


def clear_leftovers(place: Path) -> None:
    """Undo what an interrupted build left beside `place`."""
    partial, old = _beside(place)
    _remove(partial)
    if old.exists() and not place.exists():
        old.rename(place)
    _remove(old)


@contextmanager
def staged(place: Path, clock: Stopwatch | None = None) -> Iterator[Path]:
    """An empty folder beside `place` that takes its place when the block ends well.

    By then all in it is on disk, and so are the folders that lead to it: a power cut leaves the
    trajectory whole or not there.
    """
    partial, old = _beside(place)
    clock = clock or Stopwatch()
    try:  # From before the folder is there: an interruption may come as soon as it is.
        _make(partial)
        yield partial
        with clock("flush"):
            flush_tree(partial)
        if place.exists():
            place.rename(old)
        partial.rename(place)
        with clock("flush"):
            flush(place.parents[:3])
    except BaseException:
        clear_leftovers(place)
        with suppress(OSError):  # Folders made for this trajectory alone go with it.
            place.parent.rmdir()
            place.parent.parent.rmdir()
        raise
    _remove(old)


def _make(folder: Path) -> None:
    """Make a folder and those above it, of which another process may remove an empty one."""
    for _ in range(4):
        with suppress(FileNotFoundError):
            folder.mkdir(parents=True)
            return
    folder.mkdir(parents=True)


def _remove(path: Path) -> None:
    """Remove a folder with all in it, or whatever a user put in its place."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _beside(place: Path) -> tuple[Path, Path]:
    """Where a trajectory is written, and where the one that it replaces waits to be removed."""
    return place.with_name(f".{place.name}.partial"), place.with_name(f".{place.name}.old")


def _remember(place: Path, stamp: int) -> None:
    """Give a trajectory's folder the stamp of its sources as its time.

    A later run that finds it equal knows the sources unchanged without reading them. Whatever else
    it is, the contents decide.
    """
    with suppress(OSError):
        if place.stat().st_mtime_ns != stamp:
            os.utime(place, ns=(stamp, stamp))


def _stamps(paths: Iterable[Path]) -> list[tuple[int, int]]:
    with _named_errors():
        return [(stat.st_size, stat.st_mtime_ns) for stat in (path.stat() for path in paths)]


def source_stamp(paths: Iterable[Path]) -> int:
    """A time in nanoseconds that stands for the names, sizes and times of files.

    Its seconds are those of the latest change. The nanoseconds are a checksum over every file, and
    over the folders that hold them: the latest time alone would hide changes once it lies in the
    future. The time of change is among them, which no program can set back.
    """
    files = list(paths)
    shared = os.path.commonpath([path.parent for path in files])
    digest, newest = hashlib.sha256(), 0
    with _named_errors():
        for path in (*files, *sorted({path.parent for path in files})):
            stat = path.stat()
            facts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            digest.update(os.fsencode(path.relative_to(shared)) + repr(facts).encode())
            newest = max(newest, *facts[1:])
    seconds = min(newest // 10**9, _LAST_SECOND)
    return seconds * 10**9 + int.from_bytes(digest.digest()[:8]) % 10**9


_LAST_SECOND = (1 << 31) - 1
"""The latest time that every file system can give a folder."""


@contextmanager
def _named_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            error.filename or "a source file", f"cannot be read ({error.strerror})", "restore it"
        ) from error


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
