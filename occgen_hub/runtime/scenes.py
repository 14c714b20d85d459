"""Scenes that are fetched: each is fetched into scratch, built, recorded and removed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.episode_build import Built, Progress
from occgen_hub.errors import OccGenError, SourceError
from occgen_hub.job import Job
from occgen_hub.runtime.episodes import SceneEpisode, build_episodes, catch_failure
from occgen_hub.runtime.results import Failure, Result, SceneResult
from occgen_hub.scenes import (
    FetchedScene,
    SceneRecord,
    SceneRef,
    read_scene,
    unpack_scene,
    write_scene,
)
from occgen_hub.schema import load_schema
from occgen_hub.scratch import Room, Scratch, open_scratch


def build_refs(
    job: Job, refs: Iterable[EpisodeRef | SceneRef], progress: Progress
) -> Generator[Result | SceneResult, None, None]:
    """Build episodes and scenes in order. A SceneResult follows the results of a scene's episodes.

    A scene that cannot be fetched is one failure. While a scene of the Hub is built, the next one
    is downloaded if scratch has room for both.
    """
    with ExitStack() as stack:
        scenes = _Scenes(job, stack)
        results = build_episodes(
            job.builder, scenes.episodes(refs), job.out, job.settings, progress
        )
        try:
            for result in results:
                if isinstance(result, SceneResult):
                    scenes.finish(result)
                    yield result
                else:
                    yield scenes.add(result)
        finally:
            scenes.stop()
            results.close()


@dataclass
class _OpenScene:
    """A scene that is being built. began: seconds of the performance counter; unpacked: bytes."""

    fetched: FetchedScene
    began: float
    unpacked: int = 0
    built: list[str] = field(default_factory=list)
    failed: bool = False


class _Scenes:
    """The scenes of one process. `episodes` runs in its own thread, the rest in the main thread."""

    def __init__(self, job: Job, stack: ExitStack) -> None:
        self._job, self._stack = job, stack
        self._schema = load_schema(job.builder.schema)
        self._scratch: Scratch | None = None
        self._open: dict[str, _OpenScene] = {}
        self._scene_of: dict[str, str] = {}

    def episodes(
        self, refs: Iterable[EpisodeRef | SceneRef]
    ) -> Iterator[EpisodeRef | SceneEpisode | Result | SceneResult]:
        """Yield episodes and, for each scene, its episodes once it is fetched and a SceneResult."""
        prefetcher = _Prefetcher(iter(refs), self._prefetch)
        while (item := prefetcher.next()) is not None:
            ref, room = item
            if isinstance(ref, EpisodeRef):
                yield ref
                continue
            known = read_scene(self._job.out, ref.id)
            if self._job.why_scene_outdated(ref, known) is None:
                assert known is not None
                yield from (Built(name, "present", 0) for name in known.episodes)
                yield SceneResult(ref.id)
                continue
            opened = catch_failure(ref, self._job.out, partial(self._fetch, ref, room))
            prefetcher.start()
            if isinstance(opened, Failure):
                yield opened
            else:
                for episode in opened.fetched.episodes:
                    self._scene_of[episode.id] = ref.id
                    yield SceneEpisode(self._builder(opened.fetched), episode)
            yield SceneResult(ref.id)

    def _prefetch(self, ref: EpisodeRef | SceneRef) -> Room | None:
        """Download a scene if scratch has room for it; None if nothing was downloaded.

        Errors are ignored: they occur again, and are reported, when the scene is fetched.
        """
        if isinstance(ref, EpisodeRef) or self._job.hub is None or self._scratch is None:
            return None
        if self._job.why_scene_outdated(ref, read_scene(self._job.out, ref.id)) is None:
            return None
        if not self._scratch.fits(3 * ref.bytes):  # Leaves room to unpack the current archive.
            return None
        room = self._scratch.room()
        try:
            self._job.hub.download(ref, room)
        except Exception:
            room.close()
            return None
        return room

    def _fetch(self, ref: SceneRef, room: Room | None) -> _OpenScene:
        began = time.perf_counter()
        if self._scratch is None:
            self._scratch = self._stack.enter_context(open_scratch(self._job.scratch_place))
        hub = self._job.hub
        downloaded = room is not None
        room = room or self._scratch.room()
        try:
            if hub is None:
                fetched = unpack_scene(ref, ref.path, room)
            else:
                if not downloaded:
                    hub.download(ref, room)
                fetched = hub.unpack(ref, room)
            fetched.episodes = self._list_episodes(fetched)
        except BaseException:
            room.close()
            raise
        opened = _OpenScene(fetched, began, room.bytes)
        self._open[ref.id] = opened
        return opened

    def _list_episodes(self, scene: FetchedScene) -> list[EpisodeRef]:
        """The episodes of a scene. Raises SourceError if there are none."""
        try:
            episodes = list(self._builder(scene).episodes())
        except OccGenError as error:
            raise OccGenError(scene.named(str(error))) from error
        if not episodes:
            problem = f"has no episode that the source {self._job.builder.name} recognises"
            raise SourceError(scene.name, problem, "check its content or exclude it with --scenes")
        return episodes

    def _builder(self, scene: FetchedScene) -> DatasetBuilder:
        return self._job.builder.at(scene.root)

    def add(self, result: Result) -> Result:
        """Record an episode's result. A failure that names a file in scratch is changed to name
        the file of the scene.
        """
        opened = self._open.get(self._scene_of.pop(result.id, ""))
        if opened is None:
            return result
        if isinstance(result, Failure):
            opened.failed = True
            named = opened.fetched.named
            return replace(result, reason=named(result.reason), trace=named(result.trace))
        opened.built.append(result.id)
        return result

    def finish(self, result: SceneResult) -> None:
        """Record a scene whose episodes were all tried, and remove it from scratch."""
        opened = self._open.pop(result.id, None)
        if opened is None:  # It was present, or could not be fetched.
            return
        fetched = opened.fetched
        fetched.room.close()
        record = SceneRecord(
            id=result.id,
            name=fetched.name,
            bytes=fetched.bytes,
            sha256=fetched.sha256,
            stamp=fetched.ref.stamp,
            choices=self._job.scene_choices,
            episodes=tuple(sorted(opened.built)),
            failed=opened.failed,
            unpacked=opened.unpacked,
            seconds=round(time.perf_counter() - opened.began, 3),
        )
        with suppress(OSError):  # Without a record, the next run fetches the scene again.
            write_scene(self._job.out, record)

    def stop(self) -> None:
        """Cancel fetching."""
        if self._scratch is not None:
            self._scratch.close()


class _Prefetcher:
    """An iterator over items. `start` prefetches the next one in a thread."""

    def __init__(
        self,
        refs: Iterator[EpisodeRef | SceneRef],
        prefetch: Callable[[EpisodeRef | SceneRef], Room | None],
    ) -> None:
        self._refs, self._prefetch = refs, prefetch
        self._thread: threading.Thread | None = None
        self._taken: list[tuple[EpisodeRef | SceneRef, Room | None] | BaseException | None] = []

    def start(self) -> None:
        """Start to prefetch the next item in a thread."""
        self._thread = threading.Thread(target=self._take, name="prefetch", daemon=True)
        self._thread.start()

    def _take(self) -> None:
        try:
            ref = next(self._refs, None)
            self._taken.append(None if ref is None else (ref, self._prefetch(ref)))
        except BaseException as error:
            self._taken.append(error)

    def next(self) -> tuple[EpisodeRef | SceneRef, Room | None] | None:
        """The next item and, if it was prefetched, its room in scratch."""
        if self._thread is None:
            ref = next(self._refs, None)
            return None if ref is None else (ref, None)
        self._thread.join()
        self._thread = None
        taken = self._taken.pop()
        if isinstance(taken, BaseException):
            raise taken
        return taken
