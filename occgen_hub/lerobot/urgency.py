"""Encoders do not become the most urgent work of the machine."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
_SYS_NICE = 23
"""Of capabilities(7): the right to real-time scheduling, among others."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Set(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextmanager
def never_urgent() -> Iterator[None]:
    """Keep what this thread does, and threads that it starts, from taking real-time scheduling.

    SVT-AV1, which LeRobot encodes with, takes the highest priority there is (SCHED_FIFO, 99) for
    the thread that opens it and for its own, where it runs as root, as in many a container. The
    process keeps it, and those that it starts inherit it: one that waits busily for another is then
    never interrupted for it, nor for anything else on the machine. Without the capability
    CAP_SYS_NICE root may not either; it is taken away for as long as the block lasts.
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    header, sets = _Header(_VERSION_3, 0), (_Set * 2)()
    held = not libc.capget(ctypes.byref(header), sets) and sets[0].effective & 1 << _SYS_NICE
    if not held:
        yield
        return
    sets[0].effective &= ~(1 << _SYS_NICE)
    libc.capset(ctypes.byref(header), sets)
    try:
        yield
    finally:
        sets[0].effective |= 1 << _SYS_NICE
        libc.capset(ctypes.byref(header), sets)
