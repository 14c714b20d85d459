"""A built dataset for PyTorch: any frame by its number, or as a stream. Needs torch.

The index lists the location of each frame. Occupancy is read from the Parquet shards, which have a
few frames per row group. Images, depth and tasks are read from the shards or the trajectories.
"""

from occgen_hub.training.augment import Augmentation, ColorJitter, Mirror, RotateYaw, View
from occgen_hub.training.batches import collate
from occgen_hub.training.dataset import OccupancyDataset
from occgen_hub.training.items import DEFAULT_KEYS, HISTORY_KEYS, KEYS, UNKNOWN
from occgen_hub.training.stream import OccupancyStream

__all__ = [
    "DEFAULT_KEYS",
    "HISTORY_KEYS",
    "KEYS",
    "UNKNOWN",
    "Augmentation",
    "ColorJitter",
    "Mirror",
    "OccupancyDataset",
    "OccupancyStream",
    "RotateYaw",
    "View",
    "collate",
]
