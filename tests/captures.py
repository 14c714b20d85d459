"""Write one recording in each layout that the source `capture` reads, for tests.

Each function writes an episode into an empty folder: colour, depth, poses and intrinsics in the
conventions of the layout, converted from the episode's (world_from_camera, OpenCV axes, metres).
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from occgen_hub.episode import Episode
from occgen_hub.geometry.poses import from_opengl
from occgen_hub.geometry.trajectory import poses_at
from occgen_hub.media import write_video

START = 1_700_000_000.0
"""Start time of a recording, in seconds."""


def opencv_intrinsics(episode: Episode) -> list[float]:
    """fx, fy, cx, cy for --intrinsics, with the centre of the first pixel at (0, 0)."""
    K = episode.intrinsics[0]
    return [float(v) for v in (K[0, 0], K[1, 1], K[0, 2] - 0.5, K[1, 2] - 0.5)]


def copy_color(episode: Episode, frame: int, place: Path) -> None:
    """Copy the source's image file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    (source,) = (m.path for m in episode.media if m.file == "rgb" and m.frame == frame)
    shutil.copy(source, place)


def write_depth(episode: Episode, frame: int, place: Path, units: float) -> None:
    """Write a 16-bit PNG with the given units per metre."""
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.rint(episode.read_depth(frame) * units).astype(np.uint16)).save(place)


def quaternion(pose: np.ndarray) -> list[float]:
    return Rotation.from_matrix(pose[:3, :3]).as_quat().tolist()


def tum_line(time: float, pose: np.ndarray) -> str:
    return f"{time:.6f} " + " ".join(f"{v:.9f}" for v in [*pose[:3, 3], *quaternion(pose)])


def write_tum(episode: Episode, folder: Path, offset: float = 0.0) -> None:
    """Depth is 5 ms after colour, poses are four times as frequent. offset: pose clock, s."""
    times = START + np.arange(episode.length) / episode.fps
    rgb, depths = ["# color images"], ["# depth maps"]
    for frame, time in enumerate(times):
        rgb.append(f"{time:.6f} rgb/{time:.6f}.jpg")
        depths.append(f"{time + 0.005:.6f} depth/{time + 0.005:.6f}.png")
        copy_color(episode, frame, folder / rgb[-1].split()[1])
        write_depth(episode, frame, folder / depths[-1].split()[1], 5000)
    (folder / "rgb.txt").write_text("\n".join(rgb))
    (folder / "depth.txt").write_text("\n".join(depths))
    moments = np.arange(times[0], times[-1] + 0.001, 0.25 / episode.fps)
    poses, _ = poses_at(moments, times, episode.world_from_camera, 10, 0)
    rows = [tum_line(t + 0.005 + offset, pose) for t, pose in zip(moments, poses, strict=True)]
    (folder / "groundtruth.txt").write_text("# timestamp tx ty tz qx qy qz qw\n" + "\n".join(rows))


def write_seven_scenes(episode: Episode, folder: Path) -> None:
    for frame, pose in enumerate(episode.world_from_camera):
        stem = folder / f"frame-{frame:06d}"
        copy_color(episode, frame, Path(f"{stem}.color.jpg"))
        write_depth(episode, frame, Path(f"{stem}.depth.png"), 1000)
        np.savetxt(f"{stem}.pose.txt", pose)
    np.savetxt(folder / "camera-intrinsics.txt", episode.intrinsics[0])


def write_scannet(episode: Episode, folder: Path) -> None:
    (folder / "pose").mkdir(parents=True)
    (folder / "intrinsic").mkdir()
    for frame, pose in enumerate(episode.world_from_camera):
        copy_color(episode, frame, folder / f"color/{frame}.jpg")
        write_depth(episode, frame, folder / f"depth/{frame}.png", 1000)
        np.savetxt(folder / f"pose/{frame}.txt", pose)
    K = np.eye(4)
    K[:3, :3] = episode.intrinsics[0]
    K[:2, 2] -= 0.5
    for kind in ("color", "depth"):
        np.savetxt(folder / f"intrinsic/intrinsic_{kind}.txt", K)


def write_transforms(
    episode: Episode, folder: Path, *, with_depth: bool = True, swapped: bool = False
) -> None:
    K, frames = episode.intrinsics[0], []
    for frame, pose in enumerate(from_opengl(episode.world_from_camera)):
        copy_color(episode, frame, folder / f"images/frame_{frame:05d}.jpg")
        entry = {"file_path": f"images/frame_{frame:05d}.jpg", "transform_matrix": pose.tolist()}
        if with_depth:
            entry["depth_file_path"] = f"depths/frame_{frame:05d}.png"
            write_depth(episode, frame, folder / entry["depth_file_path"], 1000)
        frames.append(entry)
    fx, fy = (K[1, 1], K[0, 0]) if swapped else (K[0, 0], K[1, 1])
    width, height = episode.image_size
    values = {"camera_model": "OPENCV", "fl_x": fx, "fl_y": fy, "cx": K[0, 2], "cy": K[1, 2],
              "w": width, "h": height, "frames": frames}  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(values))


def write_stray_scanner(episode: Episode, folder: Path) -> None:
    """A video instead of images. The depth of low confidence is wrong in a corner."""
    write_video(folder / "rgb.mp4", map(episode.read_rgb, range(episode.length)), episode.fps)
    rows = ["timestamp, frame, x, y, z, qx, qy, qz, qw"]
    width, height = episode.image_size
    confidence = np.full((height, width), 2, np.uint8)
    confidence[: height // 10, : width // 10] = 0
    for frame, pose in enumerate(episode.world_from_camera):
        time = 8000 + frame / episode.fps
        numbers = ", ".join(f"{value:.9f}" for value in [*pose[:3, 3], *quaternion(pose)])
        rows.append(f"{time:.6f}, {frame + 3:06d}, {numbers}")
        metres = np.where(confidence > 0, episode.read_depth(frame), 0.6)
        for kind, values in (("depth", np.rint(metres * 1000)), ("confidence", confidence)):
            (folder / kind).mkdir(exist_ok=True)
            pixels = values.astype(np.uint16 if kind == "depth" else np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{frame + 3:06d}.png")
    (folder / "odometry.csv").write_text("\n".join(rows) + "\n")
    fx, fy, cx, cy = opencv_intrinsics(episode)
    (folder / "camera_matrix.csv").write_text(f"{fx}, 0.0, {cx}\n0.0, {fy}, {cy}\n0.0, 0.0, 1.0")


def write_plain(episode: Episode, folder: Path) -> None:
    """Like a RealSense recorder: files named by milliseconds, without lists of files."""
    rows = []
    for frame, pose in enumerate(episode.world_from_camera):
        time = START + frame / episode.fps
        copy_color(episode, frame, folder / f"color/{1000 * time:.3f}.jpg")
        write_depth(episode, frame, folder / f"depth/{1000 * time + 4:.3f}.png", 1000)
        rows.append(tum_line(time + 0.004, pose))
    (folder / "trajectory.txt").write_text("\n".join(rows))


def write_colmap(episode: Episode, folder: Path, *, binary: bool) -> None:
    """A model of one PINHOLE camera, with two points in each image."""
    place = folder / "sparse/0"
    place.mkdir(parents=True)
    K, (width, height) = episode.intrinsics[0], episode.image_size
    camera = [K[0, 0], K[1, 1], K[0, 2], K[1, 2]]
    inverse = np.linalg.inv(episode.world_from_camera)
    rows = []
    for frame, pose in enumerate(inverse):
        copy_color(episode, frame, folder / f"images/{frame}.jpg")
        x, y, z, w = quaternion(pose)
        rows.append((frame + 1, [w, x, y, z, *pose[:3, 3]], f"{frame}.jpg"))
    if binary:
        data = struct.pack("<QiiQQ4d", 1, 7, 1, width, height, *camera)
        (place / "cameras.bin").write_bytes(data)
        data = struct.pack("<Q", len(rows))
        for number, values, name in reversed(rows):
            data += struct.pack("<i7di", number, *values, 7) + name.encode() + b"\0"
            data += struct.pack("<QddqddQ", 2, 1.0, 2.0, -1, 3.0, 4.0, 5)
        (place / "images.bin").write_bytes(data)
        return
    words = " ".join(map(repr, map(float, camera)))
    (place / "cameras.txt").write_text(f"# Camera list\n7 PINHOLE {width} {height} {words}\n")
    lines = ["# Image list"]
    for number, values, name in reversed(rows):
        lines += [f"{number} {' '.join(map(repr, map(float, values)))} 7 {name}", "1 2 -1 3 4 5"]
    lines[-1] = ""  # An image without points.
    (place / "images.txt").write_text("\n".join(lines) + "\n")


def write_bag(episode: Episode, place: Path, *, odometry: bool = False) -> None:
    """A bag of compressed colour, raw depth, CameraInfo and /tf; or raw colour and odometry.

    The folder holds sqlite3 with odometry, else mcap. The camera is mounted 0.4 m above
    base_link, with the axes of an optical frame (REP 103).
    """
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    types = get_typestore(Stores.ROS2_HUMBLE)
    T = {name.rpartition("/")[2]: kind for name, kind in types.types.items()}
    mount = np.eye(4)
    mount[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    mount[:3, 3] = (0.1, 0.0, 0.4)
    bodies = episode.world_from_camera @ np.linalg.inv(mount)
    width, height = episode.image_size

    def stamp(time: float):
        nanoseconds = round(time * 1e9)
        return T["Time"](sec=nanoseconds // 10**9, nanosec=nanoseconds % 10**9)

    def header(time: float, frame: str):
        return T["Header"](stamp=stamp(time), frame_id=frame)

    def rotation(pose: np.ndarray):
        return T["Quaternion"](*quaternion(pose))

    def transform(time: float, parent: str, child: str, pose: np.ndarray):
        moved = T["Transform"](T["Vector3"](*pose[:3, 3]), rotation(pose))
        return T["TransformStamped"](header(time, parent), child, moved)

    plugin = StoragePlugin.SQLITE3 if odometry else StoragePlugin.MCAP
    with Writer(place, version=9, storage_plugin=plugin) as bag:
        topics = {}

        def write(topic: str, kind: str, time: float, message) -> None:
            if topic not in topics:
                topics[topic] = bag.add_connection(topic, kind, typestore=types)
            bag.write(topics[topic], round(time * 1e9), types.serialize_cdr(message, kind))

        write("/tf_static", "tf2_msgs/msg/TFMessage", START,
              T["TFMessage"]([transform(START, "base_link", "camera_optical", mount)]))  # fmt: skip
        K = episode.intrinsics[0] - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        P = np.concatenate([K, np.zeros((3, 1))], axis=1)
        covariance = np.zeros(36)
        for frame, body in enumerate(bodies):
            time = START + frame / episode.fps
            head = header(time, "camera_optical")
            info = T["CameraInfo"](
                header=head, height=height, width=width, distortion_model="plumb_bob",
                d=np.zeros(5), k=K.ravel(), r=np.eye(3).ravel(), p=P.ravel(),
                binning_x=0, binning_y=0,
                roi=T["RegionOfInterest"](0, 0, 0, 0, False),
            )  # fmt: skip
            write("/camera/color/camera_info", "sensor_msgs/msg/CameraInfo", time, info)
            (path,) = (m.path for m in episode.media if m.file == "rgb" and m.frame == frame)
            if odometry:
                pixels = episode.read_rgb(frame)[..., ::-1]
                image = T["Image"](head, height, width, "bgr8", 0, 3 * width,
                                   np.ascontiguousarray(pixels).ravel())  # fmt: skip
                write("/camera/color/image_raw", "sensor_msgs/msg/Image", time, image)
            else:
                data = np.frombuffer(path.read_bytes(), np.uint8)
                image = T["CompressedImage"](head, "jpeg", data)
                topic = "/camera/color/image_raw/compressed"
                write(topic, "sensor_msgs/msg/CompressedImage", time, image)
            units = np.rint(episode.read_depth(frame) * 1000).astype(np.uint16)
            values = episode.read_depth(frame).astype(np.float32) if odometry else units
            encoding = "32FC1" if odometry else "16UC1"
            raw = np.ascontiguousarray(values).view(np.uint8).ravel()
            image = T["Image"](header(time + 0.004, "camera_optical"), height, width, encoding, 0,
                               values.itemsize * width, raw)  # fmt: skip
            topic = "/camera/aligned_depth_to_color/image_raw"
            write(topic, "sensor_msgs/msg/Image", time + 0.004, image)
            if odometry:
                pose = T["PoseWithCovariance"](
                    T["Pose"](T["Point"](*body[:3, 3]), rotation(body)), covariance
                )
                zero = T["Vector3"](0.0, 0.0, 0.0)
                twist = T["TwistWithCovariance"](T["Twist"](zero, zero), covariance)
                message = T["Odometry"](header(time + 0.004, "odom"), "base_link", pose, twist)
                write("/odom", "nav_msgs/msg/Odometry", time + 0.004, message)
            else:
                message = T["TFMessage"]([transform(time + 0.004, "map", "base_link", body)])
                write("/tf", "tf2_msgs/msg/TFMessage", time + 0.004, message)
