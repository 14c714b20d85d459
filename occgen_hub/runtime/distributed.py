"""Episodes shared out among the processes that accelerate or torchrun started, on several hosts.

Each process has a device of its own and builds its share without a word to the others. What they
did they say in small files in a hidden folder of the output, which all of them see anyway; so none
depends on a connection that has been silent for days. The first process waits for the others'
files and then writes what belongs to the dataset as a whole.

Where a process dies, its launcher stops those beside it, but not those on other hosts. So each says
every second how far it is, and one that has said nothing for long is given up.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from occgen_hub.builder import EpisodeRef
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import dump_json, parse_json, read_json
from occgen_hub.runtime import failures
from occgen_hub.runtime.loop import RUN, Job, conclude, left, witness
from occgen_hub.runtime.output import check_current, make_current, sole_use
from occgen_hub.runtime.plan import shares
from occgen_hub.runtime.report import begin_report, logged, say
from occgen_hub.runtime.results import Result, Summary, Tally
from occgen_hub.runtime.work import build_each, summed

SECOND = 1.0
"""How often processes say how far they are, and the first one looks."""

LOST = 600.0
"""After so many seconds without a word, a process is taken for dead."""

MEETING = timedelta(hours=12)
"""How long the processes wait for one another at the start, where one may have to fetch weights."""


@dataclass(frozen=True)
class Group:
    """This process among its peers. device: its own, as torch names it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: str

    @property
    def local_ranks(self) -> range:
        """The processes on this host."""
        first = self.rank - self.local_rank
        return range(first, first + self.local_size)


@contextmanager
def joined(device: str | None = None) -> Iterator[Group]:
    """Meet the processes that were started beside this one, and leave them when the block ends.

    device: "cpu" to leave GPUs alone; no other may be named, as each process has its own. Raises
    UsageError where that, or the launcher's environment, is wrong.
    """
    import torch
    from accelerate import PartialState

    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--device {device}: accelerate gives each process a device of its own; leave it out."
        )
    try:
        cpu = device == "cpu" or not torch.cuda.is_available()
        state = PartialState(cpu=cpu, timeout=MEETING)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise UsageError(
            f"--executor accelerate: the processes do not find one another ({reason}); start them "
            "with accelerate launch or torchrun."
        ) from error
    try:
        yield Group(
            rank=state.process_index,
            size=state.num_processes,
            local_rank=state.local_process_index,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)),
            device=str(state.device),
        )
    finally:
        with suppress(RuntimeError, ValueError):
            state.destroy_process_group()


def together[Value](group: Group, work: Callable[[], Value]) -> Value:
    """What some work gives in this process, if it goes well in all of them.

    Else the first process raises the first error, and the others end: their exit codes are 0, since
    a launcher stops everybody, the one that speaks as well, as soon as one ends otherwise.
    """
    from accelerate.utils import gather_object

    value, error = None, None
    try:
        value = work()
    except OccGenError as problem:
        error = problem
    with _meeting():
        errors = [problem for problem in gather_object([error]) if problem is not None]
    if errors and group.rank == 0:
        raise errors[0]
    if errors:
        sys.exit(0)
    return value  # type: ignore[return-value]  # no error, hence a value


@contextmanager
def _meeting() -> Iterator[None]:
    """Around what all processes do together; raises OccGenError where one is lost meanwhile."""
    try:
        yield
    except RuntimeError as error:  # torch's, of a connection that broke.
        reason = (str(error).splitlines() or [""])[0][:200].rstrip(".")
        raise OccGenError(
            f"--executor accelerate: a process was lost while all of them met ({reason}); see what "
            "the others say and run the same build again."
        ) from error


def agreed(job: Job, group: Group) -> list[list[str]]:
    """Everybody's share of the episodes, by their ids, as the first process has it."""
    from accelerate.utils import broadcast_object_list

    plan: list[list[str]] = [[] for _ in range(group.size)]
    if group.rank == 0:
        taken = shares([job.builder.work(ref) for ref in job.refs], group.size)
        plan = [[job.refs[number].id for number in numbers] for numbers in taken]
    with _meeting():
        broadcast_object_list(plan)
    return plan


def _own(job: Job, names: list[str]) -> list[EpisodeRef]:
    """A share, as this process sees the source."""
    there = {ref.id: ref for ref in job.refs}
    if missing := [name for name in names if name not in there]:
        raise OccGenError(
            f"{job.builder.root}: the processes do not see the same episodes ({missing[0]}); "
            "give all hosts the same source, and do not change it while a build begins."
        )
    return [there[name] for name in names]


def run_shared(
    job: Job,
    group: Group,
    show: Callable[[Tally, int], None] = lambda *_: None,
    news: Callable[[Result], None] = lambda _: None,
) -> Summary | None:
    """Build this process's share of a job; in the first process also everything else.

    show: called in one process of each host with how far that host is, and how many episodes it
    has; news: called with each result of this process. Returns the summary of all in the first
    process and None in the others. Raises as `run_job` does, in the first process.
    """
    with ExitStack() as held:
        name = _name()
        together(group, lambda: _cleared(job, group, name))
        together(group, lambda: _held(held, job, group, name))
        place, failed = job.out / RUN / name, failures.known(job.out)
        together(group, lambda: _made(place))
        plan = agreed(job, group)
        refs = together(group, lambda: _own(job, plan[group.rank]))
        say(
            f"begins: {len(refs)} of {len(job.refs)} episodes, process {group.rank}, {group.device}"
        )
        total = sum(len(plan[rank]) for rank in group.local_ranks)
        with _watched(place, group, lambda tally: show(tally, total)) as tally:
            listener, process = tally.listener(lambda _: None, news), str(group.rank)
            results = build_each(job.builder, refs, job.out, job.settings, listener, failed)
            summary = summed(
                results, listener, lambda result: witness(job.out, result, process), group.device
            )
            if group.rank == 0:
                for other in _awaited(job, place, plan):
                    summary.merge(other)
                conclude(job, summary, group.size, "accelerate")
                return summary
        _until_the_end(place, group.rank, summary)
        return None


def _cleared(job: Job, group: Group, name: str) -> None:
    """Find the output free, take earlier runs' place, and take away what they left there."""
    if group.rank == 0:
        with sole_use(job.out):
            make_current(job.out, name, job.choices)
            shutil.rmtree(job.out / RUN, ignore_errors=True)
            begin_report(job.out)


def _held(held: ExitStack, job: Job, group: Group, name: str) -> None:
    """Hold the output, each process for itself: one that is lost, but alive, still does."""
    held.enter_context(sole_use(job.out, shared=True))
    check_current(job.out, name)  # Another run may have come between.
    if group.rank == 0:
        held.callback(shutil.rmtree, job.out / RUN, ignore_errors=True)
    held.enter_context(logged(job.out, f"build-{group.rank}" if group.rank else "build"))


def _name() -> str:
    """What this run is called: the same in all processes."""
    from accelerate.utils import broadcast_object_list

    name = [uuid.uuid4().hex]
    with _meeting():
        broadcast_object_list(name)
    return name[0]


def _made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OccGenError(
            f"{folder}: cannot be made ({error.strerror}); mend that and run again."
        ) from error


def _say(path: Path, value: dict[str, Any]) -> None:
    """Put a file where others look for it, whole; it need not outlast the run."""
    partial = path.with_suffix(f"{path.suffix}.partial")
    partial.write_text(dump_json(value), encoding="utf-8")
    partial.replace(path)


class _Silence:
    """For how long a process has not said how far it is, by the clock of the one that listens.

    From one look to the next two seconds count at most: whoever was stopped meanwhile, as jobs are
    by their schedulers, could not listen.
    """

    def __init__(self, place: Path, rank: int) -> None:
        self._path = place / f"{rank}.tally"
        self._heard, self._looked, self._silent = self._word(), time.monotonic(), 0.0

    def is_long(self) -> bool:
        """Whether it is over LOST."""
        now = time.monotonic()
        self._silent += min(now - self._looked, 2 * SECOND)
        self._looked = now
        if (heard := self._word()) != self._heard:
            self._heard, self._silent = heard, 0.0
        return self._silent > LOST

    def _word(self) -> tuple[int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def _awaited(job: Job, place: Path, plan: list[list[str]]) -> list[Summary]:
    """What the other processes did, when they have; of one that is lost, what is there."""
    silences = {rank: _Silence(place, rank) for rank in range(1, len(plan))}
    told: dict[int, Summary] = {}
    while waiting := silences.keys() - told.keys():
        for rank in waiting:
            said = place / f"{rank}.json"
            if said.exists():
                told[rank] = Summary.from_json(read_json(said))
            elif silences[rank].is_long():
                reason = f"process {rank} was lost; see what its host says, and run the same build"
                told[rank] = left(job, _own(job, plan[rank]), f"{reason} again")
        time.sleep(SECOND / 10)
    return [told[rank] for rank in sorted(told)]


def _until_the_end(place: Path, rank: int, summary: Summary) -> None:
    """Say what this process did, and stay until the first one has heard it and done the rest.

    Where a host's launcher leaves earlier, it may take the point where the others meet along.
    Raises OccGenError where the first process is lost, or went on without this one.
    """
    said, first = place / f"{rank}.json", _Silence(place, 0)
    again = "run the same build again, which goes on from there"
    try:
        _say(said, summary.to_json())
    except OSError as error:
        raise OccGenError(
            f"{said}: cannot be written ({error.strerror}), so that the first process ended "
            f"without this one, or will; {again}."
        ) from error
    while said.exists():
        if first.is_long():
            raise OccGenError(f"{place}: the first process was lost; {again}.")
        time.sleep(SECOND)


@contextmanager
def _watched(place: Path, group: Group, show: Callable[[Tally], None]) -> Iterator[Tally]:
    """A tally that the other processes of the host see; one of them shows them all together."""
    tally, stop = Tally(), threading.Event()

    def watch() -> None:
        while not stop.wait(SECOND):
            tell()

    def tell() -> None:
        with suppress(OSError):  # How far it is matters less than that it goes on.
            _say(place / f"{group.rank}.tally", asdict(tally))
        if group.local_rank == 0:
            whole = Tally()
            for rank in group.local_ranks:
                whole.add(tally if rank == group.rank else _told(place / f"{rank}.tally"))
            show(whole)

    thread = threading.Thread(target=watch, name="tally", daemon=True)
    thread.start()
    try:
        yield tally
    finally:
        stop.set()
        thread.join()
        tell()


def _told(path: Path) -> Tally:
    try:
        return Tally(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return Tally()
