"""The packages of the distribution; everything else stands in pyproject.toml.

All folders below occgen_hub/ that are packages, and those that stand beside it and belong into it.
"""

from __future__ import annotations

from setuptools import find_packages, setup

BESIDE = ("builders", "ckpt", "schemas")
"""The folder of each is in pyproject.toml, under tool.setuptools.package-dir."""

packages = find_packages(include=["occgen_hub", "occgen_hub.*"])
for name in BESIDE:
    packages += [f"occgen_hub.{name}", *(f"occgen_hub.{name}.{p}" for p in find_packages(name))]

setup(packages=packages)
