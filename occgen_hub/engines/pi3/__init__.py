"""The networks pi3 and pi3x, and the engines that reconstruct with them."""

from __future__ import annotations

from occgen_hub.engines.weights import load_network

__all__ = ["load_network"]
