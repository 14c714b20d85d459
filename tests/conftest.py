"""Shared by several test files: a small sample, a dataset built from it, the real trajectory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# No deadline: the first call of a kernel compiles it. In CI the examples are the same every time;
# elsewhere they are new ones.
settings.register_profile("occgen", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("occgen")

# A background job may start with Ctrl-C ignored, and its children inherit that: tests that send the
# signal would wait forever.
for kind, default in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(kind) == signal.SIG_IGN:
        signal.signal(kind, default)

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "internnav" / "traj_data"


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that the command line replaces when it runs in this process."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def sample_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of two trajectories of different sizes. Tests must not change it."""
    from occgen_hub.sample import make_sample

    out = tmp_path_factory.mktemp("sample") / "tree"
    make_sample(out, trajectories=2, frames=4, seed=7)
    return out


@pytest.fixture(scope="session")
def dataset(sample_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset built from `sample_tree`. Tests must not change it."""
    from occgen_hub.builder import load_builder
    from occgen_hub.episode_build import Settings
    from occgen_hub.job import Job, list_episodes
    from occgen_hub.runtime.build import build_dataset

    out = tmp_path_factory.mktemp("dataset") / "out"
    builder = load_builder("internnav", sample_tree)
    summary = build_dataset(Job(builder, list_episodes(builder), out, Settings()))
    assert not summary.failures
    return out


@pytest.fixture(scope="session")
def people_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of a trajectory of 8 frames with two people walking. Do not change it."""
    from occgen_hub.sample import make_sample

    out = tmp_path_factory.mktemp("people_tree") / "tree"
    make_sample(out, trajectories=1, frames=8, seed=1, people=2)
    return out


@pytest.fixture(scope="session")
def people(people_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset built from `people_tree`. Tests must not change it."""
    import occgen_hub

    out = tmp_path_factory.mktemp("people") / "out"
    assert not occgen_hub.build("internnav", people_tree, out).failures
    return out


@pytest.fixture(scope="session")
def real_tree() -> Path:
    """The real InternData-N1 tree, if it is available."""
    if not REAL.is_dir():
        pytest.skip("../shared/data/internnav is missing")
    return REAL
