"""Layers of the package: each module imports only modules of lower layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "errors",
    "stopping",
    "jit",
    "hub_token",
    "files",
    "atomic",
    "prefetch",
    "media",
    "schema",
    "taxonomy",
    "config",
    "geometry",
    "camera_mapping",
    "episode",
    "quality",
    "views",
    "sample",
    "occupancy",
    "plugins",
    "engines",
    "segmenters",
    "fusion",
    "scene",
    "pipeline",
    "loading",
    "index",
    "scene_states",
    "shards",
    "training",
    "lerobot",
    "visual",
    "card",
    "validation",
    "kinds",
    "builder",
    "archives",
    "scratch",
    "scenes",
    "hub_source",
    "stopwatch",
    "up_to_date",
    "episode_build",
    "job",
    "source_check",
    "temporary_build",
    "runtime",
    "frame_exports",
    "exporting",
    "navdp",
    "hub",
    "publishing",
    "api",
    "cli",
    "__main__",
]
MODULES = sorted(p for p in (ROOT / "occgen_hub").rglob("*.py") if p.name != "__init__.py")


def imported_parts(path: Path) -> set[str]:
    """The parts of occgen_hub that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        found = []
        if isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module]
            if node.module == "occgen_hub":
                found = [f"occgen_hub.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        names |= {name.split(".")[1] for name in found if name.startswith("occgen_hub.")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_module_imports_only_lower_layers(path):
    part = path.relative_to(ROOT / "occgen_hub").parts[0].removesuffix(".py")
    assert part in LAYERS, f"{part} has no place in the plan: see docs/design.md"
    height = LAYERS.index(part)
    above = {name for name in imported_parts(path) if LAYERS.index(name) > height}
    assert not above


def test_library_does_not_import_builders():
    for path in MODULES:
        assert not {"builders", "schemas"} & imported_parts(path) - {"schemas"}, path
