"""The heads, which turn the trunk's tokens into points, confidence, cameras and scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pixel_shuffle, relu

from occgen_hub.engines.pi3.blocks import Block, CrossBlock, Rotate


class HeadDecoder(nn.Module):
    """A linear layer in, blocks within a view, a linear layer out."""

    def __init__(self, width_in: int, width: int, width_out: int, heads: int, depth: int) -> None:
        super().__init__()
        self.projects = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(Block(width, heads, scaled=False) for _ in range(depth))
        self.linear_out = nn.Linear(width, width_out)

    def forward(self, x: Tensor, rotate: Rotate) -> Tensor:
        """(B, L, width_in) to (B, L, width_out)."""
        x = self.projects(x)
        for block in self.blocks:
            x = block(x, rotate)
        out: Tensor = self.linear_out(x)
        return out


class MetricDecoder(nn.Module):
    """A token that estimates the metric scale from the tokens of all views."""

    def __init__(self, width_in: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.projects_x = nn.Linear(width_in, width)
        self.projects_y = nn.Linear(width_in, width)
        self.blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(depth))
        self.linear_out = nn.Linear(width, width)

    def forward(self, x: Tensor, y: Tensor, rotate: Rotate) -> Tensor:
        """(B, 1, width_in) and (B, L, width_in) to (B, 1, width)."""
        x, y = self.projects_x(x), self.projects_y(y)
        for block in self.blocks:
            x = block(x, y, rotate)
        out: Tensor = self.linear_out(x)
        return out


class LinearHead(nn.Module):
    """pi3's dense head: a linear layer from a patch's token to the values of its pixels."""

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(width, channels * patch * patch)

    def forward(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h * w, width) to (B, channels, H, W)."""
        planes = self.proj(x).transpose(1, 2).unflatten(2, (h, w))
        return pixel_shuffle(planes, self.patch)


class Residual(nn.Module):
    """Two 3x3 convolutions with twice the channels between them, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, channels),
            nn.ReLU(),
            _conv(channels, 2 * channels, 3),
            nn.GroupNorm(max(1, 2 * channels // 32), 2 * channels),
            nn.ReLU(),
            _conv(2 * channels, channels, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to the same shape."""
        out: Tensor = x + self.layers(x)
        return out


class ConvHead(nn.Module):
    """pi3x's dense head: upsampling stages that get view plane coordinates, as in MoGe.

    outputs: the number of channels of each output map.
    """

    def __init__(self, width: int, stages: tuple[int, ...], outputs: tuple[int, ...]) -> None:
        super().__init__()
        widths = (width, *stages)
        self.upsample_blocks = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(
                    nn.ConvTranspose2d(before + 2, channels, 2, 2), _conv(channels, channels, 3)
                ),
                Residual(channels),
                Residual(channels),
            )
            for before, channels in zip(widths, stages, strict=False)
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(_conv(stages[-1] + 2, 32, 3), nn.ReLU(), _conv(32, channels, 1))
            for channels in outputs
        )

    def forward(self, x: Tensor, h: int, w: int, size: tuple[int, int]) -> list[Tensor]:
        """(B, h * w, width) to maps of shape (B, channels, H, W). size: (H, W)."""
        aspect = size[1] / size[0]
        x = x.transpose(1, 2).unflatten(2, (h, w))
        for stage in self.upsample_blocks:
            x = stage(_with_view_plane(x, aspect))
        x = interpolate(x, size, mode="bilinear", align_corners=False)
        x = _with_view_plane(x, aspect)
        return [block(x) for block in self.output_block]


def _conv(before: int, after: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, padding=size // 2, padding_mode="replicate")


def _with_view_plane(x: Tensor, aspect: float) -> Tensor:
    """(B, C, H, W) to (B, C + 2, H, W): add coordinates of pixels in a plane of diagonal 2."""
    span = (1 + aspect**2) ** 0.5
    height, width = x.shape[-2:]
    axes = [
        (torch.arange(n, device=x.device, dtype=x.dtype) * 2 + 1 - n) * (reach / span / n)
        for n, reach in ((width, aspect), (height, 1.0))
    ]
    u, v = torch.meshgrid(*axes, indexing="xy")
    return torch.cat((x, torch.stack((u, v)).expand(len(x), -1, -1, -1)), dim=1)


class ResidualLinear(nn.Module):
    """Three linear layers with ReLUs, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv1 = nn.Linear(width, width)
        self.res_conv2 = nn.Linear(width, width)
        self.res_conv3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same shape."""
        return x + relu(self.res_conv3(relu(self.res_conv2(relu(self.res_conv1(x))))))


class CameraHead(nn.Module):
    """Estimates a view's pose from its patch tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.res_conv = nn.ModuleList(ResidualLinear(width) for _ in range(2))
        self.more_mlps = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.fc_t = nn.Linear(width, 3)
        self.fc_rot = nn.Linear(width, 9)

    def forward(self, x: Tensor) -> Tensor:
        """(B, patches, width) to (B, 4, 4) world_from_camera, OpenCV axes."""
        for block in self.res_conv:
            x = block(x)
        x = self.more_mlps(x.mean(dim=1))
        pose = torch.eye(4, device=x.device, dtype=x.dtype).repeat(len(x), 1, 1)
        pose[:, :3, :3] = nearest_rotation(self.fc_rot(x).unflatten(-1, (3, 3)))
        pose[:, :3, 3] = self.fc_t(x)
        return pose


def nearest_rotation(matrices: Tensor) -> Tensor:
    """(B, 3, 3) to the nearest rotations, after their rows are normalised to length 1.

    Orthogonal Procrustes (Schoenemann 1966), as Levinson et al. 2020 use it to predict rotations.
    """
    U, _, Vh = torch.linalg.svd(normalize(matrices, dim=-1))
    sign = torch.linalg.det(U @ Vh)
    flip = torch.stack((torch.ones_like(sign), torch.ones_like(sign), sign), dim=-1)
    return U * flip[:, None] @ Vh
