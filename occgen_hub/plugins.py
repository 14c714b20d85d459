"""Sources, engines and segmenters, found as entry points of the installed packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from occgen_hub.errors import UsageError, shorten_message

Kind = Literal["source", "engine", "segmenter"]
"""What an entry point adds. Each has an option of this name."""

Opener = Callable[[Path | None, str | None], object]
"""The entry point of an engine or a segmenter: opens it from a path to weights and a device. Raises
UsageError if it cannot."""

_GROUPS: dict[Kind, str] = {
    "source": "occgen_hub.builders",
    "engine": "occgen_hub.engines",
    "segmenter": "occgen_hub.segmenters",
}


def plugin_names(kind: Kind) -> list[str]:
    """The names of the installed plugins of a kind, sorted."""
    return sorted(_points(kind))


def load_plugin(kind: Kind, name: str) -> tuple[Any, str]:
    """The object of an entry point, and the beginning of an error message about it.

    Raises UsageError if there is none with this name, or if it cannot be imported.
    """
    point = _points(kind).get(name)
    if point is None:
        installed = ", ".join(plugin_names(kind)) or "none"
        raise UsageError(
            f"--{kind} {name}: no such {kind}; installed are {installed}. See "
            "docs/adding_a_source.md for how to add one."
        )
    place = f"--{kind} {name}: the entry point {point.value}"
    try:
        return point.load(), place
    except (ImportError, AttributeError, SyntaxError) as error:
        problem = shorten_message(str(error))
        raise UsageError(f"{place} cannot be loaded ({problem}); correct that package.") from error


def open_plugin(
    kind: Literal["engine", "segmenter"],
    name: str,
    base: type,
    weights: Path | None,
    device: str | None,
) -> Any:
    """The engine or segmenter that an entry point opens, which has to be a `base`.

    weights, device: its options, None if not given. Raises UsageError if there is none with this
    name, or if it cannot be opened, and the opener's own errors.
    """
    opener: Opener
    opener, place = load_plugin(kind, name)
    try:
        plugin = opener(weights, device)
    except (ImportError, AttributeError, TypeError) as error:
        problem = shorten_message(str(error))
        raise UsageError(f"{place} cannot be opened ({problem}); correct that package.") from error
    if not isinstance(plugin, base):
        raise UsageError(
            f"{place} does not return an instance of {base.__module__}.{base.__name__}; correct "
            "that package."
        )
    return plugin


@cache
def _points(kind: Kind) -> dict[str, EntryPoint]:
    """The entry points by name. Cached, since the metadata of all installed packages is read."""
    return {point.name: point for point in entry_points(group=_GROUPS[kind])}
