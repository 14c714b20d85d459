"""A built dataset for PyTorch: any frame by its number, or as a stream. Needs torch.

The index says where each frame is. Occupancy comes from the Parquet shards, whose row groups hold a
few frames each; images, depth and tasks come from there too, or from the trajectories' folders.
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
