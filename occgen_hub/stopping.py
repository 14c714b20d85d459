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
"""The received signals, in order."""

_held = 0
"""Number of nested `hold_stops` blocks of the main thread."""

_over = False
"""Whether the command has ended."""


class Stopped(BaseException):
    """Ctrl-C, or a scheduler's SIGTERM. (Python remembers a KeyboardInterrupt that was caught.)

    resumable: whether running the stopped command again resumes it.
    """

    resumable = False


def stop_in_order() -> None:
    """Let a first signal unwind the command; a second one ends it at once.

    Signals that are ignored, for example in a background job, remain ignored.
    """

    def stop(number: int, _: object) -> None:
        received.append(number)
        stop_at_once()
        sys.unraisablehook = lambda _: None  # It may be raised where Python can only print it.
        if not _held:
            raise Stopped

    received.clear()
    _handle(stop)


@contextmanager
def hold_stops() -> Iterator[None]:
    """Let a first signal stop the command at the end of the block, not within it.

    For short calls of libraries that cannot handle exceptions: C++ code that calls Python back or
    prints its own errors. A second signal still ends the process.
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
    """Restore the default: the next signal ends the process."""
    _handle(signal.SIG_DFL)


def stop_if_asked() -> None:
    """Stop if a signal was received but could not be raised, or was swallowed by an import."""
    if received:
        raise Stopped


def end_with(code: int) -> None:
    """Let signals end the process with this code from now on, because the command has ended.

    During the interpreter's shutdown they are ignored.
    """
    global _over
    _handle(lambda *_: end_at_once(code))
    _over = True


def end_at_once(code: int) -> NoReturn:
    """End the process without the interpreter's shutdown.

    The command has already cleaned up. Interrupted graphics and encoders may crash during shutdown,
    or print errors of their threads.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _handle(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


@atexit.register  # Registered first, it runs after the handlers of other modules.
def _ignore_while_ending() -> None:
    if _over:
        _handle(signal.SIG_IGN)
