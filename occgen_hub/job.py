"""A job: the episodes of a source, where they go, and how they are built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from occgen_hub.builder import (
    DatasetBuilder,
    EpisodeRef,
    builder_names,
    load_builder,
)
from occgen_hub.config import Config
from occgen_hub.engines import AUTO, Auto, Engine, load_engine, network_engine
from occgen_hub.episode_build import Settings, why_outdated
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import printable
from occgen_hub.lerobot.writer import Media
from occgen_hub.schema import load_schema
from occgen_hub.up_to_date import check_replaceable


def check_paths(root: Path, out: Path) -> None:
    """Raise UsageError where reading from `root` and writing to `out` would go wrong."""
    if not (root.is_dir() or root.is_file()):
        problem = "is not a folder, nor a file" if root.exists() else "is not there"
        raise UsageError(f"{root}: {problem}; give what to read as --input.")
    try:
        source, target = root.resolve(), out.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: of a link to itself.
        raise UsageError(
            f"{out}: cannot be followed ({error}); choose another --output."
        ) from error
    if target == source or source in target.parents:
        raise UsageError(
            f"{out}: the output lies inside the input {root}; choose an --output outside it."
        )
    if target in source.parents and root.is_dir():
        raise UsageError(
            f"{out}: the input {root} lies inside the output, and would be taken for a part of the "
            "dataset; choose an --output beside it."
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file; give a folder as --output.")


def list_episodes(builder: DatasetBuilder, limit: int | None = None) -> list[EpisodeRef]:
    """The episodes to build, at most `limit`; raises UsageError when there are none."""
    if builder.root.is_file() and not builder.takes_file:
        raise UsageError(
            f"{builder.root}: is not a folder; give the root of the source tree as --input, or "
            f"another --source than {builder.name}: {', '.join(builder_names())}."
        )
    refs: list[EpisodeRef] = []
    for ref in builder.episodes():
        if limit is not None and len(refs) >= limit:
            break
        refs.append(ref)
    if not refs:
        raise UsageError(
            f"{builder.root}: holds no episode that the source {builder.name} knows; give the root "
            "of the tree, above its groups and scenes, or another --source: "
            f"{', '.join(builder_names())}."
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


def check_conditions(builder: DatasetBuilder, refs: Sequence[EpisodeRef], config: Config) -> None:
    """Raise UsageError where a network is to be told what no episode of the source has."""
    for condition in config.condition:
        if condition == "depth":
            there = any(builder.has_depth(ref) for ref in refs)
        else:
            there = condition in builder.knows
        if not there:
            raise UsageError(
                f"--condition {condition}: the source {builder.name} has none at {builder.root}; "
                "leave it out."
            )


@dataclass(frozen=True)
class Job:
    """What is to be built: the episodes of a source, where they go, and how.

    parquet_occupancy: whether the dataset has its occupancy as Parquet as well;
    parquet_images: whether its images, depth and tasks are in the same files; limited: whether
    `refs` are not all episodes of the source; device: where networks run, None for a GPU if there
    is one.
    """

    builder: DatasetBuilder
    refs: Sequence[EpisodeRef]
    out: Path
    settings: Settings
    parquet_occupancy: bool = True
    limited: bool = False
    device: str | None = None
    parquet_images: bool = False

    def on(self, device: str | None) -> Job:
        """The same job with its network on another device; None for a GPU if there is one.

        Raises UsageError where the device is not there.
        """
        engine = self.settings.engine.on(device)
        return replace(self, settings=replace(self.settings, engine=engine), device=device)

    def reason_to_build(self, ref: EpisodeRef) -> str | None:
        """Why an episode would be built or tried; None if it is up to date."""
        try:
            reason = why_outdated(self.builder, ref, self.out, self.settings)
        except OccGenError as error:
            return f"would fail: {error}"
        if reason is None and not self.settings.overwrite:
            return None
        return f"to build: {reason or 'is there, --overwrite'}"

    def device_name(self) -> str:
        """Where its networks run, "cpu" if there are none."""
        if not self.settings.engine.uses_device():
            return "cpu"
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def choices(self) -> str:
        """How its episodes are built, whichever they are: the same on all devices."""
        engine = self.settings.engine.on("cpu")
        return str([self.builder.name, replace(self.settings, engine=engine, overwrite=False)])

    def described(self) -> dict[str, Any]:
        """What a report says of it."""
        settings = self.settings
        return {
            "source": {"builder": self.builder.name, "root": printable(str(self.builder.root))},
            "output": printable(str(self.out)),
            "engine": settings.engine.name,
            "config": settings.config.model_dump(mode="json"),
            "media": settings.media,
        }


def open_job(
    source: str,
    root: Path,
    out: Path,
    *,
    engine: str = AUTO,
    weights: Path | None = None,
    device: str | None = None,
    config: Config | None = None,
    media: Media = "copy",
    limit: int | None = None,
    overwrite: bool = False,
    parquet_occupancy: bool = True,
    parquet_images: bool = False,
) -> Job:
    """What `occgen-hub build` is to do with the options of these names; nothing is done yet.

    Raises UsageError when one of them is wrong.
    """
    config = config or Config()
    if parquet_images and not parquet_occupancy:
        raise UsageError("--parquet-images: goes into the occupancy as Parquet; keep that.")
    check_paths(root, out)
    builder = load_builder(source, root)
    refs = list_episodes(builder, limit)
    for ref in refs:
        check_replaceable(out / ref.id, load_schema(builder.schema))
    chosen = choose_engine(builder, refs, engine, weights, device)
    chosen.check(config)
    check_conditions(builder, refs, config)
    settings = Settings(config, chosen, media, overwrite)
    limited = limit is not None
    return Job(builder, refs, out, settings, parquet_occupancy, limited, device, parquet_images)
