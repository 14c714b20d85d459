"""Read schema files: the features, files and meta documents of a kind of dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from math import prod
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, Field

from occgen_hub.errors import UsageError

ARROW = {
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "uint64": pa.uint64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
}
"""A feature's dtype in info.json to the Arrow type of its elements."""


class Feature(BaseModel):
    """A column: its entry of `features` in info.json, and whether every dataset has it.

    other_kinds: whether a source may use this name for another kind of column, which is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[Annotated[int, Field(ge=1)], ...]
    names: list[str] | None = None
    required: bool = True
    other_kinds: bool = False

    @property
    def scalar(self) -> bool:
        """Whether it is a plain number. LeRobot gives it the shape [1]."""
        return self.shape == (1,)

    def info(self) -> dict[str, Any]:
        """The object in info.json."""
        return {"dtype": self.dtype, "shape": list(self.shape), "names": self.names}

    def arrow_type(self) -> pa.DataType:
        """Nested lists of the shape's depth, as `datasets` stores arrays."""
        arrow = ARROW[self.dtype]
        for _ in () if self.scalar else self.shape:
            arrow = pa.list_(arrow)
        return arrow

    def datasets_type(self) -> dict[str, Any]:
        """The feature as `datasets` describes it in the parquet's metadata."""
        if self.scalar:
            return {"dtype": self.dtype, "_type": "Value"}
        if len(self.shape) == 1:
            element = {"dtype": self.dtype, "_type": "Value"}
            return {"feature": element, "length": self.shape[0], "_type": "List"}
        return {
            "shape": list(self.shape),
            "dtype": self.dtype,
            "_type": f"Array{len(self.shape)}D",
        }

    def arrow_field(self, name: str) -> pa.Field:
        """The column's field. Its metadata tells `datasets` that it has matrices.

        Other readers see nested lists. Writing them does not import `datasets`.
        """
        if len(self.shape) < 2:
            return pa.field(name, self.arrow_type())
        extension = f"datasets.features.features.Array{len(self.shape)}DExtensionType"
        parameters = json.dumps([self.shape, self.dtype])
        return pa.field(
            name,
            self.arrow_type(),
            metadata={
                "ARROW:extension:name": extension,
                "ARROW:extension:metadata": parameters,
            },
        )

    def to_arrow(self, values: np.ndarray[Any, Any] | list[str]) -> pa.Array:
        """Convert (T, *shape) values, or (T,) for a scalar, to a column of `arrow_type`."""
        if self.dtype == "string":
            return plain_texts(pa.string(), [value.encode() for value in values])
        array = np.ascontiguousarray(np.asarray(values).astype(self.dtype))
        column = plain_arrow(array.reshape(-1))
        if self.scalar:
            return column
        for width in reversed(self.shape):
            offsets = np.arange(0, len(column) + 1, width, dtype=np.int32)
            column = pa.ListArray.from_arrays(plain_arrow(offsets), column)
        return column

    def to_numpy(self, column: pa.ChunkedArray | pa.Array) -> np.ndarray[Any, Any]:
        """Convert a column of `arrow_type` to (T, *shape), or (T,) for a scalar.

        Raises ValueError if a value is missing or has another shape.
        """
        length = len(column)
        flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        for width in () if self.scalar else self.shape:
            if flat.null_count:
                raise ValueError("a value is missing")
            fixed = pa.types.is_fixed_size_list(flat.type)
            if not fixed and not pa.types.is_list(flat.type):
                raise ValueError(f"expected arrays of shape {list(self.shape)}, not {flat.type}")
            counts = flat.type.list_size if fixed else np.diff(plain_numpy(flat.offsets))
            if not np.all(counts == width):
                raise ValueError(f"expected arrays of shape {list(self.shape)}")
            flat = flat.flatten()
        if flat.null_count:
            raise ValueError("a value is missing")
        values = plain_numpy(flat)
        return values if self.scalar else values.reshape(length, *self.shape)


def plain_arrow(values: np.ndarray[Any, Any]) -> pa.Array:
    """Convert (n,) numbers or bools to an array, without copying if possible.

    Uses the buffer of numbers, because pyarrow's own conversion imports pandas (0.3 s).
    """
    if values.dtype.kind not in "iuf":
        return pa.array(values)
    values = np.ascontiguousarray(values)
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def plain_texts(kind: pa.DataType, values: Sequence[bytes]) -> pa.Array:
    """Like `plain_arrow`, for a column of UTF-8 texts (`pa.string()`) or bytes (`pa.binary()`)."""
    ends = np.cumsum([0, *map(len, values)], dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError("more than 2 GB of text in one column")
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def plain_numpy(values: pa.Array) -> np.ndarray[Any, Any]:
    """The inverse of `plain_arrow`: (n,) numbers, bools or texts. None may be missing."""
    if pa.types.is_integer(values.type) or pa.types.is_floating(values.type):
        return np.from_dlpack(values)
    kind = bool if pa.types.is_boolean(values.type) else object
    return np.array(values.to_pylist(), kind)


class ArraySpec(BaseModel):
    """An array in a file. A size is a number, or a name that stands for one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: str
    shape: tuple[int | str, ...]
    required: bool = True


class FileSpec(BaseModel):
    """A file of a dataset: its path, its format and its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    kind: Literal["parquet", "npz", "csr", "mask", "ply", "video", "image", "json", "jsonl"]
    required: bool = True
    media: bool = Field(False, description="comes from the source; left out by --media none")
    arrays: dict[str, ArraySpec] = Field(default_factory=dict)
    classes: bool = Field(False, description="of a CSR file: its values are classes, and not 1")
    modes: list[str] = Field(default_factory=list)
    json_schema: str | None = None


class Schema(BaseModel):
    """The description of a kind of dataset, used for writing and for checking it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    version: str
    codebase_version: str
    chunk: int
    chunks_size: int
    episode_index: int
    features: dict[str, Feature]
    poses: str
    intrinsics: str
    depth_units_per_metre: Annotated[int, Field(ge=1)]
    image_intrinsics: tuple[str, ...]
    files: dict[str, FileSpec]
    data_path: str
    video_path: str
    json_schemas: dict[str, dict[str, Any]]

    def path(self, file: str, frame: int | None = None) -> str:
        """The path of a file inside a trajectory, with forward slashes."""
        return self.files[file].path.format(
            chunk=self.chunk, episode_index=self.episode_index, frame=frame
        )

    def folder(self, file: str) -> str:
        """The name of a file's folder, which is also LeRobot's name of the feature."""
        return PurePosixPath(self.files[file].path).parent.name

    def arrow_schema(self, features: Mapping[str, Feature]) -> pa.Schema:
        """The parquet's schema for these columns, with the types `datasets` gives them."""
        described = {name: feature.datasets_type() for name, feature in features.items()}
        metadata = {"huggingface": json.dumps({"info": {"features": described}})}
        fields = [feature.arrow_field(name) for name, feature in features.items()]
        return pa.schema(fields, metadata)


def feature_of(field: pa.Field, sample: Any) -> Feature | None:
    """The feature of a source's column, from its type and one value. None if not supported.

    Supported are numbers, strings and rectangular arrays of numbers of up to five dimensions.
    """
    shape: list[int] = []
    kind = field.type
    while (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        if not isinstance(sample, list) or not sample:
            return None
        shape.append(len(sample))
        kind, sample = kind.value_type, sample[0]
    dtype = next((name for name, arrow in ARROW.items() if arrow == kind), None)
    if dtype is None or len(shape) > 5 or (dtype == "string" and shape) or prod(shape) > 1 << 20:
        return None
    return Feature(dtype=dtype, shape=tuple(shape) or (1,), required=False)


def _yaml(text: str) -> Any:
    """Parse YAML, in C if available, which is ten times as fast."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # safe


@cache
def load_schema(name: str) -> Schema:
    """Load a schema of `occgen_hub.schemas` by its name.

    Raises UsageError if there is none.
    """
    file = resources.files("occgen_hub.schemas") / f"{name}.yaml"
    if not file.is_file():
        raise UsageError(f"{name}: is not a schema; see the folder schemas/.")
    return Schema.model_validate(_yaml(file.read_text(encoding="utf-8")))
