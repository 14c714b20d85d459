"""Folders that are no recordings of other sources: datasets that were built, and LeRobot's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from occgen_hub.errors import SourceError, UsageError
from occgen_hub.files import is_file, read_json
from occgen_hub.loading import EXPORT

RECORDS = ("meta/occgen.json", EXPORT, ".logs/build.json")
"""Files that only a build or an export writes."""

INFO = "meta/info.json"
INTERNNAV = "observation.camera_intrinsic"
"""A feature of InternData-N1, whose trajectories are LeRobot datasets of their own kind."""

IMAGES = "chunk-*/observation.images.rgb/*.jp*g"
"""Below `videos`, images that other LeRobot datasets do not have there."""


LEROBOT_REMEDY = "use --source lerobot"


def lerobot_kind(folder: Path) -> str | None:
    """Such as "a LeRobot v3.0 dataset", if a folder is one; None for one of InternData-N1."""
    if not is_file(folder / INFO):
        return None
    try:
        info = read_json(folder / INFO)
    except SourceError:
        return None  # It may be anybody's.
    version, features = info.get("codebase_version"), info.get("features")
    if not isinstance(version, str) or not isinstance(features, dict) or INTERNNAV in features:
        return None
    if any((folder / "videos").glob(IMAGES)):
        return None
    return f"a LeRobot {version[:8]} dataset"


def built_kind(folder: Path) -> str | None:
    """What a folder is that a build or an export wrote; None for any other."""
    if any(is_file(folder / name) for name in RECORDS):
        return "a dataset that occgen-hub built"
    return None


def check_not_built(root: Path, paths: Iterable[Path]) -> None:
    """Raise UsageError where one of `paths`, at or below `root`, lies in a built dataset."""
    for folder in _folders(root, paths):
        if (kind := built_kind(folder)) is not None:
            raise UsageError(
                f"{folder}: is {kind}, and no recording; give what it was built from as --input."
            )


def check_not_lerobot(root: Path, paths: Iterable[Path]) -> None:
    """Raise UsageError where one of `paths`, at or below `root`, lies in a LeRobot dataset."""
    for folder in _folders(root, paths):
        if (kind := lerobot_kind(folder)) is not None:
            raise UsageError(f"{folder}: is {kind}; {LEROBOT_REMEDY}.")


def _folders(root: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """Every folder from `root` down to one of `paths`, once."""
    seen = set[Path]()
    for path in paths:
        for folder in (path, *path.parents):
            if folder in seen or not folder.is_relative_to(root):
                break
            seen.add(folder)
            yield folder
