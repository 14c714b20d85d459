"""Ctrl-C and SIGTERM: the first unwinds the command, the second ends it at once."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGINT, signal.SIGTERM)

received: list[int] = []
"""The signals that came, the first one first."""

_held = 0
"""How many blocks of `hold_stops` the main thread is in."""

_over = False
"""Whether the command is over."""


class Stopped(BaseException):
    """Ctrl-C, or a scheduler's SIGTERM. (Python remembers a KeyboardInterrupt that was caught.)

    goes_on: whether the command that it stopped goes on from there when it is given again.
    """

    goes_on = False


def stop_in_order() -> None:
    """Let a first signal unwind the command; a second one ends it at once.

    Signals that are ignored, as those of a job in the background may be, stay so.
    """

    def stop(number: int, _: object) -> None:
        received.append(number)
        stop_at_once()
        sys.unraisablehook = lambda _: None  # It may come where nothing can be raised.
        if not _held:
            raise Stopped

    received.clear()
    _handle(stop)


@contextmanager
def hold_stops() -> Iterator[None]:
    """Let a first signal stop the command at the end of the block, not within it.

    For short calls of libraries that an exception may not pass through: C++ that calls Python back,
    or prints errors of its own. A second signal ends the process here too.
    """
    global _held
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = len(received)
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if not _held and len(received) > before:
            raise Stopped


def stop_at_once() -> None:
    """Let the next signal end the process as it would any other."""
    _handle(signal.SIG_DFL)


def stop_if_asked() -> None:
    """Stop where it could not be raised or was swallowed, as by a library being imported."""
    if received:
        raise Stopped


def end_with(code: int) -> None:
    """Let signals end the process with this code from now on: the command is over.

    While the interpreter takes its modules apart they change nothing.
    """
    global _over
    _handle(lambda *_: end_at_once(code))
    _over = True


def end_at_once(code: int) -> NoReturn:
    """End the process without taking its modules apart.

    All that the command had begun is undone by now. Graphics and encoders that were stopped midway
    may crash when the interpreter ends, or print what went wrong in their threads.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@atexit.register  # As early as that, it runs after what other modules register.
def _ignore_while_ending() -> None:
    if _over:
        _handle(signal.SIG_IGN)
