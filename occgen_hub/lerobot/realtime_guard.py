"""Keep video encoders from taking real-time scheduling."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
_SYS_NICE = 23
"""CAP_SYS_NICE of capabilities(7): allows real-time scheduling, among other things."""


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilitySet(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextmanager
def no_realtime_scheduling() -> Iterator[None]:
    """Keep this thread, and threads that it starts, from taking real-time scheduling.

    SVT-AV1, which LeRobot encodes with, takes the highest priority there is (SCHED_FIFO, 99) for
    the thread that opens it and for its own threads if it runs as root, as it does in many
    containers. The process keeps that priority, and its children inherit it. A thread that waits
    busily is then never interrupted, and can block the whole machine. Root needs the capability
    CAP_SYS_NICE for it, which this removes for the duration of the block.
    """
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    header, sets = _CapabilityHeader(_VERSION_3, 0), (_CapabilitySet * 2)()
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
