"""Built trajectories as one LeRobot v3.0 dataset, written by the lerobot library itself."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from occgen_hub.errors import DatasetError, OccGenError
from occgen_hub.files import ABSENT, files_under
from occgen_hub.lerobot.realtime_guard import no_realtime_scheduling
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.schema import Feature, Schema

CODEBASE = "v3.0"
OWN = ("timestamp", "frame_index", "episode_index", "index", "task_index")
"""Columns that LeRobot computes itself."""

RESERVED = ("task", "size")
"""Keys that LeRobot uses itself while it writes an episode."""

DEPTH_MAX = 6.5535
"""Metres: the largest depth of a 16-bit image with 10,000 units per metre."""

STATE = "observation.state"
"""The feature from which LeRobot's policies read the robot's state."""

CAMERA_STATE = Feature(dtype="float32", shape=(7,), names=["x", "y", "z", "qx", "qy", "qz", "qw"])
"""The camera's pose as a state: metres in the source's world and a quaternion."""

QUIET_LOSSLESS = {"x265-params": "lossless=1:bframes=0:log-level=none"}
"""No B-frames: in short videos x265 gives them timestamps that no decoder can read."""


@dataclass(frozen=True)
class Layout:
    """What all frames of a LeRobot dataset have in common.

    fps: frames per second; size: (width, height) in pixels, both even; features: of the columns,
    without LeRobot's own; rgb, depth: whether there are images; state: whether the camera's pose
    is also written as `STATE`, see `camera_states`.
    """

    fps: int
    robot_type: str
    size: tuple[int, int]
    features: dict[str, Feature]
    rgb: bool
    depth: bool
    state: bool = False

    @property
    def columns(self) -> dict[str, Feature]:
        """`features`, and the state if it is the camera's pose."""
        return self.features | ({STATE: CAMERA_STATE} if self.state else {})

    def lerobot_features(self, schema: Schema) -> dict[str, dict[str, Any]]:
        """The features as `LeRobotDataset.create` takes them."""
        features = {
            name: {**feature.info(), "shape": feature.shape}
            for name, feature in ((name, flat(own)) for name, own in self.columns.items())
        }
        width, height = self.size
        video = {"dtype": "video", "names": ["height", "width", "channels"]}
        if self.rgb:
            features[schema.folder("rgb")] = {**video, "shape": (height, width, 3)}
        if self.depth:
            info = {"is_depth_map": True}
            features[schema.folder("depth")] = {**video, "shape": (height, width, 1), "info": info}
        return features


@dataclass(frozen=True)
class Fit:
    """How an image of `size` is fitted into a frame of size `into`, both (width, height) in pixels.

    It is scaled to fit, keeping its aspect ratio, and centred on black. An image that is at most
    one column and one row too large is cut instead: the sides of a video are even.
    """

    size: tuple[int, int]
    into: tuple[int, int]

    @property
    def cut(self) -> bool:
        """Whether the image is only cut, or left as it is."""
        return all(0 <= own - new <= 1 for own, new in zip(self.size, self.into, strict=True))

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, width, height) of the image in the frame, before cutting."""
        if self.cut:
            return (0, 0, *self.size)
        scale = min(new / own for own, new in zip(self.size, self.into, strict=True))
        width, height = (max(1, round(own * scale)) for own in self.size)
        return (self.into[0] - width) // 2, (self.into[1] - height) // 2, width, height

    def image(self, pixels: NDArray[Any], resample: Image.Resampling) -> NDArray[Any]:
        """The frame of (H, W) or (H, W, 3) pixels."""
        left, top, width, height = self.box
        if not self.cut:
            pixels = np.asarray(Image.fromarray(pixels).resize((width, height), resample))
        fitted = np.zeros((self.into[1], self.into[0], *pixels.shape[2:]), pixels.dtype)
        part = fitted[top : top + height, left : left + width]
        part[...] = pixels[: part.shape[0], : part.shape[1]]
        return fitted

    def intrinsics(self, K: NDArray[Any]) -> NDArray[Any]:
        """(..., 3, 3) intrinsics of the frame, from those of the image."""
        left, top, width, height = self.box
        sx, sy = width / self.size[0], height / self.size[1]
        move = np.array([[sx, 0, left], [0, sy, top], [0, 0, 1]])
        moved: NDArray[Any] = (move @ K.astype(np.float64)).astype(K.dtype)
        return moved


def flat(feature: Feature) -> Feature:
    """A feature as it is exported: arrays of several dimensions are flattened in row-major order.

    LeRobot's editing tools and the training of some policies fail with more dimensions.
    """
    if len(feature.shape) < 2:
        return feature
    return feature.model_copy(update={"shape": (prod(feature.shape),)})


def camera_states(world_from_camera: NDArray[Any]) -> NDArray[np.float32]:
    """(T, 7) float32 of (T, 4, 4) rigid poses: x, y, z in metres and the quaternion x, y, z, w.

    The first quaternion has w >= 0. Each later one has the sign that brings it closer to the one
    before, so that quaternions do not jump.
    """
    quaternions = Rotation.from_matrix(world_from_camera[:, :3, :3]).as_quat(canonical=True)
    turned = np.einsum("ij,ij->i", quaternions[:-1], quaternions[1:]) < 0
    quaternions[1:][np.logical_xor.accumulate(turned)] *= -1
    return np.hstack([world_from_camera[:, :3, 3], quaternions]).astype(np.float32)


def write(
    out: Path,
    layout: Layout,
    found: Iterable[Trajectory],
    progress: Callable[[int], None] = lambda frames: None,
) -> None:
    """Write each trajectory as an episode into the folder `out`, which must not exist.

    RGB becomes video. Depth becomes LeRobot's depth video of 12 bits, losslessly encoded: 0 stays
    0, and depth up to DEPTH_MAX is off by at most 1.3 mm. `progress` gets the number of frames
    written since its last call. Raises DatasetError for a trajectory that cannot be read,
    OccGenError for one that LeRobot rejects, and OSError.
    """
    temporary = out.with_name(f"{out.name}.tmp")
    with _quiet_libraries(), no_realtime_scheduling(), _temporary_files(temporary):
        dataset = None
        try:
            for trajectory in found:
                with _lerobot_errors(trajectory):
                    if dataset is None:
                        dataset = _create(out, layout, trajectory.schema)
                    for frame in _frames(trajectory, layout):
                        dataset.add_frame(frame)
                        progress(1)
                    dataset.save_episode(parallel_encoding=False)
        except BaseException:
            if dataset is not None:  # Else it writes when it is garbage-collected.
                with suppress(Exception):
                    dataset.finalize()
            raise
        if dataset is not None:
            dataset.finalize()
            _sort_statistics(dataset)
            shutil.rmtree(out / "images", ignore_errors=True)  # LeRobot may leave it behind.
            for feature in dataset.meta.depth_keys:
                for video in sorted((out / "videos" / feature).rglob("*.mp4")):
                    _set_level(video, temporary / "leveled.mp4")
            _reset_modes(out)


@contextmanager
def _temporary_files(folder: Path) -> Iterator[None]:
    """Put LeRobot's temporary files into `folder`, which is created here and removed at the end.

    They then use the disk of the export, not the system's temporary directory.
    """
    before = tempfile.tempdir
    folder.mkdir()
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def _create(out: Path, layout: Layout, schema: Schema) -> Any:
    """An empty LeRobotDataset."""
    from lerobot.configs.video import DepthEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset.create(
        repo_id=f"local/{out.name}",
        fps=layout.fps,
        features=layout.lerobot_features(schema),
        root=out,
        robot_type=layout.robot_type,
        use_videos=layout.rgb or layout.depth,
        video_backend="pyav",
        depth_encoder=DepthEncoderConfig(
            depth_min=0.0, depth_max=DEPTH_MAX, extra_options=QUIET_LOSSLESS
        ),
    )


@contextmanager
def _lerobot_errors(trajectory: Trajectory) -> Iterator[None]:
    """Turn errors of LeRobot and its encoders into OccGenErrors that name the trajectory."""
    import av

    try:
        yield
    except (ValueError, RuntimeError, av.FFmpegError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OccGenError(
            f"{trajectory.path}: LeRobot cannot write it ({reason.rstrip('.')}); check its files "
            "with occgen-hub validate."
        ) from error


def _sort_statistics(dataset: Any) -> None:
    """Write the statistics in sorted order. LeRobot's order is that of a set, which varies."""
    from lerobot.datasets.io_utils import write_stats

    stats = dataset.meta.stats or {}
    dataset.meta.stats = {name: dict(sorted(stats[name].items())) for name in sorted(stats)}
    write_stats(dataset.meta.stats, dataset.root)


def _set_level(video: Path, temporary: Path) -> None:
    """Declare level 6.2 in the headers of an HEVC video. The frames are not changed.

    x265 declares level 8.5 for lossless videos, which means no limits. rerun and other readers
    reject it.
    """
    import av
    from av.bitstream import BitStreamFilterContext

    with av.open(video) as source, av.open(temporary, "w") as target:
        stream = source.streams.video[0]
        copied = target.add_stream_from_template(stream, opaque=True)
        change = BitStreamFilterContext("hevc_metadata=level=6.2", stream, copied)
        for packet in source.demux(stream):
            # The last packet is empty, which makes the filter flush.
            for changed in change.filter(packet if packet.dts is not None else None):
                changed.stream = copied
                target.mux(changed)
    temporary.replace(video)


def _reset_modes(out: Path) -> None:
    """Give all files the mode of a new file. Videos have the private mode of temporary files."""
    mode = (out / "meta/info.json").stat().st_mode
    for path in files_under(out):
        path.chmod(mode)


def _frames(trajectory: Trajectory, layout: Layout) -> Iterator[dict[str, Any]]:
    """The frames of a trajectory, as `LeRobotDataset.add_frame` takes them."""
    schema, table = trajectory.schema, trajectory.table()
    fit = Fit(trajectory.image_size, layout.size)
    features = layout.columns
    columns: dict[str, Any] = {}
    for name, feature in layout.features.items():
        try:
            values = feature.to_numpy(table[name])
        except (KeyError, ValueError) as error:
            problem = f"column {name}: {error}"
            raise DatasetError(trajectory.file("frames"), problem, REBUILD) from None
        of_images = name in schema.image_intrinsics and feature.shape == (3, 3)
        columns[name] = fit.intrinsics(values) if of_images else values
    if layout.state:
        columns[STATE] = camera_states(trajectory.world_from_camera())
    tasks, task_index = trajectory.tasks(), trajectory.column("task_index").tolist()
    rgb = trajectory.images()
    for t in range(table.num_rows):
        if not 0 <= task_index[t] < len(tasks):
            problem = f"has no task {task_index[t]}, the task of frame {t}"
            raise DatasetError(trajectory.file("tasks"), problem, REBUILD)
        frame = {name: _value(values[t], features[name]) for name, values in columns.items()}
        if layout.rgb:
            image = rgb(t)
            if image is None:
                raise DatasetError(trajectory.file("video"), "is missing", ABSENT)
            frame[schema.folder("rgb")] = fit.image(image, Image.Resampling.BILINEAR)
        if layout.depth:
            depth = trajectory.depth(t)
            if depth is None:
                raise DatasetError(trajectory.file("depth", t), "is missing", ABSENT)
            metres = fit.image(depth.astype(np.float32), Image.Resampling.NEAREST)
            frame[schema.folder("depth")] = metres[..., None]
        yield {**frame, "task": tasks[task_index[t]]}


def _value(value: Any, feature: Feature) -> Any:
    """One frame's value of a column: a string, or an array of the flat feature's shape."""
    if feature.dtype == "string":
        return str(value)
    return np.asarray(value, feature.dtype).reshape(flat(feature).shape)


class _RaiseLogged(logging.Handler):
    """Raises the error that LeRobot only logs: an image could not be written."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise the logged OSError with the file's name, or a RuntimeError with the message."""
        place, error = record.args if isinstance(record.args, tuple) else (None, None)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(place))
        raise RuntimeError(record.getMessage())


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silence the progress output of encoders and libraries for each episode."""
    writer, raised = logging.getLogger("lerobot.datasets.image_writer"), _RaiseLogged(logging.ERROR)
    writer.addHandler(raised)
    import av.logging
    import datasets

    os.environ.setdefault("SVT_LOG", "1")  # Errors only.
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    av.logging.set_libav_level(av.logging.ERROR)
    try:
        yield
    finally:
        writer.removeHandler(raised)
        av.logging.set_libav_level(av.logging.INFO)  # The default.
        av.logging.set_level(av.logging.get_level())  # LeRobot makes it print; undo that.
        if not bars:
            datasets.utils.enable_progress_bars()
