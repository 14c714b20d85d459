"""ROS 2 bags: colour, depth, CameraInfo and poses by topic. Needs `rosbags`, but not ROS."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.errors import OccGenError, SourceError, UsageError, install_extra, shorten_message
from occgen_hub.files import MAX_TABLE_ROWS, is_file, opened, read_bytes
from occgen_hub.geometry.lens import Lens, opencv_matrix
from occgen_hub.media import MAX_PIXELS

from .recording import GIVE, TOLERANCE, Layout, Recording, in_metres, left_out_note, pair_up
from .transforms import Transforms, odometry
from .tum import check_tracked

IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
INFO = "sensor_msgs/msg/CameraInfo"
TF = "tf2_msgs/msg/TFMessage"
POSES = (
    *("nav_msgs/msg/Odometry", "geometry_msgs/msg/PoseStamped"),
    "geometry_msgs/msg/PoseWithCovarianceStamped",
)

COLORS = {
    "rgb8": [0, 1, 2], "8UC3": [2, 1, 0], "bgr8": [2, 1, 0], "rgba8": [0, 1, 2],
    "bgra8": [2, 1, 0], "mono8": [0, 0, 0], "8UC1": [0, 0, 0],
}  # fmt: skip
"""Encodings of colour, and the positions of red, green and blue in a pixel."""

DEPTHS = {"16UC1": "u2", "mono16": "u2", "32FC1": "f4"}
"""Encodings of depth: integers, in millimetres by default, or metres."""

UNIT = 0.001
MAX_METADATA = 1 << 19
"""Limit of metadata.yaml in bytes. It lists topics and files; rosbags needs up to 17 s per MB."""

PREFERRED = {
    "rgb": ("color", "rgb"),
    "depth": ("aligned_depth", "registered", "depth"),
}
"""Words in topic names that are preferred among several topics, the best first."""


class Bag(Layout):
    """A `.mcap` file, or a folder of a `.db3` or `.mcap` with its metadata.yaml."""

    what = "a ROS 2 bag"

    def recognise(self, place: Path) -> bool:
        """By the names of files."""
        if place.suffix in (".mcap", ".db3"):
            return is_file(place)
        return is_file(place / "metadata.yaml") and any(
            next(place.glob(f"*{suffix}*"), None) is not None for suffix in (".db3", ".mcap")
        )

    def has_depth(self, place: Path, mapping: CameraMapping) -> bool:
        """By the encoding of the first message of each topic of images."""
        with opened_bag(place) as bag:
            return bag.image_topic("depth", mapping.depth) is not None

    def sources(self, place: Path, mapping: CameraMapping) -> list[Path]:
        """The files of the bag."""
        return _files(place)

    def read(self, place: Path, mapping: CameraMapping) -> Recording:
        """Colour and depth within 20 ms of each other, with the pose at the time of the depth."""
        with opened_bag(place) as bag:
            color = bag.image_topic("rgb", mapping.rgb)
            if color is None:
                raise bag.lacks("a topic of colour images", "rgb=TOPIC")
            depth = bag.image_topic("depth", mapping.depth)
            colors, color_frame = bag.index(color)
            chosen, times, camera_frame = colors, _seconds(colors), color_frame
            depths = None
            if depth is not None:
                depths, camera_frame = bag.index(depth)
                pairs = pair_up(times, _seconds(depths))
                if not len(pairs):
                    problem = f"has no depth within {TOLERANCE:g} s of a colour image"
                    raise SourceError(place, problem, "give other --topics")
                chosen, depths = colors[pairs[:, 0]], depths[pairs[:, 1]]
                times = _seconds(depths)
            poses, tracked = bag.poses(times, camera_frame, mapping)
            kept = np.flatnonzero(tracked)
            chosen, paired = chosen[kept], len(chosen)
            depths = None if depths is None else depths[kept]
            image = bag.color(color, chosen[0])
            size = image.shape[1], image.shape[0]
            lens = mapping.lens(size) or bag.lens(color, size, mapping)
            depth_lens = depth_size = None
            if depth is not None and depths is not None:
                first = bag.depth(depth, depths[0], mapping)
                depth_size = first.shape[1], first.shape[0]
                own = bag.lens(depth, depth_size, mapping, needed=False)
                depth_lens = None if mapping.intrinsics else own
            lens = lens or (depth_lens.resized(size) if depth_lens else None)
            if lens is None:
                raise SourceError(place, "does not state the camera's intrinsics", GIVE)
        source = _Source(place)
        return Recording(
            read_color=lambda frame: source.read(lambda bag: bag.color(color, chosen[frame])),
            color_lens=[lens] * len(kept),
            poses=poses[kept],
            sources=self.sources(place, mapping),
            read_depth=None
            if depth is None or depths is None
            else lambda frame: source.read(lambda bag: bag.depth(depth, depths[frame], mapping)),
            depth_lens=depth_lens,
            depth_size=depth_size,
            times=times[kept],
            notes=(
                *left_out_note(
                    len(colors),
                    without_depth=len(colors) - paired,
                    without_a_pose=paired - len(kept),
                ),
            ),
        )


class _Source:
    """A bag that is opened when the first frame is read and then kept open."""

    def __init__(self, place: Path) -> None:
        self._place, self._turn = place, threading.Lock()
        self._bag: OpenBag | None = None

    def read[Value](self, what: Callable[[OpenBag], Value]) -> Value:
        """Call a function with the open bag, in one thread at a time."""
        with self._turn, _named_errors(self._place):
            if self._bag is None:
                self._bag = OpenBag(self._place)
            return what(self._bag)

    def __del__(self) -> None:
        if self._bag is not None:
            self._bag.close()


def _files(place: Path) -> list[Path]:
    if is_file(place):
        return [place]
    kept = (".db3", ".mcap", ".zstd", ".yaml")
    return sorted(path for path in place.iterdir() if path.suffix in kept)


@contextmanager
def opened_bag(place: Path) -> Iterator[OpenBag]:
    """Open a bag for the block. Errors are raised as SourceError."""
    with _named_errors(place):
        bag = OpenBag(place)
        try:
            yield bag
        finally:
            bag.close()


@contextmanager
def _named_errors(place: Path) -> Iterator[None]:
    try:
        yield
    except (OccGenError, MemoryError):
        raise
    except Exception as error:  # rosbags raises any kind of error for a damaged file.
        reason = shorten_message(str(error) or type(error).__name__)
        raise SourceError(
            place, f"cannot be read ({reason})", "restore it from the source"
        ) from None


class OpenBag:
    """A bag while it is open: its topics, images, lenses and poses."""

    def __init__(self, place: Path) -> None:
        try:
            from rosbags.highlevel import AnyReader
            from rosbags.typesys import Stores, get_typestore
        except ImportError:
            raise UsageError(
                f"{place}: reading ROS 2 bags needs rosbags, which is not installed; "
                f"{install_extra('ros')}."
            ) from None
        self.place = place
        for path in _files(place):  # rosbags would wait for a pipe, and read metadata of any size.
            if path.suffix == ".yaml":
                read_bytes(path, MAX_METADATA)
            else:
                opened(path).close()
        self._reader = AnyReader([place], default_typestore=get_typestore(Stores.ROS2_HUMBLE))
        self._reader.open()
        self.types: dict[str, str] = {c.topic: c.msgtype for c in self._reader.connections}

    def close(self) -> None:
        """Close the file."""
        self._reader.close()

    def lacks(self, what: str, option: str) -> SourceError:
        """The error for something that no topic has."""
        listed = ", ".join(f"{topic} ({kind})" for topic, kind in sorted(self.types.items()))
        return SourceError(
            self.place, f"does not have {what} among {listed[:600]}", f"give --topics {option}"
        )

    def messages(
        self, topic: str, start: int | None = None, stop: int | None = None
    ) -> Iterator[tuple[int, Any]]:
        """The messages of a topic, with their recording times in nanoseconds."""
        own = [c for c in self._reader.connections if c.topic == topic]
        if not own:
            raise self.lacks(f"the topic {topic}", "with one of these")
        for connection, when, data in self._reader.messages(own, start, stop):
            yield when, self._reader.deserialize(data, connection.msgtype)

    def topics(self, *kinds: str) -> list[str]:
        """The sorted topics with one of these message types."""
        return sorted(topic for topic, kind in self.types.items() if kind in kinds)

    def image_topic(self, kind: Literal["rgb", "depth"], given: str | None) -> str | None:
        """The topic of colour or depth images: the given one, or the recognised one.

        Raises SourceError if several are equally suitable.
        """
        if given is not None:
            if self.types.get(given) not in (IMAGE, COMPRESSED):
                raise self.lacks(f"images in the topic {given}", f"{kind}=TOPIC")
            return given
        found = [t for t in self.topics(IMAGE, COMPRESSED) if self._kind(t) == kind]
        raw = [t for t in found if self.types[t] == IMAGE]
        named = {t.removesuffix("/compressedDepth").removesuffix("/compressed") for t in raw}
        found = [t for t in found if t in raw or t.rpartition("/")[0] not in named]
        for word in PREFERRED[kind]:
            if preferred := [topic for topic in found if word in topic]:
                found = preferred
                break
        if len(found) > 1:
            problem = f"has several topics of {kind} images: {', '.join(found)[:300]}"
            raise SourceError(self.place, problem, f"name one with --topics {kind}=TOPIC")
        return found[0] if found else None

    def _kind(self, topic: str) -> str:
        """The first message of a topic of images."""
        _, message = next(self.messages(topic), (0, None))
        if message is None:
            return ""
        if self.types[topic] == COMPRESSED:
            return "depth" if "compressedDepth" in message.format else "rgb"
        if message.encoding in DEPTHS:
            return "depth"
        return "rgb" if message.encoding in COLORS and "infra" not in topic else ""

    def index(self, topic: str) -> tuple[NDArray[np.int64], str]:
        """(n, 2) int64: the recording time of each message, and the time of its image.

        Both are nanoseconds, sorted by the second. Also returns the camera's frame.
        """
        rows, frame = dict[int, int](), ""
        for when, message in self.messages(topic):
            stamp = message.header.stamp
            taken = stamp.sec * 10**9 + stamp.nanosec
            rows.setdefault(taken or when, when)
            frame = frame or message.header.frame_id
            if len(rows) > MAX_TABLE_ROWS:
                raise SourceError(self.place, f"has over {len(rows)} images in {topic}", "split it")
        if not rows:
            raise SourceError(self.place, f"has no messages in {topic}", "give other --topics")
        return np.array([(when, taken) for taken, when in sorted(rows.items())]), frame

    def _at(self, topic: str, entry: NDArray[np.int64]) -> Any:
        """The message of an entry of `index`."""
        when, taken = (int(number) for number in entry)
        for _, message in self.messages(topic, when, when + 1):
            stamp = message.header.stamp
            if stamp.sec * 10**9 + stamp.nanosec in (taken, 0):
                return message
        raise SourceError(
            self.place, f"has lost a message of {topic}", "do not change it meanwhile"
        )

    def color(self, topic: str, entry: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(h, w, 3) uint8 RGB."""
        message = self._at(topic, entry)
        if self.types[topic] == COMPRESSED:
            return np.asarray(_picture(bytes(message.data)).convert("RGB"))
        if message.encoding not in COLORS:
            problem = f"has images of the encoding {message.encoding[:30]} in {topic}"
            raise SourceError(self.place, problem, f"record one of {', '.join(COLORS)}")
        order = COLORS[message.encoding]
        channels = {"rgba8": 4, "bgra8": 4, "mono8": 1, "8UC1": 1}.get(message.encoding, 3)
        pixels = _rows(message, np.dtype("u1"), channels)
        return np.ascontiguousarray(pixels[..., order])

    def depth(
        self, topic: str, entry: NDArray[np.int64], mapping: CameraMapping
    ) -> NDArray[np.float64]:
        """(h, w) float64 metres, 0 for none."""
        message = self._at(topic, entry)
        if self.types[topic] == COMPRESSED:  # image_transport puts 12 bytes before a PNG.
            data = bytes(message.data)
            return in_metres(np.asarray(_picture(data[data.find(b"\x89PNG") :])), mapping, UNIT)
        if message.encoding not in DEPTHS:
            problem = f"has images of the encoding {message.encoding[:30]} in {topic}"
            raise SourceError(self.place, problem, f"record one of {', '.join(DEPTHS)}")
        order = ">" if message.is_bigendian else "<"
        values = _rows(message, np.dtype(order + DEPTHS[message.encoding]), 1)[..., 0]
        return in_metres(values, mapping, UNIT)

    def lens(
        self, topic: str, size: tuple[int, int], mapping: CameraMapping, *, needed: bool = True
    ) -> Lens | None:
        """The lens of a topic of images, from the CameraInfo in the same namespace.

        If there is none and a lens is `needed`, the bag's only CameraInfo is used.
        """
        base = topic.removesuffix("/compressedDepth").removesuffix("/compressed")
        beside = f"{base.rpartition('/')[0]}/camera_info"
        infos = self.topics(INFO)
        own = mapping.info or (beside if beside in infos else None)
        if own is None and needed and len(infos) == 1:
            own = infos[0]
        if own is None:
            return None
        _, info = next(self.messages(own), (0, None))
        if info is None:
            return None
        K = np.array(info.p).reshape(3, 4)[:, :3] if "rect" in base else np.empty(0)
        rectified = K.size == 9 and K[0, 0] > 0
        K = K if rectified else np.array(info.k).reshape(3, 3)
        distortion = () if rectified else tuple(float(d) for d in info.d)
        if K[0, 0] <= 0 or K[1, 1] <= 0:
            raise SourceError(self.place, f"has no calibration in {own}", GIVE)
        fisheye = info.distortion_model in ("equidistant", "fisheye") and bool(distortion)
        matrix = opencv_matrix(K[0, 0], K[1, 1], K[0, 2], K[1, 2])
        stated = (int(info.width) or size[0], int(info.height) or size[1])
        lens = Lens.of(matrix, stated, distortion, "fisheye" if fisheye else "radial")
        return lens.resized(size)

    def poses(
        self, times: NDArray[np.float64], frame: str, mapping: CameraMapping
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(n, 4, 4) world_from_camera at (n,) times, and (n,) bool: which poses are known.

        frame: the camera's optical frame (REP 103: x right, y down, z forward). Poses are taken
        from the given topic, from /tf, or from the only topic of odometry or poses.
        """
        offset = mapping.time_offset or 0.0
        tree = Transforms()
        for topic in self.topics(TF):
            for when, message in self.messages(topic):
                for transform in message.transforms:
                    tree.add(transform, when, static="static" in topic)
        tree.finish(offset)
        own = mapping.pose
        if own is None and not tree.moves(frame):
            found = self.topics(*POSES)
            if len(found) != 1:
                what = f"one topic of poses or a moving frame above {frame!r} in /tf"
                raise self.lacks(what, "pose=TOPIC")
            own = found[0]
        if own is not None and self.types.get(own) != TF:
            if self.types.get(own) not in POSES:
                raise self.lacks(f"poses in the topic {own}", "pose=TOPIC")
            rows = list(self.messages(own))
            tree = odometry(
                self.place, rows, tree, frame, offset, mapped=bool(mapping.body_from_camera)
            )
        raw, known, moments = tree.at(times, frame)
        check_tracked(self.place, known, times, moments)
        return mapping.world_from_camera(raw), known


def _seconds(index: NDArray[np.int64]) -> NDArray[np.float64]:
    """The times of the images of an index, in seconds."""
    return np.asarray(index[:, 1] * 1e-9, np.float64)


def _rows(message: Any, dtype: np.dtype[Any], channels: int) -> NDArray[Any]:
    """(h, w, channels) of an Image message, whose rows may be padded."""
    row = message.width * channels * dtype.itemsize
    data = np.asarray(message.data, np.uint8)
    rows = data[: message.height * message.step].reshape(message.height, message.step)[:, :row]
    pixels: NDArray[Any] = np.ascontiguousarray(rows).view(dtype)
    return pixels.reshape(message.height, message.width, channels)


def _picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"an image claims {image.width} x {image.height} pixels")
    return image
