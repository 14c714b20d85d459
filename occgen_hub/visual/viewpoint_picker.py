"""A window to choose the viewpoint of the world view with the mouse."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from occgen_hub.errors import UsageError
from occgen_hub.loading import Trajectory
from occgen_hub.visual.colors import PAPER, PATH
from occgen_hub.visual.cubes import cube_faces
from occgen_hub.visual.frames import frames
from occgen_hub.visual.heights import Heights
from occgen_hub.visual.optional_dependencies import require_pyvista
from occgen_hub.visual.viewpoint import Viewpoint, automatic

SIZE = (1280, 720)


def has_screen() -> bool:
    """Whether this machine can open windows."""
    wanted = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform != "linux" or any(os.environ.get(name) for name in wanted)


def choose_viewpoint(trajectory: Trajectory, place: Path) -> Viewpoint:
    """Show a trajectory in a window. When it is closed, write the last viewpoint to `place`.

    Raises UsageError if there is no screen, or `place` cannot be written.
    """
    if not has_screen():
        raise UsageError(
            "--choose-camera: there is no screen for a window; choose the viewpoint on a machine "
            f"with one, or write {place} by hand (see docs/formats.md)."
        )
    if not place.resolve().parent.is_dir():
        raise UsageError(f"{place}: its folder does not exist; create it, or choose another path.")
    plotter = window(trajectory)
    plotter.show(auto_close=False)
    view = viewpoint_of(plotter)
    plotter.close()
    view.save(place)
    return view


def window(trajectory: Trajectory, *, off_screen: bool = False) -> Any:
    """A PyVista plotter with the cloud, the path and the middle frame's occupied cells."""
    pv = require_pyvista()
    poses, cloud, voxel = (
        trajectory.world_from_camera(), trajectory.cloud(), trajectory.grid.voxel_size
    )  # fmt: skip
    heights = Heights(cloud.points, poses)
    plotter = pv.Plotter(off_screen=off_screen, window_size=SIZE, title="OccGen Hub: viewpoint")
    plotter.set_background(PAPER)
    shown = heights.below_ceiling(cloud.points)
    if shown.any():
        mesh = pv.PolyData(cloud.points[shown])
        mesh["color"] = cloud.colors[shown]
        plotter.add_mesh(mesh, scalars="color", rgb=True, point_size=3, lighting=False)
    (frame,) = islice(frames(trajectory, 10, 2), len(poses) // 2, len(poses) // 2 + 1)
    cells = frame.accumulated_in_world()
    cells = cells[heights.below_ceiling(cells)]
    faces = cube_faces(cells, voxel)
    if len(faces):
        mesh = pv.PolyData.from_regular_faces(
            faces.corners.reshape(-1, 3), np.arange(4 * len(faces)).reshape(-1, 4)
        )
        mesh.cell_data["color"] = heights.colors(cells)[faces.owner]
        plotter.add_mesh(mesh, scalars="color", rgb=True)
    if len(poses) > 1:
        path = pv.lines_from_points(poses[:, :3, 3].astype(np.float32))
        plotter.add_mesh(path, color=PATH, line_width=4)
    plotter.add_text("Turn with the mouse; close with Q to keep the view.", font_size=9)
    look_from(plotter, automatic(cloud.points, poses, SIZE, heights))
    return plotter


def look_from(plotter: Any, view: Viewpoint) -> None:
    """Move a plotter's camera to a viewpoint."""
    plotter.camera.position, plotter.camera.focal_point = view.position, view.target
    plotter.camera.up, plotter.camera.view_angle = view.up, view.field_of_view
    plotter.reset_camera_clipping_range()


def viewpoint_of(plotter: Any) -> Viewpoint:
    """The viewpoint of a plotter's camera."""
    camera = plotter.camera
    position, target, up = (
        tuple(float(v) for v in vector)
        for vector in (camera.position, camera.focal_point, camera.up)
    )
    return Viewpoint(position, target, up, float(camera.view_angle))  # type: ignore[arg-type]  # three numbers each
