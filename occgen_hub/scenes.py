"""Scenes that are fetched before their episodes are known: archives, here or on the Hub.

The output has a record of each built scene, so that unchanged scenes are not fetched again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from occgen_hub.archives import archive_stem, unpack
from occgen_hub.atomic import atomic_file
from occgen_hub.builder import EpisodeRef
from occgen_hub.errors import OccGenError, SourceError
from occgen_hub.files import dump_json, files_under, read_json, sha256
from occgen_hub.schema import Schema
from occgen_hub.scratch import Room

RECORDS = ".logs/scenes"
"""The folder of the records in an output. It is hidden, so it is not part of the dataset."""

PARTS = {"data", "meta", "videos"}
"""Folders of a dataset. A folder with two of them is not searched for archives."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub. oid: SHA-256 of a large file, Git's object id of a small one."""

    path: str
    bytes: int
    oid: str


@dataclass(frozen=True)
class SceneRef:
    """A scene before it is fetched.

    id: "<group>/<scene>", also its folder in the output; path: for errors; bytes: to read or
    download; stamp: changes when the scene does; files: on the Hub, one if it is an archive;
    archive: whether it has to be unpacked.
    """

    id: str
    path: Path
    bytes: int
    stamp: str
    files: tuple[RemoteFile, ...] = ()
    archive: bool = True

    @property
    def name(self) -> str:
        """Its name in messages. pathlib.Path replaces the two slashes of an address by one."""
        return str(self.path).replace("hf:/", "hf://", 1) if self.files else str(self.path)


@dataclass(frozen=True)
class SceneRecord:
    """The record of a built scene.

    name, bytes, sha256: of the archive; for a folder on the Hub, SHA-256 over its files' names and
    contents; stamp: of its SceneRef; choices: SHA-256 of the settings; episodes: ids of the built
    episodes; failed: whether others failed; unpacked: bytes in scratch; seconds: from the start of
    fetching until its last episode was written.
    """

    id: str
    name: str
    bytes: int
    sha256: str
    stamp: str
    choices: str
    episodes: tuple[str, ...]
    failed: bool
    unpacked: int
    seconds: float


def list_archives(root: Path) -> Iterator[SceneRef]:
    """The sorted archives below a folder, or `root` itself. They are not opened.

    The id is the last two parts of the path, without the suffix: the group and the scene.
    """
    if root.is_file():
        if archive_stem(root.name) is not None:
            yield _archive(root, root.parent)
        return
    for path in _archives_below(root):
        with suppress(OSError):  # Removed since.
            yield _archive(path, root)


def _archive(path: Path, root: Path) -> SceneRef:
    relative, stat = path.relative_to(root), path.stat()
    parts = (*relative.parent.parts, archive_stem(path.name) or path.name)
    if len(parts) < 2:
        parts = (root.resolve().name or "archives", *parts)
    return SceneRef("/".join(parts[-2:]), path, stat.st_size, f"{stat.st_size} {stat.st_mtime_ns}")


def _archives_below(folder: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Links are followed, but not to a folder in `above`, given by device and inode."""
    names: list[tuple[str, bool]] = []
    try:
        stat = folder.stat()
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    with suppress(OSError):
                        is_folder = entry.is_dir()
                        if is_folder or (archive_stem(entry.name) and entry.is_file()):
                            names.append((entry.name, is_folder))
    except OSError:  # The builder searches there too, and warns.
        return
    here = (stat.st_dev, stat.st_ino)
    if here in above or len(PARTS & {name for name, is_folder in names if is_folder}) >= 2:
        return
    for name, is_folder in sorted(names):
        if is_folder:
            yield from _archives_below(folder / name, (*above, here))
        else:
            yield folder / name


def scene_of(name: str) -> str:
    """The scene of an id of an episode or a scene: its first two parts."""
    return "/".join(name.split("/")[:2])


def units_of(refs: Sequence[EpisodeRef | SceneRef]) -> str:
    """What `refs` are in messages: "scenes" if one has to be fetched, else "episodes"."""
    return "scenes" if any(isinstance(ref, SceneRef) for ref in refs) else "episodes"


def selected(name: str, patterns: Sequence[str]) -> bool:
    """Whether a scene's id or name matches one of the patterns. True without patterns."""
    scene = scene_of(name)
    names = {name, scene, scene.split("/")[-1], name.split("/")[-1]}
    return not patterns or any(fnmatchcase(n, pattern) for n in names for pattern in patterns)


# Unpacking


@dataclass
class FetchedScene:
    """A scene in scratch. root: of a source tree with only this scene; room: its folder."""

    ref: SceneRef
    room: Room
    root: Path
    name: str
    bytes: int
    sha256: str
    episodes: list[EpisodeRef] = field(default_factory=list)

    def named(self, text: str) -> str:
        """Replace a path in scratch in a message by the path in the scene."""
        scene = self.root.joinpath(*self.ref.id.split("/"))
        return text.replace(f"{scene}/", f"{self.name}:").replace(str(self.root), self.name)


def unpack_scene(ref: SceneRef, path: Path, room: Room) -> FetchedScene:
    """Unpack a scene's archive at `path` into a room. Raises SourceError.

    A single folder at the top is the scene's folder if it has the scene's name (possibly below the
    group's name), or has trajectories. Otherwise, the content is put into the scene's folder.
    """
    name = ref.name
    room.name = name
    content = room.folder / "content"
    content.mkdir()
    archive = unpack(path, content, room.reserve, name)
    parts = ref.id.split("/")
    inner = content
    for start in (len(parts) - 1, len(parts) - 2):
        if start >= 0 and (found := _single_path(content, parts[start:])) is not None:
            inner = found
            break
    else:
        names = _visible(content)
        if len(names) == 1 and any(map(_has_parts, _folders(content / names[0]))):
            inner = content / names[0]
    root = room.folder / "tree"
    place = root.joinpath(*parts)
    place.parent.mkdir(parents=True)
    inner.rename(place)
    return FetchedScene(ref, room, root, archive.name, archive.bytes, archive.sha256)


def _single_path(folder: Path, names: Sequence[str]) -> Path | None:
    """The folder at these names, if it is the only entry at each level."""
    for name in names:
        if not (folder / name).is_dir() or _visible(folder) != [name]:
            return None
        folder = folder / name
    return folder


def _has_parts(folder: Path) -> bool:
    return len(PARTS & {path.name for path in _folders(folder)}) >= 2


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _visible(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith((".", "__MACOSX"))]


# Records


def write_scene(out: Path, record: SceneRecord) -> None:
    """Record the built parts of a scene. Raises OSError."""
    path = _record_path(out, record.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(dump_json(asdict(record), indent=1) + "\n", encoding="utf-8")


def read_scene(out: Path, name: str) -> SceneRecord | None:
    """The record of a scene. None if there is no valid one."""
    with suppress(OccGenError, TypeError, ValueError):
        values: dict[str, Any] = read_json(_record_path(out, name))
        record = SceneRecord(**values | {"episodes": tuple(values.get("episodes") or ())})
        numbers = (record.bytes, record.unpacked, record.seconds)
        texts = (record.id, record.name, record.sha256, record.stamp, record.choices)
        if (
            all(isinstance(number, int | float) for number in numbers)
            and all(isinstance(text, str) for text in (*texts, *record.episodes))
            and record.id == name
        ):
            return record
    return None


# Estimates

SECONDS_PER_BYTE = 1 / 1_600_000
UNPACKED_PER_BYTE = 1.2
OUTPUT_PER_BYTE = 1.5
"""Assumptions before any scene is built: 0.2 MB per frame, and 8 frames per second and process, as
for the trajectory in docs/measurements.md. The sizes are rough."""

MAX_MEASURED = 100
"""Limit of the records used for an estimate."""


@dataclass(frozen=True)
class Estimate:
    """The cost of building scenes. measured: number of records used, 0 if all is assumed; seconds:
    of one process, including fetching; unpacked: bytes of scratch for the largest scene; output:
    bytes of all of them in the dataset.
    """

    measured: int
    seconds: float
    unpacked: int
    output: int


def estimate(out: Path, refs: Sequence[SceneRef]) -> Estimate:
    """Estimate the cost of building these scenes from those that were built into `out`."""
    folder = out / RECORDS
    records = []
    for path in islice(folder.rglob("*.json"), MAX_MEASURED):
        name = path.relative_to(folder).with_suffix("").as_posix()
        record = read_scene(out, name)
        if record and record.episodes and not record.failed and record.bytes > 0:
            records.append(record)
    total, largest = sum(ref.bytes for ref in refs), max((ref.bytes for ref in refs), default=0)
    rates = [SECONDS_PER_BYTE, UNPACKED_PER_BYTE, OUTPUT_PER_BYTE]
    if records:
        read = sum(record.bytes for record in records)
        rates = [
            sum(record.seconds for record in records) / read,
            sum(record.unpacked for record in records) / read,
            sum(_size(out / name) for record in records for name in record.episodes) / read,
        ]
    seconds, unpacked, output = rates
    return Estimate(len(records), seconds * total, int(unpacked * largest), int(output * total))


def _size(folder: Path) -> int:
    """The bytes of the files in a folder."""
    return sum(path.stat().st_size for path in files_under(folder))


def _record_path(out: Path, name: str) -> Path:
    return out / RECORDS / f"{name}.json"


def why_scene_outdated(
    ref: SceneRef, record: SceneRecord | None, out: Path, choices: str, schema: Schema
) -> str | None:
    """Why a scene has to be fetched, according to its record. None if all of it is built."""
    if record is None:
        return "is not built"
    if record.stamp != ref.stamp and not _same_content(ref, record):
        return "was replaced since it was built"
    if record.choices != choices:
        return "was built with other settings"
    if record.failed:
        return "has episodes that failed"
    if lacking := next((e for e in record.episodes if not _is_whole(out / e, schema)), None):
        return f"lacks the episode {lacking}, or files of it"
    return None


def _same_content(ref: SceneRef, record: SceneRecord) -> bool:
    """Whether an archive has another time, but the same content. It is read, but not unpacked."""
    if ref.files:
        return False  # Its stamp depends on its content.
    with suppress(SourceError):
        return ref.bytes == record.bytes and sha256(ref.path) == record.sha256
    return False


def _is_whole(place: Path, schema: Schema) -> bool:
    with suppress(OccGenError, KeyError, TypeError):
        files = list(read_json(place / schema.path("record"))["files"])
        return all((place / name).is_file() for name in files)
    return False


def digest(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
