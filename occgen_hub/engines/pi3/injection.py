"""Known poses as a condition of pi3x, added by attention between cameras.

Queries, keys and values are transformed into a common frame by their cameras' poses, and the output
is transformed back ("Cameras as Relative Positional Encoding", Li et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from occgen_hub.engines.pi3.blocks import (
    ROTARY_BASE,
    Attention,
    LayerScale,
    Mlp,
    Norm,
    attend,
    full_precision,
    half_turned,
    merged,
)


@dataclass(frozen=True)
class Cameras:
    """The transformations of N cameras for attention between them.

    camera_from_world, world_from_camera: (B, N, 4, 4); cos, sin: (h * w, 2, planes), of the angles
    by which one quarter of a head is rotated for a patch's column and one for its row.
    """

    camera_from_world: Tensor
    world_from_camera: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, world_from_camera: Tensor, h: int, w: int, head_width: int) -> Cameras:
        """For (B, N, 4, 4) poses of views of h x w patches."""
        rotation = world_from_camera[..., :3, :3].transpose(-1, -2)
        inverse = torch.zeros_like(world_from_camera)
        inverse[..., :3, :3] = rotation
        inverse[..., :3, 3:] = -rotation @ world_from_camera[..., :3, 3:]
        inverse[..., 3, 3] = 1.0
        planes = head_width // 8
        device = world_from_camera.device
        rate = ROTARY_BASE ** -(torch.arange(planes, device=device) / planes)
        row, column = torch.meshgrid(
            torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij"
        )
        angle = torch.stack((column.flatten(), row.flatten()), dim=-1)[:, :, None] * rate
        return cls(inverse, world_from_camera, angle.cos(), angle.sin())

    def moved(self, x: Tensor, matrices: Tensor, *, back: bool = False) -> Tensor:
        """Transform (B, heads, N * L, head width) by the (B, N, 4, 4) matrices of its views.

        The first half of a head is multiplied as 4-vectors. The second half is rotated clockwise by
        the patch's column and row, or with `back` the other way. Computed in float32, because
        translations may be large; the result has the dtype of x.
        """
        with full_precision(x.device):
            return self._moved(x.float(), matrices, back).to(x.dtype)

    def _moved(self, x: Tensor, matrices: Tensor, back: bool) -> Tensor:
        views = matrices.shape[1]
        x = x.unflatten(2, (views, -1))  # (B, heads, N, L, head width)
        half = x.shape[-1] // 2
        vectors = x[..., :half].unflatten(-1, (-1, 4))
        vectors = vectors @ matrices[:, None, :, None].transpose(-1, -2)
        rest = x[..., half:].unflatten(-1, (2, half // 2))
        rest = half_turned(rest, self.cos, self.sin if back else -self.sin)
        return torch.cat((vectors.flatten(-2), rest.flatten(-2)), dim=-1).flatten(2, 3)


class PoseBlock(nn.Module):
    """The sum of an attention between cameras and an MLP, both of the same input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = Norm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=True)
        self.ls1 = LayerScale(width)
        self.norm2 = Norm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor, cameras: Cameras) -> Tensor:
        """(B, N * L, width) patch tokens of all views to the residual of the same shape."""
        return self.ls1(self._attention(self.norm1(x), cameras)) + self.ls2(self.mlp(self.norm2(x)))

    def _attention(self, x: Tensor, cameras: Cameras) -> Tensor:
        P, P_inverse = cameras.camera_from_world, cameras.world_from_camera
        q, k, v = self.attn.split(x)
        q = cameras.moved(q, P.transpose(-1, -2))
        k, v = (cameras.moved(t, P_inverse) for t in (k, v))
        return self.attn.proj(merged(cameras.moved(attend(q, k, v), P, back=True)))
