"""Episodes, one after another in this process: while one is written, the next is reconstructed."""

from __future__ import annotations

import errno
import resource
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import Queue

from occgen_hub.builder import (
    ChangedError,
    DatasetBuilder,
    EpisodeRef,
    Found,
    Progress,
    Settings,
    Stage,
)
from occgen_hub.errors import MachineError, OccGenError
from occgen_hub.runtime.failures import FAILURES
from occgen_hub.runtime.results import Failure, Listener, Process, Result, Summary

GRACE = 2.0
"""Seconds that an interrupted build waits for a reconstruction under way."""


class Abandoned(BaseException):
    """Nobody waits for this reconstruction any more."""


def build_one(
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    progress: Progress,
    failed: Failure | None = None,
) -> Result:
    """One episode, whatever happens to it: built, present or failed, with the reason.

    failed: what an earlier run made of it; if that is all there is to it still, it is given again.
    """
    found = find_one(builder, ref, out, settings, progress, failed)
    if not isinstance(found, Found):
        return found
    return write_one(builder, found, out, settings, progress)


def find_one(
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    progress: Progress,
    failed: Failure | None = None,
) -> Found | Result:
    """The first half of `build_one`: an episode that is to be written, or what became of it."""
    if failed is not None and is_repeated(builder, ref, out, settings, failed):
        return replace(failed, repeated=True)
    return _guarded(builder, ref, out, settings, lambda: builder.find(ref, out, settings, progress))


def is_repeated(
    builder: DatasetBuilder, ref: EpisodeRef, out: Path, settings: Settings, failed: Failure
) -> bool:
    """Whether an episode that failed before is as it was then, and is not to be tried all the same.

    Where the machine was at fault, a full disk for instance, it is always tried. One that is there
    by now was built by a run that did not come to its end.
    """
    if settings.retry_failed or not failed.state:
        return False
    if builder.state(ref, settings) != failed.state:
        return False
    try:
        return builder.outdated(ref, out, settings) is not None
    except OccGenError:
        return True  # As then.


def write_one(
    builder: DatasetBuilder, found: Found, out: Path, settings: Settings, progress: Progress
) -> Result:
    """The second half of `build_one`."""
    return _guarded(builder, found.ref, out, settings, lambda: builder.write(found, out, progress))


def _guarded[Result](
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    work: Callable[[], Result],
) -> Result | Failure:
    """What some work on an episode gives, or its failure."""
    trace = ""
    try:
        return work()
    except (ChangedError, MachineError) as error:
        return Failure(ref.id, str(error))
    except OccGenError as error:
        reason = str(error)
    except MemoryError:
        return Failure(ref.id, f"{ref.path}: needs more memory than there is; use fewer --workers.")
    except OSError as error:
        # Of a copy, the place that it goes to; where that is full, no file is at fault.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        place = out if full else error.filename2 or error.filename or out / ref.id
        said = error.strerror or str(error)
        return Failure(
            ref.id, f"{place}: cannot be read or written ({said}); mend that and run again."
        )
    except Exception as error:
        kind = type(error).__name__
        reason = (
            f"{ref.path}: failed for a reason that was not foreseen ({kind}: {error}); please "
            f"report it with its trace in {FAILURES}."
        )
        trace = traceback.format_exc()
    state = ""
    with suppress(Exception):  # What is wrong may be wrong here too: it is tried again then.
        state = builder.state(ref, settings)
    return Failure(ref.id, reason, trace, state)


def build_each(
    builder: DatasetBuilder,
    refs: Sequence[EpisodeRef],
    out: Path,
    settings: Settings,
    listener: Listener,
    failed: Mapping[str, Failure],
) -> Generator[Result, None, None]:
    """Build episodes in their order. At any time one is being written and one reconstructed.

    So a GPU waits neither for images nor for compression, and memory holds two scenes at most.
    """
    stop = threading.Event()

    def progress(stage: Stage, frames: int) -> None:
        if stop.is_set():
            raise Abandoned
        listener.frames(stage, frames)

    found: Queue[Found | Result | BaseException] = Queue(1)
    turn = threading.Semaphore(1)  # The next one begins when this one is taken to be written.

    def find() -> None:
        try:
            for ref in refs:
                turn.acquire()
                if stop.is_set():
                    return
                found.put(find_one(builder, ref, out, settings, progress, failed.get(ref.id)))
        except BaseException as error:
            found.put(error)

    thread = threading.Thread(target=find, name="reconstruct", daemon=True)
    try:
        thread.start()
        for _ in refs:
            item = found.get()
            turn.release()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, Found):
                item = write_one(builder, item, out, settings, listener.frames)
            yield item
        thread.join()
    finally:
        stop.set()
        turn.release()
        if thread.ident is not None:
            thread.join(GRACE)


def summed(
    results: Generator[Result, None, None],
    listener: Listener,
    noted: Callable[[Result], None] = lambda _: None,
    device: str = "cpu",
) -> Summary:
    """Count results as they come, and say which process it was that had them."""
    summary, start = Summary(), time.perf_counter()
    try:
        for result in results:
            summary.add(result)
            listener.finished(result)  # It may stop the run, whose failures are then none.
            noted(result)
    finally:
        results.close()  # So that an interruption here stops what is under way as well.
    summary.seconds = time.perf_counter() - start
    built = Process(
        host=socket.gethostname(),
        device=device,
        episodes=summary.built,
        frames=summary.frames,
        seconds=round(summary.seconds, 3),
        peak_memory=_peak_memory(),
    )
    summary.processes.append(built)
    return summary


def _peak_memory() -> int:
    """Bytes that this process, or one that it started, had in memory at most."""
    own, others = (
        resource.getrusage(who).ru_maxrss << 10
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    # That begins with what the process had from which this one was started; Linux knows better.
    with suppress(OSError, ValueError, IndexError):
        own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10
    return max(own, others)
