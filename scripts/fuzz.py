"""Corrupts files of sources, datasets and exports, and checks how every command handles them.

A case takes one of the subjects below, corrupts one to three of its files and runs one or two
commands on it, each in a separate process. A finding is: a traceback, a signal, an exit code other
than 0, 1 and 2, raw escape characters, too much time, memory or output; a dataset that `validate`
calls valid and a reader cannot read; and a build that ends with 0 and is not valid.

A case depends only on the seed and its number. The command that repeats it is printed with each
finding.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # Processes are forked.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from fuzz_mutations import LARGEST, corrupt

from occgen_hub import cli
from occgen_hub.files import sha256

SECONDS, MEGABYTES, CHARACTERS = 40, 1500, 200_000
"""Limits for a command: processor time, memory beyond this process's own, and output."""

ADDRESS_SPACE = 24 << 30
"""Bytes that a process may allocate, to protect the machine."""

COARSE = ("--set", "voxel_size=0.25")
CAPTURES = (
    *("tum", "seven_scenes", "scannet", "transforms", "plain", "colmap", "colmap_text", "bag"),
    "stray_scanner",
)

Step = tuple[str, ...] | Callable[[Path], object]
"""Command-line arguments, with {root} and {out} as placeholders for folders, or a function."""


@dataclass
class Subject:
    """A folder to corrupt, and the commands to run on it.

    plans: lists of steps; `then`: steps that have to succeed after a step that ended with 0.
    """

    name: str
    root: Path
    plans: list[list[Step]]
    then: dict[str, Step] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


# Subjects


def load(root: Path) -> None:
    """Read every frame of a dataset as a trainer does."""
    from occgen_hub.training import OccupancyDataset

    keys = ("occupancy", "mask", "labels", "pose", "intrinsics", "image", "depth", "task")
    dataset = OccupancyDataset(root, history_len=1, keys=keys)
    for number in range(len(dataset)):
        dataset[number]


def load_occupancy(root: Path) -> None:
    """Read the occupancy of every frame of an export, without LeRobot."""
    from occgen_hub.training import OccupancyDataset

    dataset = OccupancyDataset(root, keys=("occupancy", "mask", "pose", "intrinsics"))
    for number in range(len(dataset)):
        dataset[number]


def load_export(root: Path) -> None:
    """Read every frame of an export with LeRobot, including occupancy."""
    from occgen_hub.lerobot.dataset import LeRobotOccupancyDataset

    dataset = LeRobotOccupancyDataset("made/up", root=root)
    for number in range(len(dataset)):
        dataset[number]


def read_video(root: Path) -> None:
    """Read every frame of videos, without an engine."""
    read_source("video", root)


def read_capture(root: Path) -> None:
    """Read every frame of captures without depth."""
    read_source("capture", root)


def read_source(kind: str, root: Path) -> None:
    """Read every frame of a source's episodes."""
    from occgen_hub.builder import load_builder
    from occgen_hub.job import list_episodes

    builder = load_builder(kind, root)
    for ref in list_episodes(builder):
        episode = builder.read(ref)
        for frame in range(episode.length):
            episode.read_rgb(frame)


def run_checked(*arguments: str | Path) -> None:
    """Run a command that has to succeed, in a separate process."""
    code = run_forked(partial(command, list(map(str, arguments))), Path(os.devnull), None)[0]
    if code:
        raise RuntimeError(f"{arguments}: exit code {code}")


def subjects(place: Path, only: tuple[str, ...] = ()) -> Iterator[Subject]:
    """Make all subjects in a folder."""
    build = ("build", "--input", "{root}", "--output", "{out}", *COARSE, "--workers", "1")
    valid: dict[str, Step] = {"build": ("validate", "{out}")}

    def wanted(name: str) -> bool:
        return not only or name in only

    def made(name: str, *options: str) -> Path:
        sample = place / name / "root"
        if not sample.exists():
            options = ("--trajectories", "2", "--frames", "2", "--seed", "3", *options)
            options += ("--noise", "speckle")  # Pixels without depth.
            options += () if name == "vlnce" else ("--labels",)
            run_checked("sample", sample, *options)
            shutil.rmtree(sample / "ground_truth", ignore_errors=True)
        return sample

    for name, layout in (("tree", "vln-n1"), ("scenes", "vln-n1-scenes"), ("vlnce", "vln-ce")):
        if wanted(name):
            plans: list[list[Step]] = [[build]] * 8
            plans += [[("build", "--input", "{root}", "--output", "{root}")]]
            plans += [
                [("finalize", "{root}")],
                [("validate", "{root}")],
                [("report", "{root}", "--output", "{out}")],
            ]
            yield Subject(name, made(name, "--layout", layout), plans, valid)
    if wanted("archives"):
        root = place / "archives/root"
        root.mkdir(parents=True)
        (scene,) = [
            p for p in (made("scenes", "--layout", "vln-n1-scenes")).glob("*/*") if p.is_dir()
        ]
        for suffix in (".tar", ".tgz"):
            group = root / suffix[1:]
            group.mkdir()
            with tarfile.open(
                group / f"scene{suffix}", "w:gz" if suffix == ".tgz" else "w"
            ) as archive:
                archive.add(scene, scene.name)
        yield Subject("archives", root, [[build]], valid)
    if any(map(wanted, CAPTURES)):
        yield from captures(place, made("tree"), wanted, build, valid)
    if wanted("video"):
        root = place / "video/root"
        shutil.copytree(next(made("tree").rglob("observation.images.rgb")), root / "images")
        for number, video in enumerate(sorted(made("tree").rglob("*.mp4"))[:1]):
            shutil.copy(video, root / f"{number}.mp4")
        yield Subject("video", root, [[read_video]])
    if wanted("dataset") or wanted("export"):
        yield from datasets(place, made("tree"), wanted)
    if wanted("settings"):
        yield settings(place, made("tree"))


def captures(
    place: Path, tree: Path, wanted: Callable[[str], bool], build: Step, valid: dict[str, Step]
) -> Iterator[Subject]:
    """Make a recording in each layout that the source `capture` reads."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import captures as layouts

    from occgen_hub.builder import load_builder

    builder = load_builder("internnav", tree)
    episode = builder.read(next(iter(builder.episodes())))
    for name in filter(wanted, CAPTURES):
        root = place / name / "root/recording"
        root.parent.mkdir(parents=True)
        if name != "bag":
            root.mkdir()
        if name.startswith("colmap"):
            layouts.write_colmap(episode, root, binary=name == "colmap")
        else:
            getattr(layouts, f"write_{name}")(episode, root)
        K = ",".join(map(repr, layouts.opencv_intrinsics(episode)))
        stated = ("--intrinsics", K) if name in ("tum", "plain") else ()
        assert isinstance(build, tuple)
        step = (
            read_capture if name.startswith("colmap") else (*build, "--source", "capture", *stated)
        )
        yield Subject(name, root.parent, [[step]], valid)


def datasets(place: Path, tree: Path, wanted: Callable[[str], bool]) -> Iterator[Subject]:
    """Make a built dataset and an export of it."""
    root, export = place / "dataset/root", place / "export/root"
    build = ("build", "--input", str(tree), *COARSE, "--set", "unmeasured=unknown")
    run_checked(*build, "--output", root, "--workers", "1")
    first = sorted(p.parent.parent.relative_to(root) for p in root.rglob("meta/occgen.json"))[0]
    one = "{root}/" + first.as_posix()
    reads: dict[str, Step] = {"validate": load}
    plans: list[list[Step]] = [
        *([("validate", "{root}")],) * 4,
        *([load],) * 3,
        [("validate", "{root}", "--json")],
        [("inspect", "{root}", "--preview", "{out}.png")],
        [("report", "{root}", "--output", "{out}.html")],
        [("render", one, "{out}.png", "--frame", "0", "--view", "ego", "--size", "64x64")],
        [("render", one, "{out}.mp4", "--view", "panels", "--size", "256x64")],
        [("visualize", one, "{out}")],
        [("view", one, "--save", "{out}.rrd")],
        [("export", "{root}", "{out}")],
        [("push", "{root}", "--repo-id", "made/up", "--dry-run")],
        [("finalize", "{root}"), ("validate", "{root}")],
        [(*build, "--output", "{root}", "--workers", "1")],
        [(*build, "--output", "{root}", "--overwrite")],
    ]
    if wanted("dataset"):
        yield Subject("dataset", root, plans, reads)
    if wanted("export"):
        export.parent.mkdir(parents=True, exist_ok=True)
        run_checked("export", root, export)
        plans = [
            *([("validate", "{root}")],) * 3,
            *([load_occupancy],) * 2,
            [("inspect", "{root}", "--preview", "{out}.png")],
            [("report", "{root}", "--output", "{out}.html")],
            [("push", "{root}", "--repo-id", "made/up", "--dry-run")],
            [("export", str(root), "{root}", "--overwrite")],
            [("build", "--input", "{root}", "--output", "{out}", *COARSE)],
        ]
        yield Subject("export", export, plans, {"validate": load_export})


def settings(place: Path, tree: Path) -> Subject:
    """Make a settings file and a viewpoint file."""
    from occgen_hub.config import Config

    root = place / "settings/root"
    root.mkdir(parents=True)
    values = Config(voxel_size=0.25).model_dump(mode="json")
    (root / "config.yaml").write_text(yaml.safe_dump(values))
    view = {
        "position": [0, 0, 5.0],
        "target": [1.0, 1, 0],
        "up": [0, 0, 1.0],
        "field_of_view": 60.0,
    }
    (root / "camera.json").write_text(json.dumps({**view, "field_of_view": 60.0}))
    options = ("--input", str(tree), "--config", "{root}/config.yaml")
    (first, *_) = sorted(p.parent.parent.relative_to(tree) for p in tree.rglob("meta/info.json"))
    plans: list[list[Step]] = [
        [("build", *options, "--output", "{out}", "--workers", "1")],
        [("render", first.as_posix(), "{out}.png", "--view", "world", "--size", "64x64",
          "--camera", "{root}/camera.json", *options)],
    ]  # fmt: skip
    return Subject("settings", root, plans, {"build": ("validate", "{out}")})


# Cases


def command(arguments: list[str]) -> int:
    """Run the command line. Returns its exit code."""
    sys.argv = ["occgen-hub", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return 0


def run_forked(
    work: Callable[[], object], output: Path, seconds: float | None = SECONDS
) -> tuple[int, str, float, float]:
    """Run in a separate process. Returns exit code or -signal, output, seconds, megabytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Libraries have threads, which are idle.
        child = os.fork()
    if not child:
        code = 70
        try:
            handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            sys.stdout = io.TextIOWrapper(
                io.FileIO(1, "w", closefd=False), "utf-8", line_buffering=True
            )
            sys.stderr = io.TextIOWrapper(
                io.FileIO(2, "w", closefd=False), "utf-8", line_buffering=True
            )
            os.setsid()
            if seconds:
                resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
                resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
                resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 30, 2 << 30))
            code = _exit_code(work)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            os._exit(code)
    began, status = time.monotonic(), None
    while status is None:
        found, status_, usage = os.wait4(child, os.WNOHANG)
        if found:
            status = status_
        elif seconds and time.monotonic() - began > 6 * seconds:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # Its remaining children.
    with output.open(errors="replace", newline="") as file:
        text = file.read(CHARACTERS + 1) if output.is_file() else ""
    used = usage.ru_utime + usage.ru_stime
    return os.waitstatus_to_exitcode(status), text, used, usage.ru_maxrss / 1e3


def _exit_code(work: Callable[[], object]) -> int:
    from occgen_hub.errors import OccGenError

    try:
        code = work()
        return code if isinstance(code, int) else 0
    except OccGenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 70


def update_checksum(root: Path, path: Path) -> str:
    """Update a file's checksum in its dataset's record, so that readers do not stop there."""
    for parent in path.parents:
        record = parent / "meta/occgen.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            values = json.loads(record.read_text())
            values["files"][path.relative_to(parent).as_posix()] = sha256(path)
            record.write_text(json.dumps(values, indent=1))
            return ", checksum updated"
        if parent == root:
            break
    return ""


class Case:
    """One case. `run` returns a description of the finding, "" if there is none."""

    def __init__(self, subject: Subject, number: int, seed: int, place: Path) -> None:
        self.rng = random.Random(f"{seed} {number}")
        self.subject, self.place = subject, place
        self.lines: list[str] = []
        self.codes: list[str] = []

    def run(self) -> str:
        root = Path(shutil.copytree(self.subject.root, self.place / "root", symlinks=True))
        self.corrupt(root)
        # A mutation may leave this process, and so each forked one, with more memory.
        self.floor = run_forked(lambda: 0, self.place / "said", None)[3]
        plan = self.rng.choice(self.subject.plans)
        finalize = self.subject.name == "dataset" and plan[0] != ("finalize", "{root}")
        if finalize and self.update_checksums:
            plan = [("finalize", "{root}"), *plan]
        for number, step in enumerate(plan):
            wrong, code, output = self.step(step, number)
            if wrong:
                return f"{wrong}\n{output[-3000:]}"
            then = self.subject.then.get(step[0] if isinstance(step, tuple) else "")
            if code == 0 and then is not None:
                wrong, code, output = self.step(then, number + 10)
                if wrong or code:
                    return f"{wrong or f'exit code {code} after a 0'}\n{output[-3000:]}"
        return ""

    def corrupt(self, root: Path) -> None:
        """Corrupt one to three files. Picks a kind first, since most files are images."""
        kinds: dict[str, list[Path]] = {}
        for path in sorted(root.rglob("*")):
            if path.is_file() and path.suffix != ".lock":
                kinds.setdefault(path.suffix + path.parent.name[:4], []).append(path)
        self.update_checksums = self.rng.random() < 0.6
        for _ in range(self.rng.choice((1, 1, 1, 2, 3))):
            path = self.rng.choice(kinds[self.rng.choice(sorted(kinds))])
            if not path.is_file():
                continue  # An earlier change made it a folder or a pipe.
            how = corrupt(path, self.rng)
            small = path.is_file() and path.stat().st_size <= LARGEST
            if self.subject.name == "dataset" and self.update_checksums and small:
                how += update_checksum(root, path)
            self.lines.append(f"{path.relative_to(root)}: {how}")

    def step(self, step: Step, number: int) -> tuple[str, int, str]:
        """Run a step. Returns what is wrong, the exit code and the output."""
        root, out = self.place / "root", self.place / "out"
        if isinstance(step, tuple):
            arguments = [
                part.replace("{root}", str(root)).replace("{out}", str(out)) for part in step
            ]
            work: Callable[[], object] = partial(command, arguments)
            self.lines.append("occgen-hub " + shlex.join(step))
        else:
            work = partial(step, root)
            self.lines.append(getattr(step, "__name__", "reader"))
        code, output, seconds, megabytes = run_forked(work, self.place / f"said{number}")
        self.codes.append(str(code))
        wrong = ""
        if code not in (0, 1, 2):
            wrong = f"exit code {code} after {seconds:.0f} s"
        elif "Traceback (most recent" in output:
            wrong = "a traceback"
        elif "\x1b" in output or "\r" in output or "\0" in output:
            wrong = "raw control characters"
        elif len(output) > CHARACTERS:
            wrong = f"more than {CHARACTERS} characters"
        elif megabytes - self.floor > MEGABYTES:
            wrong = f"{megabytes - self.floor:.0f} MB"
        elif code and not output.strip():
            wrong = f"exit code {code} without a message"
        return wrong, code, output


def import_all() -> None:
    """Import what the commands need, so that each forked process has it from the start."""

    import occgen_hub.api
    import occgen_hub.exporting
    import occgen_hub.hub
    import occgen_hub.lerobot.dataset
    import occgen_hub.training
    import occgen_hub.validation
    import occgen_hub.visual.render
    import occgen_hub.visual.report
    import occgen_hub.visual.viewer  # noqa: F401


def main() -> None:
    """Run cases until the time is over. The exit code is 1 if there was a finding."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=60, help="duration in minutes; default: 60"
    )
    parser.add_argument("--seed", type=int, default=0, help="each seed gives other cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run only this case, and print everything")
    parser.add_argument(
        "--only", nargs="*", default=(), metavar="SUBJECT", help="only these subjects"
    )
    parser.add_argument("--keep", type=Path, help="copy the folders of findings here")
    options = parser.parse_args()
    import_all()
    with tempfile.TemporaryDirectory(prefix="occgen-fuzz-") as folder:
        found = fuzz(Path(folder), options)
    sys.exit(1 if found else 0)


def fuzz(place: Path, options: argparse.Namespace) -> int:
    """Run the cases one after another. Returns the number of findings."""
    everything = list(subjects(place / "subjects", tuple(options.only)))
    weights = [len({str(plan) for plan in subject.plans}) for subject in everything]
    end, number, found = time.monotonic() + 60 * options.minutes, options.first, 0
    counts: Counter[str] = Counter()
    if options.case is not None:
        number = options.case
    while time.monotonic() < end:
        here = place / f"case{number}"
        here.mkdir()
        subject = random.Random(f"{options.seed}/{number}").choices(everything, weights)[0]
        case = Case(subject, number, options.seed, here)
        wrong = case.run()
        counts[f"{subject.name} {' '.join(case.codes)}"] += 1
        if wrong or options.case is not None:
            again = f"scripts/fuzz --seed {options.seed} --case {number}"
            again += f" --only {' '.join(options.only)}" if options.only else ""
            print(
                f"\n{again}\n{subject.name}",
                *case.lines,
                wrong or "no finding",
                sep="\n",
                flush=True,
            )
        found += bool(wrong)
        if wrong and options.keep:
            shutil.copytree(here, options.keep / f"{options.seed}-{number}", symlinks=True,
                            ignore=shutil.ignore_patterns("*.jpg"), dirs_exist_ok=True,
                            copy_function=_copy_small)  # fmt: skip
        shutil.rmtree(here, ignore_errors=True)
        if options.case is not None:
            break
        number += 1
    for what, count in sorted(counts.items()):
        print(f"{count:6}  {what}")
    print(f"{counts.total()} cases, {found} findings")
    return found


def _copy_small(source: str, target: str) -> None:
    with contextlib.suppress(OSError, shutil.Error):
        if Path(source).is_file() and Path(source).stat().st_size < 1 << 28:
            shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
