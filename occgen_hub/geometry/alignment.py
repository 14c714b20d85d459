"""Bringing estimated camera poses into the world of the recorded ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from occgen_hub.geometry.sim3 import Positions, Sim3, fit_sim3, fit_unscaled, rotation_angle

LEAST_FRAMES = 3
"""Two frames have one distance in each world; a scale from that has nothing to check it."""

POOR_DISTANCE, POOR_ROTATION = 0.05, 5.0
"""Errors over these, as a share of the extent and in degrees, make an alignment poor. A good
reconstruction of a room has less than a tenth of them; 5 degrees put a wall three metres ahead
13 cells of 0.02 m aside."""


@dataclass(frozen=True)
class Alignment:
    """How estimated cameras fit onto recorded ones.

    sim3: target_from_source; translation_rmse: metres in the target's world, and rotation_error:
    mean in degrees, both over all frames, bad ones included; extent: metres, the diagonal of the
    box around the target's cameras; inliers: frames of which neither position nor rotation is an
    outlier; scaled: False where too few frames or too little motion left the scale undetermined,
    which is 1 then.
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
        """Why not to rely on it, to follow "the alignment ", or None."""
        if not self.scaled:
            few = f"there are {self.frames} frames, and it takes {LEAST_FRAMES}"
            still = "the cameras hardly move, or not alike"
            why = few if self.frames < LEAST_FRAMES else still
            return f"could not tell the scale, which was left at 1: {why}"
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
    """The Sim3 that brings estimated poses onto recorded ones of the same frames.

    source, target: (T, 4, 4) world_from_camera, OpenCV axes, finite, T at least 1; the target in
    metres, the source in any unit. Deterministic.

    Positions and orientations are fitted together (see `fit_sim3`): the centres of a nearly
    straight path leave the rotation about it undetermined, and orientations tell no scale. A
    third of the frames may be wrong.
    """
    estimated: NDArray[np.float64] = source[:, :3, 3].astype(np.float64)
    centres: NDArray[np.float64] = target[:, :3, 3].astype(np.float64)
    spread = np.sqrt(((centres - centres.mean(axis=0)) ** 2).sum(axis=1).mean())
    unit = np.full(len(target), spread if spread > 0 else 1.0)
    rotations = target[:, :3, :3].astype(np.float64) @ source[:, :3, :3].transpose(0, 2, 1)
    positions = Positions(estimated, centres, unit)
    fit = (fit_sim3 if len(target) >= LEAST_FRAMES else fit_unscaled)([positions], rotations)

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
