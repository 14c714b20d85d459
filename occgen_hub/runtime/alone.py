"""One episode of a source, built into a folder that is gone afterwards."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from occgen_hub.builder import EpisodeRef, Settings, Stage, load_builder
from occgen_hub.config import Config
from occgen_hub.engines import AUTO
from occgen_hub.errors import UsageError
from occgen_hub.runtime.loop import choose_engine, list_episodes


@dataclass(frozen=True)
class Source:
    """Where an episode comes from, and how it is built, as `occgen-hub build` has it."""

    name: str
    root: Path
    config: Config = field(default_factory=Config)
    engine: str = AUTO
    weights: Path | None = None
    device: str | None = None


@contextmanager
def built_alone(
    source: Source, episode: str, progress: Callable[[int], None] = lambda _: None
) -> Iterator[Path]:
    """The folder of a trajectory, built as it would be in a dataset, while the block lasts.

    episode: its id, or the end of one that no other has; progress: told how many frames
    are built. Raises UsageError where there is no such episode, and what building does.
    """
    if not (source.root.is_dir() or source.root.is_file()):
        raise UsageError(f"{source.root}: is not there; give what to read as --input.")
    builder = load_builder(source.name, source.root)
    ref = _chosen(list_episodes(builder), episode)
    engine = choose_engine(builder, [ref], source.engine, source.weights, source.device)
    engine.check(source.config)
    done = 0

    def count(stage: Stage, frames: int) -> None:
        nonlocal done
        done += frames if stage == "built" else 0
        progress(done)

    with tempfile.TemporaryDirectory(prefix="occgen-") as folder:
        # Links cost nothing, and are copies where the folder is on another disk.
        builder.build(ref, Path(folder), Settings(source.config, engine, "link"), count)
        yield Path(folder, ref.id)


def _chosen(refs: list[EpisodeRef], name: str) -> EpisodeRef:
    ends = [ref for ref in refs if ref.id == name or ref.id.endswith(f"/{name}")]
    exact = [ref for ref in ends if ref.id == name]
    if len(exact or ends) == 1:
        return (exact or ends)[0]
    problem = "several are called so" if ends else "there is no such episode"
    names = ", ".join(ref.id for ref in (ends or refs)[:3])
    raise UsageError(f"{name}: {problem}; there are for example {names}.")
