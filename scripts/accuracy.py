"""Accuracy of built occupancy on synthetic rooms, by kind of corruption and by method.

A row is a kind of corruption of the synthetic recordings. Each line of a row is a method: ours with
the settings `fusion: union` and `evidence`, OctoMap, Open3D's TSDF and DUFOMap. All methods of a
row get the same recordings, and the same exact visibility is applied to their results.
accuracy_metrics.py defines the columns. Our default has targets; the exit status is 1 if it misses
one.

With --labels, the classes of visible cells are compared with those of the mesh instead, on samples
with labels. With --kinect FOLDER, real frames are built instead and compared with their measured
depth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accuracy_kinect import measure_kinect
from accuracy_labels import measure_labels, show_labels
from accuracy_methods import METHODS, OURS
from accuracy_metrics import Counts, SampleTruth, evaluate, figures, measure
from accuracy_table import (
    KINECT,
    ROWS,
    Table,
    checks,
    print_checks,
    print_details,
    print_table,
)
from tqdm import tqdm

from occgen_hub.config import load_config
from occgen_hub.errors import OccGenError
from occgen_hub.sample import make_sample

__all__ = ["Counts", "SampleTruth", "evaluate", "figures", "main", "measure"]

PROCESSES = 2


def measure_row(
    row: str,
    seed: int,
    trajectories: int,
    frames: int,
    methods: list[str],
    settings: tuple[str, ...] = (),
    bounds: int = 0,
) -> dict[str, Counts]:
    """Make the recordings of a row with a seed and evaluate each method on them."""
    kind, found = ROWS[row], {}
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder, "sample")
        make_sample(sample, trajectories=trajectories, frames=frames, seed=seed, **kind.sample)
        truth = SampleTruth(sample)
        for name in methods:
            method = METHODS[name].with_settings(settings)
            if method.name == OURS:
                method = method.with_settings(kind.settings)
            counts = method.measure(truth, Path(folder, f"dataset {name}"), bounds)
            found[name] = sum(counts.values(), Counts())
    return found


@contextmanager
def single_threaded_processes() -> Iterator[None]:
    """In this block, new processes use one thread per library instead of one per core."""
    names = ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure_table(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the requested rows and methods. Rows run in parallel, one process each."""
    methods = []
    for name in options.method or METHODS:
        if missing := METHODS[name].missing:
            print(f"{name} is skipped: {missing}", file=sys.stderr)
        else:
            methods.append(name)
    rows = options.row or list(ROWS)
    seeds = range(options.seed, options.seed + options.seeds)
    counts: dict[str, dict[str, dict[int, Counts]]] = {
        row: {name: {} for name in methods} for row in rows
    }
    context = multiprocessing.get_context("spawn")
    with (
        single_threaded_processes(),
        ProcessPoolExecutor(options.processes, mp_context=context) as pool,
        tqdm(total=len(rows) * len(seeds), unit="sample", desc="accuracy") as bar,
    ):
        jobs: dict[Future[dict[str, Counts]], tuple[str, int]] = {
            pool.submit(
                measure_row, row, seed, options.trajectories, options.frames, methods,
                tuple(options.settings), options.bounds if row == "none" else 0,
            ): (row, seed)
            for seed in seeds for row in rows
        }  # fmt: skip
        try:
            for job in as_completed(jobs):
                row, seed = jobs[job]
                for name, found in job.result().items():
                    counts[row][name][seed] = found
                bar.set_postfix_str(f"{row}, seed {seed}")
                bar.update()
                _write_figures(
                    options.json, report(options, counts)
                )  # Keeps results if interrupted.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return report(options, counts)


def report(
    options: argparse.Namespace, counts: dict[str, dict[str, dict[int, Counts]]]
) -> dict[str, Any]:
    """Compute the figures from the counts by row, method and seed, and add the run's options."""
    done = {row: {name: by for name, by in of.items() if by} for row, of in counts.items()}
    done = {row: of for row, of in done.items() if of}
    return {
        "seeds": list(range(options.seed, options.seed + options.seeds)),
        "trajectories": options.trajectories,
        "frames": options.frames,
        "settings": list(options.settings),
        "table": {
            row: {name: figures(sum(by.values(), Counts())) for name, by in of.items()}
            for row, of in done.items()
        },
        "by_seed": {
            row: {name: {s: figures(c) for s, c in sorted(by.items())} for name, by in of.items()}
            for row, of in done.items()
        },
    }


def print_report(table: Table, *, markdown: bool, details: bool) -> bool:
    """Print all tables. Returns whether our method meets all of its targets."""
    print_table(table, markdown=markdown)
    if details:
        print_details(table, markdown=markdown)
    clean = table.get("none", {}).get(OURS, {})
    if "recall_bound" in clean:
        print(
            f"\nrecall on some of the clean frames: {clean['recall_bounded']:.4f} with {OURS}, "
            f"{clean['recall_bound']:.4f} if every cell that the true mesh crosses is occupied"
        )
    found = list(checks(table))
    if found:
        print_checks(found, markdown=markdown)
    return all(check.met for check in found)


def show_kinect(found: dict[str, float]) -> bool:
    """Print the figures of real frames. Returns whether they meet their targets."""
    lines = (
        ("in_front", "visible cells more than 4 cm in front of the measured depth", ".2%"),
        ("median", "visible cells in front of the measured depth, median, m", ".4f"),
        ("measured_found", "measured cells that have a visible cell within two", ".2%"),
    )
    met = {
        name: found[name] >= target if name == "measured_found" else found[name] <= target
        for name, target in KINECT.items()
    }
    for name, text, spec in lines:
        bound = ">=" if name == "measured_found" else "<="
        verdict = "met" if met[name] else "MISSED"
        print(f"{text:<60}{found[name]:>10{spec}}  {bound} {KINECT[name]:g}  {verdict}")
    print(
        "in front of the median measured by all rays that end in a cell: "
        f"{found['in_front_by_rays']:.2%}, median {found['median_by_rays']:.4f} m"
    )
    print(
        f"free cells at pixels without depth: {found['free_unmeasured']:.2%}, more than 10 cm "
        f"behind the measured depth: {found['free_behind']:.2%}"
    )
    print(
        f"cells of the scene: {found['scene_cells']:,.0f}; of Open3D's TSDF surface: "
        f"{found['tsdf_cells']:,.0f}; {found['times_tsdf']:.2f} times as many"
    )
    return all(met.values())


def _row(text: str) -> str:
    found = [name for name in ROWS if name.startswith(text)]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(f"{text!r} begins {len(found) or 'none'} of {list(ROWS)}")
    return found[0]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--row", action="append", type=_row, metavar="NAME",
        help=f"only rows with this prefix; repeatable: {'; '.join(ROWS)}")  # fmt: skip
    add("--method", action="append", choices=list(METHODS), help="only this method; repeatable")
    add("--seeds", type=int, default=3, help="number of samples per row")
    add("--seed", type=int, default=401, help="first seed")
    add("--trajectories", type=int, default=2, help="trajectories per sample")
    add("--frames", type=int, default=24, help="approximate frames per trajectory")
    add(
        "--bounds",
        type=int,
        default=1,
        help="row none: frames per trajectory on which recall's bound is measured",
    )
    add("--processes", type=int, default=PROCESSES, help="samples processed in parallel")
    add("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of our method, as in occgen-hub build")  # fmt: skip
    add(
        "--details",
        action="store_true",
        help="also print figures by range and incidence, and of free cells",
    )
    add("--markdown", action="store_true", help="print tables in Markdown")
    add("--json", type=Path, help="also write the figures to this file")
    add(
        "--from",
        dest="source",
        type=Path,
        help="print the figures of such a file and measure nothing",
    )
    add(
        "--kinect",
        type=Path,
        metavar="FOLDER",
        help="measure on real frames in the layout of 7-Scenes",
    )
    add("--labels", action="store_true", help="measure the classes of cells, with Kinect noise")
    options = parser.parse_args(arguments)
    for name in ("seeds", "trajectories", "frames", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; give 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        load_config(None, tuple(options.settings))
        if options.kinect:
            config = load_config(None, tuple(options.settings))
            with tempfile.TemporaryDirectory() as folder, tqdm(unit="frame", leave=False) as bar:
                real = measure_kinect(options.kinect, Path(folder, "out"), config, bar.update)
            met = show_kinect(real)
            found: dict[str, Any] = {"kinect": real, "targets": KINECT}
        elif options.labels:
            seeds = range(options.seed, options.seed + options.seeds)
            with tqdm(total=len(seeds), unit="sample", leave=False) as bar:
                by_seed = measure_labels(seeds, options.trajectories, options.frames, bar.update)
            met = show_labels(by_seed)
            found = {"labels": by_seed}
        else:
            found = _read_figures(options.source) if options.source else measure_table(options)
            met = print_report(found["table"], markdown=options.markdown, details=options.details)
    except OccGenError as error:
        print(error, file=sys.stderr)
        return 2
    _write_figures(options.json, found)
    return 0 if met else 1


def _write_figures(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")


def _read_figures(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        report["table"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OccGenError(
            f"{path}: has no table of figures ({error}); use a file of --json."
        ) from error
    return dict(report)


if __name__ == "__main__":
    sys.exit(main())
