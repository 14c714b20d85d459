"""A short version of scripts/rehearse_scale.py: killed builds that push lose nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "scripts"))

import rehearse_scale


@pytest.mark.long
def test_killed_builds_lose_nothing_and_push_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse_scale, "DAMAGED", 3)
    archives = rehearse_scale.make_archives(tmp_path, 2)
    found = rehearse_scale.rehearse(tmp_path / "rooms", archives, 6, 3, times=(4, 10))
    assert found.problems == []
    assert found.kills >= 1
    assert found.episodes == 9  # The others fail: a damaged image and a truncated archive.
    assert found.peaks.disk < 500e6
