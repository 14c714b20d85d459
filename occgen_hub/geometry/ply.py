"""Read and write point clouds as binary PLY files.

Open3D is not used, because importing it takes longer than building a short trajectory, and because
a header must be checked against the file's size before memory is allocated.
"""

from __future__ import annotations

import os
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import SourceError
from occgen_hub.files import opened
from occgen_hub.geometry.cloud import Cloud

MAX_HEADER = 1 << 16
RESTORE = "restore it from a copy or create it again"
_COLORS = ("red", "green", "blue")
_TYPES = {
    "char": "i1", "uchar": "u1", "short": "<i2", "ushort": "<u2", "int": "<i4", "uint": "<u4",
    "float": "<f4", "double": "<f8", "int8": "i1", "uint8": "u1", "int16": "<i2", "uint16": "<u2",
    "int32": "<i4", "uint32": "<u4", "float32": "<f4", "float64": "<f8",
}  # fmt: skip


def write_ply(path: Path, cloud: Cloud) -> None:
    """Write a cloud with float x, y, z and uchar red, green, blue. Raises OSError."""
    record = np.dtype([("p", "<f4", 3), ("c", "u1", 3)])
    vertices = np.empty(len(cloud), record)
    vertices["p"], vertices["c"] = cloud.points, cloud.colors
    properties = [f"property float {name}" for name in "xyz"]
    properties += [f"property uchar {name}" for name in _COLORS]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(cloud)}"]
    text = "\n".join([*header, *properties, "end_header", ""])
    with path.open("wb") as file:
        file.write(text.encode("ascii"))
        file.write(vertices.tobytes())


def read_ply(path: Path) -> Cloud:
    """Read the vertices of a binary PLY file. Without colours in the file, they are black.

    Raises SourceError if it is not such a file, or shorter than its header states.
    """
    with opened(path) as file:
        count, record = _header(file, path)
        vertices = np.frombuffer(file.read(count * record.itemsize), record)
    if len(vertices) < count:
        raise SourceError(path, f"is shorter than its {count} vertices", RESTORE)
    with np.errstate(over="ignore"):
        points = np.stack([vertices[name] for name in "xyz"], axis=-1).astype(np.float32)
    colors: NDArray[np.uint8] = np.zeros((count, 3), np.uint8)
    if set(_COLORS) <= set(record.names or ()):
        colors = np.stack([vertices[name] for name in _COLORS], axis=-1).astype(np.uint8)
    return Cloud(points, colors)


def check_ply(path: Path) -> None:
    """Raise SourceError if `read_ply` would, without reading the vertices."""
    with opened(path) as file:
        _header(file, path)


def _header(file: BufferedReader, path: Path) -> tuple[int, np.dtype[np.void]]:
    """Read and check the header; returns the number and type of the vertices."""
    head = file.read(MAX_HEADER)
    end = head.find(b"end_header\n")
    if not head.startswith(b"ply") or end < 0:
        raise SourceError(path, "is not a PLY file", RESTORE)
    count, record = _vertex_record(head[:end].decode("ascii", "replace"), path)
    start = end + len(b"end_header\n")
    if file.seek(0, os.SEEK_END) < start + count * record.itemsize:
        raise SourceError(path, f"is shorter than its {count} vertices", RESTORE)
    file.seek(start)
    return count, record


def _vertex_record(header: str, path: Path) -> tuple[int, np.dtype[np.void]]:
    count, element = -1, ""
    fields: list[tuple[str, str]] = []
    for words in (line.split() for line in header.splitlines()):
        if words[:1] == ["format"] and words[1:2] != ["binary_little_endian"]:
            raise SourceError(path, "is not a binary little-endian PLY", "save it as binary")
        if words[:1] == ["element"] and len(words) == 3:
            element = words[1]
            if element == "vertex" and words[2].isdigit() and not fields:
                count = int(words[2][:18])
            elif count < 0:
                raise SourceError(path, "does not begin with its vertices", "save it again")
        if words[:1] == ["property"] and element == "vertex":
            if len(words) != 3 or words[1] not in _TYPES:
                raise SourceError(path, "has vertices of an unknown type", "save it again")
            fields.append((words[2], _TYPES[words[1]]))
    names = [name for name, _ in fields]
    if count < 0 or not {"x", "y", "z"} <= set(names) or len(set(names)) < len(names):
        raise SourceError(path, "has no vertices with x, y and z", "save it again")
    return count, np.dtype(fields)
