"""What several test files share: a small sample, a dataset built from it, the real trajectory."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The first call of a kernel compiles it, which is no matter of the example it is called with. In CI
# the examples are the same every time; at a desk they are new ones.
settings.register_profile("occgen", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("occgen")

# A job in the background may be started with Ctrl-C ignored, which it hands on to what it starts:
# the tests that send it would wait in vain.
for stop, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
    if signal.getsignal(stop) == signal.SIG_IGN:
        signal.signal(stop, usual)

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "internnav" / "traj_data"


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """The command line, run in this process, handles signals in its own way."""
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def sample_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree of two trajectories of different sizes. Not to be changed by tests."""
    from occgen_hub.sample import make_sample

    out = tmp_path_factory.mktemp("sample") / "tree"
    make_sample(out, trajectories=2, frames=4, seed=7)
    return out


@pytest.fixture(scope="session")
def dataset(sample_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset built from `sample_tree`. Not to be changed by tests."""
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
    """A source tree of a trajectory of 8 frames in which two people walk. Not to be changed."""
    from occgen_hub.sample import make_sample

    out = tmp_path_factory.mktemp("people_tree") / "tree"
    make_sample(out, trajectories=1, frames=8, seed=1, people=2)
    return out


@pytest.fixture(scope="session")
def people(people_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset built from `people_tree`. Not to be changed by tests."""
    import occgen_hub

    out = tmp_path_factory.mktemp("people") / "out"
    assert not occgen_hub.build("internnav", people_tree, out).failures
    return out


@pytest.fixture(scope="session")
def real_tree() -> Path:
    """The real InternData-N1 tree, where it is there."""
    if not REAL.is_dir():
        pytest.skip("../shared/data/internnav is not there")
    return REAL
