"""What became of episodes, and of a run: values that cross from process to process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from occgen_hub.builder import Built, Progress, Stage


@dataclass(frozen=True)
class Failure:
    """An episode that could not be built, and why; trace: only for what nobody foresaw.

    state: what it failed with (`DatasetBuilder.state`): while that stays, it would fail again, and
    is left alone. Empty where the fault was the machine's, not the episode's. repeated: whether it
    was left alone this time.
    """

    id: str
    reason: str
    trace: str = ""
    state: str = ""
    repeated: bool = False


Result = Built | Failure


@dataclass
class Process:
    """What one process of a run did. device: where its networks ran; peak_memory: in bytes."""

    host: str
    device: str
    episodes: int
    frames: int
    seconds: float
    peak_memory: int


_ROWS: dict[str, Any] = {"failures": Failure, "processes": Process}


@dataclass
class Summary:
    """What a run did. seconds: of the whole run; stages: added up over episodes and threads;
    remarks: on the files of the whole dataset; notes: on how many episodes there is one of each
    kind; examples: the first of each kind, with its episode.
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
        """How many it is about."""
        return self.built + self.present + len(self.failures)

    @property
    def repeated(self) -> int:
        """How many of the failures are earlier ones that were not tried again."""
        return sum(failure.repeated for failure in self.failures)

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

    def merge(self, other: Summary) -> None:
        """Count what another process did, which took its time beside this one."""
        self.built += other.built
        self.present += other.present
        self.frames += other.frames
        self.seconds = max(self.seconds, other.seconds)
        self.failures += other.failures
        self.remarks += other.remarks
        self.notes.update(other.notes)
        self.examples = other.examples | self.examples
        self.stages.update(other.stages)
        self.processes += other.processes

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; `from_json` makes the same of it again."""
        values = {**vars(self), "notes": dict(self.notes), "stages": dict(self.stages)}
        return {**values, **{key: [asdict(row) for row in values[key]] for key in _ROWS}}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """What `to_json` said; raises TypeError and KeyError where it is something else."""
        values = dict(values)
        for key, kind in _ROWS.items():
            values[key] = [kind(**row) for row in values[key]]
        for key in ("notes", "stages"):
            values[key] = Counter(values[key])
        return cls(**values)


@dataclass(frozen=True)
class Listener:
    """What is told of a run as it goes: each finished episode, and frames as they are done."""

    finished: Callable[[Result], None] = lambda _: None
    frames: Progress = lambda *_: None


@dataclass
class Tally:
    """How far a run is. episodes: done, of which `failed` failed; the others count frames."""

    episodes: int = 0
    failed: int = 0
    reconstructed: int = 0
    built: int = 0

    def add(self, other: Tally) -> None:
        """Count what another process did."""
        self.episodes += other.episodes
        self.failed += other.failed
        self.reconstructed += other.reconstructed
        self.built += other.built

    def listener(
        self, show: Callable[[Tally], None], news: Callable[[Result], None] = lambda _: None
    ) -> Listener:
        """One that counts here what it is told, then shows it; news: told of each episode."""

        def finished(result: Result) -> None:
            self.episodes += 1
            self.failed += isinstance(result, Failure)
            news(result)
            show(self)

        def frames(stage: Stage, done: int) -> None:
            setattr(self, stage, getattr(self, stage) + done)
            show(self)

        return Listener(finished, frames)
