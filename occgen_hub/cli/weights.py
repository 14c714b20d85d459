"""The commands `weights pull` and `weights check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from occgen_hub.cli.command import FOLDER, Examples, say


@click.group()
def weights() -> None:
    """Download or check the weights of the networks."""


NETWORK = click.argument("name", type=click.Choice(["pi3", "pi3x", "da3"]))


@weights.command(cls=Examples, example="occgen-hub weights pull pi3x", resumable=True)
@NETWORK
@click.option("--revision", help="A commit or tag on the Hub; by default the one in ckpt/.")
def pull(name: Any, revision: str | None) -> None:
    """Download a network's published weights to the Hub's cache, and check them."""
    from occgen_hub.engines import weights as files

    found = files.download_weights(name, revision)
    files.check(found)
    files.verify(found)
    say(str(found.path))
    say(f"Next: occgen-hub build --source video --engine {name} --input VIDEO --output out")


@weights.command("check", cls=Examples, example="occgen-hub weights check pi3x")
@NETWORK
@click.option(
    "--weights",
    "path",
    type=FOLDER,
    help="The file of the weights; by default the one that build uses.",
)
def check_weights(name: Any, path: Path | None) -> None:
    """Print which weights are used, whether they are complete, and their licence.

    Downloads nothing. The exit code is 0 if they fit the network and are the published ones, or
    those that a config.json beside them describes, else 2.
    """
    from occgen_hub.engines import weights as files

    found = files.find_weights(name, path, missing="raise")
    digest = files.verify(found)
    size = found.path.stat().st_size
    state = "as published" if found.checkpoint.sha256 else "complete"
    say(f"{found.path}: {name}, {size / 1e9:.2f} GB, {state}.")
    say(f"SHA-256: {digest}")
    say(f"Licence: {found.checkpoint.terms}.")
