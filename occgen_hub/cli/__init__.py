"""The command line: parse, call, print. Heavy imports are left to the command that needs them."""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

import click

from occgen_hub.cli import build, look, mapping, picture, publish, sample, weights
from occgen_hub.cli.command import say
from occgen_hub.cli.stopping import (
    STOPS,
    Stopped,
    received,
    stop_at_once,
    stop_if_asked,
    stop_in_order,
)
from occgen_hub.errors import OccGenError

__all__ = ["STOPS", "cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="occgen-hub", prog_name="occgen-hub")
def cli() -> None:
    """Turn recordings into 4D occupancy datasets for LeRobot and the Hugging Face Hub.

    Begin with a made-up source: occgen-hub sample rooms, then build, validate and inspect it.
    Progress bars are turned off by TQDM_DISABLE=1.
    """


for command in (
    *(sample.sample, mapping.cameras, build.build, build.finalize, look.validate, look.inspect),
    *(picture.visualize, picture.render, picture.view, picture.report),
    *(publish.export, publish.push, weights.weights),
):
    cli.add_command(command)


def main() -> None:
    """Run the command line; errors become one sentence and an exit code."""
    stop_in_order()
    for stream in (sys.stdout, sys.stderr):  # A file's name may be no text that a terminal has.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = cli.main(standalone_mode=False)
        stop_if_asked()
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OccGenError as error:
        text = f"Error: {error}"
        for line in text.splitlines() if error.has_lines else [text]:
            say(line, err=True)
        sys.exit(error.exit_code)
    except (Stopped, click.Abort, KeyboardInterrupt) as stopped:
        more = " What was finished stays; the same command goes on from there."
        click.echo(f"Stopped.{more * getattr(stopped, 'goes_on', False)}", err=True)
        _end_at_once(128 + (received[0] if received else signal.SIGINT))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(f"Error: {place}{error.strerror or error}.", err=True)
        sys.exit(1)
    except MemoryError:
        say("Error: there is not enough memory for this; use a machine with more.", err=True)
        sys.exit(1)
    finally:
        stop_at_once()
    sys.exit(code if isinstance(code, int) else 0)


def _end_at_once(code: int) -> NoReturn:
    """End the process without taking its modules apart.

    All that the command had begun is undone by now. Graphics and encoders that were stopped midway
    may crash when the interpreter ends, or print what went wrong in their threads.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
