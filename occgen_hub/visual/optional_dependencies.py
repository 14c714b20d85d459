"""Import the optional dependencies of the extra `visual`."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType

from occgen_hub.errors import UsageError, install_extra
from occgen_hub.stopping import hold_stops


def require(name: str) -> ModuleType:
    """Import a module. Raises UsageError, which says how to install it, if that fails."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name or name}: is not installed, and this command needs it; "
            f"{install_extra('visual')}."
        ) from None
    except ImportError as error:
        raise UsageError(
            f"{name}: cannot be loaded ({str(error).splitlines()[0]}); install the system library "
            f"that is missing, or {install_extra('visual')}, with --force-reinstall."
        ) from None


def require_pyvista() -> ModuleType:
    """Import PyVista, and set it to render without a screen if there is none."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        # Otherwise VTK looks for an X server first, and warns if there is none.
        os.environ.setdefault("VTK_DEFAULT_OPENGL_WINDOW", "vtkEGLRenderWindow")
    with hold_stops():  # VTK prints exceptions that interrupt its imports.
        return require("pyvista")
