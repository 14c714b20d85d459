"""A user's own captures, in the layouts that RGB-D recorders and reconstruction tools write.

A layout is a small module with one subclass of `Layout`; `builder.LAYOUTS` lists them.
"""

from .builder import CaptureBuilder

__all__ = ["CaptureBuilder"]
