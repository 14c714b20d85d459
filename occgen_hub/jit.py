"""numba's compiler, whose results are kept on disk where there is a place for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True, ...)`; without a cache where no folder for it can be written to.

    So it is in a read-only installation without a home. Each process compiles for itself there,
    which takes some seconds; NUMBA_CACHE_DIR names another folder.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # So numba says that it found no such folder.
            return numba.njit(**options)(function)

    return decorate
