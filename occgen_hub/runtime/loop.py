"""Many episodes: build each that is not there yet, in this process or in several."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path

from occgen_hub.builder import Built, DatasetBuilder, EpisodeRef, Progress, Settings, Stage
from occgen_hub.card import is_own, write_card
from occgen_hub.engines import AUTO, Auto, Engine, load_engine, network_engine
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import dump_json, written_whole
from occgen_hub.loading import trajectories
from occgen_hub.shards import remove_shards, write_shards

FAILURES = "failures.jsonl"
_THREAD_LIMITS = (
    "NUMBA_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
)


@dataclass(frozen=True)
class Failure:
    """An episode that could not be built, and why; trace: only for what nobody foresaw."""

    id: str
    reason: str
    trace: str = ""


Result = Built | Failure


@dataclass
class Summary:
    """What a run did. seconds: of the whole run; stages: added up over episodes; remarks: on the
    files of the whole dataset.
    """

    built: int = 0
    present: int = 0
    frames: int = 0
    seconds: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)

    def add(self, result: Result) -> None:
        """Count one episode."""
        if isinstance(result, Failure):
            self.failures.append(result)
            return
        self.built += result.status == "built"
        self.present += result.status == "present"
        self.frames += result.frames
        self.notes.update(note.code for note in result.notes)
        for stage, seconds in result.seconds.items():
            self.stages[stage] += seconds  # type: ignore[assignment]  # a Counter adds up floats as well


@dataclass(frozen=True)
class Listener:
    """What is told of a run as it goes: each finished episode, and frames as they are done."""

    finished: Callable[[Result], None] = lambda _: None
    frames: Progress = lambda *_: None


def check_places(root: Path, out: Path) -> None:
    """Raise UsageError where reading from `root` and writing to `out` would go wrong."""
    if not (root.is_dir() or root.is_file()):
        raise UsageError(f"{root}: is not a folder, nor a file; give what to read as --input.")
    source, target = root.resolve(), out.resolve()
    if target == source or source in target.parents:
        raise UsageError(
            f"{out}: the output lies inside the input {root}; choose an --output outside it."
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a folder as --output.")


def list_episodes(builder: DatasetBuilder, limit: int | None = None) -> list[EpisodeRef]:
    """The episodes to build, at most `limit`; raises UsageError when there are none."""
    if builder.root.is_file() and not builder.takes_file:
        raise UsageError(
            f"{builder.root}: is not a folder; give the root of the source tree as --input."
        )
    refs: list[EpisodeRef] = []
    for ref in builder.episodes():
        if limit is not None and len(refs) >= limit:
            break
        refs.append(ref)
    if not refs:
        raise UsageError(
            f"{builder.root}: holds no episode that the source {builder.name} knows; give the root "
            "of the tree, above its groups and scenes."
        )
    seen = Counter(ref.id for ref in refs)
    if twice := [name for name, count in seen.items() if count > 1]:
        raise UsageError(f"{builder.root}: holds the episode {twice[0]} twice; rename one of them.")
    return refs


def choose_engine(
    builder: DatasetBuilder,
    refs: Sequence[EpisodeRef],
    name: str = AUTO,
    weights: Path | None = None,
    device: str | None = None,
) -> Engine:
    """The engine for these episodes: the one named, else the builder's own.

    For `auto`, weights are looked for only where some episode has no depth. Raises UsageError when
    the engine, its weights or the device cannot be had; but where some episodes have depth, and no
    weights were named, the others may as well fail one by one.
    """
    name = builder.engine if name == AUTO else name
    if name != AUTO:
        return load_engine(name, weights, device)
    have = [builder.has_depth(ref) for ref in refs]
    if all(have):
        if weights is not None:
            raise UsageError(
                f"--weights {weights}: all episodes have depth, which goes before a network; "
                "choose one with --engine, or leave the option out."
            )
        return Auto()
    try:
        return Auto(network_engine(weights, device))
    except UsageError as error:
        if weights is not None or not any(have):
            raise
        return Auto(None, str(error).splitlines()[0].rstrip("."))


def run(
    builder: DatasetBuilder,
    refs: Sequence[EpisodeRef],
    out: Path,
    settings: Settings,
    workers: int = 1,
    listener: Listener | None = None,
    *,
    parquet_occupancy: bool = True,
) -> Summary:
    """Build episodes into `out`, with `workers` processes. A failed one does not stop the others.

    Failures are listed in `out`/failures.jsonl, which is absent when there are none. Last come the
    files of the whole dataset, see `finish`. The result does not depend on the number of workers,
    nor on an earlier run having been interrupted.
    """
    listener = listener or Listener()
    start = time.perf_counter()
    summary = Summary()
    with _sole_use(out):
        results = (
            _here(builder, refs, out, settings, listener)
            if workers <= 1 or len(refs) == 1
            else _in_processes(builder, refs, out, settings, min(workers, len(refs)), listener)
        )
        with closing(results):  # So that an interruption here stops the processes as well.
            for result in results:
                summary.add(result)
                listener.finished(result)
        summary.failures.sort(key=lambda failure: failure.id)
        _write_failures(out, summary.failures)
        began = time.perf_counter()
        summary.remarks = finish(
            out, workers, overwrite=settings.overwrite, parquet_occupancy=parquet_occupancy
        )
        if summary.built:
            summary.stages["shards and card"] += time.perf_counter() - began  # type: ignore[assignment]  # as above
    summary.seconds = time.perf_counter() - start
    return summary


def finish(
    out: Path, workers: int = 1, *, overwrite: bool = False, parquet_occupancy: bool = True
) -> list[str]:
    """Bring the files of the whole dataset up to date with the trajectories that are in `out`.

    They are the Parquet shards of its occupancy (`parquet_occupancy`: else they are removed) and
    its card. Returns what a user should know. Raises OccGenError where they cannot be written.
    """
    if not trajectories(out):
        return []
    try:
        if parquet_occupancy:
            write_shards(out, workers, overwrite=overwrite)
        else:
            remove_shards(out)
        card = write_card(out)
    except OSError as error:
        reason = error.strerror or str(error)
        place = error.filename or out
        raise OccGenError(
            f"{place}: cannot be read or written ({reason}); mend that and run again."
        ) from error
    if is_own(card):
        return []
    return [f"{card} is not occgen-hub's, and was left as it was; move it away to have a card made"]


def build_one(
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
    progress: Progress,
) -> Result:
    """One episode, whatever happens to it: built, present or failed, with the reason."""
    try:
        return builder.build(ref, out, settings, progress)
    except OccGenError as error:
        return Failure(ref.id, str(error))
    except MemoryError:
        return Failure(ref.id, f"{ref.path}: needs more memory than there is; use fewer --workers.")
    except OSError as error:
        place = error.filename or out / ref.id
        reason = error.strerror or str(error)
        return Failure(
            ref.id, f"{place}: cannot be read or written ({reason}); mend that and run again."
        )
    except Exception as error:
        kind = type(error).__name__
        return Failure(
            ref.id,
            f"{ref.path}: failed for a reason that was not foreseen ({kind}: {error}); please "
            f"report it with its trace in {FAILURES}.",
            traceback.format_exc(),
        )


def _here(
    builder: DatasetBuilder,
    refs: Sequence[EpisodeRef],
    out: Path,
    settings: Settings,
    listener: Listener,
) -> Generator[Result, None, None]:
    for ref in refs:
        yield build_one(builder, ref, out, settings, listener.frames)


# Several processes

type Counts = Connection[tuple[Stage, int] | None, tuple[Stage, int] | None]
_frames_done: Counts | None = None


def _in_processes(
    builder: DatasetBuilder,
    refs: Sequence[EpisodeRef],
    out: Path,
    settings: Settings,
    workers: int,
    listener: Listener,
) -> Generator[Result, None, None]:
    """Episodes in a pool of processes; those that a dying process takes along are tried alone."""
    context = multiprocessing.get_context("spawn")
    # A pipe and no queue: its small writes are whole without a lock, which a killed process keeps.
    counts, done = context.Pipe(duplex=False)
    reader = threading.Thread(target=_drain, args=(counts, listener), daemon=True)
    reader.start()
    waiting, suspects = deque(refs), list[EpisodeRef]()
    try:
        with _threads_shared(workers):
            while waiting:
                with _pool(workers, context, done) as pool:
                    yield from _feed(pool, waiting, suspects, builder, out, settings, workers)
            while suspects:
                with _pool(1, context, done) as pool:
                    yield from _alone(pool, suspects, builder, out, settings)
    finally:
        done.send(None)
        reader.join(timeout=5)
        done.close()
        counts.close()


def _feed(
    pool: ProcessPoolExecutor,
    waiting: deque[EpisodeRef],
    suspects: list[EpisodeRef],
    builder: DatasetBuilder,
    out: Path,
    settings: Settings,
    workers: int,
) -> Generator[Result, None, None]:
    """Keep the pool busy until nothing waits or it breaks; then what it held becomes suspect."""
    running: dict[Future[Result], EpisodeRef] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers + 1:
                running[_submit(pool, builder, waiting[0], out, settings)] = waiting[0]
                waiting.popleft()  # Only now: a broken pool takes no more.
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                del running[future]
                yield result
    except BrokenProcessPool:
        for future, ref in running.items():
            if future.done() and not future.cancelled() and future.exception() is None:
                yield future.result()
            else:
                suspects.append(ref)


def _alone(
    pool: ProcessPoolExecutor,
    suspects: list[EpisodeRef],
    builder: DatasetBuilder,
    out: Path,
    settings: Settings,
) -> Iterator[Result]:
    """One after the other, until none is left or the pool breaks: then it is known by which."""
    while suspects:
        ref = suspects.pop(0)
        try:
            result = _submit(pool, builder, ref, out, settings).result()
        except BrokenProcessPool:
            reason = "its process was killed twice, perhaps for want of memory"
            yield Failure(ref.id, f"{ref.path}: {reason}; free some and run again.")
            return
        yield result


@contextmanager
def _pool(workers: int, context, done) -> Iterator[ProcessPoolExecutor]:  # type: ignore[no-untyped-def]  # multiprocessing's own
    pool = ProcessPoolExecutor(workers, context, _start, (done,))
    try:
        yield pool
        pool.shutdown()
    except BaseException:
        # Ctrl-C: do not wait for episodes under way; the next run clears what they leave.
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def _submit(
    pool: ProcessPoolExecutor,
    builder: DatasetBuilder,
    ref: EpisodeRef,
    out: Path,
    settings: Settings,
) -> Future[Result]:
    """Give an episode to the pool, which starts its processes now: they leave Ctrl-C to the parent.

    They inherit what is blocked here, so not even one that is still importing is interrupted.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_task, builder, ref, out, settings)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(done: Counts) -> None:
    """In each worker: end when the parent does."""
    global _frames_done
    _frames_done = done
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _task(builder: DatasetBuilder, ref: EpisodeRef, out: Path, settings: Settings) -> Result:
    assert _frames_done is not None
    done = _frames_done
    return build_one(builder, ref, out, settings, lambda *count: done.send(count))


def _drain(counts: Counts, listener: Listener) -> None:
    while (count := counts.recv()) is not None:
        listener.frames(*count)


@contextmanager
def _threads_shared(workers: int) -> Iterator[None]:
    """Give each process its share of the cores: set where the libraries look as they load."""
    share = str(max(1, len(os.sched_getaffinity(0)) // workers))
    before = {name: os.environ.get(name) for name in _THREAD_LIMITS}
    os.environ.update(dict.fromkeys(_THREAD_LIMITS, share))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# The output folder


@contextmanager
def _sole_use(out: Path) -> Iterator[None]:
    """Hold the output folder, so that two builds do not write the same trajectory at once."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be made or opened ({error.strerror}); choose another --output."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(
            f"{out}: another build is writing here; wait for it or choose another --output."
        ) from None
    except OSError:
        pass  # A file system without locks: go on without.
    try:
        yield
    finally:
        os.close(handle)


def _write_failures(out: Path, failures: list[Failure]) -> None:
    path = out / FAILURES
    rows = [
        {"episode": f.id, "reason": f.reason, **({"trace": f.trace} if f.trace else {})}
        for f in failures
    ]
    try:
        if rows:
            with written_whole(path) as partial:
                partial.write_text("".join(dump_json(r) + "\n" for r in rows), encoding="utf-8")
        elif path.exists():  # To remove what is not there fails in a read-only folder.
            path.unlink()
    except OSError as error:
        raise OccGenError(
            f"{path}: cannot be written ({error.strerror}); mend that and run again."
        ) from error
