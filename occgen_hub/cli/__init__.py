"""The command line: parse, call, print. Heavy imports are left to the command that needs them."""

from __future__ import annotations

import io
import os
import signal
import sys

import click

from occgen_hub.cli import build, look, mapping, picture, publish, sample, weights
from occgen_hub.cli.command import say
from occgen_hub.errors import OccGenError
from occgen_hub.stopping import (
    STOPS,
    Stopped,
    end_at_once,
    end_with,
    received,
    stop_at_once,
    stop_if_asked,
    stop_in_order,
)

__all__ = ["STOPS", "cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="occgen-hub", prog_name="occgen-hub")
def cli() -> None:
    """Turn recordings into 4D occupancy datasets for LeRobot and the Hugging Face Hub.

    Start with a synthetic source: occgen-hub sample rooms, then build, validate and inspect it.
    TQDM_DISABLE=1 turns progress bars off.
    """


for command in (
    *(sample.sample, mapping.cameras, build.build, build.finalize, look.validate, look.inspect),
    *(picture.visualize, picture.render, picture.view, picture.report),
    *(publish.export, publish.push, weights.weights),
):
    cli.add_command(command)


def main() -> None:
    """Run the command line. Errors become one sentence and an exit code."""
    stop_in_order()
    for stream in (sys.stdout, sys.stderr):  # File names may have bytes that are not text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _exit_code()
        end_with(code)
    except (Stopped, click.Abort, KeyboardInterrupt) as stopped:
        stop_at_once()
        more = " Finished work is kept; run the same command again to resume."
        click.echo(f"Stopped.{more * getattr(stopped, 'resumable', False)}", err=True)
        end_at_once(128 + (received[0] if received else signal.SIGINT))
    sys.exit(code)


def _exit_code() -> int:
    """Run the command line and print errors. Raises Stopped, Abort, KeyboardInterrupt."""
    try:
        code = cli.main(standalone_mode=False)
        stop_if_asked()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OccGenError as error:
        text = f"Error: {error}"
        for line in text.splitlines() if error.has_lines else [text]:
            say(line, err=True)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(f"Error: {place}{error.strerror or error}.", err=True)
    except MemoryError:
        say("Error: there is not enough memory; use a machine with more.", err=True)
    return 1
