"""Build one episode of a source into a temporary folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from occgen_hub.builder import EpisodeRef
from occgen_hub.episode_build import Stage, build_episode
from occgen_hub.errors import UsageError
from occgen_hub.job import open_job


@contextmanager
def temporary_build(
    episode: str, source: str, root: Path, progress: Callable[[int], None], **options: Any
) -> Iterator[Path]:
    """Build a trajectory as in a dataset. Yields its folder, which exists during the block.

    episode: its id, or a unique end of it; progress: called with the number of built frames;
    options: of `open_job`. Raises UsageError if there is no such episode, and the errors of the
    build.
    """
    done = 0

    def count(stage: Stage, frames: int) -> None:
        nonlocal done
        done += frames if stage == "built" else 0
        progress(done)

    with tempfile.TemporaryDirectory(prefix="occgen-") as folder:
        # Links cost nothing. On another disk, files are copied instead.
        job = open_job(source, root, Path(folder), media="link", **options)
        ref = _find([ref for ref in job.refs if isinstance(ref, EpisodeRef)], episode)
        build_episode(job.builder, ref, job.out, job.settings, count)
        yield job.out / ref.id


def _find(refs: Sequence[EpisodeRef], name: str) -> EpisodeRef:
    if not refs:
        raise UsageError(
            f"{name}: the input has only archives, which this command does not unpack; unpack "
            "its scene and give that folder as --input."
        )
    ends = [ref for ref in refs if ref.id == name or ref.id.endswith(f"/{name}")]
    exact = [ref for ref in ends if ref.id == name]
    if len(exact or ends) == 1:
        return (exact or ends)[0]
    problem = "several episodes have this name" if ends else "there is no such episode"
    names = ", ".join(ref.id for ref in (ends or refs)[:3])
    raise UsageError(f"{name}: {problem}; give an id such as {names}.")
