"""Synthetic recordings in the InternData-N1 layout, ray-traced from generated houses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

__all__ = ["make_sample"]


def make_sample(
    out: Path,
    *,
    trajectories: int = 3,
    frames: int = 24,
    seed: int = 0,
    layout: Literal["vln-n1", "vln-n1-scenes", "vln-ce", "trajectories", "scenes"] = "vln-n1",
    faults: bool = False,
    noise: Sequence[str] = (),
    pose_noise: tuple[float, float] | None = None,
    pose_drift: tuple[float, float] | None = None,
    people: int = 0,
    labels: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a recording of furnished houses to `out` in the layout of InternData-N1.

    `out/ground_truth/mesh.ply` is the true mesh of all scenes, in world coordinates (metres,
    z up). `out/ground_truth/ID.npz` is the truth of every frame of episode ID, see
    `occgen_hub.sample.truth`. The same arguments give the same bytes, and trajectory k does not
    depend on the number of trajectories.

    Args:
        out: a folder that does not exist yet, or is empty.
        trajectories: number of trajectories. A scene has two.
        frames: approximate number of frames; in turn `frames`, 3/4 and 5/4 of it.
        seed: determines houses and paths.
        layout: "vln-n1" has a folder for each trajectory. In "vln-n1-scenes", the newer layout, a
            scene's folder has all its episodes, and its path.ply is meta/pointcloud.ply.
            "trajectories" and "scenes" are older names of these. "vln-ce" is that of VLN-CE: two
            cameras record each trajectory, so it has twice the frames, no videos, and no `faults`.
        faults: whether the metadata has the errors of the real release.
        noise: errors of the depth images: any of "flying", "network", "stereo", "kinect" and
            "speckle", which are applied in this order; see `occgen_hub.sample.sensors`.
        pose_noise: standard deviation per axis, metres and degrees, of an independent error of each
            stated pose.
        pose_drift: maximum per axis, metres and degrees, of a smooth drift of the stated poses,
            which is zero at the first pose.
        people: number of people in each trajectory. They walk, or walk and then stand still.
        labels: whether to write label images beside the depth, of the taxonomy "sample", and
            `out/ground_truth/mesh_labels.npz` with the class of each triangle of the mesh. Errors
            of the depth do not change them. Not for "vln-ce".
        progress: called after each frame with the frames done and the total number of frames.

    Returns:
        The folders written, one per trajectory or per scene.

    Raises:
        UsageError: an argument is out of range, or `out` is not empty.
    """
    from occgen_hub.sample.tree import Corruptions, write_tree

    names = (noise,) if isinstance(noise, str) else tuple(noise)
    corruptions = Corruptions(names, pose_noise, pose_drift, people, labels)
    return write_tree(Path(out), trajectories, frames, seed, layout, faults, corruptions, progress)
