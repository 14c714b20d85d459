"""Render meshes off-screen with PyVista for a pinhole camera, with or without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from occgen_hub.errors import UsageError
from occgen_hub.stopping import hold_stops
from occgen_hub.visual.colors import PAPER
from occgen_hub.visual.cubes import Faces
from occgen_hub.visual.optional_dependencies import require_pyvista

NO_GRAPHICS = (
    "this machine cannot render: OpenGL gives empty pictures; on Debian install libegl1, "
    "libegl-mesa0 and libgl1-mesa-dri, which also render without a GPU"
)


@dataclass(frozen=True)
class Picture:
    """rgb: (H, W, 3) uint8; zbuffer: (H, W) float32, OpenGL's, 1 if empty; near, far: metres."""

    rgb: NDArray[np.uint8]
    zbuffer: NDArray[np.float32]
    near: float
    far: float

    def depth(self) -> NDArray[np.float64]:
        """(H, W) float64, metres along the optical axis, inf if empty."""
        z = self.zbuffer.astype(np.float64)
        with np.errstate(divide="ignore"):
            depth = self.near * self.far / (self.far - z * (self.far - self.near))
        return np.where(z >= 1, np.inf, depth)

    def zbuffer_at(self, bias: float) -> NDArray[np.float32]:
        """(H, W) float32: the z-buffer of the scene moved away by `bias` metres."""
        further = self.depth() + bias
        z = (self.far - self.near * self.far / further) / (self.far - self.near)
        return np.minimum(z, 1).astype(np.float32)


class OffscreenRenderer:
    """A scene of named meshes and a camera. Adding a mesh replaces the one with the same name.

    VTK prints exceptions raised in its Python callbacks instead of raising them, so signals are
    held back during its calls.

    size: (width, height), pixels; near, far: clipping range, metres.
    """

    @hold_stops()
    def __init__(self, size: tuple[int, int], near: float, far: float) -> None:
        self._pyvista = require_pyvista()
        self.size, self._near, self._far = size, near, far
        self._plotter = self._pyvista.Plotter(off_screen=True, window_size=size)
        self._plotter.set_background(PAPER)
        self._plotter.render_window.SetMultiSamples(0)
        self._actors: dict[str, Any] = {}
        self._drawn = False

    @hold_stops()
    def look(self, world_from_camera: NDArray[np.float64], K: NDArray[np.float64]) -> None:
        """Place the camera: (4, 4) pose, OpenCV axes, metres; (3, 3) intrinsics, pixels."""
        R, t = world_from_camera[:3, :3], world_from_camera[:3, 3]
        camera = self._plotter.camera
        camera.position, camera.focal_point, camera.up = t, t + R[:, 2], -R[:, 1]
        camera.clipping_range = self._near, self._far
        matrix = self._pyvista.vtkmatrix_from_array(self._projection(K))
        camera.SetExplicitProjectionTransformMatrix(matrix)
        camera.UseExplicitProjectionTransformMatrixOn()

    def _projection(self, K: NDArray[np.float64]) -> NDArray[np.float64]:
        """(4, 4) from OpenGL's camera axes (x right, y up, z backward) to its clip space."""
        (width, height), near, far = self.size, self._near, self._far
        matrix = np.zeros((4, 4))
        matrix[0, 0], matrix[0, 2] = 2 * K[0, 0] / width, 1 - 2 * K[0, 2] / width
        matrix[1, 1], matrix[1, 2] = 2 * K[1, 1] / height, 2 * K[1, 2] / height - 1
        matrix[2, 2], matrix[2, 3] = -(far + near) / (far - near), -2 * far * near / (far - near)
        matrix[3, 2] = -1
        return matrix

    @hold_stops()
    def put_faces(self, name: str, faces: Faces, colors: NDArray[np.uint8]) -> None:
        """Add squares with (m, 3) colours, drawn without lighting."""
        count = len(faces)
        corners = np.arange(4 * count).reshape(count, 4)
        mesh = (
            self._pyvista.PolyData.from_regular_faces(faces.corners.reshape(-1, 3), corners)
            if count
            else self._pyvista.PolyData()
        )
        if count:
            mesh.cell_data["color"] = colors
        self._put(name, mesh, scalars="color", rgb=True)

    @hold_stops()
    def put_lines(
        self, name: str, lines: NDArray[np.floating], color: tuple[int, int, int], radius: float
    ) -> None:
        """Add an (n, 3) line as a tube of `radius` metres."""
        if len(lines) < 2:
            self._put(name, self._pyvista.PolyData())
            return
        line = self._pyvista.lines_from_points(lines.astype(np.float32))
        self._put(name, line.tube(radius=radius, n_sides=8), color=color)

    @hold_stops()
    def put_segments(
        self, name: str, ends: NDArray[np.floating], color: tuple[int, int, int], radius: float
    ) -> None:
        """Add (n, 2, 3) segments as tubes of `radius` metres."""
        lines = self._pyvista.line_segments_from_points(ends.reshape(-1, 3).astype(np.float32))
        self._put(name, lines.tube(radius=radius, n_sides=8), color=color)

    @hold_stops()
    def put_image(self, name: str, corners: NDArray[np.floating], image: NDArray[np.uint8]) -> None:
        """Add an (H, W, 3) image on the quadrilateral of its (4, 3) corners.

        Their order is upper left, upper right, lower right, lower left.
        """
        mesh = self._pyvista.PolyData.from_regular_faces(
            corners.astype(np.float32), np.arange(4)[None]
        )
        # Texture coordinates start at the lower left.
        mesh.active_texture_coordinates = np.array([(0, 1), (1, 1), (1, 0), (0, 0)], np.float32)
        texture = self._pyvista.Texture(np.ascontiguousarray(image))
        texture.InterpolateOn()
        self._put(name, mesh, texture=texture)

    def _put(self, name: str, mesh: Any, **how: Any) -> None:
        if name in self._actors:
            self._plotter.remove_actor(self._actors.pop(name), render=False)
        if mesh.n_points:
            self._actors[name] = self._plotter.add_mesh(
                mesh, lighting=False, reset_camera=False, render=False, copy_mesh=False,
                show_scalar_bar=False, **how,
            )  # fmt: skip

    @hold_stops()
    def picture(self) -> Picture:
        """Render the scene. Raises UsageError if this machine cannot render."""
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkFloatArray, vtkUnsignedCharArray

        width, height = self.size
        window = self._plotter.render_window
        if not self._drawn:
            self._plotter.show(auto_close=False, interactive=False)  # Initialises the window.
        window.Render()
        rgb, z = vtkUnsignedCharArray(), vtkFloatArray()
        window.GetPixelData(0, 0, width - 1, height - 1, 0, rgb, 0)
        window.GetZbufferData(0, 0, width - 1, height - 1, z)
        pixels = vtk_to_numpy(rgb).reshape(height, width, 3)[::-1]
        zbuffer = vtk_to_numpy(z).reshape(height, width)[::-1]  # OpenGL's rows start at the bottom.
        if not self._drawn and not pixels.any():
            raise UsageError(f"{NO_GRAPHICS}.")
        self._drawn = True
        return Picture(pixels, zbuffer, self._near, self._far)

    @hold_stops()
    def close(self) -> None:
        """Close the window."""
        self._plotter.close()
