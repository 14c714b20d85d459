"""Many episodes: which they are, built here in one process or several, then the whole dataset."""

from __future__ import annotations

import hashlib
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from occgen_hub.builder import (
    DatasetBuilder,
    EpisodeRef,
    Settings,
    builder_names,
    check_replaceable,
    load_builder,
)
from occgen_hub.card import is_own, write_card
from occgen_hub.config import Config
from occgen_hub.engines import AUTO, Auto, Engine, load_engine, network_engine
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import printable
from occgen_hub.lerobot.writer import Media
from occgen_hub.loading import trajectories
from occgen_hub.runtime import failures
from occgen_hub.runtime.output import current, make_current, sole_use
from occgen_hub.runtime.pool import Order, in_processes
from occgen_hub.runtime.report import begin_report, logged, note, say, write_report
from occgen_hub.runtime.results import Failure, Listener, Result, Summary
from occgen_hub.runtime.work import build_each, is_repeated, summed
from occgen_hub.schema import load_schema
from occgen_hub.shards import remove_shards, write_shards

RUN = ".run"
"""Where the processes of a run tell one another how far they are; gone when it ends."""


def check_places(root: Path, out: Path) -> None:
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

    parquet_occupancy: whether the dataset has its occupancy as Parquet as well.
    """

    builder: DatasetBuilder
    refs: Sequence[EpisodeRef]
    out: Path
    settings: Settings
    parquet_occupancy: bool = True

    @property
    def asked(self) -> str:
        """How its episodes are built, whichever of them are."""
        return str(replace(self.settings, overwrite=False, retry_failed=False))

    @property
    def choices(self) -> str:
        """A digest of `asked`."""
        return hashlib.sha256(self.asked.encode()).hexdigest()[:12]

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
    retry_failed: bool = False,
    parquet_occupancy: bool = True,
) -> Job:
    """What `occgen-hub build` is to do with the options of these names; nothing is done yet.

    Raises UsageError when one of them is wrong.
    """
    config = config or Config()
    check_places(root, out)
    builder = load_builder(source, root)
    refs = list_episodes(builder, limit)
    for ref in refs:
        check_replaceable(out / ref.id, load_schema(builder.schema))
    chosen = choose_engine(builder, refs, engine, weights, device)
    chosen.check(config)
    check_conditions(builder, refs, config)
    settings = Settings(config, chosen, media, overwrite, retry_failed)
    return Job(builder, refs, out, settings, parquet_occupancy)


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
    """`run_job`, its job in parts."""
    return run_job(Job(builder, refs, out, settings, parquet_occupancy), workers, listener)


def run_job(job: Job, workers: int = 1, listener: Listener | None = None) -> Summary:
    """Build the episodes of a job, with `workers` processes. A failed one does not stop the others.

    Failures are listed in failures.jsonl, which is absent when there are none; an episode that
    failed in an earlier run and is as it was then is not tried again, unless `retry_failed` says
    so. Last come the files of the whole dataset, see `conclude`. The result does not depend on the
    number of workers, nor on an earlier run having been interrupted.
    """
    listener = listener or Listener()
    workers = min(workers, len(job.refs))
    with sole_use(job.out), logged(job.out):
        failed = failures.known(job.out)
        if current(job.out)[1:] != [job.choices]:
            with suppress(OccGenError):  # Where that cannot be written, no task can write either.
                make_current(job.out, uuid.uuid4().hex, job.choices)
        say(f"begins: {len(job.refs)} episodes, {workers} processes")
        begin_report(job.out)
        results = (
            build_each(job.builder, job.refs, job.out, job.settings, listener, failed)
            if workers <= 1
            else in_processes(
                Order(job.builder, job.out, job.settings, failed, workers), job.refs, listener
            )
        )
        summary = summed(results, listener, lambda result: witness(job.out, result))
        conclude(job, summary, workers, "local")
    return summary


def witness(out: Path, result: Result, process: str = "0") -> None:
    """Put what became of an episode into the log and, where it failed, among the failures."""
    note(result)
    if isinstance(result, Failure):
        failures.record(out, result, process)


def left(job: Job, refs: Sequence[EpisodeRef], reason: str) -> Summary:
    """Of a process that did not end: its episodes that are there, and each other one as failed.

    With the reason that it recorded itself, where it came to that. Which of them it built anew
    nobody knows, so that none counts as there where all were to be.
    """
    summary, known = Summary(remarks=[reason]), failures.known(job.out)
    tried = replace(job.settings, retry_failed=False)
    for ref in refs:
        failed = known.get(ref.id)
        if failed and is_repeated(job.builder, ref, job.out, tried, failed):
            summary.failures.append(failed)
            continue
        try:
            there = job.builder.outdated(ref, job.out, job.settings) is None
        except OccGenError:
            there = False
        if there and not job.settings.overwrite:
            summary.present += 1
        else:
            summary.failures.append(Failure(ref.id, f"{ref.path}: {reason}."))
    return summary


def conclude(job: Job, summary: Summary, workers: int, executor: str) -> None:
    """When all episodes are done, by whomever: failures, the files of the dataset, the report.

    Raises OccGenError where they cannot be written.
    """
    began = time.perf_counter()
    summary.failures.sort(key=lambda failure: failure.id)
    failures.write(job.out, [*summary.failures, *_others(job)])
    summary.remarks += finish(
        job.out,
        workers,
        overwrite=job.settings.overwrite,
        parquet_occupancy=job.parquet_occupancy,
    )
    spent = time.perf_counter() - began
    if summary.built:
        summary.stages["shards and card"] += spent  # type: ignore[assignment]  # a Counter adds up floats as well
    summary.seconds += spent
    shutil.rmtree(job.out / RUN, ignore_errors=True)
    write_report(job.out, summary, {"executor": executor, **job.described()})
    say(f"ends: {summary.built} built, {summary.present} there, {len(summary.failures)} failed")


def _others(job: Job) -> list[Failure]:
    """Failures of earlier runs, of episodes that this one, with a limit, is not about."""
    about = {ref.id for ref in job.refs}
    others = [failure for name, failure in failures.known(job.out).items() if name not in about]
    there = {ref.id for ref in job.builder.episodes()} if others else set()
    return [failure for failure in others if failure.id in there]


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
