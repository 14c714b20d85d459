"""Episodes as tasks of datatrove, which runs them here, under Slurm or on a Ray cluster.

A task builds some episodes, writes a log, and is marked complete by datatrove, so that the same
build, started again, skips it. A last task writes what belongs to the dataset as a whole. Nothing
is scheduled here: which tasks there are is said, and when and where they run is datatrove's.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import dump_json, hold, read_json, written_whole
from occgen_hub.runtime import failures, threads
from occgen_hub.runtime.loop import Job, conclude, left, witness
from occgen_hub.runtime.output import check_current, make_current, sole_use
from occgen_hub.runtime.plan import shares
from occgen_hub.runtime.report import LOGS, begin_report, logged, say
from occgen_hub.runtime.results import Failure, Listener, Summary
from occgen_hub.runtime.work import build_each, is_repeated, summed

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor

EXECUTORS = ("datatrove", "slurm", "ray")

EPISODES_A_TASK = 8
CPUS = 4
MAX_TASKS = 1000
"""Of an array of Slurm's, as most clusters have it."""


@dataclass(frozen=True)
class Resources:
    """What a task gets. cpus: cores, None for a few; memory: GB a core; gpus: None for one where
    a network runs; workers: tasks at once, None for as many as there is room for; slurm: options
    of sbatch.
    """

    tasks: int | None = None
    workers: int | None = None
    cpus: int | None = None
    memory: int = 2
    gpus: int | None = None
    device: str | None = None
    slurm: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The tasks of a job. taken: the numbers of the episodes of each; work: what they add up to;
    todo: the tasks in which something is left to do; name: the same for the same tasks.
    """

    job: Job
    taken: list[list[int]]
    work: list[float]
    todo: list[int]
    name: str

    @property
    def folder(self) -> Path:
        """Where datatrove keeps logs and marks, and the tasks what they did."""
        return self.job.out.absolute() / LOGS / self.name

    def told(self) -> str:
        """The plan in a few lines."""
        episodes, work = [len(taken) for taken in self.taken], [w / 1e6 for w in self.work]
        return (
            f"Tasks: {len(episodes)}, {len(self.todo)} of them with something to do. "
            f"Episodes: {sum(episodes)}, {_range(episodes)} a task; "
            f"megapixels: {_range([round(pixels, 1) for pixels in work])} a task.\n"
            f"Logs: {self.folder}"
        )


def _range(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def make_plan(job: Job, tasks: int | None = None) -> Plan:
    """Share the episodes of a job out among tasks, always in the same way."""
    count = min(tasks or min(MAX_TASKS, -(-len(job.refs) // EPISODES_A_TASK)), len(job.refs))
    work = [job.builder.work(ref) for ref in job.refs]
    taken = shares(work, count)
    said = [[[job.refs[n].id for n in numbers] for numbers in taken], job.asked]
    name = hashlib.sha256(dump_json(said).encode()).hexdigest()[:12]
    known = failures.known(job.out)
    todo = [rank for rank, numbers in enumerate(taken) if _left(job, numbers, known)]
    return Plan(job, taken, [sum(work[n] for n in numbers) for numbers in taken], todo, name)


def _left(job: Job, numbers: list[int], known: dict[str, Failure]) -> bool:
    """Whether one of the episodes has to be built, or tried."""
    for ref in (job.refs[number] for number in numbers):
        before = known.get(ref.id)
        if before and is_repeated(job.builder, ref, job.out, job.settings, before):
            continue
        try:
            reason = job.builder.outdated(ref, job.out, job.settings)
            if reason is not None or job.settings.overwrite:
                return True
        except OccGenError:
            return True  # It fails, and says so.
    return False


# What the tasks do


class BuildShare:
    """A step of datatrove's: builds the episodes of one task."""

    def __init__(self, plan: Plan, cores: int, device: str | None, on_a_gpu: int = 1) -> None:
        self.plan, self.cores, self.device, self.on_a_gpu = plan, cores, device, on_a_gpu

    def __repr__(self) -> str:
        """What datatrove logs of it."""
        return f"occgen-hub: {self.plan.name}"

    def __call__(self, _: object, rank: int, world_size: int) -> None:
        """Build them; raises OccGenError where another build is at it."""
        plan, job = self.plan, self.plan.job
        threads.limit(self.cores, self.on_a_gpu)
        place = plan.folder / "results" / f"{rank:05d}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        with _alone(place.with_suffix(".lock")), sole_use(job.out, shared=True):
            check_current(job.out, plan.name)
            engine = job.settings.engine
            if engine.uses_device():
                engine = engine.on(self.device)
            settings = replace(job.settings, engine=engine)
            refs = [job.refs[number] for number in plan.taken[rank]]
            listener, process = Listener(), f"{plan.name}-{rank}"
            with logged(job.out, f"{plan.name}/task-{rank:05d}"):
                say(f"begins: {len(refs)} episodes, task {rank} of {world_size}")
                results = build_each(
                    job.builder, refs, job.out, settings, listener, failures.known(job.out)
                )
                summary = summed(
                    results, listener, lambda result: witness(job.out, result, process)
                )
            with written_whole(place) as partial:
                partial.write_text(dump_json(summary.to_json()), encoding="utf-8")


class Finish:
    """The last step: what all tasks did, the files of the whole dataset, the report."""

    def __init__(self, plan: Plan, executor: str) -> None:
        self.plan, self.executor = plan, executor

    def __repr__(self) -> str:
        """What datatrove logs of it."""
        return f"occgen-hub: the end of {self.plan.name}"

    def __call__(self, *_: object) -> None:
        """Write them; raises OccGenError where that cannot be done."""
        plan, job = self.plan, self.plan.job
        with sole_use(job.out), logged(job.out):
            check_current(job.out, plan.name)
            summary = Summary()
            for rank in range(len(plan.taken)):
                summary.merge(_told(plan, rank))
            conclude(job, summary, len(os.sched_getaffinity(0)), self.executor)
            with written_whole(plan.folder / "summary.json") as partial:
                partial.write_text(dump_json(summary.to_json()), encoding="utf-8")


def _told(plan: Plan, rank: int) -> Summary:
    """What a task did in this run; where nothing was left to do, what is there already."""
    if rank not in plan.todo:
        return _before(plan, rank)
    try:
        return Summary.from_json(read_json(plan.folder / "results" / f"{rank:05d}.json"))
    except (OccGenError, TypeError, KeyError):
        return _unfinished(plan, rank)


def _before(plan: Plan, rank: int) -> Summary:
    """Of a task that had nothing to do: its episodes are there, or failed before and still would.

    By what the dataset says now, since another command may have built them since.
    """
    summary, job, known = Summary(), plan.job, failures.known(plan.job.out)
    for ref in (job.refs[number] for number in plan.taken[rank]):
        failed = known.get(ref.id)
        if failed and is_repeated(job.builder, ref, job.out, job.settings, failed):
            summary.failures.append(replace(failed, repeated=True))
        else:
            summary.present += 1
    return summary


def _unfinished(plan: Plan, rank: int) -> Summary:
    """Of a task that did not end."""
    refs = [plan.job.refs[number] for number in plan.taken[rank]]
    log = plan.folder / f"logs/task_{rank:05d}.log"
    return left(plan.job, refs, f"task {rank} did not end; see {log} and run the same build again")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a task, so that the same one, submitted twice, does not run beside itself."""
    with lock.open("w") as file:
        if not hold(file.fileno()):
            raise OccGenError(f"{lock}: the same task is running already; wait for it.")
        yield


# Handing them to datatrove


def run_cluster(job: Job, executor: str, resources: Resources) -> Summary | None:
    """Build a job's episodes as tasks of datatrove, and wait for them, but not for Slurm's.

    Returns what they did; None from Slurm, where they only begin. Raises UsageError when datatrove
    is not installed, or lacks what it needs to know, and when another build is at it.
    """
    check(executor, resources)
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "--executor slurm: there is no sbatch here; run it where jobs are submitted, or see "
            "with --dry-run what would be."
        )
    plan = make_plan(job, resources.tasks)
    with sole_use(job.out):
        plan.folder.mkdir(parents=True, exist_ok=True)
        make_current(job.out, plan.name, job.choices)
        for rank in plan.todo:
            for name in (f"completions/{rank:05d}", f"results/{rank:05d}.json"):
                (plan.folder / name).unlink(missing_ok=True)
        (plan.folder / "summary.json").unlink(missing_ok=True)
        begin_report(job.out)
    main, last = executors(plan, executor, resources)
    if executor == "slurm":
        last.depends = main
        last.run()
        return None
    said = "its logs say why"
    with _ray() if executor == "ray" else nullcontext():
        for step in (main, last):
            try:
                step.run()
            except Exception as error:  # Whatever it is: the last task tells what is missing.
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    done = plan.folder / "summary.json"
    if not done.exists():
        raise OccGenError(
            f"{plan.folder}: the last task did not end ({said}); run the same build again."
        )
    return Summary.from_json(read_json(done))


def check(executor: str, resources: Resources) -> None:
    """Raise UsageError where datatrove is not installed, or Slurm is not told enough."""
    try:
        import datatrove.executor  # noqa: F401  # asked whether it is there

        if executor == "ray":
            import ray  # noqa: F401  # likewise
    except ImportError as error:
        raise UsageError(
            f"--executor {executor}: {error.name} is not installed; run "
            "pip install 'occgen-hub[cluster]'."
        ) from error
    if executor == "slurm" and not resources.slurm.get("partition"):
        raise UsageError("--executor slurm: needs a partition; add --slurm partition=NAME.")


def parse_slurm(options: tuple[str, ...]) -> dict[str, str]:
    """`key=value` options as a mapping; raises UsageError where one is not of that form."""
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.strip().lstrip("-")
        if not equals or not key or "\n" in option:
            raise UsageError(f"--slurm {option}: expected key=value, such as time=24:00:00.")
        parsed[key] = value.strip()
    return parsed


def executors(
    plan: Plan, executor: str, resources: Resources
) -> tuple[PipelineExecutor, PipelineExecutor]:
    """datatrove's executors: of the tasks, and of the last one."""
    cores = len(os.sched_getaffinity(0))
    workers, tasks = resources.workers or -1, len(plan.taken)
    if executor == "datatrove":
        from datatrove.executor import LocalPipelineExecutor

        workers = min(resources.workers or cores, tasks)
        build = BuildShare(plan, threads.share(workers), resources.device, workers)
        main = LocalPipelineExecutor(
            [build], tasks=tasks, workers=workers, logging_dir=str(plan.folder)
        )
        last = LocalPipelineExecutor(
            [Finish(plan, executor)],
            workers=1,
            logging_dir=str(plan.folder / "end"),
            skip_completed=False,
        )
        return main, last
    gpus = resources.gpus
    if gpus is None:
        gpus = int(plan.job.settings.engine.uses_device() and resources.device != "cpu")
    cpus = resources.cpus or CPUS
    if executor == "ray" and "RAY_ADDRESS" not in os.environ:
        cpus = min(cpus, cores)  # More than there are, it would wait for for ever.
    given: dict[str, Any] = {"mem_per_cpu_gb": resources.memory}
    task = {"cpus_per_task": cpus, "gpus_per_task": gpus, "workers": workers}
    if executor == "ray":
        from datatrove.executor import RayPipelineExecutor

        build = BuildShare(plan, cpus, resources.device)
        return (
            RayPipelineExecutor(
                [build], tasks=tasks, logging_dir=str(plan.folder), **task, **given
            ),
            RayPipelineExecutor(
                [Finish(plan, executor)],
                tasks=1,
                cpus_per_task=cpus,
                logging_dir=str(plan.folder / "end"),
                skip_completed=False,
                **given,
            ),
        )
    from datatrove.executor import SlurmPipelineExecutor

    named = ("partition", "time", "qos", "job-name", "max-array-size")
    slurm = {"time": "24:00:00", "qos": "", "job-name": "occgen-hub", "max-array-size": "1001"}
    slurm |= resources.slurm
    given |= {
        "time": slurm["time"],
        "partition": slurm["partition"],
        "qos": slurm["qos"],
        "max_array_size": int(slurm["max-array-size"]),
        # The tasks run what runs here, wherever it is installed.
        "env_command": f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        "sbatch_args": {key: value for key, value in slurm.items() if key not in named},
    }
    return (
        SlurmPipelineExecutor(
            [BuildShare(plan, cpus, resources.device)],
            tasks=tasks,
            job_name=slurm["job-name"],
            logging_dir=str(plan.folder),
            **task,
            **given,
        ),
        SlurmPipelineExecutor(
            [Finish(plan, executor)],
            tasks=1,
            cpus_per_task=cpus,
            job_name=f"{slurm['job-name']}-end",
            logging_dir=str(plan.folder / "end"),
            skip_completed=False,
            # Tasks that failed leave their episodes to be told of, and the others are there.
            run_on_dependency_fail=True,
            **given,
        ),
    )


def batch_script(plan: Plan, resources: Resources) -> str:
    """The script that datatrove would give to sbatch; nothing is written."""
    main, _ = executors(plan, "slurm", resources)
    array = min(max(len(plan.todo), 1), main.max_array_size)
    with tempfile.TemporaryDirectory() as folder:  # datatrove makes the folder of Slurm's output.
        kept, main.slurm_logs_folder = main.slurm_logs_folder, folder
        arguments = main.get_sbatch_args(array)
    for key in ("output", "error"):
        arguments[key] = arguments[key].replace(folder, str(kept))
    command = (
        f"srun -l -n 1 launch_pickled_pipeline {main.logging_dir.resolve_paths('executor.pik')}"
    )
    return str(main.get_launch_file_contents(arguments, command))


@contextmanager
def _ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, or one on this machine for as long as the block lasts."""
    import ray

    if "RAY_ADDRESS" not in os.environ:
        # Ray's own is 15, which beside other work leaves a build a thirtieth of a core.
        os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"worker_process_setup_hook": f"{__name__}.{begin_anew.__name__}"},
    )
    try:
        yield
    finally:
        ray.shutdown()


def begin_anew() -> None:
    """In a worker of Ray's: have datatrove start the tasks' processes afresh, not as copies of it.

    A worker has dozens of threads; a copy has none of them but all their locks, as they were, and
    may wait for one for ever (documentation of os.fork).
    """
    import multiprocess

    multiprocess.set_start_method("spawn", force=True)
