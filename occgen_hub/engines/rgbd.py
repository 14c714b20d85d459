"""The engine rgbd: recorded depth and poses, unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from occgen_hub.config import Config
from occgen_hub.engines import Engine, Progress
from occgen_hub.episode import Episode
from occgen_hub.errors import OccGenError, UsageError
from occgen_hub.views import Views


class SensorDepth(Engine):
    """Sensor depth with known poses."""

    name = "rgbd"

    def reconstruct(
        self, episode: Episode, config: Config, scratch: Path, progress: Progress = lambda _: None
    ) -> Views:
        """Views with the depth of every `config.interval`-th frame (auto: all), decoded on demand.

        Raises OccGenError if the episode has no depth, poses or intrinsics.
        """
        read_depth, poses, intrinsics = (
            episode.read_depth,
            episode.world_from_camera,
            episode.intrinsics,
        )
        if read_depth is None or poses is None or intrinsics is None:
            needed = {"depth": read_depth, "poses": poses, "intrinsics": intrinsics}
            missing = [name for name, value in needed.items() if value is None]
            raise OccGenError(
                f"{episode.id}: has no {' and no '.join(missing)}, which the engine rgbd needs; "
                "restore the missing files, or choose another engine with --engine."
            )

        step = 1 if config.interval == "auto" else config.interval

        def depth(frame: int) -> NDArray[np.float32]:
            return read_depth(frame).astype(np.float32)

        return Views(
            engine=self.name,
            world_from_camera=poses,
            intrinsics=intrinsics,
            image_size=episode.image_size,
            depth_size=episode.image_size,
            frames=np.arange(0, episode.length, step),
            read_depth=depth,
            read_color=episode.read_rgb,
        )


def open_engine(weights: Path | None, device: str | None) -> SensorDepth:
    """Open the engine. Raises UsageError if weights are given. The device is not used."""
    if weights is not None:
        raise UsageError(
            f"--weights {weights}: the engine rgbd uses no weights; leave the option out."
        )
    return SensorDepth()
