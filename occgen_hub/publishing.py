"""Push scenes to the Hub while a dataset is built, and optionally remove them from this disk."""

from __future__ import annotations

import queue
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pyarrow.compute as pc

from occgen_hub.builder import EpisodeRef
from occgen_hub.card import CARD, PICTURE, write_card
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.files import files_under, printable, sha256
from occgen_hub.hub import (
    CONFLICTS,
    MAIN,
    MAX_FILES,
    HubBusyError,
    HubError,
    check_target,
    check_token,
    hub_errors,
    make_repository,
    move_tag,
    quiet_libraries,
)
from occgen_hub.index import (
    INDEX,
    Entry,
    bucket,
    entries,
    part_bytes,
    parts,
    read_entries,
    read_part,
)
from occgen_hub.job import Job
from occgen_hub.loading import trajectories
from occgen_hub.prefetch import prefetch
from occgen_hub.runtime.lock import LOGS
from occgen_hub.runtime.results import Failure
from occgen_hub.scene_states import FOLDER as STATES
from occgen_hub.scenes import SceneRef, read_scene
from occgen_hub.schema import load_schema
from occgen_hub.shards import FOLDER, write_shards
from occgen_hub.validation import check_trajectory

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

Keep = Literal["all", "none"]
Layout = Literal["trajectories", "packed"]

EVERY = 300.0
"""Minimum seconds between commits. The Hub allows about 128 per hour, for all machines."""

BATCH_BYTES = 20 * 10**9
"""Bytes of finished scenes that are pushed without waiting for EVERY."""

COMMIT_FILES = 1000
"""Files per commit. The Hub has problems with many more."""

WAITING = 16
"""Number of finished scenes that may wait for a batch. With more, the build waits."""

PAUSES = (10.0, 30.0, 60.0, 120.0, 300.0)
"""Seconds before each retry if the Hub is not available."""

TRIES = 20
"""Attempts to commit if other commits come first."""

GRACE = 2.0
"""Seconds that a stopped build waits for a running push."""

MESSAGE = "Add scenes with OccGen Hub"
_END = object()


class HubPublisher:
    """Pushes the scenes of a build to a dataset on the Hub, in batches, from its own thread.

    A scene's trajectories are validated and sent with its shards. The last commit of a batch adds
    them to the index, so scenes in the index are complete. Others may push other scenes meanwhile.

    keep: "none" removes scenes here when the Hub has them; layout: "packed" for only index and
    shards, with images, without the trajectories' folders; every: minimum seconds between commits;
    tell: called with messages for the user.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        keep: Keep = "all",
        layout: Layout = "trajectories",
        private: bool = False,
        every: float = EVERY,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        if keep not in get_args(Keep) or layout not in get_args(Layout):
            raise UsageError(
                f"keep is {keep} and layout {layout}; give all or none, trajectories or packed."
            )
        check_target(repo_id)
        check_token(repo_id)
        self.repo_id, self.address = repo_id, ""
        self._keep, self._packed, self._private = keep, layout == "packed", private
        self._every, self._tell = every, tell
        self._waiting: queue.Queue[object] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        self._failures: list[Failure] = []
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False
        self._done, self._files = 0, 0

    def begin(
        self, job: Job, refs: Sequence[EpisodeRef | SceneRef], shard: int
    ) -> dict[str, tuple[str, ...]]:
        """Start. Returns the ids of `refs` that the Hub has up to date, with their episodes.

        With keep "none", local files of these scenes are removed. Raises HubError, and UsageError
        if the job cannot be pushed.
        """
        from huggingface_hub import HfApi

        check_job(job)
        self._job = job
        self._stage = job.out / LOGS / f"push-{shard}"
        shutil.rmtree(self._stage, ignore_errors=True)
        self._refs: dict[str, list[EpisodeRef | SceneRef]] = {}
        for ref in refs:
            self._refs.setdefault(_unit(ref), []).append(ref)
        self._units = len({_unit(ref) for ref in job.refs})
        self._api = HfApi(library_name="occgen-hub")
        self.address = f"{self._api.endpoint}/datasets/{self.repo_id}"
        self._copy = job.out / LOGS / f"push-{shard}-index"
        shutil.rmtree(self._copy, ignore_errors=True)
        self._copy.mkdir(parents=True)
        with quiet_libraries(), hub_errors(self.repo_id, self._api.endpoint):
            make_repository(self._api, self.repo_id, self._private)
            self._hub = _HubIndex(self._api, self.repo_id, self._copy)
            self._hub.refresh()
            self._hub.fetch_card()
        if self._hub.packed() not in (None, self._packed):
            other = "trajectories" if self._packed else "packed"
            raise UsageError(
                f"{self.repo_id}: has scenes in the layout {other}; give --layout {other}, or "
                "another --push-to."
            )
        present = {} if job.settings.overwrite else dict(self._present())
        if self._keep == "none":
            names = {name for episodes in present.values() for name in episodes}
            self._remove(path for name in names if (path := job.out / name).is_dir())
        self._thread = threading.Thread(target=self._run, name="push", daemon=True)
        self._thread.start()
        return present

    def _scenes(self, unit: str) -> set[str]:
        """The scenes of a unit (see `_unit`). An archive may have several."""
        record = None
        if isinstance(self._refs[unit][0], SceneRef):
            record = read_scene(self._job.out, unit)
        if record is None:
            return {unit}
        return {name.rpartition("/")[0] for name in record.episodes}

    def _local(self, unit: str) -> list[Path]:
        """The trajectories of a unit that are here."""
        places = [self._job.out / scene for scene in sorted(self._scenes(unit))]
        return [path for place in places for path in trajectories(place)]

    def _present(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        states, known = self._hub.states()
        for unit, refs in self._refs.items():
            first = refs[0]
            if not (isinstance(first, SceneRef) and first.files) and printable(unit) not in known:
                continue  # Skip, because computing the state reads the source.
            with suppress(OccGenError):  # The build reports the error.
                if episodes := states.get(self._job.source_state(refs)):
                    if isinstance(first, SceneRef):
                        yield unit, tuple(episodes)
                    else:
                        yield from ((ref.id, (ref.id,)) for ref in refs)

    def add(self, scene: str, *, whole: bool) -> None:
        """Add a scene after its last episode. whole: whether no episode failed.

        Waits while too many scenes are queued. Raises errors of earlier pushes.
        """
        self._raise_error()
        self._waiting.put((scene, whole))

    def end(self) -> list[Failure]:
        """Wait until everything is pushed. Returns the invalid episodes. Raises HubError."""
        assert self._thread is not None
        self._waiting.put(_END)
        while self._thread.is_alive():
            self._thread.join(0.2)
        self._raise_error()
        return self._failures

    def stop(self) -> None:
        """Stop without pushing the rest. The next build resumes."""
        self._stopped.set()
        with suppress(queue.Full):
            self._waiting.put_nowait(_END)
        if self._thread is not None:
            self._thread.join(GRACE)
            shutil.rmtree(self._copy, ignore_errors=True)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # In the thread

    def _run(self) -> None:
        batch: dict[str, bool] = {}
        size, pushed = 0, -self._every
        while True:
            try:
                wait = max(0.0, pushed + self._every - time.monotonic()) if batch else 1.0
                item = self._waiting.get(timeout=min(wait, 1.0))
            except queue.Empty:
                item = None
            if self._stopped.is_set() or (self._error is not None and item is _END):
                return
            if self._error is not None:
                continue  # Keep emptying the queue, so that `add` does not block.
            try:
                if isinstance(item, tuple):
                    batch[item[0]] = item[1]
                    size += self._bytes(item[0])
                due = time.monotonic() >= pushed + self._every
                if batch and (due or item is _END or size >= BATCH_BYTES):
                    self._retry(partial(self._push, batch))
                    batch, size, pushed = {}, 0, time.monotonic()
                if item is _END:
                    self._retry(self._finish)
                    return
            except BaseException as error:
                self._error = error
                if item is _END:
                    return

    def _retry(self, action: Callable[[], None]) -> None:
        """Call `action`, and retry it after pauses while the Hub is not available."""
        for pause in PAUSES:
            try:
                with quiet_libraries(), hub_errors(self.repo_id, self._api.endpoint):
                    return action()
            except HubBusyError as error:
                self._tell(f"{error} Trying again in {pause:.0f} s.")
                if self._stopped.wait(pause):
                    raise
        with quiet_libraries(), hub_errors(self.repo_id, self._api.endpoint):
            return action()

    def _bytes(self, scene: str) -> int:
        return sum(f.stat().st_size for path in self._local(scene) for f in files_under(path))

    def _push(self, batch: dict[str, bool]) -> None:
        """Validate and send scenes, and remove them here with keep "none"."""
        kept: set[Path] = set()
        bad: list[Path] = []
        states: dict[str, str | None] = {}
        for unit, whole in batch.items():
            good, others = self._valid(unit)
            if good:
                state = self._job.built_state(self._refs[unit]) if whole and not others else None
                states |= dict.fromkeys(self._scenes(unit), state)
            kept.update(good)
            bad += others
        if not kept:
            return
        images = self._packed or self._job.parquet_images
        write_shards(self._job.out, out=self._stage, leave_out=bad, only=states, images=images)
        named = {printable(scene): state for scene, state in states.items()}
        rows = [
            replace(row, files=0 if self._packed else row.files, scene_state=named[row.scene])
            for row in read_entries(self._stage).values()
        ]
        self._done += len(batch)
        self._files += sum(row.files for row in rows)
        self._send(rows, kept)
        self._finish_batch(kept)

    def _staged(self) -> list[Path]:
        """The Parquet files that were written for a batch."""
        return [path for name in (FOLDER, STATES) for path in files_under(self._stage / name)]

    def _valid(self, unit: str) -> tuple[list[Path], list[Path]]:
        """The valid trajectories of a unit, and the invalid ones, which become failures."""
        good, bad = [], []
        for path in self._local(unit):
            if findings := check_trajectory(path):
                name = path.relative_to(self._job.out).as_posix()
                if name not in {failure.id for failure in self._failures}:
                    self._failures.append(Failure(name, f"{findings[0]}"))
                bad.append(path)
            else:
                good.append(path)
        return good, bad

    def _send(self, rows: list[Entry], kept: Iterable[Path]) -> None:
        """Commit the files of scenes and, in the last commit, their rows of the index."""
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        out, files = self._job.out, dict[str, Path]()
        for path in () if self._packed else kept:
            files |= {file.relative_to(out).as_posix(): file for file in files_under(path)}
        files |= {f.relative_to(self._stage).as_posix(): f for f in self._staged()}
        self._check_limit(rows)
        added = [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        *first, last = batched(added, COMMIT_FILES)
        for part in first:
            self._commit(part)
        self._api.preupload_lfs_files(self.repo_id, last, repo_type="dataset")
        for attempt in range(TRIES):
            head = self._hub.refresh()
            changes = self._hub.merged(rows, files)
            if not self._hub.has_card:
                changes += self._card(min(kept))
            try:
                self._commit([*last, *changes], head)
                break
            except HfHubHTTPError as error:
                if error.response.status_code not in CONFLICTS or attempt == TRIES - 1:
                    raise
            time.sleep(random.random() * min(0.2 * 2**attempt, 5.0))
        self._hub.has_card = True

    def _commit(
        self,
        operations: Iterable[CommitOperationAdd | CommitOperationDelete],
        head: str | None = None,
    ) -> None:
        """Commit, only on top of `head` if it is given. Does nothing without changes."""
        self._api.create_commit(
            self.repo_id,
            list(operations),
            repo_type="dataset",
            commit_message=MESSAGE,
            parent_commit=head,
        )

    def _check_limit(self, rows: list[Entry]) -> None:
        """Raise HubError if there would be too many files, and warn once if there will be."""
        scenes = {row.scene for row in rows}
        total = self._hub.files(scenes) + sum(row.files for row in rows)
        total += len({name for row in rows for name in row.shards}) + len(scenes)
        remedy = "give --layout packed, which keeps all in shards, and a new --push-to"
        if total > MAX_FILES:
            raise HubError(
                f"{self.repo_id}: would have {total:,} files, more than the {MAX_FILES:,} that a "
                f"repository should have; {remedy}."
            )
        expected = max(total, self._files * self._units // self._done)
        if expected > MAX_FILES and not self._warned:
            self._warned = True
            self._tell(
                f"Warning: {self.repo_id}: will have about {expected:,} files, more than the "
                f"{MAX_FILES:,} that a repository should have; {remedy}."
            )

    def _card(self, shown: Path | None = None) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Operations for the card and its picture, if they differ from the Hub's."""
        from huggingface_hub import CommitOperationAdd

        names = [CARD, PICTURE]
        before = {name: self._hub.content(name) for name in names}
        write_card(self._hub.root, shown)
        after = {name: self._hub.content(name) for name in names}
        return [
            CommitOperationAdd(name, content)
            for name, content in after.items()
            if content is not None and (content != before[name] or not self._hub.has_card)
        ]

    def _finish_batch(self, kept: Iterable[Path]) -> None:
        """After a push, move the shards to the dataset or, with keep "none", remove sent files."""
        if self._keep == "none":
            self._remove(kept)
        else:
            for path in self._staged():
                place = self._job.out / path.relative_to(self._stage)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)
        shutil.rmtree(self._stage, ignore_errors=True)

    def _remove(self, paths: Iterable[Path]) -> None:
        """Remove trajectories, each one atomically."""
        rubbish = self._stage / "removed"
        rubbish.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(sorted(paths)):
            path.rename(rubbish / str(number))
            with suppress(OSError):
                path.parent.rmdir()
                path.parent.parent.rmdir()
        shutil.rmtree(self._stage, ignore_errors=True)

    def _finish(self) -> None:
        """Update the card from the Hub's index, and move LeRobot's tag."""
        head = self._hub.refresh()
        if not parts(self._hub.root):
            return
        if changes := self._card():
            self._commit(changes)
            head = self._hub.refresh()
        if self._hub.files(()):
            move_tag(self._api, self.repo_id, head, load_schema("trajectory").codebase_version)


def check_job(job: Job) -> None:
    """Raise UsageError if a job's scenes cannot be pushed during the build."""
    if not job.parquet_occupancy:
        raise UsageError(
            "--push-to: needs the occupancy as Parquet; leave out --no-parquet-occupancy."
        )
    if not job.whole_scenes:
        raise UsageError("--push-to: needs a job with whole_scenes.")


def _unit(ref: EpisodeRef | SceneRef) -> str:
    """The name of the unit that is built and pushed together: a scene or an archive."""
    return ref.id if isinstance(ref, SceneRef) else ref.id.rpartition("/")[0]


class _HubIndex:
    """A copy of the Hub's index, in the folder `root`."""

    def __init__(self, api: HfApi, repo_id: str, root: Path) -> None:
        self.root, self.has_card = root, False
        self._api, self._repo_id = api, repo_id
        self._held: dict[str, str] = {}
        self._head = ""

    def refresh(self) -> str:
        """Update the copy. Returns its commit."""
        from huggingface_hub.hf_api import RepoFile

        info = self._api.dataset_info(self._repo_id, revision=MAIN, timeout=20, expand=["sha"])
        self._head = str(info.sha)
        names = {}
        for entry in self._listed(INDEX):
            assert isinstance(entry, RepoFile)
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            names[entry.path] = digest
        for path in parts(self.root):
            if path.relative_to(self.root).as_posix() not in names:
                path.unlink()
        missing = [name for name, digest in names.items() if not self._has_content(name, digest)]
        for _ in prefetch(self._fetch, missing, threads=8):
            pass
        self._held = names
        return self._head

    def _has_content(self, name: str, digest: str) -> bool:
        path = self.root / name
        if not path.is_file():
            return False
        return sha256(path) == digest if len(digest) == 64 else self._held.get(name) == digest

    def _listed(self, folder: str) -> list[object]:
        from huggingface_hub.errors import EntryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        try:
            found = self._api.list_repo_tree(
                self._repo_id, folder, recursive=True, revision=self._head, repo_type="dataset"
            )
            return [entry for entry in found if isinstance(entry, RepoFile)]
        except EntryNotFoundError:
            return []

    def _fetch(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)
        self._api.hf_hub_download(
            self._repo_id, name, repo_type="dataset", revision=self._head, local_dir=self.root
        )

    def fetch_card(self) -> None:
        """Download the Hub's card and picture, if there are any."""
        from huggingface_hub.errors import EntryNotFoundError

        for name in (PICTURE, CARD):
            self.has_card = True
            try:
                self._fetch(name)
            except EntryNotFoundError:
                self.has_card = False

    def content(self, name: str) -> bytes | None:
        """The content of a file of the copy, or None."""
        path = self.root / name
        return path.read_bytes() if path.is_file() else None

    def packed(self) -> bool | None:
        """Whether the Hub has only shards. None if it has nothing."""
        for path in parts(self.root):
            table = read_part(path, ["episode", "scene", "shards", "files"])
            return not any(table["files"].to_pylist())
        return None

    def states(self) -> tuple[dict[str, list[str]], set[str]]:
        """The episodes of each scene state in the index, and the names of all its scenes."""
        found: dict[str, list[str]] = {}
        scenes: set[str] = set()
        for path in parts(self.root):
            table = read_part(path, ["episode", "scene", "shards", "scene_state"])
            for row in table.select(["episode", "scene", "scene_state"]).to_pylist():
                scenes.add(row["scene"])
                if row["scene_state"] is not None:
                    found.setdefault(row["scene_state"], []).append(row["episode"])
        return found, scenes

    def files(self, without: Iterable[str]) -> int:
        """The number of the Hub's files of trajectories and shards, without these scenes."""
        total, left_out = 0, set(without)
        for path in parts(self.root):
            table = read_part(path, ["episode", "scene", "shards", "files"])
            if left_out & set(table["scene"].to_pylist()):
                keep = [scene not in left_out for scene in table["scene"].to_pylist()]
                table = table.filter(keep)
            total += pc.sum(table["files"]).as_py() or 0
            total += len(pc.unique(table["shards"].combine_chunks().flatten()))
            total += len(pc.unique(table["scene"]))  # Their scene state files.
        return total

    def merged(
        self, rows: Sequence[Entry], files: Iterable[str]
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Operations that replace the rows of these scenes in the index.

        Also deletes earlier files of these scenes that are not among `files`.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        scenes, kept = {row.scene for row in rows}, set(files)
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        old: list[Entry] = []
        for name in sorted({bucket(scene) for scene in scenes}):
            path = self.root / INDEX / f"{name}.parquet"
            there = list(entries(read_part(path))) if path.is_file() else []
            old += [row for row in there if row.scene in scenes]
            own = [row for row in rows if bucket(row.scene) == name]
            content = part_bytes([*own, *(row for row in there if row.scene not in scenes)])
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            operations.append(CommitOperationAdd(f"{INDEX}/{name}.parquet", content))
        gone = {shard for row in old for shard in row.shards}
        for scene in sorted({row.scene for row in old if row.files}):
            gone |= {str(getattr(entry, "path", "")) for entry in self._listed(scene)}
        return [*operations, *(CommitOperationDelete(name) for name in sorted(gone - kept))]
