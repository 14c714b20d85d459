"""Show a trajectory in the rerun viewer, or write a recording for it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import DatasetError, UsageError
from occgen_hub.files import read_bytes
from occgen_hub.loading import REBUILD, Trajectory
from occgen_hub.occupancy.grid import Grid
from occgen_hub.visual.colors import MOVING, OCCUPANCY, PATH
from occgen_hub.visual.cubes import cube_faces
from occgen_hub.visual.frames import Frame, frames
from occgen_hub.visual.heights import Heights
from occgen_hub.visual.optional_dependencies import require
from occgen_hub.visual.render import rate, trajectory_id
from occgen_hub.visual.viewpoint import Viewpoint, automatic

APPLICATION = "occgen-hub"
HERE = "127.0.0.1"
BLOCK = 5
"""Edge of the blocks that show observed free space, in cells."""

MAX_IMAGE_BYTES = 64 << 20
FREE = (120, 170, 255)
FREE_ALPHA = 40
"""Opacity of the surface of the observed free space, from 0 to 255."""


def _blueprint(trajectory: Trajectory) -> Any:
    """The blueprint: the world on the left; on the right image, depth, cell counts and the task."""
    rrb = require("rerun.blueprint")
    view = _viewpoint(trajectory)
    world = rrb.Spatial3DView(
        origin="/world",
        name="World",
        contents=["$origin/**", "- /world/above/**", "- /world/camera/depth/**"],
        background=[24, 26, 30],
        line_grid=False,
        eye_controls=rrb.EyeControls3D(
            position=view.position, look_target=view.target, eye_up=view.up
        ),
    )
    seen = rrb.Tabs(
        rrb.Spatial2DView(origin="/world/camera/depth", name="Depth"),
        rrb.TextDocumentView(origin="/task", name="Task"),
    )
    return rrb.Blueprint(
        rrb.Horizontal(
            world,
            rrb.Vertical(
                rrb.Spatial2DView(origin="/world/camera/image", name="Image"),
                seen,
                rrb.TimeSeriesView(origin="/cells", name="Cells of a frame"),
                row_shares=[3, 3, 2],
            ),
            column_shares=[3, 2],
        ),
        # Paused, it opens at the first frame. In the mode "following", it opens at the last.
        rrb.TimePanel(
            timeline="frame", fps=rate(trajectory), play_state="paused", state="collapsed"
        ),
        rrb.SelectionPanel(state="collapsed"),
        rrb.BlueprintPanel(state="collapsed"),
    )


def _viewpoint(trajectory: Trajectory) -> Viewpoint:
    return automatic(trajectory.cloud().points, trajectory.world_from_camera(), (1100, 900))


def log_trajectory(
    stream: Any, trajectory: Trajectory, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Log a trajectory to a rerun recording.

    The timelines `frame` (number) and `time` (seconds) have the camera's pose (`world/camera`,
    OpenCV axes, metres), its image and depth, the occupied cells that it sees, the moving ones
    among them (`world/camera/moving`), the surface of the free space that it observes
    (`world/camera/observed`), and numbers of cells. The path and the cloud are static. The cloud
    has two parts, so that everything above the cameras can be hidden. Raises DatasetError if a
    file of the trajectory is invalid.
    """
    rr = require("rerun")
    scene = _Scene(rr, stream, trajectory)
    scene.log_scenery()
    count, fps = len(trajectory.world_from_camera()), rate(trajectory)
    observed = trajectory.observed()
    for frame in frames(trajectory):
        stream.set_time("frame", sequence=frame.number)
        stream.set_time("time", duration=frame.number / fps)
        seen = next(observed, None)
        if seen is None:
            problem = f"ends before frame {frame.number}"
            raise DatasetError(trajectory.file("observed"), problem, REBUILD)
        scene.log_camera(frame)
        scene.log_cells(frame, seen)
        progress(frame.number + 1, count)


class _Scene:
    def __init__(self, rr: Any, stream: Any, trajectory: Trajectory) -> None:
        self._rr, self._stream, self._trajectory = rr, stream, trajectory
        self._poses = trajectory.world_from_camera()
        self._cloud = trajectory.cloud()
        self._heights = Heights(self._cloud.points, self._poses)
        self._images = trajectory.images()

    def log_scenery(self) -> None:
        rr, cloud, voxel = self._rr, self._cloud, self._trajectory.grid.voxel_size
        heights = self._heights
        up = f"RIGHT_HAND_{'XYZ'[heights.axis]}_{'UP' if heights.sign > 0 else 'DOWN'}"
        below = heights.below_ceiling(cloud.points)
        self._log("world", getattr(rr.ViewCoordinates, up), static=True)
        for name, part in (("cloud", below), ("above", ~below)):
            points = rr.Points3D(cloud.points[part], colors=cloud.colors[part], radii=voxel / 2)
            self._log(f"world/{name}", points, static=True)
        path = rr.LineStrips3D([self._poses[:, :3, 3]], colors=[PATH], radii=[0.012])
        self._log("world/path", path, static=True)
        tasks = "\n\n".join(self._trajectory.tasks()) or "No task is given."
        self._log("task", rr.TextDocument(tasks), static=True)
        lines = rr.SeriesLines(colors=[OCCUPANCY[2]], names=["occupied and visible"])
        self._log("cells/occupied", lines, static=True)
        self._log(
            "cells/observed", rr.SeriesLines(colors=[FREE], names=["observed / 100"]), static=True
        )

        if self._trajectory.has_dynamic():
            lines = rr.SeriesLines(colors=[MOVING], names=["moving"])
            self._log("cells/moving", lines, static=True)

    def log_camera(self, frame: Frame) -> None:
        rr, size, pose = self._rr, self._trajectory.image_size, frame.world_from_camera
        camera = rr.Transform3D(translation=pose[:3, 3], mat3x3=pose[:3, :3])
        self._log("world/camera", camera)
        lens = rr.Pinhole(
            image_from_camera=frame.intrinsics, resolution=size,
            camera_xyz=rr.ViewCoordinates.RDF, image_plane_distance=0.4,
        )  # fmt: skip
        self._log("world/camera/image", lens)
        self._log_image(frame.number)
        depth = self._trajectory.file("depth", frame.number)
        if depth.is_file():
            self._trajectory.depth(frame.number)  # Checks that it is an image of that size.
            content = read_bytes(depth, MAX_IMAGE_BYTES)
            metre = self._trajectory.schema.depth_units_per_metre
            self._log("world/camera/depth", lens)
            image = rr.EncodedDepthImage(content, media_type="image/png", meter=metre)
            self._log("world/camera/depth", image)

    def _log_image(self, number: int) -> None:
        image = self._images(number)  # Checks that it is an image of that size.
        if image is None:
            return
        path = self._trajectory.file("rgb", number)
        head = read_bytes(path, MAX_IMAGE_BYTES) if path.is_file() else b""
        entity = (
            self._rr.EncodedImage(contents=head, media_type="image/jpeg")
            if head.startswith(b"\xff\xd8")
            else self._rr.Image(image).compress(jpeg_quality=90)
        )
        self._log("world/camera/image", entity)

    def log_cells(self, frame: Frame, observed: NDArray[np.bool_]) -> None:
        rr, grid = self._rr, frame.cells.grid
        centres = grid.centres(frame.cells.columns)
        places = frame.cells.in_world()
        shown = self._heights.below_ceiling(places)
        moving = frame.cells.is_moving & shown
        still = shown & ~moving
        self._log_cubes("occupied", centres[still], self._heights.colors(places[still]))
        if self._trajectory.has_dynamic():
            self._log_cubes("moving", centres[moving], np.array([MOVING], np.uint8))
            self._log("cells/moving", rr.Scalars(len(frame.cells.moving)))
        free = free_blocks(grid, frame.cells.columns, observed)
        self._log("world/camera/observed", self._hull(free, BLOCK * grid.voxel_size))
        self._log("cells/occupied", rr.Scalars(len(centres)))
        self._log("cells/observed", rr.Scalars(int(observed.sum()) / 100))

    def _hull(self, centres: NDArray[np.float32], edge: float) -> Any:
        """The transparent surface of blocks."""
        faces = cube_faces(centres, edge)
        squares = 4 * np.arange(len(faces))[:, None]
        return self._rr.Mesh3D(
            vertex_positions=faces.corners.reshape(-1, 3),
            triangle_indices=(squares + np.array([0, 1, 2, 0, 2, 3])).reshape(-1, 3),
            albedo_factor=(*FREE, FREE_ALPHA),
        )

    def _log_cubes(
        self, name: str, centres: NDArray[np.floating], colors: NDArray[np.uint8]
    ) -> None:
        half = self._trajectory.grid.voxel_size / 2
        cubes = self._rr.Boxes3D(
            centers=centres,
            half_sizes=np.full((len(centres), 3), half, np.float32),
            colors=colors,
            fill_mode="solid",
        )
        self._log(f"world/camera/{name}", cubes)

    def _log(self, path: str, entity: Any, *, static: bool = False) -> None:
        self._stream.log(path, entity, static=static)


def free_blocks(
    grid: Grid, occupied: NDArray[np.integer], observed: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """(n, 3) centres, metres, camera frame, of the free blocks with an edge of BLOCK cells.

    A block is free if at least half of its cells are observed and none is occupied. Incomplete
    blocks at the grid's end are left out. occupied: (m,) columns; observed: (cells,) bool.
    """
    blocks = [n // BLOCK for n in grid.shape]
    if not all(blocks):
        return np.zeros((0, 3), np.float32)
    x, y, z = (n * BLOCK for n in blocks)
    whole = observed.reshape(grid.shape)[:x, :y, :z]
    shape = (blocks[0], BLOCK, blocks[1], BLOCK, blocks[2], BLOCK)
    count = whole.reshape(shape).sum(axis=(1, 3, 5), dtype=np.int32)
    free = 2 * count >= BLOCK**3
    cells = np.stack(np.unravel_index(occupied, grid.shape), axis=-1) // BLOCK
    inside = (cells < blocks).all(axis=1)
    free[tuple(cells[inside].T)] = False
    centres = (np.argwhere(free) + 0.5) * (BLOCK * grid.voxel_size) + grid.lower
    return np.asarray(centres, np.float32)


def save(
    trajectory: Trajectory, place: Path, progress: Callable[[int, int], None] = lambda *_: None
) -> None:
    """Write a .rrd file with a blueprint, for `rerun FILE`.

    The caller makes the write atomic. Raises the errors of `log_trajectory`.
    """
    stream = require("rerun").RecordingStream(APPLICATION, recording_id=trajectory_id(trajectory))
    with place.open("wb") as file, _pipe_into(file) as pipe:
        stream.save(pipe, default_blueprint=_blueprint(trajectory))
        try:
            log_trajectory(stream, trajectory, progress)
            stream.flush()
        finally:
            stream.disconnect()


@contextmanager
def _pipe_into(file: BinaryIO) -> Iterator[str]:
    """A path for rerun. What is written there goes to a file; raises OSError if that fails.

    rerun itself waits forever if the disk is full. Here, data that do not fit on the disk are
    discarded until the block ends.
    """
    reading, writing = os.pipe()
    failures: list[OSError] = []

    def copy() -> None:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            while piece := pipe.read(1 << 20):
                try:
                    if not failures:
                        file.write(piece)
                except OSError as error:
                    failures.append(error)

    thread = threading.Thread(target=copy, name="recording", daemon=True)
    thread.start()
    try:
        yield f"/dev/fd/{writing}"
    finally:
        os.close(writing)
        thread.join()
    for failure in failures:
        raise failure


@contextmanager
def viewer(
    recorded: Path, ports: tuple[int, int] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run the rerun viewer with a recording, in a process that ends with the block.

    It opens a window or, with `ports` of the page and of the data, serves browsers on this machine.
    Raises UsageError if a port is in use. (rerun can also serve from this process, but that
    sometimes hangs at the start.)
    """
    command = [sys.executable, "-m", "rerun", str(recorded)]
    for port in ports or ():
        _check_port(port)
    if ports is not None:
        web, data = map(str, ports)
        command += ["--serve-web", "--bind", HERE, "--web-viewer-port", web, "--port", data]
    # In its own session, so that Ctrl-C reaches only this process, which stops the viewer.
    process = subprocess.Popen(
        command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def viewer_url(ports: tuple[int, int]) -> str:
    """The address at which `viewer` serves the recording."""
    web, data = ports
    return f"http://{HERE}:{web}/?url={quote(f'rerun+http://{HERE}:{data}/proxy', safe='')}"


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HERE, port))
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be used ({error.strerror}); give others with --ports."
            ) from None
