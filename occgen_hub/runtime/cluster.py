"""Shards as tasks of datatrove, which runs them here, under Slurm or on a Ray cluster.

A task builds one shard. Which shards have something to do is said here; when and where they are
built is datatrove's.
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

from occgen_hub.errors import UsageError
from occgen_hub.job import Job
from occgen_hub.runtime import threads
from occgen_hub.runtime.build import build_shard
from occgen_hub.runtime.finalize import finalize
from occgen_hub.runtime.lock import LOGS, output_lock
from occgen_hub.runtime.records import Plan, join_build, make_plan, record_present
from occgen_hub.runtime.results import Summary
from occgen_hub.runtime.shard import Shard

if TYPE_CHECKING:
    from datatrove.executor.base import PipelineExecutor
    from datatrove.executor.slurm import SlurmPipelineExecutor

EPISODES_A_TASK = 8
MAX_TASKS = 1000
"""Of an array of Slurm's, as most clusters have it."""


@dataclass(frozen=True, repr=False)
class Tasks:
    """The shards of a job as tasks. todo: the shards in which something is left to do."""

    job: Job
    plan: Plan
    todo: list[int]
    executor: str

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


def make_tasks(job: Job, executor: str, count: int | None = None) -> Tasks:
    """Share the episodes of a job out among tasks, and find those with something to do.

    Raises UsageError where datatrove or Ray is not installed.
    """
    for library in ("datatrove", "ray"):
        if library in ("datatrove", executor) and find_spec(library) is None:
            raise UsageError(
                f"--executor {executor}: {library} is not installed; run "
                "pip install 'occgen-hub[cluster]'."
            )
    count = min(count or min(MAX_TASKS, -(-len(job.refs) // EPISODES_A_TASK)), len(job.refs))
    plan = make_plan(job, count)
    missing = {ref.id for ref in job.refs if job.reason_to_build(ref) is not None}
    todo = [number for number, shard in enumerate(plan.shards) if missing & set(shard)]
    return Tasks(job, plan, todo, executor)


def run_tasks(tasks: Tasks, options: Mapping[str, Any]) -> Summary | None:
    """Build shards as tasks of datatrove, and finalize the dataset.

    options: `workers`, the tasks at once, and what each gets, by the command's names.

    Returns what they did; None from Slurm, where they only begin. Raises UsageError where there is
    no Slurm, or another build is running.
    """
    out, executor, remarks = tasks.job.out, tasks.executor, []
    if executor == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "--executor slurm: there is no sbatch here; run it where jobs are submitted, or see "
            "with --dry-run what would be."
        )
    with output_lock(out):
        join_build(out, tasks.plan, alone=True)
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
            except Exception as error:  # Whatever it is: what is missing is listed at the end.
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                remarks = [f"{executor} ended early ({said}); its logs are in {tasks.folder}"]
    summary = finalize(out, threads.cores())
    summary.remarks += remarks
    return summary


def build_task(tasks: Tasks, cores: int, on_a_gpu: int, _: object, rank: int, __: int) -> None:
    """A step of datatrove's: build a shard. rank: which of those with something to do."""
    threads.limit(cores, on_a_gpu)
    job = tasks.job
    if job.settings.engine.uses_device():
        job = job.on(job.device)
    build_shard(job, Shard(tasks.todo[rank], len(tasks.plan.shards)), executor=tasks.executor)


def finalize_task(out: Path, *_: object) -> None:
    """A step of datatrove's: write the files of the whole dataset."""
    finalize(out, threads.cores())


def _executor(tasks: Tasks, options: Mapping[str, Any]) -> PipelineExecutor:
    """datatrove's executor for the tasks, here or on Ray."""
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor

    given: dict[str, Any] = {"tasks": len(tasks.todo), "skip_completed": False}
    given["logging_dir"] = str(tasks.folder)
    if tasks.executor == "datatrove":
        workers = min(options["workers"] or threads.cores(), len(tasks.todo))
        step = partial(build_task, tasks, threads.cores_each(workers), workers)
        return LocalPipelineExecutor([step], workers=workers, **given)
    given |= _each_task(tasks.job, options)
    if "RAY_ADDRESS" not in os.environ:  # More than there are, it would wait for without end.
        given["cpus_per_task"] = min(given["cpus_per_task"], threads.cores())
    return RayPipelineExecutor([partial(build_task, tasks, given["cpus_per_task"], 1)], **given)


def _each_task(job: Job, options: Mapping[str, Any]) -> dict[str, Any]:
    """What each task gets, by datatrove's names."""
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
    """`key=value` options as a mapping; raises UsageError where one is not of that form."""
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
    """datatrove's executors for Slurm: of the tasks, and of the last one, which finalizes."""
    from datatrove.executor import SlurmPipelineExecutor

    class Slurm(SlurmPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
        """One whose batch scripts have what a shell would take apart in quotes."""

        def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
            given = {k: v and shlex.quote(str(v)) for k, v in sbatch_args.items() if v is not None}
            command = run_script.replace(folder, shlex.quote(folder))
            return str(super().get_launch_file_contents(given, command))

    folder, slurm = str(tasks.folder), dict(options["slurm"])
    each = _each_task(tasks.job, options)
    given: dict[str, Any] = each | {
        "time": slurm.pop("time", "24:00:00"),
        "partition": slurm.pop("partition", None),  # Else the cluster's default.
        "qos": slurm.pop("qos", ""),
        "job_name": slurm.pop("job-name", "occgen-hub"),
        "max_array_size": int(slurm.pop("max-array-size", MAX_TASKS + 1)),
        # The tasks run what runs here, wherever it is installed.
        "env_command": f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"',
        "sbatch_args": slurm,
        "skip_completed": False,
    }
    step = partial(build_task, tasks, each["cpus_per_task"], 1)
    build = Slurm([step], tasks=len(tasks.todo), logging_dir=folder, **given)
    given |= {"gpus_per_task": 0, "workers": -1, "run_on_dependency_fail": True}
    step = partial(finalize_task, tasks.job.out)
    return build, Slurm([step], tasks=1, logging_dir=f"{folder}/finalize", **given)


def batch_script(tasks: Tasks, options: Mapping[str, Any]) -> str:
    """The script that datatrove would give to sbatch; nothing is written."""
    build, _ = _slurm(tasks, options)
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
        runtime_env={"worker_process_setup_hook": f"{__name__}.{spawn_processes.__name__}"},
    )
    try:
        yield
    finally:
        ray.shutdown()


def spawn_processes() -> None:
    """In a worker of Ray's: have datatrove start the tasks' processes afresh, not as copies of it.

    A worker has dozens of threads; a copy has none of them but all their locks, as they were, and
    may wait for one for ever (documentation of os.fork).
    """
    import multiprocess

    multiprocess.set_start_method("spawn", force=True)
