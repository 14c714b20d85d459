"""Commands that make things: `sample` and `build`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from occgen_hub.cli.command import FOLDER, Examples, no_bar, progress_bar
from occgen_hub.cli.stopping import stop_if_asked, stopped_by
from occgen_hub.errors import OccGenError, UsageError

if TYPE_CHECKING:
    from occgen_hub.builder import EpisodeRef
    from occgen_hub.runtime.cluster import Resources
    from occgen_hub.runtime.loop import Job
    from occgen_hub.runtime.results import Failure, Result, Summary, Tally


class _Size(click.ParamType[tuple[float, float]]):
    """Metres and degrees, as 0.004,0.15."""

    name = "METRES,DEGREES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, float]:
        """The two numbers; a failure of usage where there are not two."""
        try:
            metres, degrees = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(
                f"{value!r} is not metres,degrees; give two numbers as 0.004,0.15", param, ctx
            )
        return metres, degrees


@click.command(
    cls=Examples,
    example="occgen-hub sample rooms --trajectories 4 --frames 30\n"
    "occgen-hub sample hard --noise kinect --noise speckle --pose-noise --people 2",
)
@click.argument("out", type=FOLDER)
@click.option("--trajectories", default=3, show_default=True, help="How many to make.")
@click.option("--frames", default=24, show_default=True, help="Frames of the first; others differ.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same bytes.")
@click.option(
    "--layout",
    type=click.Choice(["trajectories", "scenes"]),
    default="trajectories",
    show_default=True,
    help="A folder a trajectory, or the newer one of many episodes in a scene's folder.",
)
@click.option(
    "--faults", is_flag=True, help="With some of the mistakes that meta files of real data have."
)
@click.option(
    "--noise",
    type=click.Choice(["kinect", "stereo", "network", "flying", "speckle"]),
    multiple=True,
    help="Errors of the depth images; repeatable, their order does not matter.",
)
@click.option(
    "--pose-noise", type=_Size(), is_flag=False, flag_value="0.004,0.15",
    help="Each stated pose has an error of its own, with this deviation for each axis; "
    "0.004,0.15 if no value is given.",
)  # fmt: skip
@click.option(
    "--pose-drift", type=_Size(), is_flag=False, flag_value="0.02,0.3",
    help="The stated poses drift smoothly, by this much at the end; 0.02,0.3 if no value is given.",
)  # fmt: skip
@click.option(
    "--people", default=0, show_default=True,
    help="How many people walk, or walk and then stand, in each trajectory.",
)  # fmt: skip
def sample(
    out: Path,
    trajectories: int,
    frames: int,
    seed: int,
    layout: Any,
    faults: bool,
    noise: tuple[str, ...],
    pose_noise: tuple[float, float] | None,
    pose_drift: tuple[float, float] | None,
    people: int,
) -> None:
    """Make a source tree like InternData-N1's, of ray-traced rooms, with the truth.

    The truth is in OUT/ground_truth: the mesh of the rooms and, for each episode, the true poses
    and the people of every frame.
    """
    from occgen_hub.sample import make_sample

    with progress_bar("sample", unit="frame") as progress:
        made = make_sample(
            out, trajectories=trajectories, frames=frames, seed=seed, layout=layout, faults=faults,
            noise=noise, pose_noise=pose_noise, pose_drift=pose_drift, people=people,
            progress=progress,
        )  # fmt: skip
    for path in made:
        click.echo(path)
    source, target = shlex.quote(str(out)), shlex.quote(f"{out}_occ")
    click.echo(f"Next: occgen-hub build --source internnav --input {source} --output {target}")


@click.command(
    cls=Examples,
    example="occgen-hub build --source internnav --input traj_data --output out --workers 8",
    goes_on=True,
)
@click.option("--source", default="internnav", show_default=True, help="What kind of source it is.")
@click.option(
    "--input", "root", type=FOLDER, required=True,
    help="The root of the source tree; for videos also a single one.",
)  # fmt: skip
@click.option("--output", "out", type=FOLDER, required=True, help="Where the dataset goes.")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="How to reconstruct: rgbd from sensor depth, pi3 or pi3x from images; auto takes rgbd "
    "where there is depth, else pi3x or pi3 by the weights that are there.",
)
@click.option(
    "--weights",
    type=FOLDER,
    help="A network's weights; ckpt/NAME/model.safetensors or the Hub's if not given.",
)
@click.option("--device", help="Where networks run, as cuda:1; a GPU if there is one.")
@click.option(
    "--condition",
    metavar="LIST",
    help="What pi3x is told besides the images: depth, intrinsics, poses, or some of them.",
)
@click.option("--config", type=FOLDER, help="A YAML file of settings.")
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="One setting; repeatable."
)
@click.option(
    "--media",
    type=click.Choice(["copy", "link", "none"]),
    default="copy",
    show_default=True,
    help="What to do with the source's images and videos: link makes hard links.",
)
@click.option(
    "--workers", type=click.IntRange(1),
    help="Processes, which share the cores; tasks at once on a cluster.  [default: 1, or as many "
    "as the executor has room for]",
)  # fmt: skip
@click.option(
    "--executor",
    type=click.Choice(["local", "accelerate", "datatrove", "slurm", "ray"]),
    help="Who runs the episodes: processes of this command, accelerate (a process a GPU), or "
    "datatrove, here or on a cluster.  [default: local, or accelerate where that started it]",
)
@click.option("--limit", type=click.IntRange(1), help="Build only the first so many episodes.")
@click.option("--overwrite", is_flag=True, help="Build also what is there already.")
@click.option(
    "--parquet-occupancy/--no-parquet-occupancy",
    default=True,
    show_default=True,
    help="Write the occupancy as Parquet as well, in occupancy/, which the Hub can stream.",
)
@click.option("--retry-failed", is_flag=True, help="Try also what failed before, unchanged.")
@click.option("--dry-run", is_flag=True, help="Only say what would be built, and by whom.")
@click.option("--tasks", type=click.IntRange(1), help="Cluster: tasks to make of the episodes.")
@click.option("--cpus-per-task", type=click.IntRange(1), help="Cluster: cores.  [default: 4]")
@click.option(
    "--gpus-per-task",
    type=click.IntRange(0),
    help="Cluster: GPUs.  [default: 1 if there is a network to run]",
)
@click.option(
    "--mem-per-cpu", type=click.IntRange(1), default=2, show_default=True, help="Cluster: GB."
)
@click.option(
    "--slurm", multiple=True, metavar="KEY=VALUE",
    help="An option of sbatch: partition=NAME, which it needs, time=24:00:00, qos, account; "
    "repeatable.",
)  # fmt: skip
def build(
    source: str,
    root: Path,
    out: Path,
    engine: str,
    weights: Path | None,
    device: str | None,
    condition: str | None,
    config: Path | None,
    settings: tuple[str, ...],
    media: Any,
    workers: int | None,
    executor: str | None,
    limit: int | None,
    overwrite: bool,
    parquet_occupancy: bool,
    retry_failed: bool,
    dry_run: bool,
    tasks: int | None,
    cpus_per_task: int | None,
    gpus_per_task: int | None,
    mem_per_cpu: int,
    slurm: tuple[str, ...],
) -> int:
    """Build an occupancy dataset from a source.

    What is there already and up to date is left alone, so an interrupted build goes on when it is
    started again. Ends with 0 when all was built, 1 when some episodes failed, 2 when used wrongly.
    """
    from occgen_hub.runtime import threads
    from occgen_hub.runtime.launch import executor_for, launch, peers

    executor = executor_for(executor, workers)
    if executor == "accelerate" and not dry_run:
        if not peers():
            return stopped_by(launch(workers))
        threads.limit(threads.share(peers()))  # Before numba and torch look for it.

    from occgen_hub.config import load_config
    from occgen_hub.runtime import cluster
    from occgen_hub.runtime.loop import open_job

    if condition is not None:
        settings += (f"condition=[{condition}]",)
    remote = executor in cluster.EXECUTORS
    if not remote and (tasks or cpus_per_task or gpus_per_task is not None or slurm):
        raise UsageError(
            "--tasks, --cpus-per-task, --gpus-per-task and --slurm are for clusters; say which "
            f"with --executor {', '.join(cluster.EXECUTORS)}."
        )
    if slurm and executor != "slurm":
        raise UsageError(f"--slurm: is not for --executor {executor}; leave it out.")
    resources = cluster.Resources(
        tasks=tasks,
        workers=workers,
        cpus=cpus_per_task,
        memory=mem_per_cpu,
        gpus=gpus_per_task,
        device=device,
        slurm=cluster.parse_slurm(slurm),
    )

    def job(device: str | None) -> Job:
        return open_job(
            source,
            # Tasks have working folders of their own.
            root.absolute() if remote else root,
            out.absolute() if remote else out,
            engine=engine,
            weights=weights,
            device=device,
            config=load_config(config, settings),
            media=media,
            limit=limit,
            overwrite=overwrite,
            retry_failed=retry_failed,
            parquet_occupancy=parquet_occupancy,
        )

    if dry_run:
        return _plan(job("cpu" if remote else device), executor, resources)
    if remote:
        return _submit(job("cpu"), executor, resources)
    if executor == "accelerate":
        return _build_shared(job, device)
    return _build(job(device), workers or 1)


def _plan(job: Job, executor: str, resources: Resources) -> int:
    from occgen_hub.runtime import cluster
    from occgen_hub.runtime.failures import known
    from occgen_hub.runtime.launch import processes

    if executor in cluster.EXECUTORS:
        cluster.check(executor, resources)
    failed, missing = known(job.out), 0
    for ref in job.refs:
        state, to_do = _state(job, ref, failed.get(ref.id))
        missing += to_do
        click.echo(f"{ref.id}  {state}")
    if executor in cluster.EXECUTORS:
        plan = cluster.make_plan(job, resources.tasks)
        click.echo(plan.told())
        if executor == "slurm":
            click.echo(f"The batch script:\n\n{cluster.batch_script(plan, resources)}")
    elif resources.workers or executor == "accelerate":
        _print_shares(job, resources.workers or processes())
    whole = len(job.refs)
    click.echo(f"{missing} of {whole} episodes would be built into {job.out}; nothing was done.")
    return 0


def _state(job: Job, ref: EpisodeRef, failed: Failure | None) -> tuple[str, bool]:
    """What would become of an episode, and whether it would be built or tried."""
    from occgen_hub.runtime.work import is_repeated

    settings = job.settings
    if failed is not None and is_repeated(job.builder, ref, job.out, settings, failed):
        return "failed before: see --retry-failed", False
    try:
        reason = job.builder.outdated(ref, job.out, settings)
    except OccGenError as error:
        return f"would fail: {error}", True
    if reason is None and not settings.overwrite:
        return "present", False
    return f"to build: {reason or 'is there, --overwrite'}", True


def _print_shares(job: Job, processes: int) -> None:
    from occgen_hub.runtime.plan import shares

    work = [job.builder.work(ref) for ref in job.refs]
    for number, share in enumerate(shares(work, processes)):
        pixels = sum(work[item] for item in share) / 1e6
        click.echo(f"process {number}: {len(share)} episodes, {pixels:.1f} megapixels")


def _submit(job: Job, executor: str, resources: Resources) -> int:
    from occgen_hub.runtime import cluster
    from occgen_hub.runtime.report import LOGS, REPORT

    summary = cluster.run_cluster(job, executor, resources)
    if summary is None:
        click.echo(f"The tasks were given to Slurm; {job.out / REPORT} is there when all is done.")
        click.echo(f"Logs: {job.out / LOGS}")
        return 0
    return _ended(summary, job)


def _build_shared(open_it: Callable[[str | None], Job], device: str | None) -> int:
    from occgen_hub.runtime.distributed import joined, run_shared, together

    with joined(device) as group:
        own = group.device if group.device.startswith("cuda") else "cpu"
        job = together(group, lambda: open_it(own))
        told: set[str] | None = set() if group.rank == 0 else None
        with _build_bar(len(job.refs), told, shown=group.local_rank == 0) as (show, news):
            summary = run_shared(job, group, show, news)
    return 0 if summary is None else _ended(summary, job, told)


def _build(job: Job, workers: int) -> int:
    from occgen_hub.occupancy.visibility import warm_up
    from occgen_hub.runtime.loop import run_job
    from occgen_hub.runtime.results import Tally

    if workers > 1 and job.settings.engine.uses_device():
        click.echo(
            f"Note: each of {workers} processes loads the network; --executor accelerate gives "
            "each a GPU of its own.",
            err=True,
        )
    warm_up()
    total, told = len(job.refs), set[str]()
    with _build_bar(total, told) as (show, news):
        listener = Tally().listener(lambda tally: show(tally, total), news)
        summary = run_job(job, workers, listener)
    return _ended(summary, job, told)


@contextmanager
def _build_bar(
    total: int, told: set[str] | None, *, shown: bool = True
) -> Iterator[tuple[Callable[[Tally, int], None], Callable[[Result], None]]]:
    """A bar over episodes: how to show how far it is, and how to tell what became of one.

    told: gathers the kinds of notes that were told; None for a process that tells of none.
    """
    from threading import Lock

    from tqdm import tqdm

    turn = Lock()  # Frames are counted in threads of their own.
    disable = no_bar() if shown else True
    with tqdm(
        total=total, unit="episode", desc="build", dynamic_ncols=True, disable=disable
    ) as bar:

        def show(tally: Tally, total: int) -> None:
            with turn:
                elapsed = max(bar.format_dict["elapsed"], 1e-9)
                bar.total = total
                bar.set_postfix_str(
                    f"{tally.built / elapsed:.1f} frames/s, {tally.reconstructed} reconstructed, "
                    f"{tally.failed} failed",
                    refresh=False,
                )
                bar.update(tally.episodes - bar.n)

        def news(result: Result) -> None:
            stop_if_asked()
            for line in _news(result, told):
                with turn:
                    bar.write(line, file=sys.stderr)

        yield show, news


def _news(result: Result, told: set[str] | None) -> list[str]:
    """Lines to print about an episode: its failure, or those of its notes that are new in kind."""
    from occgen_hub.runtime.results import Failure

    if isinstance(result, Failure):
        return [] if result.repeated else [f"failed  {_said(result)}"]
    if told is None:
        return []
    new = [note for note in result.notes if note.code not in told]
    told.update(note.code for note in new)
    return [f"note    {result.id}: {note.text}" for note in new]


def _said(failure: Failure) -> str:
    """An episode and why it failed; reasons that begin with the episode are not told it twice."""
    return f"{failure.id}: {failure.reason.removeprefix(f'{failure.id}: ')}"


def _ended(summary: Summary, job: Job, told: set[str] | None = None) -> int:
    """Say what a run did, and give the exit code. told: kinds of notes that were told by then."""
    from occgen_hub.runtime.failures import FAILURES

    rate = f", {summary.frames / summary.seconds:.1f} frames/s" if summary.frames else ""
    click.echo(
        f"{summary.built} built, {summary.present} already there, {len(summary.failures)} failed "
        f"of {summary.episodes} episodes; {summary.frames} frames in {summary.seconds:.1f} s{rate}."
    )
    if total := sum(summary.stages.values()):
        shares = ", ".join(f"{k} {v / total:.0%}" for k, v in summary.stages.most_common())
        click.echo(f"Time spent: {shares}.")
    for code, text in summary.examples.items():
        if code not in (told or ()):
            click.echo(f"note    {text}", err=True)
    repeated = [f"{code} ({n})" for code, n in sorted(summary.notes.items()) if n > 1]
    if repeated:
        click.echo(f"Notes that were on several episodes, and on how many: {', '.join(repeated)}.")
    for remark in summary.remarks:
        click.echo(f"Note: {remark}.")
    if summary.failures:
        click.echo(f"The failures are listed in {job.out / FAILURES}:")
        for failure in summary.failures[:20]:
            click.echo(f"  {_said(failure)}")
        if len(summary.failures) > 20:
            click.echo(f"  and {len(summary.failures) - 20} more.")
    if before := summary.repeated:
        click.echo(
            f"{before} of them failed before, with the same source and settings, and were not "
            "tried again; --retry-failed tries them."
        )
    place = shlex.quote(str(job.out))
    if summary.built:
        click.echo(f"Next: occgen-hub validate {place}")
    elif summary.present:
        click.echo(f"Dataset: {job.out}")
    return 1 if summary.failures else 0
