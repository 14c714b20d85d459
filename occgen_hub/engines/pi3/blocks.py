"""Transformer blocks of the encoder, the decoder and the heads of pi3 and pi3x."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

ROTARY_BASE = 100.0
Rotate = Callable[[Tensor], Tensor]
"""Adds positions to queries or keys of shape (B, heads, tokens, head width)."""


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which linear layers compute on the device of x: autocast's, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Norm(nn.LayerNorm):
    """Layer normalisation whose output has the dtype in which the next linear layer computes.

    With autocast, nn.LayerNorm gives float32, twice the size, which the next layer would round.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape. Means and variances are computed in float32."""
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        to = working_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(to)


class Attention(nn.Module):
    """Multi-head self-attention. With `qk_norm`, queries and keys are normalised per head."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = Norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = Norm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, width) tokens to queries, keys and values, each (B, heads, L, head width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor, rotate: Rotate | None = None) -> Tensor:
        """(B, L, width) to the same shape."""
        q, k, v = self.split(x)
        if rotate is not None:
            q, k = rotate(q), rotate(k)
        return self.proj(merged(attend(q, k, v)))


class CrossAttention(nn.Module):
    """Attention of a few query tokens to many other tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, rotate: Rotate) -> Tensor:
        """(B, Q, width) queries and (B, L, width) others to (B, Q, width).

        Only keys are rotated. The queries are at (0, 0), where the rotation is the identity.
        """
        projected = (self.q_proj(x), self.k_proj(y), self.v_proj(y))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)
        return self.proj(merged(attend(q, rotate(k), v)))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head width)) v, for tensors of one dtype."""
    out: Tensor = scaled_dot_product_attention(q, k, v)
    return out


def merged(x: Tensor) -> Tensor:
    """(B, heads, L, head width) to (B, L, width)."""
    return x.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return self.fc2(gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A learnt factor for each channel of a residual (Touvron et al. 2021)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, *, qk_norm: bool = False, scaled: bool = True
    ) -> None:
        super().__init__()
        self.norm1 = Norm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm)
        self.ls1 = LayerScale(width) if scaled else nn.Identity()
        self.norm2 = Norm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = LayerScale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor, rotate: Rotate | None = None) -> Tensor:
        """(B, L, width) to the same shape."""
        x = x + self.ls1(self.attn(self.norm1(x), rotate))
        return x + self.ls2(self.mlp(self.norm2(x)))


class CrossBlock(nn.Module):
    """A block in which a few tokens attend to many. Only the few are updated."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm2 = Norm(width, eps=1e-6)
        self.norm_y = Norm(width, eps=1e-6)
        self.cross_attn = CrossAttention(width, heads)
        self.norm3 = Norm(width, eps=1e-6)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor, y: Tensor, rotate: Rotate) -> Tensor:
        """(B, Q, width) and (B, L, width) to (B, Q, width)."""
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rotate)
        return x + self.mlp(self.norm3(x))


def half_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., d) rotated in the planes (i, i + d/2), by angles given as cosines and sines."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Rotary:
    """Rotary position embedding in two dimensions: half of a head by row, half by column.

    Each half is rotated by its coordinate times base^(-i / n) in its n planes (RoFormer, Su et al.
    2021). All views use the same tables.
    """

    def __init__(self, rows: Tensor, columns: Tensor, head_width: int) -> None:
        planes = head_width // 4
        place = torch.stack((rows, columns), dim=-1).float()  # (L, 2)
        rate = ROTARY_BASE ** -(torch.arange(planes, device=rows.device) / planes)
        angle = place[:, :, None] * rate  # (L, 2, planes)
        self.cos, self.sin = angle.cos(), angle.sin()

    @classmethod
    def of_patches(
        cls, h: int, w: int, registers: int, head_width: int, device: torch.device
    ) -> Rotary:
        """Registers at (0, 0), then the patches of a view, row after row, from (1, 1) on."""
        place = torch.cartesian_prod(torch.arange(h), torch.arange(w)).reshape(-1, 2) + 1
        place = torch.cat((place.new_zeros(registers, 2), place)).to(device)
        return cls(place[:, 0], place[:, 1], head_width)

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate (B, heads, views * L, head width) queries or keys by their tokens' positions.

        The result has the dtype of x: the tables are converted to it.
        """
        length, _, planes = self.cos.shape
        split = x.unflatten(2, (-1, length)).unflatten(-1, (2, 2 * planes))
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        return half_turned(split, cos, sin).flatten(-2).flatten(2, 3)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TF32 convolutions, for geometry and output layers."""
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.autocast(device.type, enabled=False), exact:
        yield
