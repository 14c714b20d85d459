"""Mutations of a file: change its bytes, change values of its format, or replace it."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

Mutation = Callable[[Path, random.Random], str]
"""Changes a file and returns a description. If it raises an error, nothing is changed."""

WORDS = (
    "",
    "\x1b[31m",
    "a\nb",
    "../../x",
    "/etc/passwd",
    "\0",
    "nan",
    "é" * 300,
    "<script>",
    "x\u202e",
)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**70, -(2**63), 10**400),
    *(0.5, 1e-320, -1e308, 1e308, float("nan"), float("inf")),
    *WORDS,
    *([], {}, [[]], [None], {"a": {}}, [0] * 1000),
)
NUMBERS = (0, 1, 0xFF, 0x7F, 0x80, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF)


# Any file


def flip_bytes(path: Path, rng: random.Random) -> str:
    """Change some bytes."""
    data = bytearray(path.read_bytes())
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 2, 8, 64)))]
    for place in places:
        data[place] = rng.randrange(256)
    path.write_bytes(data)
    return f"{len(places)} bytes changed, the first at {places[0]}"


def flip_near_ends(path: Path, rng: random.Random) -> str:
    """Change a byte near the start or the end, where headers and footers are."""
    data = bytearray(path.read_bytes())
    place = min(rng.randrange(200), len(data) - 1)
    place = rng.choice((place, len(data) - 1 - place))
    data[place] = rng.randrange(256)
    path.write_bytes(data)
    return f"byte {place} changed"


def write_a_number(path: Path, rng: random.Random) -> str:
    """Overwrite some bytes with an extreme number."""
    data = bytearray(path.read_bytes())
    width = rng.choice((2, 4, 8))
    number = rng.choice(NUMBERS) & ((1 << 8 * width) - 1)
    place = rng.randrange(max(1, min(len(data), rng.choice((300, len(data))))))
    data[place : place + width] = number.to_bytes(width, rng.choice(("little", "big")))
    path.write_bytes(data)
    return f"{number} written at {place}"


def truncate(path: Path, rng: random.Random) -> str:
    """Cut the end off."""
    data = path.read_bytes()
    kept = rng.choice((0, 1, len(data) // 2, max(0, len(data) - 1), rng.randrange(len(data) + 1)))
    path.write_bytes(data[:kept])
    return f"cut to {kept} bytes"


def move_bytes(path: Path, rng: random.Random) -> str:
    """Remove a piece, or insert it elsewhere once or many times."""
    data = path.read_bytes()
    start = rng.randrange(len(data))
    piece = data[start : start + rng.choice((1, 16, 1000))]
    if rng.random() < 0.4:
        path.write_bytes(data[:start] + data[start + len(piece) :])
        return f"{len(piece)} bytes removed at {start}"
    place, times = rng.randrange(len(data)), rng.choice((1, 1, 100, 10_000))
    path.write_bytes(data[:place] + piece * times + data[place:])
    return f"{len(piece)} bytes from {start} inserted at {place}, {times} times"


def replace_by_other_file(path: Path, rng: random.Random) -> str:
    """Replace a file by another one of its folder or a parent folder."""
    others = sorted(
        p for p in path.parents[rng.randrange(3)].rglob("*") if p.is_file() and p != path
    )
    other = rng.choice(others)
    with other.open("rb") as file:  # It may be a sparse file of an earlier mutation.
        path.write_bytes(file.read(1 << 26))
    return f"replaced by {other.name}"


def replace_by_special(path: Path, rng: random.Random) -> str:
    """Replace a file by something that is not a regular file with content."""
    kind = rng.choice(
        ("nothing", "folder", "loop", "dangling", "outside", "pipe", "sparse", "folder")
    )
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("not there")
    elif kind == "outside":
        path.symlink_to("/etc/passwd")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(rng.choice((1 << 20, 1 << 33, 1 << 40)))
    return f"replaced by {kind}"


# Words and numbers


def change_text(path: Path, rng: random.Random) -> str:
    """Replace one word of a text."""
    words = path.read_text().split(" ")
    place = rng.randrange(len(words))
    words[place] = str(rng.choice((*ODD, "1e400", "-" * 20, "9" * 400, "0x10", "{", "]", "\ufeff")))
    path.write_text(" ".join(words))
    return f"word {place} is {words[place][:20]!r}"


def change_value(value: Any, rng: random.Random) -> Any:
    """A nested value with one item changed, removed or added."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value, key=str))
        how = rng.random()
        if how < 0.12:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.18:
            return {**value, str(rng.choice(ODD)): rng.choice(ODD)}
        return {**value, key: change_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        how = rng.random()
        if how < 0.12:
            return value[:place] + value[place + 1 :]
        if how < 0.18:
            return value * rng.choice((2, 50))
        return [*value[:place], change_value(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int | float) and rng.random() < 0.3:
        return rng.choice((-value, value * 1000, value + 1, str(value), [value]))
    return rng.choice(ODD)


def change_json(path: Path, rng: random.Random) -> str:
    """Change a value of a JSON file."""
    path.write_text(json.dumps(change_value(json.loads(path.read_text()), rng)))
    return "a value changed"


def change_jsonl(path: Path, rng: random.Random) -> str:
    """Change a value in a line, or the lines."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    how = rng.random()
    if how < 0.1:
        rows = rows * rng.choice((0, 2, 1000))
    elif how < 0.2:
        rows.insert(rng.randrange(len(rows) + 1), rng.choice(ODD))
    else:
        place = rng.randrange(len(rows))
        rows[place] = change_value(rows[place], rng)
    path.write_text("\n".join(map(json.dumps, rows)))
    return "a line changed"


def change_yaml(path: Path, rng: random.Random) -> str:
    """Change a value of a YAML file."""
    path.write_text(yaml.safe_dump(change_value(yaml.safe_load(path.read_text()), rng)))
    return "a value changed"


# Tables and arrays


def change_parquet(path: Path, rng: random.Random) -> str:
    """Change a column or the rows of a table, and write it with another layout."""
    table = pq.read_table(path)
    number = rng.randrange(table.num_columns)
    field, column = table.schema.field(number), table.column(number).to_pylist()
    how = rng.choice(
        ("values", "values", "values", "drop", "null", "type", "rows", "name", "twice", "none")
    )
    if how == "values" and column:
        for _ in range(rng.choice((1, len(column)))):
            place = rng.randrange(len(column))
            column[place] = change_value(column[place], rng)
        table = table.set_column(number, field.name, _as_array(column, field.type))
    elif how == "drop":
        table = table.remove_column(number)
    elif how == "null":
        table = table.set_column(number, field.name, pa.nulls(len(table), field.type))
    elif how == "type":
        other = (
            [str(v) for v in column] if rng.random() < 0.5 else [rng.choice(ODD[3:6])] * len(table)
        )
        table = table.set_column(number, field.name, pa.array(other))
    elif how == "rows":
        rows = rng.choice(([], list(range(len(table)))[::-1], [0] * len(table), [0] * 5000))
        table = table.take(pa.array(rows, pa.int64()))
    elif how == "name":
        table = table.rename_columns(
            [rng.choice(WORDS) if n == number else c for n, c in enumerate(table.column_names)]
        )
    elif how == "twice":
        table = table.append_column(field, table.column(number))
    if rng.random() < 0.2:
        table = table.replace_schema_metadata({rng.choice(WORDS): rng.choice(WORDS)})
    pq.write_table(table, path, row_group_size=rng.choice((1, 2, 1000)))
    return f"column {field.name}: {how}"


def _as_array(column: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as an array of a type if possible, else of their own type."""
    for attempt in (lambda: pa.array(column, kind), lambda: pa.array(column)):
        try:
            return attempt()
        except (pa.ArrowException, OverflowError, ValueError, TypeError):
            continue
    return pa.array([json.dumps(value, default=str) for value in column])


def change_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """Change an array's type, shape or values."""
    how = rng.choice(("type", "shape", "values", "values", "empty", "more", "order"))
    if how == "type":
        kind = rng.choice(
            ("uint8", "int8", "float16", "float64", "<U4", ">i4", "complex64", "bool")
        )
        with np.errstate(all="ignore"):
            return array.astype(kind)
    if how == "shape":
        return array.reshape(rng.choice(((-1,), (1, *array.shape), (*array.shape, 1), (-1, 1))))
    if how == "empty":
        return array[:0]
    if how == "more":
        return np.concatenate([array, array[: rng.choice((1, len(array)))]])
    if how == "order":
        return array[::-1]
    changed = array.copy().reshape(-1)
    span = np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
    for _ in range(rng.choice((1, 10))):
        changed[rng.randrange(changed.size)] = rng.choice((0, 1, span.max, span.min))
    return changed.reshape(array.shape)


def change_npz(path: Path, rng: random.Random) -> str:
    """Change an array, its name, or the compression."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name, how = rng.choice(sorted(arrays)), rng.random()
    if how < 0.1:
        del arrays[name]
    elif how < 0.2:
        arrays[rng.choice(WORDS).replace("/", "_").replace("\0", "")] = arrays.pop(name)
    else:
        arrays[name] = change_array(arrays[name], rng)
    (np.savez if rng.random() < 0.3 else np.savez_compressed)(path, **arrays)
    return f"array {name} changed"


def change_npz_header(path: Path, rng: random.Random) -> str:
    """Change bytes of an array's header in the archive, and update the checksum."""
    with zipfile.ZipFile(path) as archive:
        members = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    place = rng.randrange(min(128, len(members[name])))
    members[name][place] = rng.choice(
        (rng.randrange(256), ord(rng.choice("0123456789',()<>|fiuO")))
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, data in members.items():
            archive.writestr(each, bytes(data))
    return f"byte {place} of {name} changed"


def change_ply(path: Path, rng: random.Random) -> str:
    """Change a word of a point cloud's header, or a number of its points."""
    data = path.read_bytes()
    end = data.index(b"end_header\n") + 11
    if rng.random() < 0.6:
        words = data[:end].decode().split(" ")
        place = rng.randrange(len(words))
        words[place] = rng.choice(
            ("0", "-1", "1e9", "99999999999", "uchar", "double", "list", "x\n", "")
        )
        path.write_bytes(" ".join(words).encode() + data[end:])
        return f"word {place} of the header changed"
    points = bytearray(data[end:])
    place = rng.randrange(max(1, len(points) - 4))
    points[place : place + 4] = np.float32(rng.choice((np.nan, np.inf, 1e38, -1e10))).tobytes()
    path.write_bytes(data[:end] + points)
    return f"a number at {place} of the points changed"


# Pictures and archives


def change_image(path: Path, rng: random.Random) -> str:
    """Change an image's size, mode or format."""
    image: Image.Image = Image.open(path)
    image.load()
    how = rng.choice(("size", "mode", "kind", "black", "long"))
    if how == "size":
        image = image.resize(rng.choice(((1, 1), (image.width + 1, image.height), (7, 2000))))
    elif how == "mode":
        image = image.convert("L").convert(rng.choice(("L", "RGB", "P", "1", "I;16", "CMYK")))
    elif how == "black":
        image = image.point(lambda _: 0)
    elif how == "long":
        image = image.resize((20_000, 1))
    kind = rng.choice(("PNG", "JPEG", "GIF", "TIFF")) if how == "kind" else image.format
    content = io.BytesIO()
    image.save(content, kind or {".png": "PNG"}.get(path.suffix, "JPEG"))
    path.write_bytes(content.getvalue())
    return f"picture: {how}"


def change_tar(path: Path, rng: random.Random) -> str:
    """Add an unusual member to an archive, or corrupt one of its files."""
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member)) for member in archive]
        held = [(member, file.read() if file else b"") for member, file in members]
    how = rng.choice(("link", "hard", "up", "device", "twice", "spoil", "spoil", "huge"))
    extra = tarfile.TarInfo(rng.choice(held)[0].name + rng.choice(("", "x", "/x")))
    content = b"x"
    if how in ("link", "hard"):
        extra.type = tarfile.SYMTYPE if how == "link" else tarfile.LNKTYPE
        extra.linkname = rng.choice(("/etc/passwd", "../../../x", extra.name, "."))
    elif how == "up":
        extra.name = rng.choice(
            ("../x", "/tmp/x", "a/../../x", "x" * 300, "a\x1b[31mb", "a" + "/b" * 200)
        )
    elif how == "device":
        extra.type = rng.choice((tarfile.CHRTYPE, tarfile.FIFOTYPE))
    elif how == "twice":
        extra, content = rng.choice(held)
    elif how == "spoil":
        number = rng.choice([n for n, (member, _) in enumerate(held) if member.isfile()])
        data = bytearray(held[number][1])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        held[number] = held[number][0], bytes(data)
    packed = "w:gz" if path.name.endswith("gz") else "w"
    with tarfile.open(path, packed) as archive:
        for member, data in held:
            archive.addfile(member, io.BytesIO(data))
        if how != "spoil":
            extra.size = len(content) if extra.isfile() else 0
            archive.addfile(extra, io.BytesIO(content))
            if how == "huge":  # The header claims more data than there is.
                extra.size = 1 << 40
                assert archive.fileobj is not None
                archive.fileobj.write(extra.tobuf())
    return f"archive: {how} {extra.name[:40]!r}"


ANY: tuple[Mutation, ...] = (
    *(flip_bytes, flip_near_ends, write_a_number, truncate, move_bytes),
    *(replace_by_other_file, replace_by_special),
)
OF_KIND: dict[str, tuple[Mutation, ...]] = {
    ".json": (change_json, change_json, change_json, change_text),
    ".jsonl": (change_jsonl, change_jsonl, change_jsonl, change_text),
    ".yaml": (change_yaml, change_yaml, change_text),
    ".txt": (change_text, change_text),
    ".md": (change_text,),
    ".parquet": (change_parquet,) * 4,
    ".npz": (change_npz, change_npz, change_npz_header, change_npz_header),
    ".ply": (change_ply,) * 3,
    ".png": (change_image,),
    ".jpg": (change_image,),
    ".tar": (change_tar,) * 3,
    ".tgz": (change_tar,) * 3,
}


MUTATION_ERRORS = (
    *(ValueError, TypeError, LookupError, OSError, ArithmeticError, AssertionError, EOFError),
    *(RuntimeError, SyntaxError, zlib.error, struct.error),  # RuntimeError: zip features.
    *(
        Image.DecompressionBombError,
        pa.ArrowException,
        tarfile.TarError,
        zipfile.BadZipFile,
        yaml.YAMLError,
    ),
)
"""Errors that a mutation may raise if a file's content does not match its name."""

LARGEST = 1 << 26
"""Maximum bytes of a file to corrupt, since it is read whole."""


def corrupt(path: Path, rng: random.Random) -> str:
    """Apply a suitable mutation to a file. Returns its description."""
    if path.stat().st_size > LARGEST:
        return "unchanged, too large"
    ways = (*ANY, *OF_KIND.get(path.suffix, ()))
    before = path.read_bytes()
    if path.is_symlink():  # Of an earlier change: its target must not be written to.
        _restore(path, before)
    for _ in range(20):
        try:
            return rng.choice(ways)(path, rng)
        except MUTATION_ERRORS:  # An earlier change broke its format.
            _restore(path, before)
    return "unchanged"


def _restore(path: Path, content: bytes) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    path.write_bytes(content)
