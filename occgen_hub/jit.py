"""numba's compiler, with a cache on disk if there is a writable folder for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, ...)`, or without a cache if no folder for it is writable.

    That is so in a read-only installation without a home directory. Each process then compiles
    again, which takes some seconds, unless NUMBA_CACHE_DIR names another folder.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no writable folder.
            return numba.njit(**options)(function)

    return decorate
