"""What became of episodes, and the sum of it over a build."""

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
    """An episode that could not be built, and why. trace: the traceback of an unexpected error."""

    id: str
    reason: str
    trace: str = ""


Result = Built | Failure


@dataclass(frozen=True)
class SceneResult:
    """All episodes of a scene that had to be fetched were tried, or it could not be fetched."""

    id: str


@dataclass
class Process:
    """What one process did. device: where its networks ran; peak_memory: in bytes."""

    host: str
    device: str
    episodes: int
    frames: int
    seconds: float
    peak_memory: int


@dataclass
class Summary:
    """What a build did.

    seconds: of the whole build; stages: seconds, added up over episodes and threads; remarks: on
    the files of the whole dataset; notes: the number of episodes with a note of each kind;
    examples: the first note of each kind, with its episode.
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
        """How many episodes it counts."""
        return self.built + self.present + len(self.failures)

    def add(self, result: Result) -> None:
        """Count one episode."""
        if isinstance(result, Failure):
            self.failures.append(result)
            return
        self.built += result.status == "built"
        self.present += result.status == "present"
        self.frames += result.frames
        self.notes.update(note.code for note in result.notes)
        for note in result.notes:
            self.examples.setdefault(note.code, f"{result.id}: {note.text}")
        for stage, seconds in result.seconds.items():
            self.stages[stage] += seconds  # type: ignore[assignment]  # a Counter adds up floats as well


class Publisher(Protocol):
    """Takes finished scenes out of a build, as to the Hub."""

    def begin(
        self, job: Job, refs: Sequence[EpisodeRef | SceneRef], shard: int
    ) -> dict[str, tuple[str, ...]]:
        """Those of `refs`, by id, that are published as they would be built, and their episodes."""

    def add(self, scene: str, *, whole: bool) -> None:
        """A scene all of whose episodes were tried. whole: whether none of them failed."""

    def end(self) -> list[Failure]:
        """Wait until all is published; returns the episodes that could not be."""

    def stop(self) -> None:
        """The build was stopped, or has ended."""


@dataclass(frozen=True)
class Listener:
    """Called during a build: with each finished episode, and with frames as they are done."""

    finished: Callable[[Result], None] = lambda _: None
    frames: Progress = lambda *_: None
