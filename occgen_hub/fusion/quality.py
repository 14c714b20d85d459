"""Figures of how well the frames of an episode agree, from the evidence of fusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from occgen_hub.fusion.depth_map import DepthMaps
from occgen_hub.fusion.evidence import Tolerance, spread
from occgen_hub.fusion.refine import correction
from occgen_hub.geometry.cloud import Cloud
from occgen_hub.occupancy.point_blocks import PointBlocks
from occgen_hub.prefetch import prefetch
from occgen_hub.quality import Quality

FRAMES = 8
"""Number of frames for which the residual is measured."""


@dataclass(frozen=True)
class Agreement:
    """The static surface that frames agree on.

    cloud: its points, world metres; seen_through: the measured points that other frames saw
    through, which are not in the cloud; supports: median number of frames that saw a point;
    contradicted: share of the measured points that other frames saw through.
    """

    cloud: Cloud
    seen_through: PointBlocks
    supports: float
    contradicted: float


def assess(
    static: PointBlocks,
    maps: DepthMaps,
    tolerance: Tolerance,
    agreement: Agreement,
    *,
    refined: bool = False,
) -> Quality:
    """The figures of a fused scene. static: its surface."""
    frames = list(spread(maps.frames))[:FRAMES]
    steps = [correction(static, view, tolerance) for view in prefetch(maps, frames)]
    residual, shift, turn = (float(np.median(column)) for column in zip(*steps, strict=True))
    one, two, four = tolerance.noise.sigma(np.array([1.0, 2.0, 4.0])).tolist()
    return Quality(
        sigma=(one, two, four),
        contradicted=agreement.contradicted,
        supports=agreement.supports,
        residual=residual,
        shift=shift,
        turn=turn,
        refined=refined,
    )
