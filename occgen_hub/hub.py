"""Push a dataset to the Hugging Face Hub, after checking its content and the Hub's limits."""

from __future__ import annotations

import glob
import logging
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from occgen_hub.card import write_card
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import files_under, links_leaving_folder
from occgen_hub.hub_token import check_sendable
from occgen_hub.index import (
    INDEX,
    entries,
    file_stem,
    read_entries,
    read_index,
    read_part,
    write_index,
)
from occgen_hub.lerobot.export_check import FOLDERS, exported, is_lerobot
from occgen_hub.lerobot.v30 import CODEBASE
from occgen_hub.loading import SCHEMA, Trajectory, trajectories
from occgen_hub.runtime.report import FAILURES, REPORT
from occgen_hub.scene_states import FOLDER as STATES
from occgen_hub.schema import load_schema
from occgen_hub.shards import FOLDER
from occgen_hub.validation import validate

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi
    from huggingface_hub.errors import HfHubHTTPError

MAX_FILES = 100_000
MAX_ENTRIES = 10_000
MAX_BYTES = 200 * 10**9
"""Limits that the Hub recommends: files per repository, entries per folder, bytes per file."""

LEFT_OUT = (".*", "*/.*", FAILURES, REPORT)
"""Not pushed: hidden files and folders, and reports of runs, which have paths of this machine."""

CONFLICTS = (409, 412)
"""HTTP statuses of the Hub if another commit or tag came first."""

PAUSES = (0.2, 0.5, 1.0, 2.0)
"""Approximate seconds before each retry."""

TITLE = "Upload dataset with OccGen Hub"
MAIN = "main"
AGAIN = "check the connection and run the same command again to resume"


class HubError(OccGenError):
    """The Hub cannot be reached, or rejects what is sent."""


class HubBusyError(HubError):
    """A temporary error: the same request may succeed later."""


def check_target(repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
    """Raise UsageError unless a dataset can be pushed to this repository and revision."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(repo_id, "README.md", repo_type="dataset")  # Checks the name offline.
        sound = repo_id.count("/") == 1
    except HFValidationError:
        sound = False
    if not sound:
        raise UsageError(
            f"{repo_id}: is not a repository name; give --repo-id ORG/NAME with letters, digits, "
            "'-', '_' and '.'."
        )
    if create_pr and revision is not None:
        raise UsageError(
            f"{revision}: pull requests go to {MAIN}; leave out --revision or --create-pr."
        )


def check_token(repo_id: str) -> None:
    """Raise OccGenError unless there is a token that can be sent. The Hub checks its validity."""
    if not check_sendable():
        raise HubError(
            f"{repo_id}: there is no token to push with; run hf auth login or set HF_TOKEN, with "
            "a token that has write access."
        )


def prepare(
    root: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, int]:
    """Check a dataset and update its card. Returns the size in bytes of each file to push, by path.

    The card of an export is not changed. Raises OccGenError if the dataset is not valid.
    """
    report = validate(root, progress)
    if report.findings:
        first, more = report.findings[0], len(report.findings) - 1
        rest = f" ({more} more: occgen-hub validate {root})" if more else ""
        raise OccGenError(
            f"{first.file}: {first.problem}, so nothing was sent; {first.remedy}{rest}."
        )
    if not exported(root):
        write_card(root)
    return contents(root)


def contents(root: Path) -> dict[str, int]:
    """The sorted files of a dataset that are pushed, and their sizes in bytes."""
    paths = {path.relative_to(root).as_posix(): path for path in sorted(files_under(root))}
    return {
        name: path.stat().st_size
        for name, path in paths.items()
        if not any(fnmatchcase(name, pattern) for pattern in LEFT_OUT)
    }


def warnings(
    files: Mapping[str, int],
    max_files: int = MAX_FILES,
    max_entries: int = MAX_ENTRIES,
    max_bytes: int = MAX_BYTES,
) -> list[str]:
    """A sentence for each limit of the Hub that the files exceed: which, and what to do."""
    sentences = []
    if len(files) > max_files:
        sentences.append(
            f"{len(files):,} files are more than the {max_files:,} that a repository should have; "
            "build with --media none, or push an export of it (occgen-hub export), which has few."
        )
    folder, entries = _fullest(files)
    if entries > max_entries:
        sentences.append(
            f"{folder}: {entries:,} entries are more than the {max_entries:,} that a folder should "
            "have; build with --media none, or push an export of it (occgen-hub export), which "
            "has videos instead of images."
        )
    large = {path: size for path, size in files.items() if size > max_bytes}
    if large:
        path, size = max(large.items(), key=lambda item: item[1])
        more = f" (and {len(large) - 1} more files)" if len(large) > 1 else ""
        sentences.append(
            f"{path}: {size / 1e9:.1f} GB{more} is more than the {max_bytes / 1e9:g} GB that a "
            "file should have; write the occupancy as Parquet, which is split into shards."
        )
    return sentences


def _fullest(files: Mapping[str, int]) -> tuple[str, int]:
    """The folder with the most entries (files and folders), and their number."""
    paths = {PurePosixPath(path) for path in files}
    paths |= {parent for path in paths for parent in path.parents[:-1]}
    folders = Counter(str(path.parent) for path in paths)
    return max(folders.items(), key=lambda item: item[1], default=(".", 0))


def push(
    root: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push a dataset that `prepare` has checked to the Hub. Returns its address there.

    Files that the Hub has already are not sent again, so repeating an interrupted push resumes it.
    Scenes that only the Hub has are kept, and their rows are added to the index here. Creates the
    repository and the branch `revision` if needed. Tags `main` with the version of the LeRobot
    layout. Raises HubError if the push fails.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="occgen-hub")
    # `prepare` found none, but the Hub's client would follow one that was added since.
    links = [glob.escape(path.relative_to(root).as_posix()) for path in links_leaving_folder(root)]
    with quiet_libraries(), hub_errors(repo_id, api.endpoint):
        make_repository(api, repo_id, private)
        target, page = MAIN, ""
        if create_pr:
            target, page = _pull_request(api, repo_id)
        elif revision not in (None, MAIN):
            target, page = _branch(api, repo_id, revision)

        def send() -> CommitInfo:
            # `parent_commit` detects another push in between. Then all of this is repeated.
            head = api.dataset_info(repo_id, revision=target, timeout=20).sha
            there = api.list_repo_files(repo_id, repo_type="dataset", revision=target)
            if not exported(root):
                _take_index(api, repo_id, target, root, there)
            return api.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=root,
                revision=target,
                parent_commit=head,
                commit_message=TITLE,
                ignore_patterns=[*LEFT_OUT, *links],
                delete_patterns=_outdated(root, there) or None,
            )

        done = _retry_conflicts(send)
        if target == MAIN:
            version = _version(root)
            if version is not None:
                _retry_conflicts(lambda: move_tag(api, repo_id, done.oid, version))
    return f"{api.endpoint}/datasets/{repo_id}{page}"


def _retry_conflicts[Value](action: Callable[[], Value]) -> Value:
    """Call `action`, and retry it if it conflicts with another push."""
    from huggingface_hub.errors import HfHubHTTPError

    for pause in PAUSES:
        try:
            return action()
        except HfHubHTTPError as error:
            if error.response.status_code not in CONFLICTS:
                raise
            time.sleep(pause * (0.5 + random.random()))
    return action()


def make_repository(api: HfApi, repo_id: str, private: bool) -> None:
    """Create a dataset's repository if it is missing.

    Raises UsageError if it is public and `private` is set.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # This comes first, because only this request has a timeout.
        there = api.dataset_info(repo_id, timeout=20)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        return
    if private and not there.private:
        raise UsageError(
            f"{repo_id}: already exists and is public; first make it private in its settings on "
            "the Hub, or leave out --private."
        )


def _branch(api: HfApi, repo_id: str, revision: str) -> tuple[str, str]:
    """The branch, created if needed, and its page."""
    if not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, repo_type="dataset", exist_ok=True)
    return revision, f"/tree/{quote(revision, safe='')}"


def _pull_request(api: HfApi, repo_id: str) -> tuple[str, str]:
    """The branch and the page of the pull request that an earlier push left open, or a new one."""
    me = api.whoami()["name"]
    mine = (
        request
        for request in api.get_repo_discussions(repo_id, repo_type="dataset")
        if request.is_pull_request
        and (request.title, request.author) == (TITLE, me)
        and request.status in ("draft", "open")
    )
    found = next(mine, None) or api.create_pull_request(repo_id, TITLE, repo_type="dataset")
    return f"refs/pr/{found.num}", f"/discussions/{found.num}"


def _outdated(root: Path, there: Sequence[str]) -> list[str]:
    """Path patterns of files to delete on the Hub, because the pushed folders no longer have them.

    there: the paths of all files that the Hub has.

    Without this, a trajectory that was built again with fewer files would be invalid there. For a
    built dataset, these are files of trajectories that are here, and shards of their scenes.
    """
    here = contents(root)
    if exported(root):
        folders, shards = {FOLDER, INDEX, *FOLDERS}, re.compile("(?!)")
    else:
        folders = {path.relative_to(root).as_posix() for path in trajectories(root)}
        stems = "|".join(re.escape(file_stem(scene)) for scene in sorted(_scenes(root)))
        shards = re.compile(
            rf"{FOLDER}/(?:[^/]*|[^/]*/(?:{stems})-[^/]*)\.parquet|{STATES}/[^/]*/(?:{stems})\.parquet"
        )
    return [
        glob.escape(path)
        for path in there
        if path not in here
        and (
            shards.fullmatch(path) or not folders.isdisjoint(map(str, PurePosixPath(path).parents))
        )
    ]


def _scenes(root: Path) -> set[str]:
    """The scenes of a built dataset that have trajectories or all of their shards here."""
    table = read_index(root, ["scene", "files", "shards"]).to_pylist()
    packed = {row["scene"] for row in table if not row["files"]
              and all((root / name).exists() for name in row["shards"])}  # fmt: skip
    return packed | {path.parent.relative_to(root).as_posix() for path in trajectories(root)}


def _take_index(api: HfApi, repo_id: str, revision: str, root: Path, there: Sequence[str]) -> None:
    """Add the Hub's rows of other scenes to a built dataset's index, and update its card.

    there: the paths of all files that the Hub has.
    """
    names = [path for path in there if re.fullmatch(rf"{INDEX}/[0-9a-f]{{2}}\.parquet", path)]
    own = _scenes(root)
    rows = {row.episode: row for row in read_entries(root).values() if row.scene in own}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            part = api.hf_hub_download(
                repo_id, name, repo_type="dataset", revision=revision, local_dir=folder
            )
            others = entries(read_part(Path(part)))
            rows |= {row.episode: row for row in others if row.scene not in own}
    if write_index(root, rows.values()):
        write_card(root)


def _version(root: Path) -> str | None:
    """The version of the LeRobot layout, such as `v2.1`. None for datasets in other layouts."""
    if exported(root):
        return CODEBASE if is_lerobot(root) else None
    for path in trajectories(root):
        return str(Trajectory.open(path).info()["codebase_version"])
    return load_schema(SCHEMA).codebase_version


def move_tag(api: HfApi, repo_id: str, commit: str, version: str) -> None:
    """Move the tag by which LeRobot finds a version that it can read, as its own push does."""
    from huggingface_hub.errors import RevisionNotFoundError

    tags = api.list_repo_refs(repo_id, repo_type="dataset").tags
    old = next((tag.target_commit for tag in tags if tag.name == version), None)
    if old == commit:
        return
    if old is not None:
        with suppress(RevisionNotFoundError):  # Another push removed it first.
            api.delete_tag(repo_id, tag=version, repo_type="dataset")
    api.create_tag(repo_id, tag=version, revision=commit, repo_type="dataset")


# Errors


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the Hub client's messages on each attempt. The final result is reported once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn errors of the Hub's client into HubErrors."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        yield
    except (OSError, httpx.TransportError, RuntimeError) as error:
        # A RuntimeError of the client wraps an error of one of its threads.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OfflineModeIsEnabled):
            raise HubError(f"{endpoint}: HF_HUB_OFFLINE is set; unset it to push.") from error
        if isinstance(cause, HfHubHTTPError):
            raise _http_error(repo_id, endpoint, cause) from error
        if isinstance(cause, httpx.TransportError):
            raise HubBusyError(
                f"{endpoint}: cannot be reached ({_message(cause)}); {AGAIN}."
            ) from error
        if isinstance(cause, ConnectionError):  # hf_xet raises it for any error.
            raise HubBusyError(
                f"{endpoint}: the upload was interrupted ({_message(cause)}); {AGAIN}."
            ) from error
        raise
    except ValueError as error:  # The client raises it if the Hub rejects the card.
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise HubError(
            f"{repo_id}: the Hub rejected the card ({reason}); correct the dataset's README.md."
        ) from error


def _message(error: BaseException) -> str:
    """The message of an error without URLs, which are long."""
    message = [*str(error).strip().splitlines(), ""][0] or type(error).__name__
    return re.split(r" for url |, domain: ", message)[0][:160].rstrip(".")


def _http_error(repo_id: str, endpoint: str, error: HfHubHTTPError) -> HubError:
    status = error.response.status_code
    words = (error.server_message or error.response.reason_phrase).strip().splitlines()
    reason = f"{status}, {words[0][:160].rstrip('.')}" if words else f"{status}"
    if status == 401:
        problem, remedy = "the Hub rejected the token", "run hf auth login with a valid one"
    elif status == 403:
        problem, remedy = "the token has no write access", "use one that has, or another --repo-id"
    elif status == 404:
        problem, remedy = "was not found, or the token has no access", "check --repo-id, --revision"
    elif status in CONFLICTS:
        problem, remedy = "others are writing there", "run the same command again later"
    elif status == 429 or status >= 500:
        return HubBusyError(
            f"{endpoint}: is not available at the moment ({reason}); run the same command again "
            "later to resume."
        )
    else:
        problem, remedy = "the Hub rejected it", "see its message"
    return HubError(f"{repo_id}: {problem} ({reason}); {remedy}.")
