"""The location of a built dataset: a folder, or a repository on the Hub, downloaded or streamed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occgen_hub.errors import UsageError, shorten_message
from occgen_hub.hub_token import check_sendable
from occgen_hub.index import INDEX
from occgen_hub.loading import SCHEMA
from occgen_hub.scene_states import FOLDER as STATES
from occgen_hub.schema import load_schema
from occgen_hub.shards import FOLDER

HUB = "hf://datasets/"

ATTEMPTS = 6
FIRST_WAIT = 0.5
"""Seconds before the second attempt to read. Each further wait is twice as long."""

_REPO_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """The location of a dataset.

    root: the folder with its index; address: of the dataset for fsspec, from which parts of shards
    are read; None if shards are below `root`.
    """

    root: Path
    address: str | None = None

    def path(self, name: str) -> Path | str:
        """The path or address of a file of the dataset."""
        return self.root / name if self.address is None else f"{self.address}/{name}"


def fetched_source(source: str | Path, keys: Sequence[str], revision: str | None) -> Source:
    """A dataset in a folder, or "org/name" on the Hub, with the files of `keys` downloaded.

    Raises UsageError if it does not exist or cannot be downloaded.
    """
    if Path(source).is_dir():
        return Source(Path(source))
    repo_id, revision = _repository(source, revision)
    patterns = [f"{INDEX}/*.parquet", f"{FOLDER}/*.parquet"]
    patterns += [f"{STATES}/*.parquet"] if "states" in keys else []
    patterns += [*(_pattern(file) for key in keys for file in _files(key))]
    return Source(_fetched(repo_id, revision, patterns))


def streamed_source(source: str | Path, revision: str | None) -> Source:
    """A dataset in a folder, or on the Hub, from which only the index is downloaded.

    source: a folder, "org/name" or "hf://datasets/org/name[@revision]". Raises UsageError if it
    does not exist or cannot be downloaded.
    """
    if Path(source).is_dir():
        return Source(Path(source))
    repo_id, revision = _repository(source, revision)
    folder = _fetched(repo_id, revision, [f"{INDEX}/*.parquet"])
    # A snapshot's folder is named after its commit, so the shards match the index.
    return Source(folder, f"{HUB}{repo_id}@{folder.name}")


def read_range(address: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a file at an address of fsspec, with retries."""
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    content = with_retries(lambda: system.cat_file(path, start, end), address)
    return bytes(content)


def remote_size(address: str) -> int:
    """The size in bytes of a file at an address of fsspec."""
    import fsspec

    system, path = fsspec.core.url_to_fs(address)
    return int(with_retries(lambda: system.info(path)["size"], address))


def with_retries[Result](work: Callable[[], Result], what: str) -> Result:
    """The result of `work`, which reads from a network and is tried up to ATTEMPTS times.

    Raises UsageError if all attempts fail, or if there is no such file.
    """
    from huggingface_hub.utils import httpx

    wait = FIRST_WAIT
    for attempt in range(ATTEMPTS):
        try:
            return work()
        except FileNotFoundError:
            raise UsageError(f"{what}: does not exist; push the dataset again.") from None
        except (OSError, httpx.HTTPError, EOFError) as error:
            if attempt + 1 == ATTEMPTS:
                reason = shorten_message(str(error) or type(error).__name__)
                raise UsageError(
                    f"{what}: cannot be read ({reason}); check the network and run again."
                ) from error
        time.sleep(wait)
        wait *= 2
    raise AssertionError


def _repository(source: str | Path, revision: str | None) -> tuple[str, str | None]:
    """The name of a source's repository, and its revision."""
    name = str(source).removeprefix(HUB).rstrip("/") if isinstance(source, str) else ""
    name, _, stated = name.partition("@")
    if not _REPO_ID.fullmatch(name):
        raise UsageError(
            f"{source}: is not a folder; give the one that occgen-hub build wrote, or a dataset on "
            "the Hub as org/name."
        )
    return name, stated or revision


def _fetched(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    """The folder in the Hub's cache with the files of a dataset that match the patterns."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    check_sendable()
    try:
        folder = snapshot_download(
            repo_id, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except (httpx.HTTPError, OSError, HFValidationError) as error:
        reason = shorten_message(str(error) or type(error).__name__)
        raise UsageError(
            f"{repo_id}: is not a local folder, and cannot be downloaded from the Hub ({reason}); "
            "check the name, the revision and the network."
        ) from error
    return Path(folder)


def _files(key: str) -> tuple[str, ...]:
    """The files of the schema, except shards, that a key of an item needs."""
    needed: dict[str, tuple[str, ...]] = {
        "image": ("record", "rgb", "video"),
        "depth": ("record", "depth"),
        "task": ("record", "tasks", "frames"),
    }
    return needed.get(key, ())


def _pattern(file: str) -> str:
    """A pattern for all instances of a file of the schema, for the Hub."""
    schema = load_schema(SCHEMA)
    path: Any = schema.files[file].path
    return "*/" + str(
        path.format(chunk=schema.chunk, episode_index=schema.episode_index, frame="*")
    )


def place(root: Path, episode: str, file: str, frame: int | None = None) -> Path:
    """The path of a file of the schema in an episode."""
    return root / episode / load_schema(SCHEMA).path(file, frame)
