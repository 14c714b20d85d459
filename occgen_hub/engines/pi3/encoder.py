"""The image encoder: a vision transformer with registers (DINOv2, Oquab et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from occgen_hub.engines.pi3.blocks import Block


class PatchEmbed(nn.Module):
    """Divides an image into square patches and makes a token of each."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, patches, width), row by row."""
        return self.proj(x).flatten(2).transpose(1, 2)


class Encoder(nn.Module):
    """Encodes each image on its own. Position embeddings are learnt on a grid and resampled."""

    def __init__(
        self, channels: int, width: int, heads: int, depth: int, registers: int, patch: int,
        grid: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, width))
        self.patch_embed = PatchEmbed(channels, width, patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: Tensor, h: int, w: int) -> Tensor:
        """(B, channels, h * patch, w * patch) to (B, h * w, width)."""
        place = self._positions(h, w)
        patches = self.patch_embed(images) + place[:, 1:]
        first = (self.cls_token + place[:, :1]).expand(len(patches), -1, -1)
        registers = self.register_tokens.expand(len(patches), -1, -1)
        tokens = torch.cat((first, registers, patches), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens[:, -h * w :])
        return out

    def _positions(self, h: int, w: int) -> Tensor:
        """(1, 1 + h * w, width), resampled as in training: bicubic with antialiasing."""
        if (h, w) == (self.grid, self.grid):
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        image = rest.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
        image = interpolate(image, (h, w), mode="bicubic", antialias=True)
        return torch.cat((first, image.flatten(2).transpose(1, 2)), dim=1)
