"""The source `capture`: finds recordings, recognises their layout, and reads them as episodes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.builder import DatasetBuilder, EpisodeRef, other_source
from occgen_hub.camera_mapping import CameraMapping
from occgen_hub.episode import Column, Episode, MediaFile, Note, Task
from occgen_hub.errors import OccGenError, SourceError, UsageError
from occgen_hub.geometry.lens import Lens, PinholeView
from occgen_hub.media import picture_facts
from occgen_hub.schema import Feature

from .bag import Bag
from .colmap import Colmap
from .folders import PlainFolder
from .nerfstudio import NerfStudio
from .recording import Layout, Recording, stated_lens
from .scannet import ScanNet
from .seven_scenes import SevenScenes
from .stray_scanner import StrayScanner
from .tum import TumRgbd

LAYOUTS: tuple[Layout, ...] = (
    *(Bag(), TumRgbd(), SevenScenes(), ScanNet(), NerfStudio(), Colmap(), StrayScanner()),
    PlainFolder(),
)
"""The layouts in the order in which they are tried, since a folder may match several."""

GROUP = "capture"
DEFAULT_FPS = 30.0
FPS = (0.01, 1000.0)
UNEVEN = 0.25
"""Largest deviation of time steps from their median, as a share of it, at a constant rate."""

SAME_SHAPE = 0.05
"""Largest relative difference between the aspect ratios of registered colour and depth."""

OFF_CENTRE = 0.2
"""Distance of a principal point from the middle, as a share of the image, that gets a note."""

TIME = "source_timestamp"
"""The column with the times of the recording, seconds."""


class CaptureBuilder(DatasetBuilder):
    """Reads RGB-D captures, posed images and ROS 2 bags."""

    name = "capture"
    takes_file = True
    maps = (
        *("rgb", "depth", "pose", "info", "intrinsics", "depth_unit"),
        *("pose_direction", "pose_axes", "time_offset"),
    )

    @classmethod
    def recognise(cls, root: Path) -> str | None:
        """The layout of the root, or of a folder in it."""
        for place in (root, *_folders(root)):
            if (layout := layout_of(place)) is not None:
                return layout.what
        return None

    def episodes(self) -> Iterator[EpisodeRef]:
        """Every recording at or below the root, sorted by id. Raises UsageError for none."""
        found = list(_find(self.root))
        if not found:
            known = "; ".join(layout.what for layout in LAYOUTS)
            other = other_source(self.root, self.name)
            raise UsageError(
                f"{self.root}: has no capture in a known layout ({known}); "
                "for the last one, name the folders color and depth, and the poses trajectory.txt; "
                f"{other or 'docs/formats.md has all layouts'}."
            )
        topics = {"rgb", "depth", "pose", "info"} & set(self._mapping.as_json())
        if topics and not any(isinstance(_layout(place), Bag) for place in found):
            raise UsageError(f"--topics: {self.root} has no bag; leave the option out.")
        refs = [EpisodeRef(_id(self.root, place), place) for place in found]
        yield from sorted(refs, key=lambda ref: ref.id)

    def has_depth(self, ref: EpisodeRef) -> bool:
        """Whether its layout has depth, by the names of files."""
        try:
            return _layout(ref.path).has_depth(ref.path, self._mapping)
        except SourceError:
            return True  # `read` reports the error.

    def work(self, ref: EpisodeRef) -> float:
        """Frames times pixels for images; the bytes of a bag."""
        try:
            images = [p for p in self.sources(ref) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
            if images:
                return float(len(images) * prod(picture_facts(images[0]).size))
        except OccGenError:
            return 0.0
        return super().work(ref)

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The files of the frames that are used, and those that describe them."""
        return _layout(ref.path).sources(ref.path, self._mapping)

    def read(self, ref: EpisodeRef) -> Episode:
        """One episode, with colour and depth resampled to a pinhole camera."""
        recording = _layout(ref.path).read(ref.path, self._mapping)
        view, depth_view, notes = pinhole_views(
            recording.color_lens,
            ref.path,
            depth_lens=recording.depth_lens,
            depth_size=recording.depth_size,
        )
        length, target = len(recording.color_lens), view[0].target
        read_raw_depth = recording.read_depth

        def color(frame: int) -> NDArray[np.uint8]:
            return view[frame].color(recording.read_color(frame))

        def depth(frame: int) -> NDArray[np.float64]:
            assert read_raw_depth is not None
            return depth_view[frame].depth(read_raw_depth(frame))

        fps, rate_notes = _rate(recording.times)
        media = _colors(recording, view, color, ref.path)  # Depth is encoded by the writer.
        times = {}
        if recording.times is not None:
            times[TIME] = Column(Feature(dtype="float64", shape=(1,)), recording.times)
        return Episode(
            id=ref.id,
            length=length,
            fps=fps,
            robot_type="unknown",
            image_size=target.size,
            read_rgb=color,
            read_depth=None if read_raw_depth is None else depth,
            world_from_camera=np.ascontiguousarray(recording.poses),
            intrinsics=np.stack([one.target.matrix for one in view]),
            tasks=(Task("explore the scene"),),
            task_index=np.zeros(length, np.int64),
            columns=times,
            media=tuple(media),
            fingerprint=self.fingerprint(list(recording.sources)),
            notes=(*recording.notes, *notes, *rate_notes, *self._overridden(recording, ref.path)),
        )

    def _overridden(self, recording: Recording, place: Path) -> list[Note]:
        """A note where the user's intrinsics differ from those in a file of the recording."""
        if self._mapping.intrinsics is None or not place.is_dir():
            return []
        given = recording.color_lens[0]
        as_stated = self._mapping.model_copy(update={"intrinsics": None})
        try:
            lens, files = stated_lens(place, given.size, as_stated)
        except SourceError:
            return []
        if lens is None or np.allclose(lens.matrix, given.matrix, rtol=0.005, atol=0.5):
            return []
        text = (
            f"--intrinsics replaces those of {files[0].name}, which differ (focal lengths "
            f"{lens.matrix[0, 0]:.1f}, {lens.matrix[1, 1]:.1f})"
        )
        return [Note("intrinsics", text)]

    @property
    def _mapping(self) -> CameraMapping:
        return self.cameras[0] if self.cameras else CameraMapping()


# Finding recordings


def layout_of(place: Path) -> Layout | None:
    """The layout of a folder or file, or None."""
    try:
        return next((layout for layout in LAYOUTS if layout.recognise(place)), None)
    except OSError:
        return None


def _layout(place: Path) -> Layout:
    layout = layout_of(place)
    if layout is None:
        raise SourceError(place, "is not a capture any longer", "restore it or remove it")
    return layout


def _folders(place: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(place) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and e.name[0] != ".")
    except OSError:
        return []
    return [place / name for name in names]


def _find(place: Path, above: tuple[tuple[int, int], ...] = ()) -> Iterator[Path]:
    """Yield recordings at or below a path. Folders in a recording are not searched.

    Links to folders are followed, except to a folder in `above`.
    """
    try:
        stat = place.stat()
    except OSError:
        return
    if (own := (stat.st_dev, stat.st_ino)) in above:
        return
    if layout_of(place) is not None:
        yield place
        return
    if place.is_dir():
        yield from (p for p in sorted(place.glob("*.mcap")) if layout_of(p) is not None)
    for folder in _folders(place):
        yield from _find(folder, (*above, own))


def _id(root: Path, place: Path) -> str:
    """ "capture/<scene>/<trajectory>": the last part of a path names the trajectory."""
    own = root.resolve().name.removesuffix(".mcap")
    parts = [own, *place.relative_to(root).parts] if place != root else [own, "trajectory_0"]
    *scene, last = (re.sub(r"[^\w.-]+", "_", part).strip("._-") or "x" for part in parts)
    return f"{GROUP}/{'_'.join(scene)[-100:]}/{last.removesuffix('.mcap')[-100:]}"


# Frames


def pinhole_views(
    lenses: Sequence[Lens],
    place: Path,
    *,
    depth_lens: Lens | None = None,
    depth_size: tuple[int, int] | None = None,
) -> tuple[list[PinholeView], list[PinholeView], list[Note]]:
    """The resampling of colour and depth of each frame to one pinhole camera, and notes.

    The pinhole camera has the matrix and size of the depth images if there are any, because
    geometry matters more than pixels, else those of the colour images.

    lenses: of each frame's colour image; depth_lens: of the depth images, None for that of colour;
    depth_size: their (width, height), None without depth; place: for errors.
    """
    notes = []
    views, depth_views = dict[Lens, PinholeView](), dict[Lens, PinholeView]()
    size = depth_size
    for lens in dict.fromkeys(lenses):
        target = depth_lens or (lens if size is None else lens.resized(size))
        views[lens] = PinholeView(lens, target.pinhole())
        depth_views[lens] = PinholeView(target, target.pinhole())
    first = next(iter(views.values()))
    notes += _principal_point_notes(views)
    if any(lens.distorts for lens in views):
        notes.append(Note("distortion", "lens distortion is removed from the images"))
    if size is not None and size != first.source.size:
        width, height = first.source.size
        if abs(width / height / (size[0] / size[1]) - 1) > SAME_SHAPE:
            problem = (
                f"has colour images of {width} x {height} and depth images of {size[0]} x "
                f"{size[1]} pixels, which differ in shape"
            )
            raise SourceError(place, problem, "register depth to colour when you record")
        text = f"colour is {width} x {height}, depth {size[0]} x {size[1]}: colour is resized"
        notes.append(Note("color size", text))
    return (
        [views[lens] for lens in lenses],
        [depth_views[lens] for lens in lenses],
        notes,
    )


def _principal_point_notes(lenses: Iterable[Lens]) -> list[Note]:
    """A note where intrinsics seem to be those of images of another size."""
    for lens in lenses:
        size, centre = np.array(lens.size), lens.matrix[:2, 2]
        if (np.abs(centre / size - 0.5) > OFF_CENTRE).any():
            text = (
                f"the principal point ({centre[0]:.0f}, {centre[1]:.0f}) is far from the middle of "
                f"images of {size[0]} x {size[1]}: check that the intrinsics are for this size"
            )
            return [Note("principal point", text)]
    return []


def _colors(
    recording: Recording,
    views: list[PinholeView],
    color: Callable[[int], NDArray[np.uint8]],
    place: Path,
) -> Iterator[MediaFile]:
    """The colour images to write: the original files if they need no change."""
    for frame, view in enumerate(views):
        path = recording.colors[frame] if recording.colors else None
        if path is not None and view.same and picture_facts(path).plain:
            yield MediaFile("rgb", path, frame)
        else:
            yield MediaFile("rgb", path or place, frame, read=partial(color, frame))


def _rate(times: NDArray[np.float64] | None) -> tuple[float, list[Note]]:
    """The frame rate from the median time step, and a note if it is assumed or uneven."""
    steps = np.diff(times) if times is not None else np.empty(0)
    median = float(np.median(steps)) if len(steps) else 0.0
    if median <= 0 or not FPS[0] <= 1 / median <= FPS[1]:
        text = (
            f"no file states a usable frame rate: {DEFAULT_FPS:g} fps is assumed, without effect "
            "on cells; times in the names of images or in the poses would state it, and export "
            "--fps sets another"
        )
        return DEFAULT_FPS, [Note("fps", text)]
    fps = round(1 / median, 3)
    if np.abs(steps - median).max() <= UNEVEN * median:
        return fps, []
    text = (
        f"the time between frames varies from {1000 * steps.min():.3g} to "
        f"{1000 * steps.max():.3g} ms: every frame is used once, at {fps:g} fps; the recorded "
        f"times are in the column {TIME}"
    )
    return fps, [Note("variable rate", text)]
