"""Recognize built datasets and LeRobot datasets, which other sources do not read."""

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
"""A feature of InternData-N1. Its trajectories are a special kind of LeRobot dataset."""

IMAGES = "chunk-*/observation.images.rgb/*.jp*g"
"""A folder of images below `videos`, which other LeRobot datasets do not have."""


LEROBOT_REMEDY = "use --source lerobot"


def lerobot_kind(folder: Path) -> str | None:
    """For example "a LeRobot v3.0 dataset". None for other folders and for InternData-N1."""
    if not is_file(folder / INFO):
        return None
    try:
        info = read_json(folder / INFO)
    except SourceError:
        return None  # It may belong to any tool.
    version, features = info.get("codebase_version"), info.get("features")
    if not isinstance(version, str) or not isinstance(features, dict) or INTERNNAV in features:
        return None
    if any((folder / "videos").glob(IMAGES)):
        return None
    return f"a LeRobot {version[:8]} dataset"


def built_kind(folder: Path) -> str | None:
    """Describes a folder that a build or an export wrote. None for other folders."""
    if any(is_file(folder / name) for name in RECORDS):
        return "a dataset that occgen-hub built"
    return None


def check_not_built(root: Path, paths: Iterable[Path]) -> None:
    """Raise UsageError if one of `paths`, at or below `root`, is in a built dataset."""
    for folder in _folders(root, paths):
        if (kind := built_kind(folder)) is not None:
            raise UsageError(
                f"{folder}: is {kind}, not a recording; give the original recording as --input."
            )


def check_not_lerobot(root: Path, paths: Iterable[Path]) -> None:
    """Raise UsageError if one of `paths`, at or below `root`, is in a LeRobot dataset."""
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
