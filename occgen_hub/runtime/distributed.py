"""Episodes shared out among the processes that accelerate or torchrun started, on several hosts.

Each process has a device of its own and builds its share without a word to the others. What they
did they say in small files in a hidden folder of the output, which all of them see anyway; so none
depends on a connection that has been silent for days. The first process waits for the others'
files and then writes what belongs to the dataset as a whole.
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
from occgen_hub.runtime.loop import RUN, Job, conclude, sole_use, witness
from occgen_hub.runtime.plan import shares
from occgen_hub.runtime.report import begin_report, logged, say
from occgen_hub.runtime.results import Result, Summary, Tally
from occgen_hub.runtime.work import build_each, summed

SECOND = 1.0
"""How often processes say how far they are, and the first one looks."""


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
    errors = [problem for problem in gather_object([error]) if problem is not None]
    if errors and group.rank == 0:
        raise errors[0]
    if errors:
        sys.exit(0)
    return value  # type: ignore[return-value]  # no error, hence a value


def agreed(job: Job, group: Group) -> list[list[str]]:
    """Everybody's share of the episodes, by their ids, as the first process has it."""
    from accelerate.utils import broadcast_object_list

    plan: list[list[str]] = [[] for _ in range(group.size)]
    if group.rank == 0:
        taken = shares([job.builder.work(ref) for ref in job.refs], group.size)
        plan = [[job.refs[number].id for number in numbers] for numbers in taken]
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
    from accelerate.utils import broadcast_object_list

    with ExitStack() as held:
        together(group, lambda: _held(held, job, group))
        name = [uuid.uuid4().hex]
        broadcast_object_list(name)
        place, failed = job.out / RUN / name[0], failures.known(job.out)
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
            for rank in range(1, group.size if group.rank == 0 else 1):
                summary.merge(_awaited(place / f"{rank}.json"))
        if group.rank:
            said = place / f"{group.rank}.json"
            _say(said, summary.to_json())
            # Until the first process takes it away, at the end of all: where a host's launcher
            # leaves earlier, it may take the point where the others meet along.
            while said.exists():
                time.sleep(SECOND)
            return None
        try:
            conclude(job, summary, group.size, "accelerate")
        finally:
            shutil.rmtree(job.out / RUN, ignore_errors=True)  # The others wait for that.
        return summary


def _held(held: ExitStack, job: Job, group: Group) -> None:
    """Take the output folder for the whole group."""
    if group.rank == 0:
        held.enter_context(sole_use(job.out))
        shutil.rmtree(job.out / RUN, ignore_errors=True)
        begin_report(job.out)
    held.enter_context(logged(job.out, f"build-{group.rank}" if group.rank else "build"))


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


def _awaited(path: Path) -> Summary:
    """What another process did, when it has. If it dies, its launcher stops this one as well."""
    while not path.exists():
        time.sleep(SECOND / 10)
    return Summary.from_json(read_json(path))


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
