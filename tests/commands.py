"""Run the command line in its own process, and read the files that it wrote."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from occgen_hub.files import sha256

RUN_FILES = {"report.json", ".logs"}
"""Files about a build run, which differ between runs."""

Tree = dict[str, str]


def occgen_hub(
    *arguments: str | Path, launcher: tuple[str, ...] = (), timeout: float = 300, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end. launcher: arguments for Python that start it, as with torchrun,
    or ("-c", script), which has to call `main`.
    """
    name = () if launcher[:1] == ("-c",) else ("occgen_hub",)
    return subprocess.run(
        [sys.executable, *(launcher or ("-m",)), *name, *map(str, arguments)],
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def start(*arguments: str | Path, **env: str) -> subprocess.Popen[str]:
    """Start the command in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "occgen_hub", *map(str, arguments)],
        env=os.environ | {"TQDM_DISABLE": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def tree(folder: Path) -> Tree:
    """All paths of a dataset, including hidden ones, with the checksum of their content."""
    return {
        path.relative_to(folder).as_posix(): sha256(path) if path.is_file() else "folder"
        for path in folder.rglob("*")
        if path.relative_to(folder).parts[0] not in RUN_FILES
    }
