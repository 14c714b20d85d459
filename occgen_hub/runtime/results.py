"""The results of episodes, and their summary over a build."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from occgen_hub.builder import EpisodeRef
from occgen_hub.episode_build import Built, Progress
from occgen_hub.job import Job
from occgen_hub.scenes import SceneRef


@dataclass(frozen=True)
class Failure:
    """An episode that could not be built. trace: the traceback of an unexpected error."""

    id: str
    reason: str
    trace: str = ""


Result = Built | Failure


@dataclass(frozen=True)
class SceneResult:
    """A fetched scene is done: all its episodes were tried, or fetching it failed."""

    id: str


@dataclass
class Process:
    """The work of one run of a shard, with its workers.

    device: where networks ran; peak_memory: of its largest process, in bytes.
    """

    host: str
    device: str
    episodes: int
    frames: int
    seconds: float
    peak_memory: int


@dataclass
class Summary:
    """The results of a build, added up.

    seconds: duration of the whole build; stages: seconds per stage, added up over episodes and
    threads; remarks: about the files of the whole dataset; notes: number of episodes per note code;
    examples: the first note of each code, with its episode.
    """

    built: int = 0
    present: int = 0
    frames: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    stages: Counter[str] = field(default_factory=Counter)
    processes: list[Process] = field(default_factory=list)

    @property
    def episodes(self) -> int:
        """The number of episodes."""
        return self.built + self.present + len(self.failures)

    def add(self, result: Result) -> None:
        """Add the result of one episode."""
        if isinstance(result, Failure):
            self.failures.append(result)
            return
        self.built += result.status == "built"
        self.present += result.status == "present"
        self.frames += result.frames
        self.notes.update({note.code for note in result.notes})
        for note in result.notes:
            self.examples.setdefault(note.code, f"{result.id}: {note.text}")
        for stage, seconds in result.seconds.items():
            self.stages[stage] += seconds  # type: ignore[assignment]  # a Counter adds up floats as well


class Publisher(Protocol):
    """Publishes the finished scenes of a build, for example on the Hub."""

    def begin(
        self, job: Job, refs: Sequence[EpisodeRef | SceneRef], shard: int
    ) -> dict[str, tuple[str, ...]]:
        """The ids of those of `refs` that are published and up to date, with their episodes."""

    def add(self, scene: str, *, whole: bool) -> None:
        """Publish a scene whose episodes were all tried. whole: whether none of them failed."""

    def end(self) -> list[Failure]:
        """Wait until everything is published; returns a failure for each episode that is not."""

    def stop(self) -> None:
        """Stop publishing, because the build was stopped or has ended."""


@dataclass(frozen=True)
class Listener:
    """Callbacks of a build: `finished` for each episode, `frames` for frames within an episode."""

    finished: Callable[[Result], None] = lambda _: None
    frames: Progress = lambda *_: None
