"""Ctrl-C and SIGTERM: the first unwinds the command, the second ends it at once."""

from __future__ import annotations

import signal
import sys

STOPS = (signal.SIGINT, signal.SIGTERM)

received: list[int] = []
"""The signals that came, the first one first."""


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
        raise Stopped

    received.clear()
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def stop_at_once() -> None:
    """Let the next signal end the process as it would any other."""
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def stop_if_asked() -> None:
    """Stop where it could not be raised or was swallowed, as by a library being imported."""
    if received:
        raise Stopped
