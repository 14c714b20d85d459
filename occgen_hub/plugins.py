"""Sources, engines and segmenters, found as entry points of the installed packages."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal

from occgen_hub.errors import OccGenError, UsageError, shorten_message

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

    Raises UsageError if there is none or several with this name, or if it cannot be imported.
    """
    points = _points(kind).get(name)
    if points is None:
        installed = ", ".join(plugin_names(kind)) or "none"
        raise UsageError(
            f"--{kind} {name}: no such {kind}; installed are {installed}. See "
            "docs/adding_a_source.md for how to add one."
        )
    if len(points) > 1:
        values = " and ".join(point.value for point in points)
        raise UsageError(
            f"--{kind} {name}: {values} have this name; rename all but one, or uninstall them."
        )
    place = f"--{kind} {name}: the entry point {points[0].value}"
    try:
        return points[0].load(), place
    except Exception as error:  # The module may raise anything when it is imported.
        raise UsageError(f"{place} cannot be loaded ({_cause(error)}).") from error


def open_plugin(
    kind: Literal["engine", "segmenter"],
    name: str,
    base: type,
    weights: Path | None,
    device: str | None,
) -> Any:
    """The engine or segmenter that an entry point opens, which has to be a `base`.

    weights, device: its options, None if not given. Raises UsageError if there is none with this
    name, if it cannot be opened or has another `name`, and the opener's own errors.
    """
    opener: Opener
    opener, place = load_plugin(kind, name)
    try:
        plugin = opener(weights, device)
    except (OccGenError, OSError, MemoryError):
        raise
    except Exception as error:
        raise UsageError(f"{place} cannot be opened ({_cause(error)}).") from error
    if not isinstance(plugin, base):
        raise UsageError(
            f"{place} does not return an instance of {base.__module__}.{base.__name__}; correct "
            "that package."
        )
    if getattr(plugin, "name", None) != name:
        found = getattr(plugin, "name", None)
        raise UsageError(f"{place} has the name {found!r}; give it name = {name!r}.")
    return plugin


def _cause(error: Exception) -> str:
    """What an author of a plugin has to correct."""
    return f"{type(error).__name__}: {shorten_message(str(error))}; correct that package"


@cache
def _points(kind: Kind) -> dict[str, list[EntryPoint]]:
    """The entry points by name. Cached, since the metadata of all installed packages is read."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=_GROUPS[kind]):
        found.setdefault(point.name, []).append(point)
    return found
