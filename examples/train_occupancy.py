"""Trains a small network to see occupancy in one image, on whole scenes that are held out.

    python examples/train_occupancy.py DATASET --minutes 8 --picture prediction.png

DATASET is a folder that occgen-hub build wrote, or org/name on the Hub. A 2D encoder sees the
image; its features are lifted along the rays into the camera's grid of 8 cm cells; a 3D decoder
says which cells are occupied. It learns what is there, hidden cells included. Figures are apart for
visible cells, which the frame observed, and for hidden cells, which only other frames did.
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from occgen_hub import ColorJitter, Mirror, OccupancyDataset, OccupancyStream

SIZE, STRIDE, UNKNOWN = (160, 96), 4, 255
KEYS = ("image", "intrinsics", "labels")


def convolution(before: int, after: int, stride: int = 1, dimensions: int = 2) -> nn.Sequential:
    """A convolution of 3 x 3 or 3 x 3 x 3, normalized."""
    layer = nn.Conv2d if dimensions == 2 else nn.Conv3d
    return nn.Sequential(
        layer(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.ReLU(inplace=True)
    )


class ImageToOccupancy(nn.Module):
    """(B, 3, H, W) images and (B, 3, 3) intrinsics to (B, nx, ny, nz) logits of occupancy."""

    def __init__(self, grid, mean: Tensor, width: int = 24) -> None:
        super().__init__()
        sides = zip(grid.lower, grid.shape, strict=True)
        axes = [low + (torch.arange(n) + 0.5) * grid.voxel_size for low, n in sides]
        self.register_buffer("centres", torch.stack(torch.meshgrid(*axes, indexing="ij"), -1))
        self.register_buffer("prior", torch.logit(mean.clamp(0.001, 0.999)))
        self.stem = nn.Sequential(convolution(3, 16, 2), convolution(16, 24, 2))
        self.middle = nn.Sequential(convolution(24, 48, 2), convolution(48, 48))
        self.deep = nn.Sequential(convolution(48, 64, 2), convolution(64, 64), convolution(64, 64))
        self.merge = nn.ModuleList([nn.Conv2d(n, width, 1) for n in (24, 48, 64)])
        self.mix = convolution(width, width)
        self.depth = nn.Conv2d(width, 32, 1)  # At which depth along its ray a surface is.
        first, second = (convolution(n, 16, dimensions=3) for n in (width + 3, 16))
        self.decoder = nn.Sequential(first, second, nn.Conv3d(16, 1, 3, padding=1))

    def forward(self, image: Tensor, intrinsics: Tensor) -> Tensor:
        """See the class."""
        stem = self.stem(image.float() / 127.5 - 1)
        middle = self.middle(stem)
        deep = self.deep(middle)
        features = sum(
            F.interpolate(merge(x), stem.shape[-2:], mode="bilinear", align_corners=False)
            for merge, x in zip(self.merge, (stem, middle, deep), strict=True)
        )
        features = self.mix(features)
        surface = self.depth(features).softmax(1)  # (B, 32, h, w)
        x, y, z = self.centres.unbind(-1)
        z = z.clamp(min=0.05)
        K = intrinsics[:, :, :, None, None, None]
        u = (K[:, 0, 0] * x / z + K[:, 0, 2]) / image.shape[-1]  # 0 to 1
        v = (K[:, 1, 1] * y / z + K[:, 1, 2]) / image.shape[-2]
        place = torch.stack([u, v], -1) * 2 - 1  # (B, nx, ny, nz, 2)
        flat = place.flatten(2, 3)
        lifted = F.grid_sample(features, flat, align_corners=False).unflatten(3, z.shape[1:])
        far = (z / z.max() * 2 - 1).expand(len(image), *z.shape)
        ray = torch.cat([place, far[..., None]], -1)
        hit = F.grid_sample(surface[:, None], ray, align_corners=False)
        depth = (z / 4).expand(len(image), 1, *z.shape)
        prior = self.prior.expand(len(image), 1, *z.shape)
        volume = torch.cat([lifted * (1 + 8 * hit), hit * 8, depth, prior / 4], 1)
        return (self.decoder(volume) + prior)[:, 0]


def intersections_and_unions(occupied: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """(2, 2): common cells and all cells, of the free and of the occupied, among the known ones."""
    pairs = ((~occupied & known, ~truth & known), (occupied & known, truth & known))
    return torch.stack([torch.stack([(a & b).sum(), (a | b).sum()]) for a, b in pairs]).double()


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {key: value.to(device) for key, value in batch.items()}


def mean_occupancy(loader: DataLoader, grid) -> Tensor:
    """(nx, ny, nz): how often each cell was occupied where it was observed."""
    occupied, known = torch.zeros(2, *grid.shape)
    for batch in loader:
        occupied += ((batch["labels"] > 0) & (batch["labels"] != UNKNOWN)).sum(0)
        known += (batch["labels"] != UNKNOWN).sum(0)
    return occupied / known.clamp(min=1)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[dict[str, Tensor]], mean: Tensor) -> dict[str, float]:
    """IoU of the occupied, and its mean with that of the free, in visible and in hidden cells.

    Of the network, and of the mean occupancy at 0.5 and at the threshold that is best here.
    """
    model.eval()
    thresholds = [0.5, *torch.linspace(0.02, 0.6, 30).tolist()]
    counts = torch.zeros(2, 1 + len(thresholds), 2, 2).double()
    for batch in batches:
        truth, visible = batch["labels"] > 0, batch["visible"]  # 1, or a class.
        guesses = [model(batch["image"], batch["intrinsics"]) > 0]
        guesses += [(mean > threshold).expand(truth.shape) for threshold in thresholds]
        for n, cells in enumerate((visible, (batch["labels"] != UNKNOWN) & ~visible)):
            found = [intersections_and_unions(guess, truth, cells) for guess in guesses]
            counts[n] += torch.stack(found).cpu()
    ratios = counts[..., 0] / counts[..., 1].clamp(min=1)
    figures = {}
    for where, ratio in zip(("visible", "hidden"), ratios, strict=True):
        for name, values in (("IoU", ratio[:, 1]), ("mIoU", ratio.mean(-1))):
            found, at_half, *others = values.tolist()
            figures[f"{where} {name}"] = found
            figures[f"{where} {name} of the mean"] = at_half
            figures[f"{where} {name} of the mean, best threshold"] = max(others)
    return figures


@torch.no_grad()
def draw(model: nn.Module, batch: dict[str, Tensor], path: str) -> None:
    """A picture: the image, and seen from above, the highest occupied cell of truth and network."""
    import matplotlib.pyplot as plt

    predicted = model(batch["image"], batch["intrinsics"]) > 0
    figure, axes = plt.subplots(3, 3, figsize=(9, 7))
    for row, n in zip(axes, range(3), strict=False):
        n = n * (len(predicted) - 1) // 2
        known, truth = batch["labels"][n] != UNKNOWN, batch["labels"][n] > 0
        row[0].imshow(batch["image"][n].permute(1, 2, 0).cpu())
        titles = {"truth, from above": truth & known, "network, from above": predicted[n] & known}
        for axis, (title, cells) in zip(row[1:], titles.items(), strict=True):
            height = torch.arange(cells.shape[1], 0, -1, device=cells.device)[None, :, None]
            above = (cells * height).amax(1).T.flip(0).float().cpu()
            axis.imshow(above.masked_fill(above == 0, float("nan")), vmin=0, vmax=32)
            axis.set_title(title, fontsize=9)
        row[0].axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--minutes", type=float, default=7, help="CPU time of training")
    parser.add_argument("--steps", type=int, default=1 << 30)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--picture")
    options = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator()
    common = {"target": "scene", "voxel_stride": STRIDE}
    still = OccupancyDataset(options.dataset, split="train", keys=("labels",), **common)
    mean = mean_occupancy(DataLoader(still, batch_size=16), still.grid)
    common |= {"keys": KEYS, "image_size": SIZE}
    held_out = OccupancyDataset(
        options.dataset, split="validation", **common | {"keys": (*KEYS, "visible")}
    )
    device = accelerator.device
    checks = [moved(batch, device) for batch in DataLoader(held_out, batch_size=options.batch)]
    common |= {"split": "train", "augment": (Mirror(), ColorJitter())}
    stream = OccupancyStream(options.dataset, even=True, **common)
    # The stream shares the frames out among the ranks itself: the loader is not prepared.
    loader = DataLoader(stream, options.batch, num_workers=options.workers, drop_last=True)
    model = ImageToOccupancy(still.grid, mean)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    model, optimizer = accelerator.prepare(model, optimizer)
    mean, step, began, waited = mean.to(device), 0, time.process_time(), 0.0
    for epoch in itertools.count():
        stream.set_epoch(epoch)
        asked = time.perf_counter()
        for batch in loader:
            waited += time.perf_counter() - asked
            batch = moved(batch, device)
            done = max((time.process_time() - began) / (60 * options.minutes), step / options.steps)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, step / 20) * (1 - done)
            logits, labels = model(batch["image"], batch["intrinsics"]), batch["labels"]
            known = labels != UNKNOWN
            loss = F.binary_cross_entropy_with_logits(
                logits[known], (labels[known] > 0).float(), pos_weight=logits.new_tensor(3.0)
            )
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            step += 1
            asked = time.perf_counter()
        else:
            accelerator.print(f"epoch {epoch}, step {step}: loss {loss.item():.4f}", flush=True)
            continue
        break
    figures = evaluate(model, checks, mean) | {"steps": step, "seconds waited": waited}
    accelerator.print("\n".join(f"{name:<40} {value:.4g}" for name, value in figures.items()))
    if options.picture and accelerator.is_main_process:
        draw(model, checks[0], options.picture)


if __name__ == "__main__":
    main()
