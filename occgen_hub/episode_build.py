"""One episode, from its source to the files of its trajectory."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from occgen_hub.atomic import atomic_folder, clear_leftovers
from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.config import Config
from occgen_hub.engines import Auto, Engine
from occgen_hub.episode import Episode, Note
from occgen_hub.errors import SourceError
from occgen_hub.lerobot.writer import Media, Provenance, TrajectoryWriter
from occgen_hub.occupancy.grid import Grid
from occgen_hub.occupancy.states import FreeSpace
from occgen_hub.occupancy.visibility import FrameOccupancy
from occgen_hub.pipeline import observe, reconstruct
from occgen_hub.scene import Scene
from occgen_hub.schema import Schema, load_schema
from occgen_hub.segmenters import Segmenter, with_labels
from occgen_hub.stopwatch import Stopwatch
from occgen_hub.up_to_date import (
    MISSING,
    check_replaceable,
    outdated,
    record_license,
    remember,
    sizes_and_times,
    source_stamp,
)

Stage = Literal["reconstructed", "built"]
Progress = Callable[[Stage, int], None]
"""Called with a stage, and the number of frames that reached it since the last call."""


@dataclass(frozen=True)
class Settings:
    """How to build: the configuration, the engine, the media.

    overwrite: also build up-to-date episodes; segmenter: makes labels if the source has none.
    """

    config: Config = field(default_factory=lambda: Config())
    engine: Engine = field(default_factory=Auto)
    media: Media = "copy"
    overwrite: bool = False
    segmenter: Segmenter | None = None


@dataclass(frozen=True)
class Built:
    """The result of an episode. seconds: time spent in each stage."""

    id: str
    status: Literal["built", "present"]
    frames: int
    notes: tuple[Note, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


class ChangedError(SourceError):
    """A file of the source changed while it was read. The next run reads it again."""


@dataclass(frozen=True)
class ReconstructedEpisode:
    """An episode that was read and reconstructed, but not yet written.

    stamps: of its sources before they were read; reason: why it is built, `MISSING` if it is
    new; clock: the seconds spent on it.
    """

    builder: DatasetBuilder
    ref: EpisodeRef
    episode: Episode
    scene: Scene
    provenance: Provenance
    sources: list[Path]
    stamps: list[tuple[int, int]]
    reason: str | None
    clock: Stopwatch


def build_episode(
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    progress: Progress = lambda *_: None,
) -> Built:
    """Build one episode into `out / ref.id`, unless it is up to date.

    The trajectory is written beside its final path, and renamed when it is complete. If it raises
    OccGenError, the final path is unchanged.
    """
    done = reconstruct_episode(builder, ref, out, settings, progress)
    return done if isinstance(done, Built) else write_episode(done, out, progress)


def reconstruct_episode(
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    progress: Progress = lambda *_: None,
) -> ReconstructedEpisode | Built:
    """The first half of `build_episode`: read and reconstruct an episode that is not up to date.

    It may run in another thread, while `write_episode` writes the previous episode.
    """
    place = out / ref.id
    clear_leftovers(place, exclusive=True)  # A build holds its output; an episode is in one shard.
    remove_scratch(place)
    check_replaceable(place, load_schema(builder.schema))
    engine = settings.engine.for_episode(ref.id, has_depth=builder.has_depth(ref))
    made_by, reason = provenance(builder, engine, settings), None
    if not settings.overwrite:
        reason, stamp = outdated(builder, ref, out, made_by)
        if reason is None:
            record_license(place, load_schema(builder.schema), builder.license)
            remember(place, stamp)
            return Built(ref.id, "present", 0)

    clock, sources = Stopwatch(), builder.sources(ref)
    stamps = sizes_and_times(sources)
    with clock("read"):
        episode = with_labels(builder.read(ref), settings.segmenter)
    try:
        with clock("reconstruct"):
            scene = reconstruct(
                episode,
                engine,
                settings.config,
                scratch_folder(place),
                lambda frames: progress("reconstructed", frames),
            )
    except BaseException:
        remove_scratch(place)
        raise
    return ReconstructedEpisode(
        builder, ref, episode, scene, made_by, sources, stamps, reason, clock
    )


def write_episode(
    done: ReconstructedEpisode, out: Path, progress: Progress = lambda *_: None
) -> Built:
    """The second half of `build_episode`: occupancy, visibility, and every file."""
    ref, episode, clock, place = done.ref, done.episode, done.clock, out / done.ref.id
    schema = load_schema(done.builder.schema)
    try:
        with atomic_folder(place, flushing=lambda: clock("flush")) as folder:
            notes = _write(folder, schema, episode, done.scene, done.provenance, clock, progress)
            if sizes_and_times(done.sources) != done.stamps:
                raise ChangedError(ref.path, "changed while it was read", "run the build again")
            check_replaceable(place, schema)
            remember(folder, source_stamp(done.sources))
    finally:
        remove_scratch(place)
    if done.reason not in (None, MISSING):
        notes = (Note("built again", f"the existing trajectory {done.reason}: built again"), *notes)
    return Built(ref.id, "built", episode.length, notes, clock.seconds)


def scratch_folder(place: Path) -> Path:
    """The folder for depth that does not fit into memory, while a trajectory is built."""
    return place.with_name(f".{place.name}.scratch")


def remove_scratch(place: Path) -> None:
    """Remove the scratch folder of a trajectory, and parents that become empty."""
    scratch = scratch_folder(place)
    if scratch.exists():
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            place.parent.rmdir()
            place.parent.parent.rmdir()


def why_outdated(
    builder: DatasetBuilder, ref: EpisodeRef, out: Path, settings: Settings
) -> str | None:
    """Why `build_episode` would build an episode. None if it is up to date."""
    check_replaceable(out / ref.id, load_schema(builder.schema))
    engine = settings.engine.for_episode(ref.id, has_depth=builder.has_depth(ref))
    return outdated(builder, ref, out, provenance(builder, engine, settings))[0]


def provenance(builder: DatasetBuilder, engine: Engine, settings: Settings) -> Provenance:
    """The provenance to record for an episode."""
    return Provenance(
        builder.name,
        builder.version,
        engine.name,
        engine.weights(),
        settings.config,
        settings.media,
        tuple(camera.as_json() for camera in builder.cameras),
        builder.license,
        None if settings.segmenter is None else settings.segmenter.record(),
    )


def _write(
    folder: Path,
    schema: Schema,
    episode: Episode,
    scene: Scene,
    provenance: Provenance,
    clock: Stopwatch,
    progress: Progress,
) -> tuple[Note, ...]:
    """Write everything. Returns the notes that were recorded."""
    grid = Grid.of(provenance.config)
    free = FreeSpace(grid)
    writer = TrajectoryWriter(folder, schema, episode, grid)
    beside, turn, over = Stopwatch(), threading.Lock(), threading.Event()

    def tables() -> None:
        with turn:
            if not over.is_set():
                _write_scene(writer, scene, provenance.config, beside)

    try:
        with ThreadPoolExecutor(1) as pool:  # Uses cores that are idle otherwise.
            written = pool.submit(tables)
            with clock("write occupancy"):
                writer.write_occupancy(_observed(episode, scene, grid, free, clock, progress))
            written.result()
    finally:
        # If the start of the thread is interrupted, the pool does not know it. The folder must not
        # be removed before that thread has ended or is kept from starting.
        with turn:
            over.set()
    clock.add(beside)
    with clock("write scene"):
        writer.write_states(scene, free)
    with clock("write media"):
        writer.write_media(provenance.media)
    with clock("checksums"):
        writer.finish(provenance, scene)
    return writer.all_notes(scene)


def _write_scene(writer: TrajectoryWriter, scene: Scene, config: Config, clock: Stopwatch) -> None:
    with clock("write scene"):
        writer.write_scene(scene, config)
        writer.write_tables(scene)


def _observed(
    episode: Episode,
    scene: Scene,
    grid: Grid,
    free: FreeSpace,
    clock: Stopwatch,
    progress: Progress,
) -> Iterator[FrameOccupancy]:
    """Occupancy and visibility of each frame in order. Waiting counts as time of occupancy."""
    frames = observe(scene, episode, grid, free)
    while True:
        with clock("occupancy"):
            frame = next(frames, None)
        if frame is None:
            return
        yield frame
        progress("built", 1)
