"""The networks pi3 and pi3x.

See "pi^3: Permutation-Equivariant Visual Geometry Learning" (arXiv 2507.13347).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from occgen_hub.engines.pi3.blocks import (
    Block,
    CrossBlock,
    Rotary,
    full_precision,
    working_dtype,
)
from occgen_hub.engines.pi3.encoder import Encoder, PatchEmbed
from occgen_hub.engines.pi3.heads import (
    CameraHead,
    ConvHead,
    HeadDecoder,
    LinearHead,
    MetricDecoder,
)
from occgen_hub.engines.pi3.injection import Cameras, PoseBlock
from occgen_hub.engines.pi3.sizes import HEAD_VIEWS, Sizes

MAX_LOG_DEPTH = 15.0
"""Upper limit of the logarithm of depth in pi3x."""

MIN_MOTION = 0.02
"""If all other cameras are nearer to the first one, pi3x does not normalise translations."""


class Trunk(nn.Module):
    """The common part of both networks: encoder, decoder and camera head."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.register_token = nn.Parameter(torch.zeros(1, 1, sizes.registers, sizes.width))
        self.register_buffer("image_mean", torch.zeros(1, 3, 1, 1))
        self.register_buffer("image_std", torch.ones(1, 3, 1, 1))
        self.encoder = self._encoder(3)
        self.decoder = nn.ModuleList(
            Block(sizes.width, sizes.heads, qk_norm=True) for _ in range(sizes.decoder_depth)
        )
        self.point_decoder = self._head_decoder(sizes.width)
        self.conf_decoder = self._head_decoder(sizes.width)
        self.camera_decoder = self._head_decoder(sizes.camera_width)
        self.camera_head = CameraHead(sizes.camera_width)

    def _encoder(self, channels: int) -> Encoder:
        s = self.sizes
        return Encoder(
            channels, s.width, s.heads, s.encoder_depth, s.encoder_registers, s.patch,
            s.position_grid,
        )  # fmt: skip

    def _head_decoder(self, width_out: int) -> HeadDecoder:
        s = self.sizes
        return HeadDecoder(2 * s.width, s.width, width_out, s.heads, s.head_depth)

    def compile_blocks(self) -> None:
        """Compile the blocks with torch.compile, for any number of tokens.

        All blocks have the same structure, so a few compiled functions are enough. To compile the
        whole network would take minutes. Compilation happens when the first views are processed.
        """
        for module in self.modules():
            if isinstance(module, Block | CrossBlock | PoseBlock):
                module.compile(dynamic=True)

    def patches(self, images: Tensor) -> tuple[int, int]:
        """The numbers of rows and columns of patches in (..., H, W) images.

        Raises ValueError if they are not whole numbers.
        """
        (height, width), patch = images.shape[-2:], self.sizes.patch
        if height % patch or width % patch or not height * width:
            raise ValueError(f"{width} x {height} pixels: not multiples of {patch}")
        return height // patch, width // patch

    def encode(self, images: Tensor) -> Tensor:
        """(B * N, 3, H, W) images in [0, 1] to (B * N, patches, width) tokens."""
        tokens: Tensor = self.encoder(
            (images - self.image_mean) / self.image_std, *self.patches(images)
        )
        return tokens

    def decode(
        self,
        tokens: Tensor,
        views: int,
        rotary: Rotary,
        after: Callable[[int, Tensor], Tensor] = lambda _, x: x,
    ) -> Tensor:
        """(B * N, patches, width) tokens to (B * N, registers + patches, 2 width).

        Blocks attend within a view and to all views alternately. `after` is applied to the output
        of each block.
        """
        registers = self.register_token[0].expand(len(tokens), -1, -1)
        x = torch.cat((registers, tokens), dim=1)
        kept = []
        for number, block in enumerate(self.decoder):
            if number % 2:  # over all views
                x = block(x.unflatten(0, (-1, views)).flatten(1, 2), rotary)
                x = x.unflatten(1, (views, -1)).flatten(0, 1)
            else:
                x = block(x, rotary)
            x = after(number, x)
            if number >= len(self.decoder) - 2:
                kept.append(x.to(working_dtype(x)))  # The first layer of all heads is linear.
        return torch.cat(kept, dim=-1)

    def cameras(self, hidden: Tensor, rotary: Rotary) -> Tensor:
        """(B * N, 4, 4) world_from_camera, OpenCV axes, float32."""
        tokens = self.camera_decoder(hidden, rotary)[:, self.sizes.registers :]
        with full_precision(tokens.device):
            poses: Tensor = self.camera_head(tokens.float())
        return poses

    def rotary(self, images: Tensor) -> Rotary:
        """The positions of a view's tokens, for heads of the trunk's width."""
        h, w = self.patches(images)
        width = self.sizes.width // self.sizes.heads
        return Rotary.of_patches(h, w, self.sizes.registers, width, images.device)


class Pi3(Trunk):
    """The network pi3: images of a scene to points, confidence and cameras, in an arbitrary unit.

    It is permutation-equivariant: the outputs follow the order of the images.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.point_head = LinearHead(sizes.width, 3, sizes.patch)
        self.conf_head = LinearHead(sizes.width, 1, sizes.patch)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, N, 3, H, W) images in [0, 1], H and W multiples of the patch, to float32

        points, local_points: (B, N, H, W, 3), in the scene and in the view's camera; conf:
        (B, N, H, W, 1), a logit; camera_poses: (B, N, 4, 4) world_from_camera, OpenCV axes;
        descriptors: (B, N, width), the mean of the encoder's tokens of each view.
        """
        batch, views = images.shape[:2]
        flat = images.flatten(0, 1)
        rotary, (h, w) = self.rotary(flat), self.patches(flat)
        with _trunk_precision(flat.device):
            tokens = self.encode(flat)
            descriptors = tokens.float().mean(dim=1)
            hidden = self.decode(tokens, views, rotary)
            poses = self.cameras(hidden, rotary)
            parts = [self._heads(part, rotary, h, w) for part in hidden.split(HEAD_VIEWS)]
        local, conf = (torch.cat(maps) for maps in zip(*parts, strict=True))
        return _by_view(
            {
                "points": in_world(local, poses),
                "local_points": local,
                "conf": conf,
                "camera_poses": poses,
                "descriptors": descriptors,
            },
            batch,
        )

    def _heads(self, hidden: Tensor, rotary: Rotary, h: int, w: int) -> tuple[Tensor, Tensor]:
        first = self.sizes.registers
        points = self.point_decoder(hidden, rotary)[:, first:]
        conf = self.conf_decoder(hidden, rotary)[:, first:]
        with full_precision(hidden.device):
            xy, z = self.point_head(points.float(), h, w).permute(0, 2, 3, 1).split((2, 1), -1)
            depth = z.exp()
            local = torch.cat((xy * depth, depth), dim=-1)
            return local, self.conf_head(conf.float(), h, w).permute(0, 2, 3, 1)


class Pi3X(Trunk):
    """The network pi3x: like Pi3 in metres, with convolutional heads and optional conditions."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        width, patch = sizes.width, sizes.patch
        self.depth_emb = nn.Parameter(torch.zeros(1, 1, width))
        self.metric_token = nn.Parameter(torch.zeros(1, 1, 2 * width))
        self.depth_encoder = self._encoder(2)
        self.ray_embed = PatchEmbed(2, width, patch)
        self.pose_inject_blk = nn.ModuleList(
            PoseBlock(width, sizes.heads) for _ in sizes.pose_blocks
        )
        self.point_head = ConvHead(width, sizes.upsampling, (2, 1))
        self.conf_head = ConvHead(width, sizes.upsampling, (1,))
        self.metric_decoder = MetricDecoder(
            2 * width, sizes.metric_width, sizes.metric_heads, sizes.head_depth
        )
        self.metric_head = nn.Linear(sizes.metric_width, 1)

    @torch.inference_mode()
    def forward(
        self,
        images: Tensor,
        depths: Tensor | None = None,
        intrinsics: Tensor | None = None,
        poses: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """(B, N, 3, H, W) images in [0, 1], H and W multiples of the patch, and conditions:

        depths: (B, N, H, W) along the optical axis, 0 for none; intrinsics: (B, N, 3, 3) pixels
        of these images, pixel centres at + 0.5; poses: (B, N, 4, 4) world_from_camera, OpenCV
        axes, used if there are at least two views.

        Returns the outputs of Pi3 in metres, and metric: (B,) the scale by which they were
        multiplied; rays: (B, N, H, W, 3) unit vectors in the view's camera.
        """
        batch, views = images.shape[:2]
        flat = images.flatten(0, 1)
        rotary, (h, w) = self.rotary(flat), self.patches(flat)
        with _trunk_precision(flat.device):
            tokens = self.encode(flat)
            descriptors = tokens.float().mean(dim=1)
            mean_depth = None
            if depths is not None:
                mean_depth = _mean_depth(depths)
                tokens = tokens + self._depth_tokens(depths, mean_depth, h, w)
            if intrinsics is not None:
                tokens = tokens + self._ray_tokens(intrinsics, flat)
            after = self._injection(poses, mean_depth, views, h, w)
            hidden = self.decode(tokens, views, rotary, after)
            camera_poses = self.cameras(hidden, rotary)
            metric = self._metric(hidden.unflatten(0, (batch, views)).flatten(1, 2), flat)
            size = (flat.shape[-2], flat.shape[-1])
            parts = [self._heads(part, rotary, h, w, size) for part in hidden.split(HEAD_VIEWS)]
        rays, local, conf = (torch.cat(maps) for maps in zip(*parts, strict=True))
        scale = metric.repeat_interleave(views)
        local = local * scale[:, None, None, None]
        camera_poses[:, :3, 3] *= scale[:, None]
        found = {
            "points": in_world(local, camera_poses),
            "local_points": local,
            "conf": conf,
            "camera_poses": camera_poses,
            "rays": rays,
            "descriptors": descriptors,
        }
        return {**_by_view(found, batch), "metric": metric}

    def _depth_tokens(self, depths: Tensor, mean_depth: Tensor, h: int, w: int) -> Tensor:
        valid = depths > 0
        relative = torch.where(valid, depths / mean_depth[:, None, None, None], 0.0)
        image = torch.stack((relative, valid.to(relative.dtype)), dim=2).flatten(0, 1)
        tokens: Tensor = self.depth_encoder(image, h, w)
        return tokens + self.depth_emb

    def _ray_tokens(self, intrinsics: Tensor, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        with full_precision(images.device):
            K = intrinsics.flatten(0, 1).float()
            u, v = torch.meshgrid(
                *(torch.arange(n, device=K.device) + 0.5 for n in (width, height)), indexing="xy"
            )
            pixels = torch.stack((u, v, torch.ones_like(u)))
            rays = torch.einsum("bij,jhw->bihw", torch.linalg.inv(K), pixels)
        tokens: Tensor = self.ray_embed(rays[:, :2])
        return tokens

    def _injection(
        self, poses: Tensor | None, mean_depth: Tensor | None, views: int, h: int, w: int
    ) -> Callable[[int, Tensor], Tensor]:
        """The function applied after each block of the decoder, which adds known poses to some."""
        if poses is None or views < 2:
            return lambda _, x: x
        with full_precision(poses.device):
            known = relative_poses(poses.float(), mean_depth)
            cameras = Cameras.of(known, h, w, self.sizes.width // self.sizes.heads)
        blocks = dict(zip(self.sizes.pose_blocks, self.pose_inject_blk, strict=True))
        first = self.sizes.registers

        def after(number: int, x: Tensor) -> Tensor:
            if number not in blocks:
                return x
            patches = x[:, first:].unflatten(0, (-1, views)).flatten(1, 2)
            added = blocks[number](patches, cameras).unflatten(1, (views, -1)).flatten(0, 1)
            return torch.cat((x[:, :first], x[:, first:] + added), dim=1)

        return after

    def _metric(self, hidden: Tensor, images: Tensor) -> Tensor:
        """(B,) float32: the length of the unit in metres."""
        h, w = self.patches(images)
        width = self.sizes.metric_width // self.sizes.metric_heads
        rotary = Rotary.of_patches(h, w, self.sizes.registers, width, images.device)
        token = self.metric_token.expand(len(hidden), -1, -1)
        token = self.metric_decoder(token, hidden, rotary)
        with full_precision(images.device):
            metric: Tensor = self.metric_head(token.float())[:, 0, 0].exp()
        return metric

    def _heads(
        self, hidden: Tensor, rotary: Rotary, h: int, w: int, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = self.sizes.registers
        points = self.point_decoder(hidden, rotary)[:, first:]
        conf = self.conf_decoder(hidden, rotary)[:, first:]
        with full_precision(hidden.device):
            maps = self.point_head(points.float(), h, w, size)
            xy, z = (part.permute(0, 2, 3, 1) for part in maps)
            slope = torch.cat((xy, torch.ones_like(z)), dim=-1)
            local = slope * z.clamp(max=MAX_LOG_DEPTH).exp()
            (logit,) = self.conf_head(conf.float(), h, w, size)
            return normalize(slope, dim=-1), local, logit.permute(0, 2, 3, 1)


def in_world(local: Tensor, poses: Tensor) -> Tensor:
    """(B, H, W, 3) points in camera frames to the world, by (B, 4, 4) poses."""
    moved: Tensor = (
        torch.einsum("bij,bhwj->bhwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]
    )
    return moved


def relative_poses(poses: Tensor, mean_depth: Tensor | None) -> Tensor:
    """(B, N, 4, 4) poses relative to each scene's first view, with normalised translations.

    The unit is the mean depth (B,) if given, else the mean distance of the other cameras from the
    first, or 1 if they do not move.
    """
    relative = torch.linalg.inv(poses[:, :1]) @ poses
    distance = relative[:, 1:, :3, 3].norm(dim=-1)
    unit = mean_depth
    if unit is None:
        moving = (distance >= MIN_MOTION).any(dim=-1)
        unit = torch.where(moving, distance.mean(dim=-1), 1.0)
    relative[:, :, :3, 3] /= unit[:, None, None]
    return relative


def _mean_depth(depths: Tensor) -> Tensor:
    """(B,) the mean of the valid depths of all views of a scene; 1 if there are none."""
    valid = depths > 0
    count = valid.sum(dim=(1, 2, 3))
    total = torch.where(valid, depths, 0.0).sum(dim=(1, 2, 3))
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def _by_view(maps: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    return {name: values.unflatten(0, (batch, -1)) for name, values in maps.items()}


def _trunk_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 on a GPU, else the dtype of the weights."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return nullcontext()


NETWORKS: dict[Literal["pi3", "pi3x"], type[Pi3] | type[Pi3X]] = {"pi3": Pi3, "pi3x": Pi3X}
