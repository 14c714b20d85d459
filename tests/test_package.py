"""The wheel: it is complete, and the installed package runs without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "occgen_hub": "occgen_hub",
    "builders": "occgen_hub/builders",
    "ckpt": "occgen_hub/ckpt",
    "schemas": "occgen_hub/schemas",
}
"""Folders of the checkout, and their paths in the wheel."""

FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
UNTRACKED = shutil.ignore_patterns("__pycache__", "*.safetensors")
"""Files in a checkout that git does not track."""

pytestmark = pytest.mark.slow


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without variables that make Python find the checkout."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **more}


def copy_of_the_checkout(place: Path) -> Path:
    """Copy the files that are packaged, so that building neither writes to nor reads stale files
    from the checkout.
    """
    place.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, place)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, place / name, ignore=UNTRACKED)
    return place


def wheel_of(checkout: Path, out: Path) -> Path:
    """Build a wheel from a source distribution, as `python -m build` does."""
    out.mkdir()
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, out], cwd=checkout, env=clean_environment(),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (sdist,) = out.glob("*.tar.gz")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, sdist)
    (wheel,) = out.glob("*.whl")
    return wheel


def files_of(checkout: Path) -> set[str]:
    """The names in a wheel of the files of a checkout."""
    return {
        f"{inside}/{path.relative_to(checkout / folder).as_posix()}"
        for folder, inside in FOLDERS.items()
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }


def files_in(wheel: Path) -> set[str]:
    """The files in a wheel, without its metadata."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_of_the_checkout(tmp_path_factory.mktemp("checkout") / "occgen-hub")


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    return wheel_of(checkout, tmp_path_factory.mktemp("wheel") / "dist")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel and the pinned packages, without the checkout."""
    place = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(place, symlinks=True)
    pip("--python", place / "bin/python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = place.glob("lib/python*/site-packages")
    # Added after the installation; otherwise pip finds the checkout installed already. Python
    # ignores .pth files in a folder that a .pth file names, so the editable install is not used.
    (packages / "pins.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def test_wheel_has_exactly_the_files_of_the_checkout(checkout, wheel):
    assert files_in(wheel) == files_of(checkout)
    assert "occgen_hub/media/video.py" in files_in(wheel)
    assert "occgen_hub/schemas/trajectory.yaml" in files_in(wheel)


def test_new_packages_are_included_without_being_listed(tmp_path):
    checkout = copy_of_the_checkout(tmp_path / "occgen-hub")
    for folder in ("occgen_hub/new/inner", "builders/new", "occgen_hub/visual/new"):
        (checkout / folder).mkdir(parents=True)
    added = ("occgen_hub/new/__init__.py", "occgen_hub/new/inner/__init__.py",
             "occgen_hub/visual/new/__init__.py", "builders/new/__init__.py")  # fmt: skip
    for name in added:
        (checkout / name).write_text("")
    held = files_in(wheel_of(checkout, tmp_path / "dist"))
    assert held == files_of(checkout)
    assert {f"occgen_hub/{name.removeprefix('occgen_hub/')}" for name in added} <= held


def test_wheel_excludes_weights_in_the_checkout(tmp_path):
    checkout = copy_of_the_checkout(tmp_path / "occgen-hub")
    (checkout / "ckpt/pi3/model.safetensors").write_bytes(b"licensed otherwise")
    assert not [n for n in files_in(wheel_of(checkout, tmp_path / "dist")) if "safetensors" in n]


@pytest.mark.parametrize("pictures", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_installed_package_works_from_an_empty_folder(installed, tmp_path, pictures):
    """Compiles the kernels again, which takes a minute, and longer for pictures."""

    def run(*arguments: str) -> str:
        done = subprocess.run([installed / "bin" / arguments[0], *arguments[1:]], cwd=tmp_path,
                              env=clean_environment(TQDM_DISABLE="1"), capture_output=True,
                              text=True, timeout=600, check=False)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    code = (
        "import json, sys, occgen_hub, occgen_hub.schemas, occgen_hub.ckpt, occgen_hub.media\n"
        "from occgen_hub.builder import builder_names, load_builder\n"
        "from pathlib import Path\n"
        "for name in builder_names(): load_builder(name, Path())\n"
        "print(json.dumps([m.__file__ for n, m in sys.modules.items() if n[:6] == 'occgen']))\n"
    )
    places = json.loads(run("python", "-c", code))
    assert all(Path(place).is_relative_to(installed) for place in places), places

    run("occgen-hub", "sample", "rooms", "--trajectories", "1", "--frames", "2")
    run("occgen-hub", "build", "--input", "rooms", "--output", "out")
    assert "valid" in run("occgen-hub", "validate", "out")
    assert run("occgen-hub", "--version").split()[-1] == stated_version()
    if not pictures:
        return
    (trajectory,) = (path.parent.parent for path in (tmp_path / "out").rglob("meta/occgen.json"))
    run("occgen-hub", "render", str(trajectory), "room.png", "--size", "320x180")
    assert (tmp_path / "room.png").stat().st_size > 1000
    run("occgen-hub", "report", "out", "--output", "page.html")


def stated_version() -> str:
    """The version in pyproject.toml."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("version = "))
    return line.split('"')[1]
