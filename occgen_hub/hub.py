"""A dataset and the Hugging Face Hub: what would go there, whether it fits, and the push."""

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
from occgen_hub.files import files_under, links_out
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
"""What the Hub recommends at most: files in a repository, entries in a folder, bytes of a file."""

LEFT_OUT = (".*", "*/.*", FAILURES, REPORT)
"""What stays here: hidden files and folders, and what a run says of itself, with this machine's
paths."""

CONFLICTS = (409, 412)
"""What the Hub answers where another commit or tag came first."""

PAUSES = (0.2, 0.5, 1.0, 2.0)
"""Seconds before trying again, about."""

TITLE = "Upload dataset with OccGen Hub"
MAIN = "main"
AGAIN = "check the connection and run the same command again, which goes on from there"


class HubError(OccGenError):
    """The Hub cannot be reached, or does not take what is sent."""


class HubBusyError(HubError):
    """The same may go well a moment later."""


def check_target(repo_id: str, revision: str | None = None, create_pr: bool = False) -> None:
    """Raise UsageError unless a dataset could be pushed to that name."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(repo_id, "README.md", repo_type="dataset")  # Asks nobody; checks the name.
        sound = repo_id.count("/") == 1
    except HFValidationError:
        sound = False
    if not sound:
        raise UsageError(
            f"{repo_id}: is no name of a repository; give --repo-id ORG/NAME, of letters, digits, "
            "'-', '_' and '.'."
        )
    if create_pr and revision is not None:
        raise UsageError(
            f"{revision}: a pull request is made to {MAIN}; leave out --revision or --create-pr."
        )


def check_token(repo_id: str) -> None:
    """Raise OccGenError when no token can be sent; whether it is good, the Hub says."""
    if not check_sendable():
        raise HubError(
            f"{repo_id}: there is no token to push with; run hf auth login, or set HF_TOKEN, with "
            "a token that may write."
        )


def prepare(
    root: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, int]:
    """Check a dataset, write its card anew, and say what goes: the bytes of each file by its path.

    An export's card stays as it was written with it. Raises OccGenError when the dataset is not
    valid.
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
    """The files of a dataset that go to the Hub, sorted, and their bytes."""
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
    """A sentence for each of the Hub's limits that the files are beyond: which, and what to do."""
    said = []
    if len(files) > max_files:
        said.append(
            f"{len(files):,} files are more than the {max_files:,} that a repository should have; "
            "build with --media none, or push what occgen-hub export makes of it, which has few."
        )
    folder, entries = _fullest(files)
    if entries > max_entries:
        said.append(
            f"{folder}: {entries:,} entries are more than the {max_entries:,} that a folder should "
            "have; build with --media none, or push what occgen-hub export makes of it, which has "
            "videos for images."
        )
    large = {path: size for path, size in files.items() if size > max_bytes}
    if large:
        path, size = max(large.items(), key=lambda item: item[1])
        more = f" (and {len(large) - 1} more files)" if len(large) > 1 else ""
        said.append(
            f"{path}: {size / 1e9:.1f} GB{more} is more than the {max_bytes / 1e9:g} GB that a "
            "file should have; write the occupancy as parquet, which is in shards."
        )
    return said


def _fullest(files: Mapping[str, int]) -> tuple[str, int]:
    """The folder with the most entries, files and folders, and how many it has."""
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
    """Send a dataset that `prepare` found good to the Hub, and return its address there.

    What is there already is not sent again, so an interrupted push goes on when it is repeated.
    Scenes that are there and not here stay, and their rows are added to the index here.
    The repository and the branch `revision` are made where they are missing. `main` is tagged
    with the version of the LeRobot layout. Raises HubError when something is in the way.
    """
    from huggingface_hub import HfApi

    api = HfApi(library_name="occgen-hub")
    # `prepare` found none; one that came since would be followed by the Hub's client.
    links = [glob.escape(path.relative_to(root).as_posix()) for path in links_out(root)]
    with quiet(), told(repo_id, api.endpoint):
        make_repository(api, repo_id, private)
        target, page = MAIN, ""
        if create_pr:
            target, page = _pull_request(api, repo_id)
        elif revision not in (None, MAIN):
            target, page = _branch(api, repo_id, revision)

        def send() -> CommitInfo:
            # Another push in between is noticed by its commit, and then all this is done again.
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

        done = _beside_others(send)
        if target == MAIN:
            version = _version(root)
            if version is not None:
                _beside_others(lambda: move_tag(api, repo_id, done.oid, version))
    return f"{api.endpoint}/datasets/{repo_id}{page}"


def _beside_others[Value](action: Callable[[], Value]) -> Value:
    """Do what fails where another push does the same at that moment, once more if need be."""
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
    """Make a dataset's repository where it is missing; UsageError where it is public and private is
    asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        # Asked first, since it is the one question that does not wait for ever for an answer.
        there = api.dataset_info(repo_id, timeout=20)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, repo_type="dataset", private=private or None, exist_ok=True)
        return
    if private and not there.private:
        raise UsageError(
            f"{repo_id}: is there already and public; make it private in its settings on the Hub "
            "first, or leave out --private."
        )


def _branch(api: HfApi, repo_id: str, revision: str) -> tuple[str, str]:
    """The branch, made if it is missing, and its page."""
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
    """What the Hub has inside of what is pushed and that is no more: patterns of paths.

    there: the paths of all files that the Hub has.

    Without it, a trajectory that was built again with fewer files would not be valid there. Of a
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
    """The scenes of which a built dataset has trajectories here, or shards that are all of them."""
    table = read_index(root, ["scene", "files", "shards"]).to_pylist()
    packed = {row["scene"] for row in table if not row["files"]
              and all((root / name).exists() for name in row["shards"])}  # fmt: skip
    return packed | {path.parent.relative_to(root).as_posix() for path in trajectories(root)}


def _take_index(api: HfApi, repo_id: str, revision: str, root: Path, there: Sequence[str]) -> None:
    """Add to a built dataset's index the rows that the Hub has of other scenes; and to its card.

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
    """The version of the LeRobot layout, as `v2.1`; None for a dataset that has not this layout."""
    if exported(root):
        return CODEBASE if is_lerobot(root) else None
    for path in trajectories(root):
        return str(Trajectory.open(path).info()["codebase_version"])
    return load_schema(SCHEMA).codebase_version


def move_tag(api: HfApi, repo_id: str, commit: str, version: str) -> None:
    """Move the tag by which LeRobot finds what it can read, as its own push does."""
    from huggingface_hub.errors import RevisionNotFoundError

    tags = api.list_repo_refs(repo_id, repo_type="dataset").tags
    old = next((tag.target_commit for tag in tags if tag.name == version), None)
    if old == commit:
        return
    if old is not None:
        with suppress(RevisionNotFoundError):  # Another push was faster.
            api.delete_tag(repo_id, tag=version, repo_type="dataset")
    api.create_tag(repo_id, tag=version, revision=commit, repo_type="dataset")


# What goes wrong, in words


@contextmanager
def quiet() -> Iterator[None]:
    """Without the Hub's client telling of each attempt: what comes of them is said once."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def told(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what the Hub's client raises into a sentence."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        yield
    except (OSError, httpx.TransportError, RuntimeError) as error:
        # A RuntimeError of the client's only wraps what happened in one of its threads.
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OfflineModeIsEnabled):
            raise HubError(f"{endpoint}: HF_HUB_OFFLINE is set; unset it to push.") from error
        if isinstance(cause, HfHubHTTPError):
            raise _refused(repo_id, endpoint, cause) from error
        if isinstance(cause, httpx.TransportError):
            raise HubBusyError(
                f"{endpoint}: cannot be reached ({_first(cause)}); {AGAIN}."
            ) from error
        if isinstance(cause, ConnectionError):  # So hf_xet says whatever happens to it.
            raise HubBusyError(
                f"{endpoint}: the upload broke off ({_first(cause)}); {AGAIN}."
            ) from error
        raise
    except ValueError as error:  # So the client says that the Hub found a fault in the card.
        said = " ".join(str(error).split())[:200].rstrip(".")
        raise HubError(
            f"{repo_id}: the Hub does not take the card ({said}); correct the dataset's README.md."
        ) from error


def _first(error: BaseException) -> str:
    """What an error says, without addresses, which are long."""
    said = [*str(error).strip().splitlines(), ""][0] or type(error).__name__
    return re.split(r" for url |, domain: ", said)[0][:160].rstrip(".")


def _refused(repo_id: str, endpoint: str, error: HfHubHTTPError) -> HubError:
    status = error.response.status_code
    words = (error.server_message or error.response.reason_phrase).strip().splitlines()
    said = f"{status}, {words[0][:160].rstrip('.')}" if words else f"{status}"
    if status == 401:
        problem, remedy = "the Hub does not know the token", "run hf auth login with a good one"
    elif status == 403:
        problem, remedy = "the token may not write there", "use one that may, or another --repo-id"
    elif status == 404:
        problem, remedy = "is not there, or hidden from the token", "check --repo-id and --revision"
    elif status in CONFLICTS:
        problem, remedy = "others write there all the time", "run the same command again later"
    elif status == 429 or status >= 500:
        return HubBusyError(
            f"{endpoint}: cannot take it at the moment ({said}); run the same command again later, "
            "which goes on from there."
        )
    else:
        problem, remedy = "the Hub does not take it", "see what it says"
    return HubError(f"{repo_id}: {problem} ({said}); {remedy}.")
