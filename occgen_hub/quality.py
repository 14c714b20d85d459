"""Figures of how well the frames of an episode agree, as a dataset records them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from occgen_hub.episode import Note

POOR_POSES = (0.008, 0.15)
"""Median motion of frames, metres and degrees, above which a note suggests refined poses."""

WORTH_REFINING = 1 / 16
"""Median motion of frames, as a fraction of a cell's edge, above which they are aligned to the
scene."""

POOR_CONTRADICTED = 0.3
"""If more than this fraction of points is contradicted, a note says that the frames disagree."""


@dataclass(frozen=True)
class Quality:
    """How well an episode's frames agree.

    sigma: estimated standard deviation of depth at 1, 2 and 4 m, metres; contradicted: fraction of
    the measured points that other frames saw through; supports: median number of frames that saw a
    point of the scene; residual: median distance of the scene from the surfaces that frames
    measured, metres; shift, turn: median motion of a frame that would fit it best to the scene,
    metres and degrees; refined: whether poses were aligned to the scene.
    """

    sigma: tuple[float, float, float]
    contradicted: float
    supports: float
    residual: float
    shift: float
    turn: float
    refined: bool = False

    def poses_are_off(self, voxel_size: float) -> bool:
        """Whether aligning the frames may matter for cells of this size, metres."""
        return self.shift > WORTH_REFINING * voxel_size

    def record(self) -> dict[str, object]:
        """The figures for `meta/occgen.json`."""
        figures = {key: value for key, value in asdict(self).items() if key != "refined"}
        return {
            key: [round(v, 6) for v in value] if isinstance(value, tuple) else round(value, 6)
            for key, value in figures.items()
        } | {"refined": self.refined}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Quality | None:
        """The figures of a `meta/occgen.json`. None if they are missing or not all numbers."""
        try:
            figures = record["quality"]
            one, two, four = (float(value) for value in figures["sigma"])
            single = ("contradicted", "supports", "residual", "shift", "turn")
            values = {key: float(figures[key]) for key in single}
            refined = figures.get("refined") is True
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        if not all(map(isfinite, (one, two, four, *values.values()))):
            return None
        return cls((one, two, four), **values, refined=refined)

    def notes(self, setting: object) -> list[Note]:
        """Notes for the user. setting: `Config.refine_poses` of the build."""
        notes = []
        if self.contradicted > POOR_CONTRADICTED:
            text = (
                f"frames contradict one another: {self.contradicted:.0%} of the measured points "
                "were seen through by other frames; check units, poses, intrinsics, and that depth "
                "and images belong together"
            )
            notes.append(Note("frames disagree", text))
        if not self.refined and (self.shift > POOR_POSES[0] or self.turn > POOR_POSES[1]):
            advice = (
                "aligning the frames did not help: the scale of the depth may differ between them"
                if setting == "auto"
                else "its poses may drift; try --set refine_poses=auto"
            )
            text = (
                f"frames lie {1000 * self.shift:.0f} mm and {self.turn:.2f} degrees off the scene "
                f"(median): {advice}"
            )
            notes.append(Note("poses", text))
        return notes
