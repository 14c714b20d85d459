"""The commands `build` and `finalize`."""

from __future__ import annotations

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
    no_bar,
    say,
    say_by_folder,
    with_options,
)
from occgen_hub.cli.mapping import CAMERA, MAPPING, take_cameras
from occgen_hub.errors import UsageError
from occgen_hub.stopping import stop_if_asked

if TYPE_CHECKING:
    from occgen_hub.builder import EpisodeRef
    from occgen_hub.job import Job
    from occgen_hub.publishing import HubPublisher
    from occgen_hub.runtime.results import Failure, Listener, Result, Summary
    from occgen_hub.runtime.shard import Shard
    from occgen_hub.scenes import SceneRef

MOST_SHOWN = 10
"""Episodes of which it is said beforehand what they will take."""

CLUSTERS = {
    "datatrove": ("tasks",),
    "slurm": ("tasks", "cpus_per_task", "gpus_per_task", "mem_per_cpu", "slurm"),
    "ray": ("tasks", "cpus_per_task", "gpus_per_task", "mem_per_cpu"),
}
"""The executors of datatrove, and which of the options of clusters each uses."""


@click.command(
    cls=Examples,
    example="occgen-hub build --source internnav --input traj_data --output out --workers 8\n"
    "occgen-hub build --source lerobot --input my-org/robot --cameras cameras.yaml --output out",
    goes_on=True,
)
@click.option(
    "--source", default="internnav", show_default=True, metavar="NAME",
    help="What kind of source it is: internnav (InternData-N1, VLN-CE), lerobot, capture (RGB-D "
    "folders, ROS 2 bags), video, or that of a plug-in.",
)  # fmt: skip
@click.option(
    "--input", "root", type=SOURCE, required=True,
    help="The root of the source tree, whose scenes may be archives; hf://datasets/ORG/NAME"
    "[@REVISION][/FOLDER] for one on the Hub, or ORG/NAME for a LeRobot dataset; for videos also a "
    "single one.",
)  # fmt: skip
@click.option("--output", "out", type=FOLDER, required=True, help="Where the dataset goes.")
@click.option(
    "--engine", default="auto", show_default=True, metavar="NAME",
    help="How to reconstruct: rgbd from sensor depth; pi3, pi3x or da3 from images; auto takes "
    "rgbd where there is depth, else pi3x, pi3 or da3 by the weights that are there; or that of a "
    "plug-in.",
)  # fmt: skip
@click.option(
    "--weights",
    type=FOLDER,
    help="A network's weights; ckpt/NAME/model.safetensors or the Hub's if not given.",
)
@click.option(
    "--license",
    type=click.Choice(["any", "commercial"]),
    default="any",
    show_default=True,
    help="What a network's weights have to allow: commercial takes only those that allow such use.",
)
@click.option("--device", help="Where networks run, as cuda:1; a GPU if there is one.")
@click.option(
    "--condition",
    metavar="LIST",
    help="What pi3x is given besides the images: depth, intrinsics, poses, or some of them.",
)
@click.option(
    "--segmenter", metavar="NAME",
    help="Make labels of the images with this installed segmenter, where the source has none.",
)  # fmt: skip
@click.option("--segmenter-weights", type=FOLDER, help="The weights of its network.")
@click.option("--config", type=FOLDER, help="A YAML file of settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable."
)
@click.option(
    "--media",
    type=click.Choice(["copy", "link", "none"]),
    help="What to do with the source's images and videos: link makes hard links.  [default: copy; "
    "none for LeRobot datasets, which the result is joined to]",
)
@click.option(
    "--workers", type=click.IntRange(1),
    help="Processes, which share the cores and GPUs; tasks at once on a cluster.  [default: 1, or "
    "as many as the executor has room for]",
)  # fmt: skip
@click.option(
    "--shard", metavar="I/N",
    help="Build share I of N of the episodes, numbered from 0 as ranks and array tasks are: from "
    "0/N to N-1/N. Then run finalize.",
)  # fmt: skip
@click.option(
    "--executor",
    type=click.Choice(["local", "accelerate", "datatrove", "slurm", "ray"]),
    help="Who builds the shards: this command, accelerate (a process a GPU), or datatrove, here or "
    "on a cluster.  [default: local, or accelerate where that started it]",
)
@click.option(
    "--limit", type=click.IntRange(1),
    help="Build only the first so many episodes; of archives and on the Hub, scenes.",
)  # fmt: skip
@click.option(
    "--scenes", multiple=True, metavar="PATTERN",
    help="Build only scenes whose GROUP/SCENE or name matches, as 'r2r/*'; repeatable.",
)  # fmt: skip
@click.option(
    "--scratch", type=FOLDER,
    help="Where scenes are unpacked and downloaded while they are built.  [default: .scratch in "
    "the output]",
)  # fmt: skip
@click.option(
    "--scratch-limit", default="64GB", show_default=True, metavar="SIZE",
    help="Bytes in scratch at most, which workers share.",
)  # fmt: skip
@click.option(
    "--hfov", type=float, metavar="DEGREES",
    help="What cameras see from side to side, where the source has no intrinsics (VLN-CE).  "
    "[default: 79]",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Build also what is there already.")
@click.option(
    "--parquet-occupancy/--no-parquet-occupancy",
    default=True,
    show_default=True,
    help="Write the occupancy as Parquet as well, in occupancy/, which the Hub can stream.",
)
@click.option(
    "--parquet-images",
    is_flag=True,
    help="Write images, depth and tasks into these files too, so that a stream has them.",
)
@click.option(
    "--push-to", metavar="ORG/NAME",
    help="Push scenes to this dataset on the Hub as they are built, without those that it has.",
)  # fmt: skip
@click.option(
    "--keep", type=click.Choice(["all", "none"]), default="all", show_default=True,
    help="With --push-to: whether scenes stay here when the Hub has them.",
)  # fmt: skip
@click.option(
    "--layout", type=click.Choice(["trajectories", "packed"]), default="trajectories",
    show_default=True,
    help="With --push-to: a folder a trajectory, or all in a few Parquet files a scene.",
)  # fmt: skip
@click.option(
    "--push-every", type=click.FloatRange(0), metavar="SECONDS",
    help="With --push-to: seconds between commits at least, since the Hub takes about 128 an hour "
    "of all machines.  [default: 300]",
)  # fmt: skip
@click.option("--private", is_flag=True, help="With --push-to: make it private, if it is made now.")
@click.option("--dry-run", is_flag=True, help="Only say what would be built, and by whom.")
@click.option("--verbose", is_flag=True, help="With --dry-run: every episode, not only totals.")
@click.option("--tasks", type=click.IntRange(1), help="Cluster: shards to make of the episodes.")
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

    What is there already and up to date is left alone, so an interrupted build goes on when it is
    started again. Ends with 0 when all was built, 1 when some episodes failed, 2 when used wrongly.
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
        threads.limit(threads.cores_each(ranks))  # Before numba and torch look for it.

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
    if executor in CLUSTERS:
        return _build_on_cluster(options, executor, running)
    if executor == "accelerate":
        running["workers"] = running["workers"] or threads.gpus() or threads.cores()
    return _build_here(options, running["workers"] or 1, own, pushing)


@click.command(cls=Examples, example="occgen-hub finalize out")
@click.argument("out", type=FOLDER)
def finalize(out: Path) -> int:
    """Write what belongs to a dataset as a whole, when all its shards are built.

    That is the card, the occupancy as Parquet, report.json and failures.jsonl. It may be run again
    at any time. Ends with 1 when some episodes failed or are missing.
    """
    from occgen_hub.runtime.finalize import finalize as finalize_dataset
    from occgen_hub.runtime.threads import cores

    return _print_summary(finalize_dataset(out, cores()), out)


def _check_usage(executor: str, shard: Shard | None, running: dict[str, Any]) -> None:
    """Raise UsageError for options that do not fit the executor."""
    from occgen_hub.runtime.ranks import launched

    for name, value in running.items():
        takers = [key for key, names in CLUSTERS.items() if name in names]
        if value not in (None, ()) and takers and executor not in takers:
            raise UsageError(
                f"--{name.replace('_', '-')}: is not used by --executor {executor}; leave it out "
                f"or choose one of {', '.join(takers)}."
            )
    if shard and executor != "local":
        raise UsageError(f"--shard: --executor {executor} makes shards itself; leave it out.")
    if (ranks := launched()) and executor != "accelerate" and not shard:
        raise UsageError(
            f"--executor {executor}: {ranks} processes were started beside one another, which only "
            "--executor accelerate shares the episodes among; leave the option out."
        )
    if ranks and executor == "accelerate" and running["workers"] not in (None, ranks):
        raise UsageError(
            f"--workers {running['workers']}: {ranks} processes were started already; leave the "
            "option out."
        )


def _check_pushing(pushing: dict[str, Any], options: dict[str, Any], executor: str) -> None:
    """Raise UsageError for options that do not fit --push-to, and set those that go with it."""
    if pushing["push_to"] is None:
        defaults = {"keep": "all", "layout": "trajectories", "push_every": None, "private": False}
        for name, default in defaults.items():
            if pushing[name] != default:
                raise UsageError(f"--{name.replace('_', '-')}: goes with --push-to; give that too.")
        return
    if executor != "local":
        raise UsageError(
            f"--push-to: --executor {executor} does not push; start the command on each machine "
            "with --shard I/N."
        )
    options["whole_scenes"] = True
    options["parquet_images"] |= pushing["layout"] == "packed"


def _publisher(pushing: dict[str, Any]) -> HubPublisher | None:
    """What pushes scenes as they are built, if that is asked for."""
    if pushing["push_to"] is None:
        return None
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from occgen_hub.publishing import EVERY, HubPublisher

    disable_progress_bars()  # There is one of the build.
    return HubPublisher(
        pushing["push_to"],
        keep=pushing["keep"],
        layout=pushing["layout"],
        private=pushing["private"],
        every=EVERY if pushing["push_every"] is None else pushing["push_every"],
        tell=lambda line: say(line, err=True),
    )


def _open_cluster_job(options: dict[str, Any]) -> Job:
    """A job whose tasks have working folders and devices of their own."""
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
    from occgen_hub.engines import without_fetching
    from occgen_hub.job import open_job
    from occgen_hub.runtime import cluster
    from occgen_hub.runtime.records import make_plan
    from occgen_hub.scenes import SceneRef

    with without_fetching("expect"):
        job = _open_cluster_job(options) if executor in CLUSTERS else open_job(**options)
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
    _say_estimate(job, [ref for ref in todo if isinstance(ref, SceneRef)])
    _say_outlook(job, refs)
    if executor in CLUSTERS:
        tasks = cluster.make_tasks(job, executor, running["tasks"])
        click.echo(tasks)
        if executor == "slurm" and tasks.todo:
            click.echo(f"The batch script:\n\n{cluster.batch_script(tasks, running)}")
    units = "scenes" if any(isinstance(ref, SceneRef) for ref in refs) else "episodes"
    say(f"{len(todo)} of {len(refs)} {units} would be built into {job.out}; nothing was done.")
    return 0


def _say_estimate(job: Job, scenes: Sequence[SceneRef]) -> None:
    """What building these scenes takes: bytes to fetch, time and disk."""
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


def _say_outlook(job: Job, refs: Sequence[EpisodeRef | SceneRef]) -> None:
    """What the network will take for these episodes: frames, windows, memory, time, licence."""
    from occgen_hub.engines import Auto
    from occgen_hub.engines.network import NetworkEngine
    from occgen_hub.engines.weights import LICENSES, missing_error
    from occgen_hub.job import outlook

    if not job.settings.engine.uses_device():
        return
    found = outlook(job, refs)
    if not found:
        return
    for name, own in list(found.items())[:MOST_SHOWN]:
        windows = f"{own.windows} windows of {own.size} that share {own.overlap}"
        click.echo(
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
        f"In all {sum(own.frames for own in found.values())} frames, about "
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
        _say_outlook(job, [ref for ref in job.refs if job.reason_to_build(ref)])
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
        say(f"The tasks were given to Slurm; {job.out / REPORT} is there when all is done.")
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
    disable = no_bar() if shown else True
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
            for line in _news(result, shown_codes):
                with turn:
                    bar.write(line, file=sys.stderr)
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


def _news(result: Result, shown_codes: set[str] | None) -> list[str]:
    """Lines to print about an episode: its failure, or its notes with codes not shown before."""
    from occgen_hub.runtime.results import Failure

    if isinstance(result, Failure):
        return [f"failed  {_text(result)}"]
    if shown_codes is None:
        return []
    new = [note for note in result.notes if note.code not in shown_codes]
    shown_codes.update(note.code for note in new)
    return [f"note    {result.id}: {note.text}" for note in new]


def _text(failure: Failure) -> str:
    """An episode and why it failed; a reason that begins with the episode does not repeat it."""
    return f"{failure.id}: {failure.reason.removeprefix(f'{failure.id}: ')}"


def _print_summary(
    summary: Summary,
    out: Path,
    shown_codes: set[str] | None = None,
    *,
    whole: bool = True,
    pushed: str | None = None,
) -> int:
    """Print what a build did, and return the exit code.

    shown_codes: of the notes that were printed already; whole: whether it was more than a shard;
    pushed: the address on the Hub that it was pushed to.
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
        say(f"Notes that were on several episodes, and on how many: {', '.join(repeated)}.")
    for remark in summary.remarks:
        say(f"Note: {remark}.")
    if summary.failures and whole:
        say(f"The failures are listed in {out / FAILURES}:")
        for failure in summary.failures[:20]:
            say(f"  {_text(failure)}")
        if len(summary.failures) > 20:
            say(f"  and {len(summary.failures) - 20} more.")
    if pushed:
        say(f"On the Hub: {pushed}")
    elif summary.built and whole:
        say(f"Next: occgen-hub validate {shlex.quote(str(out))}")
    elif whole and summary.present:
        say(f"Dataset: {out}")
    return 1 if summary.failures else 0
