"""Trains a small network to predict occupancy from one image, and tests it on held-out scenes.

    python examples/train_occupancy.py DATASET --steps 500 --picture prediction.png

DATASET is a folder written by occgen-hub build, or org/name on the Hub. A 2D encoder predicts where
the ray of each pixel ends, features are lifted along the rays into a grid of 8 cm cells, and a 3D
decoder predicts occupancy and, if there are labels, classes. Scores are for visible cells, which
the frame observed, and for hidden cells, which only other frames observed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from accelerate import Accelerator, utils
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from occgen_hub import ColorJitter, Mirror, OccupancyDataset, OccupancyStream
from occgen_hub.errors import OccGenError
from occgen_hub.taxonomy import load_taxonomy

SIZE, STRIDE, UNKNOWN, BINS = (160, 96), 4, 255, 48
KEYS = ("image", "depth", "intrinsics", "labels", "visible")


def convolution(before: int, after: int, stride: int = 1, dimensions: int = 2) -> nn.Sequential:
    """A normalized 3 x 3 or 3 x 3 x 3 convolution. CPUs are fast with multiples of 16 channels."""
    layer = (nn.Conv2d if dimensions == 2 else nn.Conv3d)(before, after, 3, stride, 1)
    return nn.Sequential(layer, nn.GroupNorm(4, after), nn.ReLU(inplace=True))


class ImageToOccupancy(nn.Module):
    """Predicts three kinds of logits from (B, 3, H, W) images and (B, 3, 3) intrinsics.

    Occupancy, (B, nx, ny, nz); the class of occupied cells, (B, C, nx, ny, nz); the depth at which
    each ray ends, (B, BINS, H / 4, W / 4), from 0 to the end of the grid. often: (C, nx, ny, nz)
    how often each class occupies each cell in the training set.
    """

    def __init__(self, grid, often: Tensor) -> None:
        super().__init__()
        sides = zip(grid.lower, grid.shape, strict=True)
        axes = [low + (torch.arange(n) + 0.5) * grid.voxel_size for low, n in sides]
        prior = torch.logit(often.sum(0).clamp(0.001, 0.999))
        fine = torch.stack([*torch.meshgrid(*axes, indexing="ij"), prior])
        self.register_buffer("fine", fine)  # Centres and prior of cells,
        self.register_buffer("coarse", F.avg_pool3d(fine, 2, ceil_mode=True))  # of 2 x 2 x 2 cells.
        self.register_buffer("classes", (often + 1e-3).log())
        self.stem = nn.Sequential(convolution(3, 16, 2), convolution(16, 32, 2))
        self.middle = nn.Sequential(convolution(32, 64, 2), convolution(64, 64))
        self.deep = nn.Sequential(convolution(64, 128, 2), convolution(128, 128))
        self.merge = nn.ModuleList([nn.Conv2d(n, 64, 1) for n in (32, 64, 128)])
        self.mix = nn.Sequential(convolution(64, 64), convolution(64, 64))
        self.depth, self.features = nn.Conv2d(64, BINS, 1), nn.Conv2d(64, 28, 1)
        blocks = [convolution(32, 32, dimensions=3) for _ in range(3)]
        self.decoder = nn.Sequential(*blocks, nn.ConvTranspose3d(32, 16, 2, 2))
        self.surface, self.last = nn.Conv3d(4, 16, 1), nn.Conv3d(16, 1 + len(often), 1)

    def forward(self, image: Tensor, intrinsics: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        stem = self.stem(image.float() / 127.5 - 1)
        middle = self.middle(stem)
        levels = zip(self.merge, (stem, middle, self.deep(middle)), strict=True)
        levels = [F.interpolate(merge(x), stem.shape[-2:], mode="bilinear") for merge, x in levels]
        mixed = self.mix(sum(levels))
        depth = self.depth(mixed)
        here = depth.softmax(1)
        ends = torch.stack([8 * here, here.cumsum(1) - here], 1)
        K = intrinsics / intrinsics.new_tensor([image.shape[-1], image.shape[-2], 1])[:, None]
        coarse, place = self.lift(ends, K, self.coarse)
        features = F.grid_sample(self.features(mixed), place.flatten(2, 3), align_corners=False)
        features = features.unflatten(3, place.shape[2:4])
        decoded = self.decoder(torch.cat([features, coarse], 1))
        fine, nx, ny, nz = self.lift(ends, K, self.fine)[0], *self.fine.shape[1:]
        logits = self.last(F.relu(decoded[:, :, :nx, :ny, :nz] + self.surface(fine)))
        return logits[:, 0] + self.fine[3], logits[:, 1:] + self.classes, depth

    def lift(self, ends: Tensor, K: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 4, ...): rays that end in the cell or before it, depth, prior; (B, ..., 2): uv."""
        x, y, z, prior = cells
        uv = [K[:, n, n, None, None, None] * c / z.clamp(min=0.05) for n, c in enumerate((x, y))]
        place = 2 * (torch.stack(uv, -1) + K[:, None, None, None, :2, 2]) - 1  # From -1 to 1.
        far = (2 * z / self.fine[2].max() - 1).expand(place.shape[:-1])
        known = torch.stack([z, prior]).expand(len(K), -1, *z.shape) / 4
        found = F.grid_sample(ends, torch.cat([place, far[..., None]], -1), align_corners=False)
        return torch.cat([found, known], 1), place


def loss_of(model: nn.Module, batch: dict[str, Tensor], farthest: float) -> Tensor:
    """The loss on known cells, their classes and the measured depth."""
    logits, classes, depth = model(batch["image"], batch["intrinsics"])
    labels, metres = batch["labels"].long(), batch["depth"][:, 2::4, 2::4]
    known, occupied = labels != UNKNOWN, (labels > 0) & (labels != UNKNOWN)
    cells = (logits[known], occupied[known].float())
    loss = F.binary_cross_entropy_with_logits(*cells, pos_weight=logits.new_tensor(2.0))
    bins = (metres / farthest * BINS).long()
    bins = bins.masked_fill((metres == 0) | (bins >= BINS), -100)
    named = labels.sub(1).masked_fill(~occupied | (labels > classes.shape[1]), -100)
    return loss + 0.2 * F.cross_entropy(depth, bins) + 0.2 * F.cross_entropy(classes, named)


def frequencies(loader: DataLoader, n: int) -> Tensor:
    """(n - 1, nx, ny, nz): how often each class occupies each cell, where this is known."""
    labels = (batch["labels"].long().clamp(max=n) for batch in loader)
    counts = sum(F.one_hot(each, n + 1).sum(0) for each in labels)[..., :n]
    return (counts[..., 1:] / counts.sum(-1, keepdim=True).clamp(min=1)).movedim(-1, 0)


def guessed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, nx, ny, nz): 0 where the network predicts no occupancy, else the class."""
    logits, classes, _ = model(batch["image"], batch["intrinsics"])
    return (logits > 0) * (classes.argmax(1) + 1)


@torch.no_grad()
def scores(guess: Callable, batches: list[dict[str, Tensor]], n: int) -> list[float]:
    """IoU of occupancy and mIoU of classes, for visible cells, then for hidden cells."""
    counts = torch.zeros(2, n, n).double()
    for batch in batches:
        labels = batch["labels"].long()
        found = guess(batch).expand_as(labels)
        for table, cells in zip(counts, (batch["visible"], ~batch["visible"]), strict=True):
            pairs = (n * labels + found)[cells & (labels < n)]
            table += torch.bincount(pairs, minlength=n * n).view(n, n).cpu()
    occupied = counts[:, 1:, 1:].sum((1, 2)) / (counts.sum((1, 2)) - counts[:, 0, 0])
    same, there = counts.diagonal(dim1=1, dim2=2), counts.sum(2)[:, 1:] > 0
    each = (same / (counts.sum(1) + counts.sum(2) - same).clamp(min=1))[:, 1:]
    mean = (each * there).sum(1) / there.sum(1).clamp(min=1)
    return torch.stack([occupied, mean], 1).flatten().tolist()


@torch.no_grad()
def draw(model: nn.Module, batch: dict[str, Tensor], path: str) -> None:
    """Save a picture: the image, and the highest occupied cells of truth and network from above."""
    truth, found = batch["labels"][0].cpu(), guessed(model, batch)[0].cpu()
    known, height = truth != UNKNOWN, torch.arange(truth.shape[1], 0, -1)
    _, axes = plt.subplots(1, 3, figsize=(13, 3.5), layout="tight")
    axes[0].imshow(batch["image"][0].permute(1, 2, 0).cpu())
    for axis, title, cells in zip(axes[1:], ("truth", "network"), (truth, found), strict=True):
        above = ((cells > 0) * known * height[:, None]).amax(1).T.flip(0).float()
        axis.imshow(above.masked_fill(above == 0, float("nan")), vmin=0, vmax=len(height))
        axis.set_title(f"{title}, from above")
    plt.savefig(path, dpi=110)


def main() -> None:
    """Train, measure and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    for name, value in {"--steps": 500, "--batch": 8, "--workers": 0, "--picture": ""}.items():
        parser.add_argument(name, type=type(value), default=value)
    options = parser.parse_args()
    torch.manual_seed(0)
    accelerator = Accelerator()
    common = {"target": "scene", "voxel_stride": STRIDE}
    sized = common | {"image_size": SIZE, "keys": KEYS}
    try:
        still = OccupancyDataset(options.dataset, split="train", keys=("labels",), **common)
        held_out = OccupancyDataset(options.dataset, split="validation", **sized)
    except OccGenError as error:  # For example without a scene for validation.
        parser.exit(error.exit_code, f"Error: {error}\n")
    n = 1 + (len(load_taxonomy(still.taxonomy).classes) if still.taxonomy else 1)
    often = frequencies(DataLoader(still, batch_size=16), n)
    sized |= {"split": "train", "augment": (Mirror(), ColorJitter()), "even": True}
    stream = OccupancyStream(options.dataset, **sized)
    # The stream itself splits the frames among the ranks, so the loader is not prepared.
    loader = DataLoader(stream, options.batch, num_workers=options.workers, drop_last=True)
    batches = (b for epoch in itertools.count() for b in (stream.set_epoch(epoch) or loader))
    model = ImageToOccupancy(still.grid, often)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps, pct_start=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    farthest = still.grid.lower[2] + still.grid.shape[2] * still.grid.voxel_size
    for step, batch in zip(range(options.steps), batches, strict=False):
        loss = loss_of(model, utils.send_to_device(batch, accelerator.device), farthest)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 25 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}", flush=True)
    checks = utils.send_to_device(list(DataLoader(held_out, options.batch)), accelerator.device)
    rows = {"network": scores(lambda batch: guessed(model.eval(), batch), checks, n)}
    rate, usual = often.sum(0).to(accelerator.device), 1 + often.argmax(0).to(accelerator.device)
    for t in (0.5, *(step / 50 for step in range(1, 30))):
        mean = (rate > t) * usual
        rows[f"mean occupancy over {t}"] = scores(lambda _, mean=mean: mean, checks, n)
    best = max(list(rows)[1:], key=lambda name: rows[name][0])
    accelerator.print(f"{'':<24} visible IoU, mIoU    hidden IoU, mIoU")
    for name in ("network", "mean occupancy over 0.5", best):
        accelerator.print(f"{name:<24}" + "".join(f"{value:>10.4f}" for value in rows[name]))
    if options.picture and accelerator.is_main_process:
        draw(model, checks[0], options.picture)


if __name__ == "__main__":
    main()
