"""Write a recording as a LeRobot dataset, for tests: v2.1 by hand, v3.0 with the library lerobot.

There are two cameras. "front" has the frames of the recording; "back" has the same frames in
reverse order, so both see the same room. The action has 26 numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial.transform import Rotation

from occgen_hub.episode import Episode
from occgen_hub.geometry.poses import from_opengl
from occgen_hub.lerobot.realtime_guard import no_realtime_scheduling
from occgen_hub.media import write_video

FRONT, BACK = "observation.images.front", "observation.images.back"
FPS = 10
TASKS = ("walk to the door", "walk back")


def recorded_frames(episode: Episode, camera: str, frames: Sequence[int]) -> list[int]:
    """The recording's frames that a camera shows at the given frames of the dataset."""
    last = episode.length - 1
    return [frame if camera == "front" else last - frame for frame in frames]


def actions(frames: Sequence[int]) -> np.ndarray:
    """(T, 26) float32."""
    return (np.asarray(frames)[:, None] + np.arange(26) / 100).astype(np.float32)


def opencv_intrinsics(episode: Episode) -> list[float]:
    K = episode.intrinsics[0]
    return [float(v) for v in (K[0, 0], K[1, 1], K[0, 2] - 0.5, K[1, 2] - 0.5)]


def xyz_rpy(poses: np.ndarray) -> np.ndarray:
    """(T, 6): x, y, z, roll, pitch, yaw."""
    angles = Rotation.from_matrix(poses[:, :3, :3]).as_euler("xyz")
    return np.concatenate([poses[:, :3, 3], angles], axis=1)


def write_gray16(path: Path, images: Sequence[np.ndarray]) -> None:
    """Write a lossless 16-bit grey video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", FPS)
        stream.height, stream.width = images[0].shape
        stream.pix_fmt = "gray16le"
        for image in images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray16le")))
        out.mux(stream.encode())


def write_v21(episode: Episode, root: Path, parts: Sequence[Sequence[int]]) -> None:
    """Write a v2.1 dataset. parts: the frames of each episode.

    Front: depth as gray16 video with 10,000 units per metre, (4,) intrinsics, 4x4 poses with
    OpenGL axes. Back: depth as an Array2D column in metres, 3x3 intrinsics with negative focal
    lengths, camera_from_world poses as x, y, z, roll, pitch, yaw. Uses custom path templates.
    """
    fx, fy, cx, cy = opencv_intrinsics(episode)
    half_turn = np.diag([-1.0, -1, 1, 1])
    episodes, index = [], 0
    for number, frames in enumerate(parts):
        seen = {name: recorded_frames(episode, name, frames) for name in ("front", "back")}
        stem = f"task-0000/episode_{number:08d}"
        for name, shown in seen.items():
            place = root / f"videos/task-0000/observation.images.{name}/episode_{number:08d}.mp4"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_video(place, [episode.read_rgb(t) for t in shown], FPS)
        units = [np.rint(episode.read_depth(t) * 10_000).astype(np.uint16) for t in seen["front"]]
        place = root / f"videos/task-0000/observation.depth.front/episode_{number:08d}.mkv"
        write_gray16(place, units)
        poses = {name: episode.world_from_camera[shown] for name, shown in seen.items()}
        turned = np.linalg.inv(poses["back"] @ half_turn)
        depth = np.stack([episode.read_depth(t) for t in seen["back"]]).astype(np.float32)
        count = len(frames)
        table = {
            "observation.intrinsic.front": np.tile([fx, fy, cx, cy], (count, 1)),
            "observation.extrinsic.front": from_opengl(poses["front"]),
            "observation.intrinsic.back": np.tile([[-fx, 0, cx], [0, -fy, cy], [0, 0, 1]],
                                                  (count, 1, 1)),
            "observation.extrinsic.back": xyz_rpy(turned),
            "observation.depth.back": depth,
            "action": actions(frames),
            "timestamp": (np.arange(count) / FPS).astype(np.float32),
            "frame_index": np.arange(count),
            "episode_index": np.full(count, number),
            "index": np.arange(index, index + count),
            "task_index": np.arange(count) * 2 // count,
        }  # fmt: skip
        (root / "data" / stem).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({k: pa.array(v.tolist(), arrow_type(v)) for k, v in table.items()}),
                       root / f"data/{stem}.parquet")  # fmt: skip
        episodes.append({"episode_index": number, "tasks": [*TASKS], "length": count})
        index += count
    features: dict[str, Any] = {
        name: {"dtype": str(v.dtype), "shape": list(v.shape[1:]) or [1], "names": None}
        for name, v in table.items()
    }
    features["action"]["names"] = {"motors": [f"motor_{n}" for n in range(26)]}
    height, width = depth.shape[1:]
    for name in (FRONT, BACK, "observation.depth.front"):
        channels = 1 if "depth" in name else 3
        features[name] = {"dtype": "video", "shape": [channels, height, width],
                          "names": ["channels", "height", "width"]}  # fmt: skip
    write_meta(root, features, episodes)


def arrow_type(values: np.ndarray) -> pa.DataType:
    arrow = pa.from_numpy_dtype(values.dtype)
    for _ in values.shape[1:]:
        arrow = pa.list_(arrow)
    return arrow


def write_meta(root: Path, features: dict[str, Any], episodes: list[dict[str, Any]]) -> None:
    info = {
        "codebase_version": "v2.1", "robot_type": "walker", "fps": FPS, "features": features,
        "total_episodes": len(episodes), "chunks_size": 1000,
        "data_path": "data/task-{episode_chunk:04d}/episode_{episode_index:08d}.parquet",
        "video_path":
            "videos/task-{episode_chunk:04d}/{video_key}/episode_{episode_index:08d}.mp4",
    }  # fmt: skip
    (root / "meta").mkdir()
    (root / "meta/info.json").write_text(json.dumps(info))
    lines = "\n".join(map(json.dumps, episodes))
    (root / "meta/episodes.jsonl").write_text(lines)
    tasks = [json.dumps({"task_index": n, "task": task}) for n, task in enumerate(TASKS)]
    (root / "meta/tasks.jsonl").write_text("\n".join(tasks))


V21_MAPPING = """
cameras:
  - rgb: observation.images.front
    depth: observation.depth.front
    depth_unit: 0.0001
    intrinsics: observation.intrinsic.front
    pose: observation.extrinsic.front
    pose_axes: opengl
  - rgb: observation.images.back
    depth: observation.depth.back
    intrinsics: observation.intrinsic.back
    pose: observation.extrinsic.back
    pose_layout: xyz_rpy
    pose_direction: camera_from_world
"""


def write_v30(episode: Episode, root: Path, parts: Sequence[Sequence[int]]) -> None:
    """Write a v3.0 dataset with lerobot: one file per camera with all episodes.

    Front: depth as LeRobot depth video, (9,) intrinsics, (16,) poses of the body that carries the
    camera. Back: depth as TIFF images in millimetres, poses as x, y, z, quaternion x, y, z, w.
    """
    from lerobot.configs.video import DepthEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    width, height = episode.image_size
    names = ["height", "width", "channels"]
    color = {"dtype": "video", "shape": (height, width, 3), "names": names}
    depth = {**color, "shape": (height, width, 1), "info": {"is_depth_map": True}}
    numbers = {"dtype": "float32", "names": None}
    features = {
        FRONT: color,
        BACK: {**color, "dtype": "image"},
        "observation.depth.front": depth,
        "observation.depth.back": {**depth, "dtype": "image", "info": {"is_depth_map": True}},
        "observation.camera_int.front": {**numbers, "shape": (9,)},
        "observation.camera_ext.front": {**numbers, "shape": (16,)},
        "observation.camera_ext.back": {**numbers, "shape": (7,)},
        "action": {**numbers, "shape": (26,), "names": [f"motor_{n}" for n in range(26)]},
    }
    dataset = LeRobotDataset.create(
        repo_id="local/robot", root=root, fps=FPS, features=features, robot_type="walker",
        video_backend="pyav",
        depth_encoder=DepthEncoderConfig(extra_options={
            "x265-params": "lossless=1:bframes=0:log-level=none"}),
    )  # fmt: skip
    with no_realtime_scheduling():
        add_episodes(dataset, episode, parts)
        dataset.finalize()


def add_episodes(dataset: Any, episode: Episode, parts: Sequence[Sequence[int]]) -> None:
    """Add each part to a LeRobotDataset of `write_v30` as one episode."""
    mount = np.linalg.inv(MOUNT)
    fx, fy, cx, cy = opencv_intrinsics(episode)
    K = np.array([fx, 0, cx, 0, fy, cy, 0, 0, 1], np.float32)
    for frames in parts:
        for place, frame in enumerate(frames):
            (front,), (back,) = (
                recorded_frames(episode, name, [frame]) for name in ("front", "back")
            )
            pose = episode.world_from_camera[back]
            quaternion = Rotation.from_matrix(pose[:3, :3]).as_quat()
            millimetres = np.rint(episode.read_depth(back) * 1000).astype(np.uint16)
            dataset.add_frame({
                FRONT: episode.read_rgb(front),
                BACK: episode.read_rgb(back),
                "observation.depth.front": episode.read_depth(front).astype(np.float32)[..., None],
                "observation.depth.back": millimetres[..., None],
                "observation.camera_int.front": K,
                "observation.camera_ext.front":
                    (episode.world_from_camera[front] @ mount).astype(np.float32).ravel(),
                "observation.camera_ext.back":
                    np.concatenate([pose[:3, 3], quaternion]).astype(np.float32),
                "action": actions([frame])[0],
                "task": TASKS[place * 2 // len(frames)],
            })  # fmt: skip
        dataset.save_episode(parallel_encoding=False)


MOUNT = np.array([[0, 0, 1, 0.1], [-1, 0, 0, 0], [0, -1, 0, 0.4], [0, 0, 0, 1.0]])
"""body_from_camera of the front camera in `write_v30`."""


def v30_mapping(episode: Episode) -> str:
    """The camera mapping of `write_v30`."""
    return f"""
cameras:
  - rgb: observation.images.front
    depth: observation.depth.front
    intrinsics: observation.camera_int.front
    pose: observation.camera_ext.front
    body_from_camera: {MOUNT.tolist()}
  - rgb: observation.images.back
    depth: observation.depth.back
    intrinsics: {opencv_intrinsics(episode)}
    pose: observation.camera_ext.back
    pose_layout: xyz_quaternion_xyzw
"""
