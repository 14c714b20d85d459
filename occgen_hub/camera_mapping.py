"""A user's settings for a camera that the files of a recording do not state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from occgen_hub.errors import UsageError, shorten_message
from occgen_hub.files import read_bytes
from occgen_hub.geometry.lens import Lens, opencv_matrix
from occgen_hub.geometry.poses import (
    OPENGL_FROM_OPENCV,
    RIGID,
    ROS_FROM_OPENCV,
    rigidity_error,
)

UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
"""Names of depth units, and metres per unit."""

CALIBRATIONS = (4, 8, 9, 12)
"""Allowed numbers of values in `intrinsics`."""

POSES: dict[str, tuple[int, ...]] = {
    "matrix": (16, 12),
    "xyz_rpy": (6,),
    "xyz_quaternion_xyzw": (7,),
    "xyz_quaternion_wxyz": (7,),
}
"""Layouts of a pose in a column, and their numbers of values."""


class CameraMapping(BaseModel):
    """The places and conventions of a camera's data in a recording.

    A source uses some of them (`DatasetBuilder.maps`). None means as stated in the files.

    Attributes:
        rgb, depth, pose, info: their topics in a bag, or columns in a table.
        intrinsics: fx, fy, cx, cy in pixels of the colour images, and OpenCV's distortion: k1, k2,
            p1, p2[, k3[, k4, k5, k6]]. The centre of the first pixel is (0, 0), as in OpenCV, ROS
            and RealSense.
        depth_unit: metres per unit of depth.
        pose_layout: the format of a pose: a row-major matrix; x, y, z and the angles roll, pitch
            and yaw in radians, about the fixed axes x, y and z in that order; or x, y, z and a
            quaternion.
        pose_direction: the direction of the poses.
        pose_axes: the camera's axes. OpenCV: x right, y down, z forward; OpenGL: x right, y up,
            z backward; ROS: body axes, x forward, y left, z up.
        body_from_camera: the camera's pose on the moving body that the poses describe, or, without
            poses, in the world: 16 numbers of a row-major (4, 4) matrix. Its camera has axes
            `pose_axes`.
        time_offset: seconds to add to the times of the poses.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rgb: str | None = None
    depth: str | None = None
    pose: str | None = None
    info: str | None = None
    intrinsics: tuple[float, ...] | None = None
    depth_unit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    pose_layout: (
        Literal["matrix", "xyz_rpy", "xyz_quaternion_xyzw", "xyz_quaternion_wxyz"] | None
    ) = None
    pose_direction: Literal["world_from_camera", "camera_from_world"] | None = None
    pose_axes: Literal["opencv", "opengl", "ros"] | None = None
    body_from_camera: tuple[float, ...] | None = None
    time_offset: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @field_validator("intrinsics")
    @classmethod
    def _check_intrinsics(cls, numbers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if numbers is None:
            return None
        if len(numbers) not in CALIBRATIONS or not np.isfinite(numbers).all():
            raise ValueError("has to be fx,fy,cx,cy or fx,fy,cx,cy,k1,k2,p1,p2[,k3[,k4,k5,k6]]")
        if min(numbers[:2]) <= 0 or min(numbers[2:4]) < 0:
            raise ValueError("has a focal length or principal point under 0")
        return numbers

    @field_validator("body_from_camera")
    @classmethod
    def _check_mount(cls, numbers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if numbers is not None:
            matrix = np.reshape(numbers, (1, 4, 4)) if len(numbers) == 16 else np.zeros((1, 4, 4))
            if not rigidity_error(matrix)[0] <= RIGID:
                raise ValueError("has to be the 16 numbers of a rigid 4 x 4 matrix, row after row")
        return numbers

    def poses(self, numbers: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert (T, n) or (T, rows, columns) numbers of a column to (T, 4, 4) poses.

        Direction and axes are not changed. Without `pose_layout`, 16 and 12 numbers are a matrix, 6
        are "xyz_rpy" and 7 are "xyz_quaternion_xyzw". Raises ValueError for other counts.
        """
        from scipy.spatial.transform import Rotation

        flat = numbers.reshape(len(numbers), -1).astype(np.float64)
        count = flat.shape[1]
        layout: str = self.pose_layout or next((k for k, n in POSES.items() if count in n), "")
        if count not in POSES.get(layout, ()):
            raise ValueError(f"has {count} numbers, which do not fit {layout or 'any pose_layout'}")
        poses = np.tile(np.eye(4), (len(flat), 1, 1))
        if layout == "matrix":
            poses[:, : count // 4] = flat.reshape(-1, count // 4, 4)
            return poses
        known: NDArray[np.bool_] = np.asarray(np.isfinite(flat).all(axis=1))
        turned = flat[known, 3:]
        if layout == "xyz_rpy":
            rotation = Rotation.from_euler("xyz", turned)
        else:
            known[known] = np.linalg.norm(turned, axis=1) > 0.5
            turned = flat[known, 3:]
            xyzw = turned[:, [1, 2, 3, 0]] if layout == "xyz_quaternion_wxyz" else turned
            rotation = Rotation.from_quat(xyzw)
        poses[known, :3, :3], poses[:, :3, 3] = rotation.as_matrix(), flat[:, :3]
        poses[~known] = np.nan
        return poses

    def as_json(self) -> dict[str, Any]:
        """The settings that are not None, as JSON values."""
        return self.model_dump(mode="json", exclude_none=True)

    def lens(self, size: tuple[int, int]) -> Lens | None:
        """The lens from `intrinsics`, for images of `size` (width, height)."""
        if self.intrinsics is None:
            return None
        return Lens.of(opencv_matrix(*self.intrinsics[:4]), size, self.intrinsics[4:])

    def world_from_camera(self, poses: NDArray[np.floating]) -> NDArray[np.float64]:
        """Convert (..., 4, 4) poses of the recording to world_from_camera with OpenCV axes."""
        standard = poses.astype(np.float64)
        if self.pose_direction == "camera_from_world":
            standard = np.asarray(np.linalg.inv(standard), np.float64)
        if self.body_from_camera is not None:
            standard = standard @ np.reshape(self.body_from_camera, (4, 4))
        axes = {"opengl": OPENGL_FROM_OPENCV, "ros": ROS_FROM_OPENCV}.get(self.pose_axes or "")
        return standard if axes is None else standard @ axes


def camera_mapping(where: str, values: dict[str, Any]) -> CameraMapping:
    """A mapping from values by attribute name.

    where: the file or option of the values, for errors. Raises UsageError for an invalid value.
    """
    try:
        return CameraMapping.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        option = name.replace("_", "-") if where == "--" else name
        raise UsageError(f"{where}{option}: {problem}.") from None


def read_cameras(path: Path) -> tuple[CameraMapping, ...]:
    """Read the mappings of a YAML file: `cameras`, a list of mappings by attribute name.

    `intrinsics` may also be the name of a column, `depth_unit` one of `UNITS`, and a matrix may be
    rows of numbers. Raises UsageError for an invalid file.
    """
    try:
        document = yaml.safe_load(read_bytes(path, 1 << 20))
    except (yaml.YAMLError, RecursionError) as error:
        problem = shorten_message(str(error).replace("\n", " "))
        raise UsageError(f"{path}: is not YAML ({problem}); correct it.") from None
    rows = document.get("cameras") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise UsageError(
            f"{path}: has no list 'cameras'; occgen-hub cameras INPUT writes a file to begin with."
        )
    return tuple(_from_file(f"{path}: camera {n}: ", row) for n, row in enumerate(rows, 1))


def _from_file(where: str, row: dict[str, Any]) -> CameraMapping:
    K = row.get("intrinsics")
    if isinstance(K, list) and len(K) == 3 and all(isinstance(r, list) and len(r) == 3 for r in K):
        row = {**row, "intrinsics": [K[0][0], K[1][1], K[0][2], K[1][2]]}
    values = {str(key): _flatten(value) for key, value in row.items()}
    if isinstance(values.get("intrinsics"), str):
        if values.get("info"):
            raise UsageError(f"{where}intrinsics: info says the same; leave one of them out.")
        values["info"] = values.pop("intrinsics")
    if values.get("depth_unit") in UNITS:
        values["depth_unit"] = UNITS[values["depth_unit"]]
    if not values.get("rgb"):
        raise UsageError(f"{where}rgb: is missing; name the camera's colour images.")
    return camera_mapping(where, values)


def _flatten(value: Any) -> Any:
    """Rows of numbers as one list."""
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        return [number for row in value for number in row]
    return value


def metres_in_unit(scale: float) -> float:
    """Metres per unit of depth, from a scale of files and tools.

    5000 means units per metre, and 0.0002 means metres per unit. No sensor has units of more than a
    metre, so the number shows which of the two it is.
    """
    return 1.0 / scale if scale > 1 else scale
