"""The truth of every frame of an episode, as an npz file that numpy reads without pickle.

Arrays of T frames, V vertices and F triangles:

- `world_from_camera` (T, 4, 4) float64: the true poses, OpenCV axes, metres.
- `intrinsics` (3, 3) float64: pixels; pixel (u, v) has its centre at (u + 0.5, v + 0.5).
- `people_vertices` (T, V, 3) float32: the people's mesh in each frame, world coordinates, metres.
- `people_faces` (F, 3) int32: its triangles, counter-clockwise seen from outside.
- `people_labels` (F,) int32: the person of each triangle, from 0.

The truth of labels is in a file for all scenes: `labels` (F,) uint8, the class of each triangle of
`mesh.ply`; `person` uint8, the class of people; `taxonomy`, its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from occgen_hub.sample.episode import OPENCV, Episode
from occgen_hub.sample.figure import People
from occgen_hub.sample.mesh import Floats
from occgen_hub.sample.scene import TAXONOMY, Scene
from occgen_hub.taxonomy import load_taxonomy


def write_truth(path: Path, episode: Episode, people: People, vertices: Floats) -> None:
    """Write an episode's truth. Equal content gives equal bytes.

    vertices: (T, V, 3) of the people, world coordinates, metres.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path,
        world_from_camera=episode.world_from_camera @ OPENCV,
        # In single precision, as in the tables and as rays are cast.
        intrinsics=episode.camera.K.astype(np.float32).astype(np.float64),
        people_vertices=vertices.astype(np.float32),
        people_faces=people.faces,
        people_labels=people.labels,
    )


def write_mesh_labels(path: Path, scenes: Sequence[Scene]) -> None:
    """Write the classes of the triangles of all scenes, in the order of `ply.write_mesh`."""
    np.savez_compressed(
        path,
        labels=np.concatenate([scene.label for scene in scenes]),
        person=np.uint8(load_taxonomy(TAXONOMY).id_of("person")),
        taxonomy=np.array(TAXONOMY),
    )
