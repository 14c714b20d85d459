"""Augmentations that change grid, pose, image and intrinsics of an item together.

Each is called with an item, which it changes, the item's `View` and a random generator. It returns
the new view. An augmented item is what the camera would have recorded in a changed world, or after
a rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from occgen_hub.errors import UsageError
from occgen_hub.occupancy.grid import Grid
from occgen_hub.training.coarse import resampled

Item = dict[str, Any]
Rng = np.random.Generator

BITS = ("mask", "visible")
"""Keys of observed cells, which are packed bits in sparse items."""

CELLS = ("occupancy", "dynamic", *BITS, "labels")


@dataclass(frozen=True)
class View:
    """The camera of an item.

    grid: of its cells; pose: (4, 4) float64, world_from_camera; intrinsics: (3, 3) float64, for
    images of image_size, (width, height); aligned: whether past cells are in this camera's grid.
    """

    grid: Grid
    pose: NDArray[np.float64]
    intrinsics: NDArray[np.float64]
    image_size: tuple[int, int]
    aligned: bool = False


class Augmentation(Protocol):
    """An element of `augment`."""

    def check(self, grid: Grid) -> None:
        """Raise UsageError if it cannot be used with the grid."""

    def __call__(self, item: Item, view: View, rng: Rng) -> View:
        """Change the item, with any keys of OccupancyDataset, and return its new view."""


@dataclass(frozen=True)
class Mirror:
    """Mirrors the world, and the image with it, with a probability. Text becomes unreadable.

    The world is mirrored along its x axis and the camera along its own, so poses stay rigid and
    gravity does not change. The grid must be as wide to the left of the camera as to its right.
    "left" and "right" in instructions ("task") are not swapped.
    """

    probability: float = 0.5

    def check(self, grid: Grid) -> None:
        """Raise UsageError if the grid is not symmetric."""
        upper = grid.lower[0] + grid.shape[0] * grid.voxel_size
        if abs(upper + grid.lower[0]) > 1e-6 * grid.voxel_size + 1e-9:
            raise UsageError(
                f"Mirror: the grid reaches from {grid.lower[0]:g} to {upper:g} m across; leave "
                "Mirror out, or build with a symmetric pc_range."
            )

    def __call__(self, item: Item, view: View, rng: Rng) -> View:
        """See `Augmentation`."""
        if rng.random() >= self.probability:
            return view
        for key, value in item.items():
            kind = key.removeprefix("history_")
            if kind in (*CELLS, "history"):
                item[key] = _mirrored_cells(value, view.grid, kind)
            elif kind in ("image", "depth"):
                item[key] = value.flip(-1)
            elif kind == "intrinsics":
                item[key] = _mirrored_intrinsics(value, view.image_size[0])
            elif kind in ("pose", "grid_pose"):
                item[key] = _mirrored_pose(value)
        return replace(
            view,
            pose=_MIRROR @ view.pose @ _MIRROR,
            intrinsics=_mirrored_intrinsics(torch.from_numpy(view.intrinsics), view.image_size[0])
            .numpy()
            .copy(),
        )


_MIRROR = np.diag([-1.0, 1.0, 1.0, 1.0])


def _mirrored_cells(value: torch.Tensor, grid: Grid, kind: str) -> torch.Tensor:
    if value.shape[-3:] == grid.shape:
        return value.flip(-3)
    if kind in BITS:
        return _packed(_unpacked(value, grid).flip(-3))
    mirrored = value.clone()
    mirrored[:, -3] = grid.shape[0] - 1 - mirrored[:, -3]
    return _sorted_rows(mirrored)


def _mirrored_intrinsics(value: torch.Tensor, width: int) -> torch.Tensor:
    mirrored = value.clone()
    mirrored[..., 0, 2] = width - mirrored[..., 0, 2]
    mirrored[..., 0, 1] = 0.0 - mirrored[..., 0, 1]  # Negation would make 0.0 to -0.0.
    return mirrored


def _mirrored_pose(value: torch.Tensor) -> torch.Tensor:
    mirror = torch.from_numpy(_MIRROR).to(value.dtype)
    return mirror @ value @ mirror


@dataclass(frozen=True)
class RotateYaw:
    """Rotates the camera about the world's vertical by up to `degrees` to either side.

    The position of the camera does not change. The image is resampled for the rotated camera, with
    the same intrinsics. Parts that were not in the image are black, without depth, and not
    observed. Each cell gets the state of the old cell that contains its centre, so surfaces move by
    up to half a cell.

    up: (3,) the world's direction away from the ground.
    """

    degrees: float = 15.0
    up: tuple[float, float, float] = (0.0, 0.0, 1.0)

    def check(self, grid: Grid) -> None:
        """Every grid allows it."""

    def __call__(self, item: Item, view: View, rng: Rng) -> View:
        """See `Augmentation`."""
        angle = float(np.radians(rng.uniform(-self.degrees, self.degrees)))
        turn = np.eye(4)
        turn[:3, :3] = _axis_rotation(np.asarray(self.up, np.float64), angle)
        past = _past_poses(item, view)
        turned, turned_past = _turned(view.pose, turn), [_turned(pose, turn) for pose in past]
        moves = [_relative_motion(pose, new) for pose, new in zip(past, turned_past, strict=True)]
        move = _relative_motion(view.pose, turned)
        in_sight = _in_sight(view)
        for key, value in item.items():
            kind, is_past = key.removeprefix("history_"), key.startswith("history")
            if kind in (*CELLS, "history"):
                own = [move] * len(moves) if view.aligned else moves
                item[key] = _turned_cells(
                    value,
                    view,
                    own if is_past else move,
                    in_sight,
                    "occupancy" if kind == "history" else kind,
                )
            elif kind in ("image", "depth"):
                item[key] = (
                    torch.stack(
                        [_turned_image(v, view, m) for v, m in zip(value, moves, strict=True)]
                    )
                    if is_past and len(value)
                    else value
                    if is_past
                    else _turned_image(value, view, move)
                )
            elif key == "pose":
                item[key] = torch.from_numpy(turned).to(value.dtype)
            elif key == "history_pose":
                item[key] = _relative(turned, turned_past, item, value)
        return replace(view, pose=turned)


def _axis_rotation(axis: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    """(3, 3): the rotation about an axis, by Rodrigues' formula."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    turn: NDArray[np.float64] = (
        np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    )
    return turn


def _turned(pose: NDArray[np.float64], turn: NDArray[np.float64]) -> NDArray[np.float64]:
    """The pose of a camera that is rotated about its position."""
    turned = pose.copy()
    turned[:3, :3] = turn[:3, :3] @ pose[:3, :3]
    return turned


def _relative_motion(old: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray[np.float64]:
    """(4, 4): from the camera before to the camera after."""
    moved: NDArray[np.float64] = np.linalg.inv(new) @ old
    return moved


def _past_poses(item: Item, view: View) -> list[NDArray[np.float64]]:
    """world_from_camera of the past frames of an item."""
    relative = item.get("history_pose")
    return [] if relative is None else [view.pose @ p.double().numpy() for p in relative]


def _relative(
    pose: NDArray[np.float64], past: list[NDArray[np.float64]], item: Item, before: torch.Tensor
) -> torch.Tensor:
    """(H, 4, 4) current_from_past; the identity if there is no such frame."""
    world = np.linalg.inv(pose)
    relative = [torch.from_numpy(world @ p).to(before.dtype) for p in past]
    valid = item["history_valid"][:, None, None]
    return torch.where(valid, torch.stack(relative), before) if relative else before


def _in_sight(view: View) -> NDArray[np.bool_]:
    """(nx, ny, nz) whether the image shows the centre of a cell."""
    nx, ny, nz = view.grid.shape
    axes = [
        low + (np.arange(n) + 0.5) * view.grid.voxel_size
        for low, n in zip(view.grid.lower, (nx, ny, nz), strict=True)
    ]
    x, y, z = axes[0][:, None], axes[1][:, None], axes[2]
    ahead = np.where(z > 0, z, np.nan)
    (fx, skew, cx), (_, fy, cy) = view.intrinsics[0], view.intrinsics[1]
    v = fy * y / ahead + cy  # (ny, nz)
    rows = (v >= 0) & (v < view.image_size[1])
    u = fx * x / ahead + cx  # (nx, nz)
    u = u[:, None] + skew * (y / ahead) if skew else u[:, None]
    seen: NDArray[np.bool_] = (u >= 0) & (u < view.image_size[0]) & rows
    return seen


def _turned_cells(
    value: torch.Tensor,
    view: View,
    moves: NDArray[np.float64] | Sequence[NDArray[np.float64]],
    in_sight: NDArray[np.bool_],
    kind: str,
) -> torch.Tensor:
    """Cells in the grid of the rotated camera. moves: one, or one for each past frame."""
    grid, dense = view.grid, value
    sparse = value.shape[-3:] != grid.shape
    if sparse:
        dense = _unpacked(value, grid) if kind in BITS else _dense(value, grid, moves)
    if not isinstance(moves, np.ndarray):
        if not len(moves):
            return value
        turned = torch.stack(
            [_turned_grid(d, grid, m, in_sight, kind) for d, m in zip(dense, moves, strict=True)]
        )
    else:
        turned = _turned_grid(dense, grid, moves, in_sight, kind)
    if not sparse:
        return turned
    return _packed(turned) if kind in BITS else turned.nonzero().to(value.dtype)


def _turned_grid(
    dense: torch.Tensor,
    grid: Grid,
    move: NDArray[np.float64],
    in_sight: NDArray[np.bool_],
    kind: str,
) -> torch.Tensor:
    back = np.linalg.inv(move).astype(np.float64)
    values = dense.numpy()
    if kind != "labels":
        return torch.from_numpy(resampled(values, grid, back) & in_sight)
    known = resampled(values != 255, grid, back) & in_sight
    labels = np.where(known, resampled(values, grid, back), np.uint8(255))
    return torch.from_numpy(labels)


def _turned_image(value: torch.Tensor, view: View, move: NDArray[np.float64]) -> torch.Tensor:
    """An image, (3, H, W) uint8, or depth, (H, W) metres, of the rotated camera."""
    height, width = value.shape[-2:]
    u, v = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    K = view.intrinsics
    rays = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(K).T
    before = rays @ move[:3, :3]  # By the inverse rotation.
    depth = np.where(before[..., 2] > 1e-6, before[..., 2], np.nan)
    pixels = (before / depth[..., None]) @ K.T
    place = np.nan_to_num(
        np.stack([2 * pixels[..., 0] / width - 1, 2 * pixels[..., 1] / height - 1], -1), nan=2.0
    )
    grid = torch.from_numpy(place.astype(np.float32))[None]
    is_image = value.dtype == torch.uint8
    source = value.float()[None] if is_image else value[None, None]
    sampled = torch.nn.functional.grid_sample(
        source, grid, mode="bilinear" if is_image else "nearest", align_corners=False
    )
    if is_image:
        return sampled[0].round().clamp(0, 255).to(torch.uint8)
    return (sampled[0, 0] / torch.from_numpy(np.nan_to_num(depth, nan=1.0)).float()).to(value.dtype)


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast and saturation of the images by factors, 1 - x to 1 + x.

    Past images are changed like the current one.
    """

    brightness: float = 0.3
    contrast: float = 0.3
    saturation: float = 0.3

    def check(self, grid: Grid) -> None:
        """Every grid allows it."""

    def __call__(self, item: Item, view: View, rng: Rng) -> View:
        """See `Augmentation`."""
        sizes = (self.brightness, self.contrast, self.saturation)
        brightness, contrast, saturation = (1 + float(rng.uniform(-x, x)) for x in sizes)
        for key in ("image", "history_image"):
            if key in item:
                pixels = item[key].float() * brightness
                mean = pixels.mean(dim=(-3, -2, -1), keepdim=True)
                pixels = mean + contrast * (pixels - mean)
                grey = pixels.mean(dim=-3, keepdim=True)
                pixels = grey + saturation * (pixels - grey)
                item[key] = pixels.round().clamp(0, 255).to(torch.uint8)
        return view


# Sparse and packed forms


def _unpacked(packed: torch.Tensor, grid: Grid) -> torch.Tensor:
    """(..., bytes) uint8 to (..., nx, ny, nz) bool."""
    bits = np.unpackbits(packed.numpy(), axis=-1, count=grid.cells)
    return torch.from_numpy(bits.view(np.bool_).reshape(*packed.shape[:-1], *grid.shape))


def _packed(dense: torch.Tensor) -> torch.Tensor:
    """(..., nx, ny, nz) bool to (..., bytes) uint8."""
    flat = dense.numpy().reshape(*dense.shape[:-3], -1)
    return torch.from_numpy(np.packbits(flat, axis=-1))


def _dense(
    rows: torch.Tensor, grid: Grid, moves: NDArray[np.float64] | Sequence[NDArray[np.float64]]
) -> torch.Tensor:
    """(n, 3) cells, or (n, 4) with the past frame first, to bool grids."""
    first = () if isinstance(moves, np.ndarray) else (len(moves),)
    dense = torch.zeros((*first, *grid.shape), dtype=torch.bool)
    dense[tuple(rows.long().T)] = True
    return dense


def _sorted_rows(rows: torch.Tensor) -> torch.Tensor:
    order = np.lexsort(rows.numpy().T[::-1])
    return rows[torch.from_numpy(order)]
