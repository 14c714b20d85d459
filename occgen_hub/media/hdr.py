"""HDR video brought to SDR: what networks were trained with, and what screens and JPEGs show.

Light is worked out in nits (candela a square metre) as the signal's standard has it, what is
brighter than paper is compressed, and the colours of BT.2020 become those of BT.709.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av

Transfer = Literal["PQ", "HLG"]
"""How a signal stands for light: SMPTE ST 2084, or ARIB STD-B67; both are in ITU-R BT.2100."""

_TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
"""By FFmpeg's numbers, AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67."""

_WIDE = (2, 9)
"""AVCOL_PRI_UNSPECIFIED, which in HDR stands for the usual ones, and AVCOL_PRI_BT2020."""

PAPER = 203.0
"""Nits of diffuse white in HDR (ITU-R BT.2408), which is about where SDR has its own."""

PEAK = 1000.0
"""Nits that become full white: those of the screens that HDR is graded on."""

KNEE = 0.6
"""Of diffuse white: light up to there is left as it is, what is above it is compressed."""

LEVELS = 4096
"""To which a signal is rounded: twelve bits, the most that HDR video has."""

_TO_BT709 = np.array(
    [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ],
    np.float32,
)
"""Linear light of BT.2020's primaries in BT.709's (ITU-R BT.2087)."""

_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)


def transfer(stream: av.VideoStream) -> Transfer | None:
    """How a video is HDR, None where it is not."""
    return _TRANSFERS.get(int(stream.codec_context.color_trc or 0))


def is_wide(stream: av.VideoStream) -> bool:
    """Whether an HDR video's colours are those of BT.2020."""
    return int(stream.codec_context.color_primaries or 0) in _WIDE


def to_sdr(signal: NDArray[np.uint16], kind: Transfer, *, wide: bool) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 sRGB of an (H, W, 3) uint16 RGB signal, 65535 its largest value.

    wide: whether its primaries are BT.2020's, else BT.709's.
    """
    light: NDArray[np.float32] = _light(kind)[signal >> 4]
    if kind == "HLG":  # The screen's own part: brighter where the scene is (ITU-R BT.2100).
        light *= np.maximum(light @ _LUMINANCE, 1e-6)[..., None] ** np.float32(0.2)
        light *= np.float32(PEAK / PAPER)
    brightest = light.max(axis=-1, keepdims=True)
    light *= compressed(brightest) / np.maximum(brightest, np.float32(1e-6))
    if wide:
        light = light @ _TO_BT709.T
    levels = (light.clip(0, 1) * (LEVELS - 1) + 0.5).astype(np.uint16)
    return np.take(_encoded(), levels)


def compressed(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Light of 0 to PEAK, 1 being diffuse white, in 0 to 1; it rises everywhere, without a kink.

    Above the knee it is the curve of E. Reinhard et al., "Photographic tone reproduction for
    digital images" (2002), with PEAK as its white.
    """
    over = np.maximum(light - KNEE, 0) / (1 - KNEE)
    white = (PEAK / PAPER - KNEE) / (1 - KNEE)
    rolled = KNEE + (1 - KNEE) * over * (1 + over / white**2) / (1 + over)
    return np.where(light <= KNEE, light, rolled).astype(np.float32)


@cache
def _light(kind: Transfer) -> NDArray[np.float32]:
    """(LEVELS,) light of each level of a signal.

    PQ: of the screen, 1 being diffuse white. HLG: of the scene, 1 being the brightest.
    """
    signal = np.asarray(np.linspace(0, 1, LEVELS), np.float64)
    if kind == "PQ":
        m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * (10_000 / PAPER)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return np.asarray(light, np.float32)


@cache
def _encoded() -> NDArray[np.uint8]:
    """(LEVELS,) uint8 sRGB of light from 0 to 1."""
    light = np.asarray(np.linspace(0, 1, LEVELS), np.float64)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(signal * 255), np.uint8)
