"""Align estimated camera poses to the world of the recorded ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.sim3 import Positions, Sim3, fit_sim3, fit_unscaled, rotation_angle

MIN_FRAMES = 3
"""Fewest frames for a scale. Two frames give one distance, which nothing confirms."""

POOR_DISTANCE, POOR_ROTATION = 0.05, 5.0
"""Errors from which an alignment is poor: a share of the extent, and degrees. A good reconstruction
of a room has less than a tenth of them. 5 degrees move a wall at 3 m by 13 cells of 0.02 m."""


@dataclass(frozen=True)
class Alignment:
    """How estimated cameras fit recorded ones.

    sim3: target_from_source; translation_rmse: metres in the target's world; rotation_error: mean,
    degrees, both over all frames including outliers; extent: metres, the diagonal of the box around
    the target's cameras; inliers: number of frames with inlying position and rotation;
    scaled: False if too few frames or too little motion left the scale undetermined, which is then
    1.
    """

    sim3: Sim3
    translation_rmse: float
    rotation_error: float
    extent: float
    inliers: int
    frames: int
    scaled: bool

    @property
    def problem(self) -> str | None:
        """Why the alignment is unreliable, as the rest of a sentence on it; None if it is not."""
        if not self.scaled:
            few = f"there are {self.frames} frames, and {MIN_FRAMES} are needed"
            still = "the cameras hardly move, or their paths differ"
            reason = few if self.frames < MIN_FRAMES else still
            return f"could not determine the scale, which is assumed to be 1: {reason}"
        if self.translation_rmse > POOR_DISTANCE * self.extent:
            return (
                f"is {self.translation_rmse:.3g} m off (RMSE), for cameras {self.extent:.3g} m "
                f"apart; {self.inliers} of {self.frames} frames agree with it"
            )
        if self.rotation_error > POOR_ROTATION:
            return (
                f"is {self.rotation_error:.3g} degrees off on average; "
                f"{self.inliers} of {self.frames} frames agree with it"
            )
        return None


def align_poses(source: NDArray[np.floating], target: NDArray[np.floating]) -> Alignment:
    """Find the Sim3 from estimated poses to recorded poses of the same frames.

    source, target: (T, 4, 4) world_from_camera, OpenCV axes, finite, T at least 1; the target in
    metres, the source in any unit. Deterministic.

    Positions and orientations are fitted together (see `fit_sim3`): the centres of a nearly
    straight path do not determine the rotation about it, and orientations do not determine the
    scale. A third of the frames may be wrong.
    """
    estimated: NDArray[np.float64] = source[:, :3, 3].astype(np.float64)
    centres: NDArray[np.float64] = target[:, :3, 3].astype(np.float64)
    spread = np.sqrt(((centres - centres.mean(axis=0)) ** 2).sum(axis=1).mean())
    unit = np.full(len(target), spread if spread > 0 else 1.0)
    rotations = target[:, :3, :3].astype(np.float64) @ source[:, :3, :3].transpose(0, 2, 1)
    positions = Positions(estimated, centres, unit)
    fit = (fit_sim3 if len(target) >= MIN_FRAMES else fit_unscaled)([positions], rotations)

    distance = np.linalg.norm(centres - fit.sim3.points(estimated), axis=1)
    angle = rotation_angle(fit.sim3.rotation, rotations)
    return Alignment(
        sim3=fit.sim3,
        translation_rmse=float(np.sqrt((distance**2).mean())),
        rotation_error=float(np.degrees(angle.mean())),
        extent=float(np.linalg.norm(np.ptp(centres, axis=0))),
        inliers=int((fit.positions[0] & fit.rotations).sum()),
        frames=len(target),
        scaled=fit.scaled,
    )
