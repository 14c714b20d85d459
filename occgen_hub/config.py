"""The configuration of a build, with defaults that need no tuning."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from occgen_hub.errors import SourceError, UsageError
from occgen_hub.files import read_bytes

MAX_CONFIG_BYTES = 1 << 16
MAX_INTERVAL = 1 << 20
MAX_CELLS = 1 << 29
"""Limit of a grid: half a gigabyte, since a frame uses one byte per cell."""

Condition = Literal["depth", "intrinsics", "poses"]

Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Noise = (
    Literal["auto", "simulated", "kinect", "stereo", "tof"]
    | tuple[NotNegative, NotNegative, NotNegative]
)
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Config(BaseModel):
    """The parameters of a build. Equal parameters and sources give equal bytes.

    Lengths are in metres. Every parameter has a default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    voxel_size: Annotated[float, Field(ge=1e-4, le=100, allow_inf_nan=False)] = Field(
        0.02, description="edge of an occupancy cell, metres"
    )
    pc_range: tuple[Finite, Finite, Finite, Finite, Finite, Finite] = Field(
        (-2.0, -1.5, -0.5, 2.0, 1.0, 3.5),
        description="camera grid: x_min y_min z_min x_max y_max z_max, OpenCV axes",
    )
    interval: Annotated[int, Field(ge=1, le=MAX_INTERVAL)] | Literal["auto"] = Field(
        1,
        description="reconstruct the scene from every interval-th frame; every frame gets "
        "occupancy; auto, for networks: skips frames where the camera hardly moves",
    )
    depth_range: tuple[Positive, Positive] = Field(
        (0.1, 6.5), description="nearest and farthest depth to use"
    )
    depth_edge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.03, description="drop pixels between two surfaces, relative tolerance; 0 keeps all"
    )
    fusion: Literal["evidence", "union"] = Field(
        "evidence",
        description="evidence keeps points that frames agree on; union keeps every point",
    )
    noise: Noise = Field(
        "auto",
        description="of depth: auto estimates it; simulated, kinect, stereo, tof; or [a, b, c], "
        "sigma = sqrt(a^2 + (b z)^2 + (c z^2)^2) in metres",
    )
    refine_poses: bool | Literal["auto"] = Field(
        "auto",
        description="align each frame to the fused scene: true, false, or auto, if poses have "
        "errors and frames then agree better",
    )
    unmeasured: Literal["auto", "unknown", "free"] = Field(
        "auto",
        description="space on a ray that meets no surface, if its pixel has no depth beyond the "
        "grid: unknown, or free, for depth that is missing only where nothing is in reach; auto: "
        "free for internnav, which is simulated, and networks, else unknown",
    )
    fusion_voxel_size: Positive | None = Field(
        None, description="resolution of the fused cloud; half of voxel_size if not set"
    )
    voxel_size_scale: Annotated[float, Field(ge=1e-3, le=1e6, allow_inf_nan=False)] | None = Field(
        None,
        description="dynamic voxel size: origin_pcd.ply is downsampled to cbrt(scene volume) / "
        "voxel_size_scale if that is coarser than voxel_size",
    )
    confidence: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.1, description="networks: drop points with a lower confidence"
    )
    max_pixels: Annotated[int, Field(ge=1 << 10, le=1 << 22)] = Field(
        255_000, description="networks: pixels of the resized frames"
    )
    window: Annotated[int, Field(ge=2, le=4096)] | None = Field(
        None, description="networks: frames at a time; as many as fit into memory if not set"
    )
    overlap: Annotated[int, Field(ge=1, le=2048)] | None = Field(
        None,
        description="networks: frames that a window shares with the next, half of it at most; half "
        "if not set",
    )
    loop_closure: bool | Literal["auto"] = Field(
        "auto",
        description="networks: find places that a video returns to, and correct the drift: true, "
        "false, or auto, for videos of four windows or more",
    )
    condition: tuple[Condition, ...] = Field(
        (), description="pi3x: inputs in addition to images: depth, intrinsics, poses"
    )
    hfov: Annotated[float, Field(ge=5, le=170)] | None = Field(
        None,
        description="horizontal field of view in degrees, for sources without intrinsics; 79 if "
        "not set",
    )
    compile: bool = Field(
        False, description="networks: compile them first (torch.compile), for long builds"
    )
    mesh: bool = Field(
        False, description="fill small holes along a Poisson surface through the cloud"
    )
    mesh_density_cut: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = Field(
        0.0, description="mesh: share of the surface to remove, where points are sparsest"
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> Config:
        if self.depth_range[0] >= self.depth_range[1]:
            raise ValueError("depth_range must be (nearest, farthest), nearest first")
        if any(low >= high for low, high in zip(self.pc_range, self.pc_range[3:], strict=False)):
            raise ValueError("each minimum of pc_range must be below its maximum")
        if max(self.grid_shape) < 2:
            raise ValueError("voxel_size must be smaller than the grid; it is in metres")
        if math.prod(self.grid_shape) > MAX_CELLS:
            raise ValueError(
                f"pc_range / voxel_size gives a grid of {self.grid_shape} cells, over the limit of "
                f"{MAX_CELLS} cells; use a larger voxel_size or a smaller pc_range"
            )
        return self

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """(nx, ny, nz): the smallest numbers of cells that cover `pc_range`."""
        size = decimal(self.voxel_size)
        nx, ny, nz = (
            math.ceil((decimal(high) - decimal(low)) / size)
            for low, high in zip(self.pc_range, self.pc_range[3:], strict=False)
        )
        return nx, ny, nz

    @property
    def fusion_size(self) -> float:
        """Edge of the voxels in which the fused cloud has one point, metres."""
        return self.fusion_voxel_size or self.voxel_size / 2


def decimal(value: float) -> Fraction:
    """The number as a decimal fraction: 0.02 becomes exactly 1/50."""
    return Fraction(repr(float(value)))


def load_config(path: Path | None = None, settings: tuple[str, ...] = ()) -> Config:
    """Load a configuration: defaults, then a YAML file, then `key=value` settings.

    Raises UsageError if the file cannot be read or a value is not valid.
    """
    values: dict[str, Any] = {} if path is None else _read_yaml(path)
    config = _config(values, path)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"--set {setting}: expected key=value, for example --set voxel_size=0.05."
            )
        try:
            values[key.strip()] = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise UsageError(f"--set {setting}: the value is not valid YAML.") from error
    return _config(values, None) if settings else config


def _config(values: dict[str, Any], path: Path | None) -> Config:
    """The configuration with these values. path: their file, for errors."""
    place = f"{path}: " if path is not None else ""
    for key, value in values.items():  # pydantic accepts true as the number 1.
        field = Config.model_fields.get(key)
        takes_bool = field is not None and bool in (field.annotation, *get_args(field.annotation))
        if field and isinstance(value, bool) and not takes_bool:
            raise UsageError(f"{place}{key}: cannot be true or false ({field.description}).")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UsageError(place + _first_error(error)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(read_bytes(path, MAX_CONFIG_BYTES))
    except SourceError as error:
        raise UsageError(f"{path}: {error.problem}; check --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"{path}: not valid YAML; correct it or leave --config out.") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UsageError(f"{path}: expected lines of 'key: value', such as 'voxel_size: 0.05'.")
    return values


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    if not first["loc"]:
        return f"{first['msg'].removeprefix('Value error, ')[:300]}."
    key = str(first["loc"][0])
    if key not in Config.model_fields:
        known = ", ".join(Config.model_fields)
        return f"{key[:80]}: unknown setting; the settings are {known}."
    return f"{key}: {_expected(first, key)} ({Config.model_fields[key].description})."


_EXPECTED = {"float": "a number", "int": "a whole number", "bool": "true or false"}


def _expected(error: Any, key: str) -> str:
    """The value that a setting should have, from pydantic's error."""
    kind, default = error["type"], Config.model_fields[key].default
    if kind in ("missing", "too_long", "tuple_type"):
        count = f"{len(default)} numbers" if default else "some of them"
        return f"expected {count} in square brackets, separated by commas"
    for prefix, words in _EXPECTED.items():
        if kind.startswith(f"{prefix}_"):
            return f"expected {words}"
    return str(error["msg"].replace("Input should be", "must be", 1))[:300]
