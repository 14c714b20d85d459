"""Files and folders appear complete or not at all, with concurrent writers and after kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from occgen_hub import atomic
from occgen_hub.atomic import atomic_file, atomic_folder, clear_leftovers
from occgen_hub.loading import Trajectory, trajectories
from occgen_hub.media import video_frames

TOKEN = "0123456789abcdef"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(place: Path, text: str) -> None:
    with atomic_file(place) as partial:
        partial.write_text(text)


def make(place: Path, text: str) -> None:
    with atomic_folder(place) as partial:
        (partial / "inner").mkdir()
        (partial / "inner/file").write_text(text)


def content_of(place: Path) -> str:
    """The text in a file or folder written by these."""
    return (place / "inner/file" if place.is_dir() else place).read_text()


BOTH = pytest.mark.parametrize("put", [write, make], ids=["file", "folder"])


@BOTH
def test_new_content_replaces_the_old(put, tmp_path):
    for text in ("one", "two"):
        put(tmp_path / "name", text)
        assert content_of(tmp_path / "name") == text
        assert names(tmp_path) == ["name"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
@pytest.mark.parametrize("before", [False, True])
def test_error_keeps_the_old_content(context, error, before, tmp_path):
    place = tmp_path / "name"
    if before:
        (write if context is atomic_file else make)(place, "before")

    def fail() -> None:
        with context(place) as partial:
            (partial / "half" if partial.is_dir() else partial).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == (["name"] if before else [])
    assert not before or content_of(place) == "before"


@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
def test_final_name_appears_only_when_complete(context, tmp_path):
    with context(tmp_path / "name") as partial:
        assert not (tmp_path / "name").exists()
        assert partial.parent == tmp_path
        assert partial.name.startswith(".name.")


@BOTH
def test_link_at_the_destination_is_replaced_and_not_followed(put, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/name").symlink_to(tmp_path / "secret")
    put(tmp_path / "in/name", "new")
    assert not (tmp_path / "in/name").is_symlink()
    assert content_of(tmp_path / "in/name") == "new"
    assert (tmp_path / "secret").read_text() == "secret"


@BOTH
def test_planted_links_are_not_written_through(put, tmp_path, monkeypatch):
    """Neither links with predictable names, nor one with the exact temporary name."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in").mkdir()
    for name in (".name.partial", f".name.{TOKEN}.partial", f".name.{TOKEN}.old", ".name.old"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "secret")
    put(tmp_path / "in/name", "new")
    assert content_of(tmp_path / "in/name") == "new"
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda size: TOKEN)
    monkeypatch.setattr(atomic, "clear_leftovers", lambda path: None)
    (tmp_path / "in" / f".name.{TOKEN}.partial").symlink_to(tmp_path / "secret")
    with pytest.raises(FileExistsError):
        put(tmp_path / "in/name", "newer")
    assert (tmp_path / "secret").read_text() == "secret"
    assert content_of(tmp_path / "in/name") == "new"


@BOTH
def test_concurrent_writers_leave_one_complete_result(put, tmp_path):
    errors: list[BaseException] = []

    def work(n: int) -> None:
        try:
            for _ in range(10):
                put(tmp_path / "name", str(n) * 1000)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    text = content_of(tmp_path / "name")
    assert len(text) == 1000
    assert len(set(text)) == 1
    assert names(tmp_path) == ["name"]


UNFINISHED_WRITE = """
import sys, time
from pathlib import Path
from occgen_hub.atomic import atomic_file, atomic_folder
with {context}(Path(sys.argv[1])) as partial:
    (partial / "half" if partial.is_dir() else partial).write_text("half")
    print("begun", flush=True)
    time.sleep(60)
"""


def start_writing(context: str, place: Path) -> subprocess.Popen[str]:
    """Start a process that waits in the middle of a write."""
    code = UNFINISHED_WRITE.format(context=context)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(place)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(("put", "context"), [(write, "atomic_file"), (make, "atomic_folder")])
def test_only_leftovers_of_killed_processes_are_removed(put, context, tmp_path):
    living, killed = (start_writing(context, tmp_path / "name") for _ in range(2))
    try:
        assert len(names(tmp_path)) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        put(tmp_path / "name", "mine")
        (hidden, name) = names(tmp_path)
        assert (hidden.endswith(".partial"), name) == (True, "name")
        clear_leftovers(tmp_path / "name")
        assert names(tmp_path) == [hidden, name]
    finally:
        living.kill()
        living.wait()
    clear_leftovers(tmp_path / "name")
    assert names(tmp_path) == ["name"]
    for process in (living, killed):
        assert process.stdout is not None
        process.stdout.close()


@pytest.mark.parametrize("token", [f"{TOKEN}.", ""])
def test_folder_moved_aside_by_a_killed_process_is_restored(token, tmp_path):
    """The process was killed between its two moves."""
    make(tmp_path / "name", "old")
    (tmp_path / "name").rename(tmp_path / f".name.{token}old")
    (tmp_path / f".name.{token}partial/half").mkdir(parents=True)
    with pytest.raises(ValueError, match="fails"), atomic_folder(tmp_path / "name"):
        raise ValueError("fails")
    assert names(tmp_path) == ["name"]
    assert content_of(tmp_path / "name") == "old"


def test_old_content_is_not_restored_over_new_content(tmp_path):
    make(tmp_path / "name", "new")
    make(tmp_path / f".name.{TOKEN}.old", "old")
    clear_leftovers(tmp_path / "name")
    assert names(tmp_path) == ["name"]
    assert content_of(tmp_path / "name") == "new"


def test_other_hidden_files_are_kept(tmp_path):
    theirs = [".name", ".name.txt", ".name.partial.txt", ".name.0123.old", ".other.partial",
              f".name2.{TOKEN}.partial"]  # fmt: skip
    for name in theirs:
        (tmp_path / name).write_text("theirs")
    write(tmp_path / "name", "mine")
    assert names(tmp_path) == sorted([*theirs, "name"])


def test_without_locks_leftovers_are_recognised_by_age(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    young, old = (tmp_path / f".name.{n * 16}.partial" for n in "ab")
    for path in (young, old):
        path.write_text("half")
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    write(tmp_path / "name", "mine")
    assert names(tmp_path) == [young.name, "name"]


@BOTH
def test_long_names_are_written(put, tmp_path):
    for name in ("n" * 255, "\u00e4" * 127):
        put(tmp_path / name, "whole")
        assert content_of(tmp_path / name) == "whole"
    assert len(names(tmp_path)) == 2


def test_parent_folders_are_created_and_removed_on_failure(tmp_path):
    with pytest.raises(ValueError, match="fails"), atomic_folder(tmp_path / "a/b/c"):
        raise ValueError("fails")
    assert not names(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="fails"), atomic_folder(tmp_path / "a/b/c"):
        raise ValueError("fails")
    assert names(tmp_path) == ["a"]
    make(tmp_path / "a/b/c", "whole")
    assert content_of(tmp_path / "a/b/c") == "whole"


def test_content_is_flushed_before_it_is_moved(tmp_path, monkeypatch):
    flushed: list[str] = []
    monkeypatch.setattr(atomic, "_flush", lambda path: flushed.append(path.name))
    make(tmp_path / "name", "whole")
    assert flushed[0] == "file"
    assert flushed[1] == "inner" or flushed[2] == "inner"
    assert flushed[-1] == tmp_path.name
    del flushed[:]
    write(tmp_path / "file", "whole")
    assert flushed[0].endswith(".partial")
    assert flushed[1:] == [tmp_path.name]


def test_file_has_default_permissions(tmp_path):
    (tmp_path / "other").write_text("x")
    write(tmp_path / "name", "x")
    assert (tmp_path / "name").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_unlocked_temporary_files_are_kept_while_new(tmp_path):
    new = tmp_path / f".name.{TOKEN}.partial"
    new.touch()
    write(tmp_path / "name", "mine")
    assert names(tmp_path) == [new.name, "name"]
    os.utime(new, (time.time() - 60,) * 2)
    write(tmp_path / "name", "mine")
    assert names(tmp_path) == ["name"]


@pytest.mark.slow
def test_concurrent_renders_leave_a_complete_video(dataset, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / ".room.mp4.partial").symlink_to(tmp_path / "secret")
    (path, *_) = trajectories(dataset)
    command = [sys.executable, "-m", "occgen_hub", "render", path, tmp_path / "room.mp4",
               "--view", "ego", "--size", "160x120"]  # fmt: skip
    running = [subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        assert process.communicate(timeout=300)[1] == b""
        assert process.returncode == 0
    length = len(Trajectory.open(path).world_from_camera())
    assert len(list(video_frames(tmp_path / "room.mp4"))) == length
    assert names(tmp_path) == ["room.mp4", "secret"]
    assert (tmp_path / "secret").read_text() == "secret"
