"""Plain implementations of pi3 and pi3x with the same weights, as a baseline for the networks.

Attention computes its full weight matrix, positions are computed where they are needed, and the
heads process all views at once. The outputs equal those of `occgen_hub.engines.pi3`; the benchmark
checks this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from occgen_hub.engines.pi3.network import MAX_LOG_DEPTH, Pi3, Pi3X

Weights = Mapping[str, Tensor]
BASE = 100.0


def weights_under(weights: Weights, prefix: str) -> Weights:
    """The weights under a prefix, by the rest of their names."""
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def dense(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def normed(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, L, d) each to (B, L, heads * d)."""
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def apply_rotary(x: Tensor, positions: Tensor) -> Tensor:
    """Apply rotary embedding to (B, heads, L, d) queries or keys at (L, 2) positions."""
    halves = []
    for half, place in zip(x.chunk(2, -1), positions.T, strict=True):
        planes = half.shape[-1] // 2
        angle = place[:, None] / BASE ** (torch.arange(planes, device=x.device) / planes)
        cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
        a, b = half.chunk(2, -1)
        halves.append(half * cos + torch.cat((-b, a), -1) * sin)
    return torch.cat(halves, -1)


def block(w: Weights, x: Tensor, heads: int, positions: Tensor | None = None) -> Tensor:
    """A transformer block. Steps without weights are skipped."""
    qkv = dense(w, "attn.qkv", normed(w, "norm1", x, 1e-6)).unflatten(-1, (3, heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if "attn.q_norm.weight" in w:
        q, k = normed(w, "attn.q_norm", q, 1e-5), normed(w, "attn.k_norm", k, 1e-5)
    if positions is not None:
        q, k = apply_rotary(q, positions), apply_rotary(k, positions)
    x = x + w.get("ls1.gamma", 1.0) * dense(w, "attn.proj", attention(q, k, v))
    hidden = dense(w, "mlp.fc2", gelu(dense(w, "mlp.fc1", normed(w, "norm2", x, 1e-6))))
    return x + w.get("ls2.gamma", 1.0) * hidden


def view_positions(h: int, w: int, registers: int) -> Tensor:
    """(registers + h * w, 2) float: registers are at (0, 0), patches start at (1, 1)."""
    patches = torch.cartesian_prod(torch.arange(h), torch.arange(w)) + 1
    return torch.cat((torch.zeros(registers, 2), patches.float()))


def head_tokens(w: Weights, x: Tensor, heads: int, depth: int, positions: Tensor) -> Tensor:
    """A head's own blocks, and its linear layers before and after."""
    x = dense(w, "projects", x)
    for n in range(depth):
        x = block(weights_under(w, f"blocks.{n}."), x, heads, positions)
    return dense(w, "linear_out", x)


def metric_token(w: Weights, token: Tensor, y: Tensor, heads: int, positions: Tensor) -> Tensor:
    """One token that attends to all others, in each block of the metric decoder."""
    x, y, n = dense(w, "projects_x", token), dense(w, "projects_y", y), 0
    while b := weights_under(w, f"blocks.{n}."):
        seen, others = normed(b, "norm2", x, 1e-6), normed(b, "norm_y", y, 1e-6)
        q, k, v = (
            dense(b, f"cross_attn.{name}", t).unflatten(-1, (heads, -1)).transpose(1, 2)
            for name, t in (("q_proj", seen), ("k_proj", others), ("v_proj", others))
        )
        x = x + dense(b, "cross_attn.proj", attention(q, apply_rotary(k, positions), v))
        x = x + dense(b, "mlp.fc2", gelu(dense(b, "mlp.fc1", normed(b, "norm3", x, 1e-6))))
        n += 1
    return dense(w, "linear_out", x)


def plain(model: nn.Module) -> Callable[[Tensor], dict[str, Tensor]]:
    """The plain network with a model's weights: (1, N, 3, H, W) images to outputs."""
    assert isinstance(model, Pi3 | Pi3X)
    sizes, weights = model.sizes, model.state_dict()

    @torch.inference_mode()
    def run(images: Tensor) -> dict[str, Tensor]:
        views, (h, w) = images.shape[1], model.patches(images)
        x = (images[0] - model.image_mean) / model.image_std
        encoder = weights_under(weights, "encoder.")
        x = model.encoder.patch_embed(x) + model.encoder._positions(h, w)[:, 1:]
        first = encoder["cls_token"] + model.encoder._positions(h, w)[:, :1]
        extra = torch.cat((first, encoder["register_tokens"]), 1).expand(views, -1, -1)
        x = torch.cat((extra, x), 1)
        for n in range(sizes.encoder_depth):
            x = block(weights_under(encoder, f"blocks.{n}."), x, sizes.heads)
        x = normed(encoder, "norm", x[:, -h * w :], 1e-6)

        positions = view_positions(h, w, sizes.registers).to(x.device)
        x = torch.cat((weights["register_token"][0].expand(views, -1, -1), x), 1)
        kept = []
        for n in range(sizes.decoder_depth):
            b = weights_under(weights, f"decoder.{n}.")
            if n % 2:
                joined = block(
                    b, x.reshape(1, -1, sizes.width), sizes.heads, positions.repeat(views, 1)
                )
                x = joined.reshape(x.shape)
            else:
                x = block(b, x, sizes.heads, positions)
            kept.append(x)
        hidden = torch.cat(kept[-2:], -1)

        def tokens(name: str) -> Tensor:
            w_ = weights_under(weights, f"{name}_decoder.")
            return head_tokens(w_, hidden, sizes.heads, sizes.head_depth, positions)[
                :, sizes.registers :
            ]

        poses = model.camera_head(tokens("camera").float())
        scale = 1.0
        if isinstance(model, Pi3X):
            size = (images.shape[-2], images.shape[-1])
            xy, z = model.point_head(tokens("point"), h, w, size)
            z = z.clamp(max=MAX_LOG_DEPTH).exp()
            local = torch.cat((xy * z, z), 1).permute(0, 2, 3, 1)
            (conf,) = model.conf_head(tokens("conf"), h, w, size)
            token = metric_token(
                weights_under(weights, "metric_decoder."), weights["metric_token"],
                hidden.reshape(1, -1, hidden.shape[-1]), sizes.metric_heads,
                positions.repeat(views, 1),
            )  # fmt: skip
            scale = model.metric_head(token)[0, 0, 0].exp()
        else:
            xy, z = model.point_head(tokens("point"), h, w).split((2, 1), 1)
            z = z.exp()
            local = torch.cat((xy * z, z), 1).permute(0, 2, 3, 1)
            conf = model.conf_head(tokens("conf"), h, w)
        local = local * scale
        poses[:, :3, 3] *= scale
        points = (
            torch.einsum("bij,bhwj->bhwi", poses[:, :3, :3], local) + poses[:, None, None, :3, 3]
        )
        found = {
            "points": points,
            "local_points": local,
            "conf": conf.permute(0, 2, 3, 1),
            "camera_poses": poses,
        }
        return {name: values[None] for name, values in found.items()}

    return run
