"""Build episodes one after another: one is written while the next is reconstructed."""

from __future__ import annotations

import errno
import threading
import traceback
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.episode_build import (
    Progress,
    ReconstructedEpisode,
    Settings,
    Stage,
    reconstruct_episode,
    write_episode,
)
from occgen_hub.errors import OccGenError
from occgen_hub.runtime.report import FAILURES
from occgen_hub.runtime.results import Failure, Result, SceneResult
from occgen_hub.scenes import SceneRef

JOIN_TIMEOUT = 2.0
"""Seconds that an interrupted build waits for the current reconstruction."""


class Cancelled(BaseException):
    """The reconstruction was cancelled."""


@dataclass(frozen=True)
class SceneEpisode:
    """An episode of a fetched scene, and the builder that reads it."""

    builder: DatasetBuilder
    ref: EpisodeRef


def build_episodes(
    builder: DatasetBuilder,
    refs: Iterable[EpisodeRef | SceneEpisode | Result | SceneResult],
    out: Path,
    settings: Settings,
    progress: Progress = lambda *_: None,
) -> Generator[Result | SceneResult, None, None]:
    """Build episodes in order, and yield their results. A failed one does not stop the others.

    Results among `refs` are yielded unchanged, in order.

    At any time at most one episode is being written and one reconstructed. So a GPU waits neither
    for images nor for compression, and memory holds at most two scenes. `refs` is iterated in the
    thread that reconstructs.
    """
    stop = threading.Event()

    def cancellable(stage: Stage, frames: int) -> None:
        if stop.is_set():
            raise Cancelled
        progress(stage, frames)

    reconstructed: Queue[ReconstructedEpisode | Result | SceneResult | BaseException | None] = (
        Queue(1)
    )
    # Released when an episode is taken to be written: only then may the next one start.
    may_start = threading.Semaphore(1)

    def reconstruct(item: EpisodeRef | SceneEpisode) -> ReconstructedEpisode | Result:
        own, ref = (item.builder, item.ref) if isinstance(item, SceneEpisode) else (builder, item)
        return catch_failure(
            ref, out, lambda: reconstruct_episode(own, ref, out, settings, cancellable)
        )

    def reconstruct_all() -> None:
        try:
            for item in refs:
                may_start.acquire()
                if stop.is_set():
                    return
                if isinstance(item, EpisodeRef | SceneEpisode):
                    reconstructed.put(reconstruct(item))
                else:
                    reconstructed.put(item)
            reconstructed.put(None)
        except BaseException as error:
            reconstructed.put(error)

    def write(found: ReconstructedEpisode) -> Result:
        return catch_failure(found.ref, out, lambda: write_episode(found, out, progress))

    thread = threading.Thread(target=reconstruct_all, name="reconstruct", daemon=True)
    try:
        thread.start()
        while (item := reconstructed.get()) is not None:
            may_start.release()
            if isinstance(item, BaseException):
                raise item
            yield write(item) if isinstance(item, ReconstructedEpisode) else item
    finally:
        stop.set()
        may_start.release()
        if thread.ident is not None:
            thread.join(JOIN_TIMEOUT)


def catch_failure[Value](
    ref: EpisodeRef | SceneRef, out: Path, action: Callable[[], Value]
) -> Value | Failure:
    """Call `action`, and return its value or a Failure of the episode or scene `ref`."""
    try:
        return action()
    except OccGenError as error:
        return Failure(ref.id, str(error))
    except MemoryError:
        reason = "needs more memory than there is; use fewer --workers"
    except ImportError as error:
        reason = f"a library could not be loaded ({error}); repair the installation and run again"
    except OSError as error:
        # An error of a copy names its target too. If the disk is full, no single file is at fault.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        path = out if full else error.filename2 or error.filename
        trace = ""
        if path is None:  # One without a number is of a library, such as Pillow, that reads a file.
            path, trace = (out / ref.id, "") if error.errno else (ref.path, traceback.format_exc())
        cause = error.strerror or str(error)
        reason = f"{path}: cannot be read or written ({cause}); fix that and run again."
        return Failure(ref.id, reason, trace)
    except Exception as error:
        reason = (
            f"{ref.path}: failed for an unexpected reason ({type(error).__name__}: {error}); "
            f"please report it to the authors of the code in which the trace in {FAILURES} ends."
        )
        return Failure(ref.id, reason, traceback.format_exc())
    return Failure(ref.id, f"{ref.path}: {reason}.")
