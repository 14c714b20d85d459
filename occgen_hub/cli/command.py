"""Shared parts of the commands: parameter types, output and progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import click

from occgen_hub.errors import one_line
from occgen_hub.stopping import Stopped, stop_if_asked


class _NonEmptyPath(click.Path):
    """A path that is not empty. An unset shell variable would otherwise mean `.`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Fails if it is empty."""
        if not str(value):
            self.fail("is empty; give a path, . for this folder", param, ctx)
        return super().convert(value, param, ctx)


class Source(_NonEmptyPath):
    """A path, or an address of the Hub, which is not changed."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path, or the address."""
        if isinstance(value, str) and value.startswith("hf://"):
            return value
        return super().convert(value, param, ctx)


MOST_LINES = 20
"""Maximum length of a printed list. Longer lists are replaced by totals."""

SOURCE = Source(file_okay=True, dir_okay=True, path_type=Path)
FOLDER = _NonEmptyPath(file_okay=True, dir_okay=True, path_type=Path)


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A decorator that adds options in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def default_output_path(folder: Path, ending: str) -> Path:
    """The default path of a picture or page about a dataset: here, but outside of the dataset."""
    dataset, here = folder.resolve(), Path().resolve()
    name = f"{dataset.name}{ending}"
    return dataset.parent / name if dataset == here or dataset in here.parents else Path(name)


class Examples(click.Command):
    """A command whose help ends with an example.

    resumable: whether running it again after an interruption resumes it.
    """

    def __init__(
        self, *args: Any, example: str = "", resumable: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.example, self.resumable = example, resumable

    def invoke(self, ctx: click.Context) -> Any:
        """Run it. Sets `resumable` of a Stopped exception."""
        try:
            try:
                return super().invoke(ctx)
            except ImportError:  # Some libraries raise it for a signal during their import.
                stop_if_asked()
                raise
        except Stopped as stopped:
            stopped.resumable = self.resumable
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Print the example."""
        with formatter.section("Example"):
            for line in self.example.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def say(line: str, *, err: bool = False) -> None:
    """Print a line that may contain text of a dataset, without control characters."""
    click.echo(one_line(line), err=err)


def by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    """Group paths by folder, as deep as there are at most MOST_LINES folders.

    Folders are sorted; `.` is the top. The first level may have more folders.
    """
    parents = {path: PurePosixPath(path).parts[:-1] for path in paths}
    found: dict[str, list[str]] = {}
    for depth in range(1, 2 + max(map(len, parents.values()), default=0)):
        deeper: dict[str, list[str]] = {}
        for path, parts in parents.items():
            deeper.setdefault("/".join(parts[:depth]) or ".", []).append(path)
        if found and len(deeper) > MOST_LINES:
            break
        found = deeper
    return dict(sorted(found.items()))


def say_by_folder(
    lines: Mapping[str, str], total: Callable[[list[str]], str], *, verbose: bool
) -> bool:
    """Print a line for each path or, for many paths unless verbose, a total for each folder.

    lines: by path; total: returns the total of the paths in a folder. Returns whether it printed
    totals.
    """
    if verbose or len(lines) <= MOST_LINES:
        for line in lines.values():
            say(line)
        return False
    folders = by_folder(lines)
    for folder, paths in list(folders.items())[:MOST_LINES]:
        say(f"{total(paths)}  {folder}")
    if (more := len(folders) - MOST_LINES) > 0:
        say(f"and {more:,} more folders")
    say(f"--verbose lists all {len(lines):,}.")
    return True


def bar_disabled() -> bool | None:
    """The value of tqdm's `disable`. None disables bars if there is no terminal."""
    return True if os.environ.get("TQDM_DISABLE", "0") not in ("", "0") else None


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar for the block. Yields a function to call with (done, total).

    A total of None means unknown.
    """
    from tqdm import tqdm

    with tqdm(unit=unit, desc=what, leave=False, disable=bar_disabled()) as bar:

        def progress(done: int, total: int | None) -> None:
            stop_if_asked()
            bar.total = total
            bar.update(done - bar.n)

        yield progress
