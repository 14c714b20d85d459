"""The commands `build` and `finalize`."""

from __future__ import annotations

import os
import shlex
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occgen_hub.cli.command import (
    FOLDER,
    SOURCE,
    Examples,
    bar_disabled,
    say,
    say_by_folder,
    with_options,
)
from occgen_hub.cli.mapping import CAMERA, MAPPING, take_cameras
from occgen_hub.errors import UsageError, one_line
from occgen_hub.stopping import stop_if_asked

if TYPE_CHECKING:
    from occgen_hub.builder import EpisodeRef
    from occgen_hub.job import Job
    from occgen_hub.publishing import HubPublisher
    from occgen_hub.runtime.results import Failure, Listener, Result, Summary
    from occgen_hub.runtime.shard import Shard
    from occgen_hub.scenes import SceneRef

MOST_SHOWN = 10
"""Number of episodes for which an estimate is printed before the build."""

CLUSTER_OPTIONS = {
    "datatrove": ("tasks",),
    "slurm": ("tasks", "cpus_per_task", "gpus_per_task", "mem_per_cpu", "slurm"),
    "ray": ("tasks", "cpus_per_task", "gpus_per_task", "mem_per_cpu"),
}
"""The executors of datatrove, and the cluster options that each uses."""


@click.command(
    cls=Examples,
    example="occgen-hub build --source internnav --input traj_data --output out --workers 8\n"
    "occgen-hub build --source lerobot --input my-org/robot --cameras cameras.yaml --output out",
    resumable=True,
)
@click.option(
    "--source", default="internnav", show_default=True, metavar="NAME",
    help="The kind of source: internnav (InternData-N1, VLN-CE), lerobot, capture (RGB-D folders, "
    "ROS 2 bags), video, or one of a plug-in.",
)  # fmt: skip
@click.option(
    "--input", "root", type=SOURCE, required=True,
    help="The root folder of the source, which may have archives of scenes; hf://datasets/ORG/NAME"
    "[@REVISION][/FOLDER] for one on the Hub, or ORG/NAME for a LeRobot dataset; also a single "
    "video.",
)  # fmt: skip
@click.option("--output", "out", type=FOLDER, required=True, help="Where the dataset goes.")
@click.option(
    "--engine", default="auto", show_default=True, metavar="NAME",
    help="How to reconstruct: rgbd from sensor depth; pi3, pi3x or da3 from images; auto: rgbd if "
    "there is depth, else the first of pi3x, pi3 and da3 that has weights here; or one of a "
    "plug-in.",
)  # fmt: skip
@click.option(
    "--weights",
    type=FOLDER,
    help="A network's weights; by default ckpt/NAME/model.safetensors or the Hub's.",
)
@click.option(
    "--license",
    type=click.Choice(["any", "commercial"]),
    default="any",
    show_default=True,
    help="What the licence of a network's weights must allow: any use, or commercial use. The "
    "licence of the dataset is that of its source; see docs/licence.md.",
)
@click.option(
    "--device", help="Where networks run, such as cuda:1; by default a GPU if there is one."
)
@click.option(
    "--condition",
    metavar="LIST",
    help="Inputs of pi3x in addition to images: any of depth, intrinsics and poses.",
)
@click.option(
    "--segmenter", metavar="NAME",
    help="If the source has no labels, make them from the images with this installed segmenter.",
)  # fmt: skip
@click.option("--segmenter-weights", type=FOLDER, help="The weights of its network.")
@click.option("--config", type=FOLDER, help="A YAML file of settings.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting, such as voxel_size=0.05 (metres); repeatable. docs/settings.md lists them.",
)
@click.option(
    "--media",
    type=click.Choice(["copy", "link", "none"]),
    help="What to do with the source's images and videos; link makes hard links.  [default: copy; "
    "none for LeRobot datasets, whose own files are used with the result]",
)
@click.option(
    "--workers", type=click.IntRange(1),
    help="Number of processes, which share the cores and GPUs; on a cluster, number of tasks at a "
    "time.  [default: 1, or as many as the executor allows]",
)  # fmt: skip
@click.option(
    "--shard", metavar="I/N",
    help="Build share I of N of the episodes, numbered from 0 (like ranks and array tasks): 0/N to "
    "N-1/N. Then run finalize.",
)  # fmt: skip
@click.option(
    "--executor",
    type=click.Choice(["local", "accelerate", "datatrove", "slurm", "ray"]),
    help="What builds the shards: this command, accelerate (a process per GPU), or datatrove, here "
    "or on a cluster.  [default: local, or accelerate if that started it]",
)
@click.option(
    "--limit", type=click.IntRange(1),
    help="Build only the first episodes, this many; for archives and on the Hub, scenes.",
)  # fmt: skip
@click.option(
    "--scenes", multiple=True, metavar="PATTERN",
    help="Build only scenes whose GROUP/SCENE or name matches, such as 'r2r/*'; repeatable.",
)  # fmt: skip
@click.option(
    "--scratch", type=FOLDER,
    help="The folder for downloading and unpacking scenes during the build.  [default: .scratch in "
    "the output]",
)  # fmt: skip
@click.option(
    "--scratch-limit", default="64GB", show_default=True, metavar="SIZE",
    help="Limit of the bytes in scratch, for all workers together.",
)  # fmt: skip
@click.option(
    "--hfov", type=float, metavar="DEGREES",
    help="Horizontal field of view of the cameras if the source has no intrinsics (VLN-CE).  "
    "[default: 79]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Also build up-to-date episodes again.")
@click.option(
    "--parquet-occupancy/--no-parquet-occupancy",
    default=True,
    show_default=True,
    help="Also write the occupancy as Parquet in occupancy/, which the Hub can stream.",
)
@click.option(
    "--parquet-images",
    is_flag=True,
    help="Also write images, depth and tasks into these files, for streaming.",
)
@click.option(
    "--push-to", metavar="ORG/NAME",
    help="Push scenes to this dataset on the Hub during the build. Scenes that it has are skipped.",
)  # fmt: skip
@click.option(
    "--keep", type=click.Choice(["all", "none"]), default="all", show_default=True,
    help="With --push-to: whether to keep scenes here when the Hub has them.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["trajectories", "packed"]), default="trajectories",
    show_default=True,
    help="With --push-to: a folder per trajectory, or only a few Parquet files per scene.",
)  # fmt: skip
@click.option(
    "--push-every", type=click.FloatRange(0), metavar="SECONDS",
    help="With --push-to: minimum seconds between commits. The Hub allows about 128 per hour, for "
    "all machines.  [default: 300]",
)  # fmt: skip
@click.option("--private", is_flag=True, help="With --push-to: create the dataset as private.")
@click.option(
    "--dry-run", is_flag=True,
    help="Only print what would be built and where; on a cluster, also the tasks.",
)  # fmt: skip
@click.option(
    "--verbose", is_flag=True,
    help="With --dry-run: list every episode. Without it, more than 20 are counted by folder.",
)  # fmt: skip
@click.option(
    "--tasks", type=click.IntRange(1),
    help="Cluster: number of shards.  [default: one for each 8 episodes, or scenes for archives "
    "and on the Hub; at most 1000]",
)  # fmt: skip
@click.option("--cpus-per-task", type=click.IntRange(1), help="Cluster: cores.  [default: 4]")
@click.option(
    "--gpus-per-task", type=click.IntRange(0),
    help="Cluster: GPUs.  [default: 1 if there is a network to run]",
)  # fmt: skip
@click.option("--mem-per-cpu", type=click.IntRange(1), help="Cluster: GB.  [default: 2]")
@click.option(
    "--slurm", multiple=True, metavar="KEY=VALUE",
    help="An option of sbatch: partition=NAME, time=24:00:00, qos, account; repeatable.",
)  # fmt: skip
@with_options(CAMERA, *MAPPING)
def build(
    condition: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    shard: str | None,
    executor: str | None,
    dry_run: bool,
    verbose: bool,
    hfov: float | None,
    scratch_limit: str,
    **options: Any,
) -> int:
    """Build an occupancy dataset from a source.

    Up-to-date episodes are skipped, so starting an interrupted build again resumes it. Exit codes:
    0 if everything was built, 1 if episodes failed, 2 for wrong usage, 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    from occgen_hub.runtime import threads
    from occgen_hub.runtime.ranks import launched
    from occgen_hub.runtime.shard import Shard

    names = ("workers", "tasks", "cpus_per_task", "gpus_per_task", "mem_per_cpu", "slurm")
    running = {name: options.pop(name) for name in names}
    executor = executor or ("accelerate" if launched() and shard is None else "local")
    own = Shard.parse(shard) if shard else None
    _check_usage(executor, own, running)
    pushing = {
        name: options.pop(name) for name in ("push_to", "keep", "layout", "push_every", "private")
    }
    _check_pushing(pushing, options, executor)
    if executor == "accelerate" and (ranks := launched()):
        threads.limit(threads.cores_each(ranks))  # Before numba and torch read it.

    from occgen_hub.config import load_config
    from occgen_hub.scratch import parse_bytes

    if condition is not None:
        settings += (f"condition=[{condition}]",)
    if hfov is not None:
        settings += (f"hfov={hfov}",)
    options["config"] = load_config(config, settings)
    options["cameras"] = take_cameras(options)
    options["scratch_limit"] = parse_bytes(scratch_limit)
    if executor == "slurm":
        from occgen_hub.runtime.cluster import parse_slurm

        running["slurm"] = parse_slurm(running["slurm"])
    if dry_run:
        return _dry_run(options, executor, own, running, verbose)
    if executor == "accelerate" and launched():
        return _build_rank(options)
    if executor in CLUSTER_OPTIONS:
        return _build_on_cluster(options, executor, running)
    if executor == "accelerate":
        running["workers"] = running["workers"] or threads.gpus() or threads.cores()
    return _build_here(options, running["workers"] or 1, own, pushing)


@click.command(cls=Examples, example="occgen-hub finalize out")
@click.argument("out", type=FOLDER)
def finalize(out: Path) -> int:
    """Write the files of the whole dataset, after all its shards are built.

    These are the card, the occupancy as Parquet, report.json and failures.jsonl. It may be run
    again at any time. The exit code is 1 if episodes failed or are missing.
    """
    from occgen_hub.runtime.finalize import finalize as finalize_dataset
    from occgen_hub.runtime.threads import cores

    return _print_summary(finalize_dataset(out, cores()), out)


def _check_usage(executor: str, shard: Shard | None, running: dict[str, Any]) -> None:
    """Raise UsageError for options that do not fit the executor."""
    from occgen_hub.runtime.ranks import launched

    for name, value in running.items():
        takers = [key for key, names in CLUSTER_OPTIONS.items() if name in names]
        if value not in (None, ()) and takers and executor not in takers:
            raise UsageError(
                f"--{name.replace('_', '-')}: is not used by --executor {executor}; leave it out "
                f"or choose one of {', '.join(takers)}."
            )
    if shard and executor != "local":
        raise UsageError(f"--shard: --executor {executor} makes shards itself; leave it out.")
    if (ranks := launched()) and executor != "accelerate" and not shard:
        raise UsageError(
            f"--executor {executor}: {ranks} processes were started, and only --executor "
            "accelerate distributes episodes over them; leave the option out."
        )
    if ranks and executor == "accelerate" and running["workers"] not in (None, ranks):
        raise UsageError(
            f"--workers {running['workers']}: {ranks} processes were started already; leave the "
            "option out."
        )


def _check_pushing(pushing: dict[str, Any], options: dict[str, Any], executor: str) -> None:
    """Raise UsageError for options that do not fit --push-to, and set those that it implies."""
    if pushing["push_to"] is None:
        defaults = {"keep": "all", "layout": "trajectories", "push_every": None, "private": False}
        for name, default in defaults.items():
            if pushing[name] != default:
                raise UsageError(f"--{name.replace('_', '-')}: needs --push-to; give that too.")
        return
    if executor != "local":
        raise UsageError(
            f"--push-to: --executor {executor} does not push; start the command on each machine "
            "with --shard I/N."
        )
    options["whole_scenes"] = True
    options["parquet_images"] |= pushing["layout"] == "packed"


def _publisher(pushing: dict[str, Any]) -> HubPublisher | None:
    """The publisher for --push-to, or None."""
    if pushing["push_to"] is None:
        return None
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from occgen_hub.publishing import EVERY, HubPublisher

    disable_progress_bars()  # The build has its own.
    return HubPublisher(
        pushing["push_to"],
        keep=pushing["keep"],
        layout=pushing["layout"],
        private=pushing["private"],
        every=EVERY if pushing["push_every"] is None else pushing["push_every"],
        tell=lambda line: say(line, err=True),
    )


def _open_cluster_job(options: dict[str, Any]) -> Job:
    """Open a job whose tasks run in other working folders and on other devices."""
    from occgen_hub.job import open_job

    absolute = {
        name: options[name].absolute()
        for name in ("root", "out", "scratch")
        if isinstance(options[name], Path) and (name != "root" or options[name].exists())
    }
    return replace(open_job(**options | absolute | {"device": "cpu"}), device=options["device"])


def _dry_run(
    options: dict[str, Any],
    executor: str,
    shard: Shard | None,
    running: dict[str, Any],
    verbose: bool,
) -> int:
    from occgen_hub.engines import without_downloads
    from occgen_hub.job import open_job
    from occgen_hub.runtime import cluster
    from occgen_hub.runtime.records import make_plan
    from occgen_hub.scenes import SceneRef, units_of

    with without_downloads("expect"):
        job = _open_cluster_job(options) if executor in CLUSTER_OPTIONS else open_job(**options)
    mine = None if shard is None else set(make_plan(job, shard.count).shards[shard.index])
    refs = [ref for ref in job.refs if mine is None or ref.id in mine]
    todo, lines, reasons = [], {}, Counter[str]()
    for ref in refs:
        reason = job.reason_to_build(ref)
        size = f"  {ref.bytes / 1e6:,.1f} MB" if isinstance(ref, SceneRef) else ""
        if reason is not None:
            todo.append(ref)
        reasons[reason or "present"] += 1
        lines[ref.id] = f"{ref.id}{size}  {reason or 'present'}"
    missing = {ref.id for ref in todo}
    if say_by_folder(
        lines,
        lambda ids: f"{len(missing.intersection(ids)):>9,} of {len(ids):>9,} to build",
        verbose=verbose,
    ):
        for reason, count in reasons.most_common(MOST_SHOWN):
            say(f"{count:,} {reason}")
    _print_estimate(job, [ref for ref in todo if isinstance(ref, SceneRef)])
    _print_network_estimates(job, refs)
    if executor in CLUSTER_OPTIONS:
        tasks = cluster.make_tasks(job, executor, running["tasks"])
        click.echo(tasks)
        if executor == "slurm" and tasks.todo:
            click.echo(f"The batch script:\n\n{cluster.batch_script(tasks, running)}")
            place = shlex.quote(str(job.out))
            say(f"When all of these tasks have ended, one more runs occgen-hub finalize {place}.")
    units = units_of(refs)
    say(f"{len(todo)} of {len(refs)} {units} would be built into {job.out}; nothing was done.")
    return 0


def _print_estimate(job: Job, scenes: Sequence[SceneRef]) -> None:
    """Print an estimate for building these scenes: bytes to fetch, time and disk space."""
    from occgen_hub.scenes import estimate

    if not scenes:
        return
    found = estimate(job.out, scenes)
    fetched = "downloaded" if job.hub else "read"
    basis = (
        f"measured on {found.measured} built scenes"
        if found.measured
        else "assumed, since no scene is built yet"
    )
    say(
        f"{len(scenes)} scenes, {sum(ref.bytes for ref in scenes) / 1e6:,.1f} MB to be {fetched}: "
        f"about {_duration(found.seconds)} of one process, {found.output / 1e6:,.1f} MB in the "
        f"dataset, and {found.unpacked / 1e6:,.1f} MB of scratch for the largest ({basis})."
    )


def _print_network_estimates(job: Job, refs: Sequence[EpisodeRef | SceneRef]) -> None:
    """Print what the network needs for these episodes: windows, memory and time; its licence."""
    from occgen_hub.engines import Auto
    from occgen_hub.engines.network import NetworkEngine
    from occgen_hub.engines.weights import LICENSES, missing_error
    from occgen_hub.job import network_estimates

    if not job.settings.engine.uses_device():
        return
    found = network_estimates(job, refs)
    if not found:
        return
    for name, own in list(found.items())[:MOST_SHOWN]:
        windows = f"{own.windows} windows of {own.size} that share {own.overlap}"
        say(
            f"{name}: {own.frames} frames in {windows if own.windows > 1 else '1 window'}, "
            f"{own.memory / 1e9:.1f} GB, about {_duration(own.seconds)}",
            err=True,
        )
    if len(found) > MOST_SHOWN:
        click.echo(f"and {len(found) - MOST_SHOWN} more episodes", err=True)
    engine = job.settings.engine
    network = engine.network if isinstance(engine, Auto) else engine
    weights = (network and network.weights()) or {}
    license = str(weights.get("license"))
    click.echo(
        f"In total {sum(own.frames for own in found.values())} frames, about "
        f"{_duration(sum(own.seconds for own in found.values()))} of {weights.get('network')} on "
        f"{job.device_name()}. Licence of its weights: {LICENSES.get(license, license)}.",
        err=True,
    )
    if isinstance(network, NetworkEngine) and not network.weights_file.path.is_file():
        click.echo(
            f"Before the build: {missing_error(network.weights_file.checkpoint.network)}", err=True
        )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _build_here(
    options: dict[str, Any], workers: int, shard: Shard | None, pushing: dict[str, Any]
) -> int:
    from occgen_hub.job import open_job
    from occgen_hub.occupancy.visibility import warm_up
    from occgen_hub.runtime.build import build_dataset, build_shard

    publisher = _publisher(pushing)
    job = open_job(**options)
    if job.settings.engine.uses_device():
        _print_network_estimates(job, [ref for ref in job.refs if job.reason_to_build(ref)])
    warm_up()
    shown_codes = set[str]()
    with _progress(len(job.refs) if shard is None else None, shown_codes) as listener:
        if shard is None:
            summary = build_dataset(job, workers, listener, publisher)
        else:
            summary = build_shard(job, shard, workers, listener, publisher=publisher)
    pushed = publisher.address if publisher else None
    code = _print_summary(summary, job.out, shown_codes, whole=shard is None, pushed=pushed)
    if shard is not None and not pushed:
        say(f"When all shards are built: occgen-hub finalize {shlex.quote(str(job.out))}")
    return code


def _build_rank(options: dict[str, Any]) -> int:
    """Build as one of the processes that accelerate or torchrun started."""
    from occgen_hub.job import open_job
    from occgen_hub.runtime.build import build_shard
    from occgen_hub.runtime.finalize import finalize as finalize_dataset
    from occgen_hub.runtime.ranks import on_all_ranks, process_group
    from occgen_hub.runtime.records import count_finished
    from occgen_hub.runtime.shard import Shard
    from occgen_hub.runtime.threads import cores

    out = options["out"]
    with process_group(options["device"]) as state:
        shard = Shard(state.process_index, state.num_processes)
        device = str(state.device) if state.device.type == "cuda" else "cpu"
        shown_codes: set[str] | None = set() if state.is_main_process else None
        counted = partial(count_finished, out, shard.count)

        def build_own() -> None:
            job = open_job(**options | {"device": device})
            shown = state.is_local_main_process
            with _progress(len(job.refs), shown_codes, shown=shown, counted=counted) as listener:
                build_shard(job, shard, listener=listener, executor="accelerate")

        on_all_ranks(state, build_own)
        if state.is_main_process:
            return _print_summary(finalize_dataset(out, cores()), out, shown_codes)
    return 0


def _build_on_cluster(options: dict[str, Any], executor: str, running: dict[str, Any]) -> int:
    from occgen_hub.runtime import cluster
    from occgen_hub.runtime.records import count_finished
    from occgen_hub.runtime.report import REPORT

    job = _open_cluster_job(options)
    tasks = cluster.make_tasks(job, executor, running["tasks"])
    counted = partial(count_finished, job.out, len(tasks.plan.shards))
    with _progress(len(job.refs), None, shown=executor != "slurm", counted=counted):
        summary = cluster.run_tasks(tasks, running)
    if summary is None:
        say(f"The tasks are queued in Slurm; {job.out / REPORT} appears when all are done.")
        return 0
    return _print_summary(summary, job.out)


@contextmanager
def _progress(
    total: int | None,
    shown_codes: set[str] | None,
    *,
    shown: bool = True,
    counted: Callable[[], int] | None = None,
) -> Iterator[Listener]:
    """A bar over episodes while the block lasts, and lines on failures and notes.

    total: None if unknown; shown_codes: collects the codes of the notes that were printed, None to
    print none; counted: how many episodes are finished, if other processes build some of them.
    """
    from tqdm import tqdm

    from occgen_hub.runtime.results import Failure, Listener

    turn, ended = threading.Lock(), threading.Event()  # Frames are counted in other threads.
    counts: Counter[str] = Counter()
    disable = bar_disabled() if shown else True
    with tqdm(
        total=total, unit="episode", desc="build", disable=disable, dynamic_ncols=True
    ) as bar:

        def show(finished: int) -> None:
            with turn:
                elapsed = max(bar.format_dict["elapsed"], 1e-9)
                bar.set_postfix_str(
                    f"{counts['built'] / elapsed:.1f} frames/s, {counts['reconstructed']} "
                    f"reconstructed, {counts['failed']} failed",
                    refresh=False,
                )
                bar.update(finished - bar.n)

        def poll() -> None:
            while counted is not None and not ended.wait(2):
                show(counted())

        def finished(result: Result) -> None:
            stop_if_asked()
            counts["episodes"] += 1
            counts["failed"] += isinstance(result, Failure)
            for line in _new_lines(result, shown_codes):
                with turn:
                    bar.write(one_line(line), file=sys.stderr)
            if counted is None:
                show(counts["episodes"])

        def frames(stage: str, count: int) -> None:
            counts[stage] += count
            show(int(bar.n) if counted is not None else counts["episodes"])

        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield Listener(finished, frames)
        finally:
            ended.set()
            thread.join()


def _new_lines(result: Result, shown_codes: set[str] | None) -> list[str]:
    """Lines to print about an episode: its failure, or its notes with codes not shown before."""
    from occgen_hub.runtime.results import Failure

    if isinstance(result, Failure):
        return [f"failed  {_failure_text(result)}"]
    if shown_codes is None:
        return []
    new = [note for note in result.notes if note.code not in shown_codes]
    shown_codes.update(note.code for note in new)
    return [f"note    {result.id}: {note.text}" for note in new]


def _failure_text(failure: Failure) -> str:
    """An episode and the reason of its failure, without repeating the episode's name."""
    return f"{failure.id}: {failure.reason.removeprefix(f'{failure.id}: ')}"


def _print_summary(
    summary: Summary,
    out: Path,
    shown_codes: set[str] | None = None,
    *,
    whole: bool = True,
    pushed: str | None = None,
) -> int:
    """Print the summary of a build, and return the exit code.

    shown_codes: of notes that were printed already; whole: whether it was the whole build, not a
    shard; pushed: the address on the Hub.
    """
    from occgen_hub.runtime.report import FAILURES

    rate = f", {summary.frames / summary.seconds:.1f} frames/s" if summary.frames else ""
    say(
        f"{summary.built} built, {summary.present} already there, {len(summary.failures)} failed "
        f"of {summary.episodes} episodes; {summary.frames} frames in {summary.seconds:.1f} s{rate}."
    )
    if total := sum(summary.stages.values()):
        shares = ", ".join(f"{k} {v / total:.0%}" for k, v in summary.stages.most_common())
        say(f"Time spent: {shares}.")
    for code, text in summary.examples.items():
        if code not in (shown_codes or ()):
            say(f"note    {text}", err=True)
    repeated = [f"{code} ({n})" for code, n in sorted(summary.notes.items()) if n > 1]
    if repeated:
        say(f"Notes on several episodes (number of episodes): {', '.join(repeated)}.")
    for remark in summary.remarks:
        say(f"Note: {remark}.")
    if summary.failures and whole:
        say(f"The failures are listed in {out / FAILURES}:")
        for failure in summary.failures[:20]:
            say(f"  {_failure_text(failure)}")
        if len(summary.failures) > 20:
            say(f"  and {len(summary.failures) - 20} more.")
        if earlier := sum(os.path.lexists(out / failure.id) for failure in summary.failures):
            say(f"Earlier versions of {earlier} of them remain in the dataset.")
    if pushed:
        say(f"On the Hub: {pushed}")
    elif summary.built and whole:
        place = shlex.quote(str(out))
        say(f"Next: occgen-hub validate {place} && occgen-hub inspect {place}")
    elif whole and summary.present:
        say(f"Dataset: {out}")
    return 1 if summary.failures else 0
