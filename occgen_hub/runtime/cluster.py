"""Shards as tasks of datatrove, which runs them here, under Slurm or on a Ray cluster.

A task builds one shard and is marked complete by datatrove. Which tasks have something to do is
said here; when and where they run is datatrove's.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from occgen_hub.builder import Built
from occgen_hub.errors import UsageError
from occgen_hub.runtime import threads
from occgen_hub.runtime.build import build_shard
from occgen_hub.runtime.finalize import finalize
from occgen_hub.runtime.job import Job
from occgen_hub.runtime.lock import LOGS, output_lock
from occgen_hub.runtime.records import Plan, join_build, make_plan, recording
from occgen_hub.runtime.results import Process, Summary
from occgen_hub.runtime.shard import Shard

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor

EXECUTORS = ("datatrove", "slurm", "ray")

EPISODES_A_TASK = 8
CPUS = 4
MEMORY = 2
MAX_TASKS = 1000
"""Of an array of Slurm's, as most clusters have it."""


@dataclass(frozen=True)
class Resources:
    """What a task gets; None for a default.

    workers: tasks at once; cpus: cores; memory: GB a core; gpus: by default one if a network runs;
    slurm: options of sbatch.
    """

    tasks: int | None = None
    workers: int | None = None
    cpus: int | None = None
    memory: int | None = None
    gpus: int | None = None
    slurm: dict[str, str] = field(default_factory=dict)


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


def check_installed(executor: str) -> None:
    """Raise UsageError where datatrove or Ray is not installed."""
    for library in ("datatrove", "ray"):
        if library in ("datatrove", executor) and find_spec(library) is None:
            raise UsageError(
                f"--executor {executor}: {library} is not installed; run "
                "pip install 'occgen-hub[cluster]'."
            )


# The tasks


@dataclass(frozen=True)
class Tasks:
    """The shards of a job as tasks. todo: those in which something is left to do."""

    job: Job
    plan: Plan
    todo: list[int]

    @property
    def folder(self) -> Path:
        """Where datatrove keeps its logs."""
        return self.job.out / LOGS / "datatrove"

    def __str__(self) -> str:
        counts = [len(shard) for shard in self.plan.shards]
        return (
            f"Tasks: {len(counts)}, {len(self.todo)} of them with something to do. Episodes: "
            f"{sum(counts)}, {min(counts)} to {max(counts)} a task.\nLogs: {self.folder}"
        )


def make_tasks(job: Job, count: int | None = None) -> Tasks:
    """Share the episodes of a job out among tasks, and find those with something to do."""
    count = min(count or min(MAX_TASKS, -(-len(job.refs) // EPISODES_A_TASK)), len(job.refs))
    plan = make_plan(job, count)
    missing = {ref.id for ref in job.refs if job.reason_to_build(ref) is not None}
    todo = [number for number, shard in enumerate(plan.shards) if missing & set(shard)]
    return Tasks(job, plan, todo)


def _begin(tasks: Tasks, executor: str) -> None:
    """Put the build on record, and the shards in which all is there already."""
    out = tasks.job.out
    with output_lock(out):
        join_build(out, tasks.plan, alone=True)
        for number, shard in enumerate(tasks.plan.shards):
            if number not in tasks.todo:
                with recording(out, number, executor) as record:
                    for name in shard:
                        record(Built(name, "present", 0))
                    record(Process(socket.gethostname(), "cpu", 0, 0, 0.0, 0))


class BuildTask:
    """A step of datatrove's: builds the shard of each rank."""

    def __init__(self, tasks: Tasks, executor: str, cores: int, on_a_gpu: int = 1) -> None:
        self.tasks, self.executor, self.cores, self.on_a_gpu = tasks, executor, cores, on_a_gpu

    def __repr__(self) -> str:
        """What datatrove logs of it."""
        return "occgen-hub build"

    def __call__(self, _: object, rank: int, world_size: int) -> None:
        """Build it."""
        threads.limit(self.cores, self.on_a_gpu)
        tasks, job = self.tasks, self.tasks.job
        if job.settings.engine.uses_device():
            job = job.on(job.device)
        build_shard(job, Shard(tasks.todo[rank], len(tasks.plan.shards)), executor=self.executor)


class FinalizeTask:
    """A step of datatrove's: writes the files of the whole dataset."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __repr__(self) -> str:
        """What datatrove logs of it."""
        return "occgen-hub finalize"

    def __call__(self, *_: object) -> None:
        """Write them."""
        finalize(self.out, threads.cores())


# Handing them to datatrove


def run_tasks(tasks: Tasks, executor: str, resources: Resources) -> Summary | None:
    """Build shards as tasks of datatrove, and finalize the dataset.

    Returns what they did; None from Slurm, where they only begin. Raises UsageError where datatrove
    is not installed, there is no Slurm, or another build is running.
    """
    check_installed(executor)
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "--executor slurm: there is no sbatch here; run it where jobs are submitted, or see "
            "with --dry-run what would be."
        )
    _begin(tasks, executor)
    if tasks.todo and executor == "slurm":
        build, last = _slurm(tasks, resources)
        last.depends = build
        last.run()
        return None
    remarks = []
    if tasks.todo:
        with _ray() if executor == "ray" else nullcontext():
            try:
                _executor(tasks, executor, resources).run()
            except Exception as error:  # Whatever it is: what is missing is listed at the end.
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                remarks = [f"{executor} ended early ({said}); its logs are in {tasks.folder}"]
    summary = finalize(tasks.job.out, threads.cores())
    summary.remarks += remarks
    return summary


def _executor(tasks: Tasks, executor: str, resources: Resources) -> PipelineExecutor:
    """datatrove's executor for the tasks, here or on Ray."""
    given: dict[str, Any] = {
        "tasks": len(tasks.todo),
        "logging_dir": str(tasks.folder),
        "skip_completed": False,
    }
    if executor == "datatrove":
        from datatrove.executor import LocalPipelineExecutor

        workers = min(resources.workers or threads.cores(), len(tasks.todo))
        build = BuildTask(tasks, executor, threads.cores_each(workers), workers)
        return LocalPipelineExecutor([build], workers=workers, **given)
    from datatrove.executor import RayPipelineExecutor

    given |= _each_task(tasks.job, resources)
    if "RAY_ADDRESS" not in os.environ:  # More than there are, it would wait for without end.
        given["cpus_per_task"] = min(given["cpus_per_task"], threads.cores())
    return RayPipelineExecutor([BuildTask(tasks, executor, given["cpus_per_task"])], **given)


def _each_task(job: Job, resources: Resources) -> dict[str, Any]:
    """What each task gets, by datatrove's names."""
    network = job.settings.engine.uses_device() and job.device != "cpu"
    return {
        "cpus_per_task": resources.cpus or CPUS,
        "mem_per_cpu_gb": resources.memory or MEMORY,
        "gpus_per_task": int(network) if resources.gpus is None else resources.gpus,
        "workers": resources.workers or -1,
    }


def _slurm(
    tasks: Tasks, resources: Resources
) -> tuple[SlurmPipelineExecutor, SlurmPipelineExecutor]:
    """datatrove's executors for Slurm: of the tasks, and of the last one, which finalizes."""
    from datatrove.executor import SlurmPipelineExecutor

    class Slurm(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
        """One whose batch scripts have what a shell would take apart in quotes."""

        def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
            given = {k: v and shlex.quote(str(v)) for k, v in sbatch_args.items() if v is not None}
            command = run_script.replace(folder, shlex.quote(folder))
            return str(super().get_launch_file_contents(given, command))

    folder = str(tasks.folder)
    slurm = {"time": "24:00:00", "job-name": "occgen-hub"} | resources.slurm
    each = _each_task(tasks.job, resources)
    given: dict[str, Any] = each | {
        "time": slurm.pop("time"),
        "partition": slurm.pop("partition", None),  # Else the cluster's default.
        "qos": slurm.pop("qos", ""),
        "job_name": slurm.pop("job-name"),
        "max_array_size": int(slurm.pop("max-array-size", MAX_TASKS + 1)),
        # The tasks run what runs here, wherever it is installed.
        "env_command": f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        "sbatch_args": slurm,
        "skip_completed": False,
    }
    steps = [BuildTask(tasks, "slurm", each["cpus_per_task"])], [FinalizeTask(tasks.job.out)]
    build = Slurm(steps[0], tasks=len(tasks.todo), logging_dir=folder, **given)
    given |= {"gpus_per_task": 0, "workers": -1, "run_on_dependency_fail": True}
    return build, Slurm(steps[1], tasks=1, logging_dir=f"{folder}/finalize", **given)


def batch_script(tasks: Tasks, resources: Resources) -> str:
    """The script that datatrove would give to sbatch; nothing is written."""
    build, _ = _slurm(tasks, resources)
    with tempfile.TemporaryDirectory() as folder:  # datatrove makes the folder of Slurm's output.
        kept, build.slurm_logs_folder = str(build.slurm_logs_folder), folder
        arguments = build.get_sbatch_args(min(len(tasks.todo), build.max_array_size))
    arguments |= {key: arguments[key].replace(folder, kept) for key in ("output", "error")}
    command = f"srun  -l -n 1 launch_pickled_pipeline {tasks.folder}/executor.pik"
    return str(build.get_launch_file_contents(arguments, command))


@contextmanager
def _ray() -> Iterator[None]:
    """The cluster that RAY_ADDRESS names, or one on this machine for as long as the block lasts."""
    if "RAY_ADDRESS" not in os.environ:
        # Ray's own is 15, which beside other work leaves a build a thirtieth of a core.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Without a cluster, Ray listens to this machine alone. It looks when it is imported.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

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
