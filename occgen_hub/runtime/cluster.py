"""Shards as datatrove tasks, run on this machine, under Slurm or on a Ray cluster.

A task builds one shard. This module finds the shards that have something left to do; datatrove
decides when and where they run.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from occgen_hub.errors import UsageError, install_extra
from occgen_hub.job import Job
from occgen_hub.runtime import threads
from occgen_hub.runtime.build import build_shard
from occgen_hub.runtime.finalize import finalize
from occgen_hub.runtime.lock import LOGS, output_lock
from occgen_hub.runtime.records import Plan, join_build, make_plan, record_present
from occgen_hub.runtime.results import Summary
from occgen_hub.runtime.shard import Shard
from occgen_hub.scenes import units_of

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor

EPISODES_PER_TASK = 8
"""For archives and on the Hub, scenes."""

MAX_TASKS = 1000
"""The limit that most clusters set for the size of a Slurm array."""


@dataclass(frozen=True, repr=False)
class Tasks:
    """The shards of a job as tasks. todo: the numbers of the shards that are not complete."""

    job: Job
    plan: Plan
    todo: list[int]
    executor: str

    @property
    def folder(self) -> Path:
        """The folder of datatrove's logs."""
        return self.job.out / LOGS / "datatrove"

    def __str__(self) -> str:
        counts = [len(shard) for shard in self.plan.shards]
        units = units_of(self.job.refs).capitalize()
        return (
            f"Tasks: {len(counts)}, {len(self.todo)} of them with something to do. {units}: "
            f"{sum(counts)}, {min(counts)} to {max(counts)} a task.\nLogs: {self.folder}"
        )


def make_tasks(job: Job, executor: str, count: int | None = None) -> Tasks:
    """Distribute the episodes of a job over tasks, and find the tasks that are not complete.

    executor: "datatrove", "slurm" or "ray"; count: the number of tasks, by default one for each
    EPISODES_PER_TASK episodes, at most MAX_TASKS. Raises UsageError if datatrove or Ray is not
    installed.
    """
    for library in ("datatrove", "ray"):
        if library in ("datatrove", executor) and find_spec(library) is None:
            raise UsageError(
                f"--executor {executor}: {library} is not installed; {install_extra('cluster')}."
            )
    count = min(count or min(MAX_TASKS, -(-len(job.refs) // EPISODES_PER_TASK)), len(job.refs))
    plan = make_plan(job, count)
    missing = {ref.id for ref in job.refs if job.reason_to_build(ref) is not None}
    todo = [number for number, shard in enumerate(plan.shards) if missing & set(shard)]
    return Tasks(job, plan, todo, executor)


def run_tasks(tasks: Tasks, options: Mapping[str, Any]) -> Summary | None:
    """Build shards as datatrove tasks, and finalize the dataset.

    options: `workers`, the number of tasks at a time, and the resources of each task, with the
    names of the command's options.

    Returns a summary of the build, or None for Slurm, which only queues the tasks. Raises
    UsageError if Slurm is not installed or another build is running.
    """
    out, executor, remarks = tasks.job.out, tasks.executor, []
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "--executor slurm: sbatch was not found; run this on a login node, or use --dry-run to "
            "see what would be submitted."
        )
    with output_lock(out):
        join_build(out, tasks.plan, exclusive=True)
        for number, shard in enumerate(tasks.plan.shards):
            if number not in tasks.todo:
                record_present(out, number, executor, shard)
    if tasks.todo and executor == "slurm":
        build, last = _slurm(tasks, options)
        last.depends = build
        last.run()
        return None
    if tasks.todo:
        with _ray() if executor == "ray" else nullcontext():
            try:
                _executor(tasks, options).run()
            except Exception as error:  # finalize lists the missing episodes as failures.
                message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                remarks = [f"{executor} ended early ({message}); its logs are in {tasks.folder}"]
    summary = finalize(out, threads.cores())
    summary.remarks += remarks
    return summary


def build_task(
    tasks: Tasks, cores: int, processes_per_gpu: int, _: object, rank: int, __: int
) -> None:
    """A datatrove step: build shard `tasks.todo[rank]`."""
    threads.limit(cores, processes_per_gpu)
    job = tasks.job
    if job.settings.engine.uses_device():
        job = job.on(job.device)
    build_shard(job, Shard(tasks.todo[rank], len(tasks.plan.shards)), executor=tasks.executor)


def finalize_task(out: Path, *_: object) -> None:
    """A datatrove step: write the files of the whole dataset."""
    finalize(out, threads.cores())


def _executor(tasks: Tasks, options: Mapping[str, Any]) -> PipelineExecutor:
    """The datatrove executor that runs the tasks on this machine or on Ray."""
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    given: dict[str, Any] = {"tasks": len(tasks.todo), "skip_completed": False}
    given["logging_dir"] = str(tasks.folder)
    if tasks.executor == "datatrove":
        workers = min(options["workers"] or threads.cores(), len(tasks.todo))
        step = partial(build_task, tasks, threads.cores_each(workers), workers)
        return LocalPipelineExecutor([step], workers=workers, **given)
    given |= _task_resources(tasks.job, options)
    if "RAY_ADDRESS" not in os.environ:  # Ray would wait forever for more cores than there are.
        given["cpus_per_task"] = min(given["cpus_per_task"], threads.cores())
    return RayPipelineExecutor([partial(build_task, tasks, given["cpus_per_task"], 1)], **given)


def _task_resources(job: Job, options: Mapping[str, Any]) -> dict[str, Any]:
    """The resources of each task, as arguments of datatrove's executors."""
    gpus = options["gpus_per_task"]
    if gpus is None:
        gpus = int(job.settings.engine.uses_device() and job.device != "cpu")
    return {
        "cpus_per_task": options["cpus_per_task"] or 4,
        "mem_per_cpu_gb": options["mem_per_cpu"] or 2,
        "gpus_per_task": gpus,
        "workers": options["workers"] or -1,
    }


def parse_slurm(options: tuple[str, ...]) -> dict[str, str]:
    """Parse `key=value` options into a mapping. Raises UsageError if one has another form."""
    parsed = {}
    for option in options:
        key, equals, value = option.partition("=")
        key = key.strip().lstrip("-")
        if not equals or not key or "\n" in option:
            raise UsageError(f"--slurm {option}: expected key=value, such as time=24:00:00.")
        parsed[key] = value.strip()
    return parsed


def _slurm(
    tasks: Tasks, options: Mapping[str, Any]
) -> tuple[SlurmPipelineExecutor, SlurmPipelineExecutor]:
    """The datatrove executors for Slurm: one for the tasks, one for the finalizing task."""
    from datatrove.executor import SlurmPipelineExecutor

    class Slurm(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
        """An executor that quotes paths and options in its batch scripts for the shell."""

        def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
            given = {k: v and shlex.quote(str(v)) for k, v in sbatch_args.items() if v is not None}
            command = run_script.replace(folder, shlex.quote(folder))
            return str(super().get_launch_file_contents(given, command))

    folder, slurm = str(tasks.folder), dict(options["slurm"])
    resources = _task_resources(tasks.job, options)
    given: dict[str, Any] = resources | {
        "time": slurm.pop("time", "24:00:00"),
        "partition": slurm.pop("partition", None),  # None: the cluster's default.
        "qos": slurm.pop("qos", ""),
        "job_name": slurm.pop("job-name", "occgen-hub"),
        "max_array_size": int(slurm.pop("max-array-size", MAX_TASKS + 1)),
        # The tasks use the Python environment of this process.
        "env_command": f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        "sbatch_args": slurm,
        "skip_completed": False,
    }
    step = partial(build_task, tasks, resources["cpus_per_task"], 1)
    build = Slurm([step], tasks=len(tasks.todo), logging_dir=folder, **given)
    given |= {"gpus_per_task": 0, "workers": -1, "run_on_dependency_fail": True}
    step = partial(finalize_task, tasks.job.out)
    return build, Slurm([step], tasks=1, logging_dir=f"{folder}/finalize", **given)


def batch_script(tasks: Tasks, options: Mapping[str, Any]) -> str:
    """The script that datatrove would pass to sbatch. Writes nothing into the output folder."""
    build, _ = _slurm(tasks, options)
    # get_sbatch_args creates the folder of Slurm's output, so it gets a temporary one.
    with tempfile.TemporaryDirectory() as folder:
        logs, build.slurm_logs_folder = str(build.slurm_logs_folder), folder
        arguments = build.get_sbatch_args(min(len(tasks.todo), build.max_array_size))
    arguments |= {key: arguments[key].replace(folder, logs) for key in ("output", "error")}
    command = f"srun  -l -n 1 launch_pickled_pipeline {tasks.folder}/executor.pik"
    return str(build.get_launch_file_contents(arguments, command))


@contextmanager
def _ray() -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names, or start one on this machine for the block."""
    if "RAY_ADDRESS" not in os.environ:
        # Ray's default is 15: beside other load, a build got a thirtieth of a core.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Makes Ray listen on localhost only. Ray reads it on import.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    ray.init(
        ignore_reinit_error=True,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"worker_process_setup_hook": f"{__name__}.{spawn_processes.__name__}"},
    )
    try:
        yield
    finally:
        ray.shutdown()


def spawn_processes() -> None:
    """In a Ray worker: make datatrove spawn the processes of tasks instead of forking them.

    A Ray worker has dozens of threads. A forked copy has the locks that they held and none of the
    threads, so it may deadlock (see the documentation of os.fork).
    """
    import multiprocess

    multiprocess.set_start_method("spawn", force=True)
