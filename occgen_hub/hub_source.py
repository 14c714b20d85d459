"""A dataset on the Hugging Face Hub as a source, listed at one commit, downloaded by scene."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from occgen_hub.archives import archive_stem
from occgen_hub.builder import plain_license
from occgen_hub.errors import OccGenError, SourceError, UsageError, shorten_message
from occgen_hub.scenes import (
    PARTS,
    FetchedScene,
    RemoteFile,
    SceneRef,
    digest,
    unpack_scene,
)
from occgen_hub.scratch import Room

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

FORM = "hf://datasets/ORG/NAME[@REVISION][/FOLDER]"
AGAIN = "check the connection and run the same command again to resume"
GROUPS = "traj_data"
"""The folder of InternData-N1 that holds the groups."""
BLOCK = 4096
"""Bytes that a small file uses on disk."""


class HubSourceError(OccGenError):
    """The Hub cannot be reached, or refuses a request."""


@dataclass(frozen=True)
class HubSource:
    """A folder of a dataset on the Hub. revision: a branch, a tag or a commit.

    license: from the dataset's card, set by `listed`.
    """

    repo_id: str
    revision: str
    folder: str
    license: str | None = None

    def __str__(self) -> str:
        below = f"/{self.folder}" if self.folder else ""
        return f"hf://datasets/{self.repo_id}@{self.revision}{below}"

    @classmethod
    def parse(cls, text: str | Path) -> HubSource | None:
        """The source that an --input names. None if it is a path.

        Raises UsageError for an invalid address of the Hub.
        """
        # pathlib.Path replaces two slashes by one.
        begin = re.match(r"hf:/{1,2}(?=[^/])", str(text))
        if begin is None:
            return None
        rest = str(text)[begin.end() :].rstrip("/")
        name = r"datasets/([\w.-]+/[\w.-]+?)"
        revision = r"(?:@(refs/(?:pr|convert)/[\w.-]+|[^/@]+))?"
        found = re.fullmatch(f"{name}{revision}(?:/(.+))?", rest)
        parts = PurePosixPath(found[3] or "").parts if found else ()
        if found is None or ".." in parts:
            raise UsageError(f"{text}: is not a dataset on the Hub; give --input {FORM}.")
        return cls(found[1], (found[2] or "main").replace("%2F", "/"), "/".join(parts))

    @classmethod
    def named(cls, text: str | Path) -> HubSource | None:
        """The dataset that an --input names as ORG/NAME. None if a path with this name exists."""
        found = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(text))
        return None if found is None or Path(text).exists() else cls(str(text), "main", "")

    @classmethod
    def of_snapshot(cls, folder: Path) -> HubSource | None:
        """The source of a folder in the cache of huggingface_hub. None for other folders.

        The revision is a commit.
        """
        parts = folder.absolute().parts
        for n, part in enumerate(parts[:-2]):
            name = re.fullmatch(r"datasets--([\w.-]+?)--([\w.-]+)", part)
            if name and parts[n + 1] == "snapshots" and re.fullmatch("[0-9a-f]{40}", parts[n + 2]):
                return cls(f"{name[1]}/{name[2]}", parts[n + 2], "/".join(parts[n + 3 :]))
        return None

    def snapshot(self, *patterns: str) -> Path:
        """The folder in the cache of huggingface_hub with the files below `folder` that match.

        Raises HubSourceError.
        """
        from huggingface_hub import HfApi

        api = HfApi(library_name="occgen-hub")
        with _hub_errors(self, api.endpoint):
            info = api.repo_info(
                self.repo_id, repo_type="dataset", revision=self.revision, timeout=20
            )
            api.auth_check(self.repo_id, repo_type="dataset")
            below = f"{self.folder}/" if self.folder else ""
            place = api.snapshot_download(
                self.repo_id,
                repo_type="dataset",
                revision=info.sha or self.revision,
                allow_patterns=[f"{below}{pattern}" for pattern in patterns],
            )
        return Path(place, self.folder)

    def fetch(self, name: str) -> None:
        """Download a file below `folder` to the cache of huggingface_hub. Raises HubSourceError."""
        from huggingface_hub import HfApi

        api = HfApi(library_name="occgen-hub")
        with _hub_errors(self, api.endpoint):
            api.hf_hub_download(
                self.repo_id,
                f"{self.folder}/{name}" if self.folder else name,
                repo_type="dataset",
                revision=self.revision,
            )

    def listed(self) -> tuple[HubSource, list[SceneRef]]:
        """The source at the current commit of its revision, and its sorted scenes.

        A scene is an archive, or all folders of one scene. Raises HubSourceError.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi(library_name="occgen-hub")
        with _hub_errors(self, api.endpoint):
            info = api.dataset_info(self.repo_id, revision=self.revision, timeout=20)
            # Anybody can list a gated dataset. Access to its files needs a separate check.
            api.auth_check(self.repo_id, repo_type="dataset")
            value = info.card_data.get("license") if info.card_data else None
            pinned = HubSource(
                self.repo_id, info.sha or self.revision, self.folder, plain_license(value)
            )
            entries = api.list_repo_tree(
                self.repo_id,
                self.folder or None,
                recursive=True,
                revision=pinned.revision,
                repo_type="dataset",
            )
            files = [
                RemoteFile(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile)
            ]
        return pinned, pinned._scenes(files)

    def _scenes(self, files: list[RemoteFile]) -> list[SceneRef]:
        groups: dict[str, list[RemoteFile]] = {}
        archives = {}
        for file in files:
            relative = self._below(file.path)
            parts = relative.split("/")
            if (scene := self._scene_folder(relative)) is not None:
                groups.setdefault(scene, []).append(file)
            elif (stem := archive_stem(parts[-1])) and not parts[-1].startswith("."):
                archives["/".join([*parts[:-1], stem])] = file
        found = []
        for name, file in archives.items():
            found.append(self._ref(name, (file,), file.oid, archive=True))
        for name, members in groups.items():
            members.sort(key=lambda file: file.path)
            stamp = digest("".join(f"{file.path}\0{file.oid}\n" for file in members))
            found.append(self._ref(name, tuple(members), stamp, archive=False))
        return sorted(found, key=lambda ref: ref.id)

    def _below(self, path: str) -> str:
        """The path of a file relative to `folder`."""
        return path.removeprefix(f"{self.folder}/" if self.folder else "")

    @staticmethod
    def _scene_folder(relative: str) -> str | None:
        """The folder of a file's scene. None for files outside of scenes.

        Scenes are in the folders of groups, which are in `traj_data` or in the given folder.
        """
        parts = relative.split("/")[:-1]
        at = next((n for n, part in enumerate(parts) if part in PARTS), None)
        if at is None:
            return None
        start = max((n + 1 for n, part in enumerate(parts[:at]) if part == GROUPS), default=0)
        return "/".join(parts[: min(at, start + 2)])

    def _ref(
        self, name: str, files: tuple[RemoteFile, ...], stamp: str, *, archive: bool
    ) -> SceneRef:
        address = f"hf:/datasets/{self.repo_id}"
        path = Path(f"{address}/{files[0].path}") if archive else Path(address, self.folder, name)
        parts = [part for part in name.split("/") if part]
        above = [*self.repo_id.split("/"), *PurePosixPath(self.folder).parts]
        ident = [*above, *parts][-2:]
        size = sum(file.bytes for file in files)
        return SceneRef("/".join(ident), path, size, stamp, files, archive)

    def download(self, ref: SceneRef, room: Room) -> None:
        """Download a scene's files to `room.folder / "hub"`.

        Reserves space in the room first. Raises HubSourceError, or SourceError if a file differs
        from the listing.
        """
        from huggingface_hub import HfApi

        api = HfApi(library_name="occgen-hub")
        room.name = ref.name
        room.reserve(sum(max(file.bytes, BLOCK) + BLOCK for file in ref.files))
        place = room.folder / "hub"
        with _hub_errors(self, api.endpoint, ref):
            for file in ref.files:
                path = api.hf_hub_download(
                    self.repo_id,
                    file.path,
                    repo_type="dataset",
                    revision=self.revision,
                    local_dir=place,
                )
                if (size := Path(path).stat().st_size) != file.bytes:
                    problem = f"has {size} bytes, but the Hub lists {file.bytes}"
                    raise SourceError(ref.name, problem, AGAIN)

    def unpack(self, ref: SceneRef, room: Room) -> FetchedScene:
        """Unpack the downloaded files of a scene. Raises SourceError."""
        place = room.folder / "hub"
        if not ref.archive:
            root, parts = room.folder / "tree", ref.id.split("/")
            first = self._below(ref.files[0].path)
            scene = place.joinpath(self.folder, self._scene_folder(first) or "")
            target = root.joinpath(*parts)
            target.parent.mkdir(parents=True)
            scene.rename(target)
            return FetchedScene(ref, room, root, ref.name, ref.bytes, ref.stamp)
        file = ref.files[0]
        scene_read = unpack_scene(ref, place / file.path, room)
        if len(file.oid) == 64 and file.oid != scene_read.sha256:
            raise SourceError(ref.name, "differs in SHA-256 from the Hub's listing", AGAIN)
        (place / file.path).unlink()
        room.release(max(file.bytes, BLOCK))
        return scene_read


def select_scenes(refs: list[SceneRef], source: HubSource) -> list[SceneRef]:
    """The scenes. Raises UsageError if there are none."""
    if not refs:
        raise UsageError(
            f"{source}: has no archives and no folders of scenes; give a folder of the dataset, "
            f"as in {FORM}."
        )
    return refs


# Errors


@contextmanager
def _hub_errors(source: HubSource, endpoint: str, ref: SceneRef | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client into HubSourceErrors, and silence its messages."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx

    name = str(source) if ref is None else ref.name
    loggers = [logging.getLogger(n) for n in ("huggingface_hub", "hf_xet")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (OSError, httpx.HTTPError, RuntimeError, ValueError) as error:
        for cause in _causes(error):
            if isinstance(cause, errors.OfflineModeIsEnabled):
                raise HubSourceError(
                    f"{name}: HF_HUB_OFFLINE is set; unset it to read from the Hub."
                ) from error
            if isinstance(cause, errors.HfHubHTTPError) and cause.response is not None:
                raise _http_error(name, source, endpoint, cause) from error
            if isinstance(cause, httpx.HTTPError):
                reason = shorten_message(str(cause) or type(cause).__name__)
                raise HubSourceError(
                    f"{name}: the connection to {endpoint} failed ({reason}); {AGAIN}."
                ) from error
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, errors.HFValidationError):
            raise UsageError(f"{name}: is not a dataset name; give {FORM}.") from error
        reason = shorten_message(str(error) or type(error).__name__)
        raise HubSourceError(
            f"{name}: the download was interrupted ({reason}); {AGAIN}."
        ) from error
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_error(
    name: str, source: HubSource, endpoint: str, error: HfHubHTTPError
) -> HubSourceError:
    from huggingface_hub import errors

    status = error.response.status_code
    reason = shorten_message(f"{status}, {error.server_message or error.response.reason_phrase}")
    page = f"{endpoint}/datasets/{source.repo_id}"
    if isinstance(error, errors.GatedRepoError):
        problem = "is gated, and this token has no access"
        remedy = f"request access at {page} and set HF_TOKEN, or run hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        problem, remedy = f"has no revision {source.revision}", f"choose one at {page}"
    elif isinstance(error, errors.RemoteEntryNotFoundError | errors.EntryNotFoundError):
        problem, remedy = "was not found", f"see {page}/tree/{source.revision}"
    elif "invalid" in reason.lower() and status == 401 and "username" not in reason.lower():
        problem, remedy = "the Hub rejected the token", "run hf auth login with a valid one"
    elif isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        problem = "was not found, or this token has no access"
        remedy = "check the name, and set HF_TOKEN if it is private"
    elif status == 429 or status >= 500:
        problem = "the Hub is not available at the moment"
        remedy = "run the same command again later to resume"
    else:
        problem, remedy = "the Hub refused it", "see its message"
    return HubSourceError(f"{name}: {problem} ({reason}); {remedy}.")
