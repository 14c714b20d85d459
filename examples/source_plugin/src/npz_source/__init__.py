"""A source of OccGen Hub: every `.npz` file below the root is an episode.

A file holds `rgb` (T, H, W, 3) uint8, `depth` (T, H, W) float32 metres, `poses` (T, 4, 4)
world_from_camera with OpenCV axes in metres, and `intrinsics` (3, 3) in pixels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from occgen_hub.builder import DatasetBuilder, EpisodeRef
from occgen_hub.episode import Episode, MediaFile, Task
from occgen_hub.errors import SourceError
from occgen_hub.files import read_bytes

MAX_BYTES = 1 << 32
NEEDED = ("rgb", "depth", "poses", "intrinsics")


class NpzBuilder(DatasetBuilder):
    """Reads recordings in .npz files."""

    name = "npz"

    def episodes(self) -> Iterator[EpisodeRef]:
        """Yield one episode per file, sorted by id. Decodes nothing."""
        for path in sorted(self.root.glob("*.npz")):
            yield EpisodeRef(f"npz/{path.stem}/trajectory_0", path)

    def sources(self, ref: EpisodeRef) -> list[Path]:
        """The episode's file. If it changes, the episode is built again."""
        return [ref.path]

    def has_depth(self, ref: EpisodeRef) -> bool:
        """Always true: files without depth are rejected."""
        return True

    def read(self, ref: EpisodeRef) -> Episode:
        """Read one episode. This is the only place that converts units and axes."""
        try:
            # Never allow_pickle: a pickle can run any code.
            arrays = np.load(io.BytesIO(read_bytes(ref.path, MAX_BYTES)), allow_pickle=False)
            rgb, depth, poses, K = (arrays[name] for name in NEEDED)
        except (ValueError, KeyError, EOFError, OSError) as error:
            problem = f"does not have {', '.join(NEEDED)}"
            raise SourceError(ref.path, problem, "record it again") from error
        length, height, width = depth.shape
        return Episode(
            id=ref.id,
            length=length,
            fps=10.0,
            robot_type="unknown",
            image_size=(width, height),
            read_rgb=lambda frame: rgb[frame],
            read_depth=lambda frame: depth[frame].astype(np.float64),
            world_from_camera=poses.astype(np.float64),
            intrinsics=np.repeat(K[None].astype(np.float64), length, axis=0),
            tasks=(Task("explore the scene"),),
            task_index=np.zeros(length, np.int64),
            columns={},
            # `read` because the images are not separate files. The build writes depth itself.
            media=tuple(
                MediaFile("rgb", ref.path, t, read=lambda t=t: rgb[t]) for t in range(length)
            ),
            fingerprint=self.fingerprint(self.sources(ref)),
        )
