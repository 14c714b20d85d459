"""Tone mapping of HDR video to SDR, for networks, screens and JPEG files.

The signal is converted to light in nits (candela per square metre) by its standard, light brighter
than diffuse white is compressed, and BT.2020 colours are converted to BT.709.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import av

Transfer = Literal["PQ", "HLG"]
"""Transfer functions of HDR: SMPTE ST 2084 and ARIB STD-B67, both in ITU-R BT.2100."""

_TRANSFERS: dict[int, Transfer] = {16: "PQ", 18: "HLG"}
"""FFmpeg's AVCOL_TRC_SMPTE2084 and AVCOL_TRC_ARIB_STD_B67."""

_WIDE = (2, 9)
"""AVCOL_PRI_UNSPECIFIED, which for HDR means BT.2020 too, and AVCOL_PRI_BT2020."""

DIFFUSE_WHITE = 203.0
"""Diffuse white in HDR, in nits (ITU-R BT.2408). It becomes about the white of SDR."""

PEAK = 1000.0
"""Luminance that becomes full white, in nits: that of the displays used to grade HDR."""

KNEE = 0.6
"""Light above which it is compressed, relative to diffuse white."""

LEVELS = 4096
"""Number of levels of a signal: twelve bits, the most that HDR video has."""

_TO_BT709 = np.array(
    [
        [1.660491, -0.587641, -0.072850],
        [-0.124550, 1.132900, -0.008349],
        [-0.018151, -0.100579, 1.118730],
    ],
    np.float32,
)
"""Linear light of BT.2020 to BT.709 (ITU-R BT.2087)."""

_LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)


def transfer(stream: av.VideoStream) -> Transfer | None:
    """The transfer function of an HDR video; None for SDR."""
    return _TRANSFERS.get(int(stream.codec_context.color_trc or 0))


def is_wide(stream: av.VideoStream) -> bool:
    """Whether an HDR video has BT.2020 primaries."""
    return int(stream.codec_context.color_primaries or 0) in _WIDE


def to_sdr(signal: NDArray[np.uint16], kind: Transfer, *, wide: bool) -> NDArray[np.uint8]:
    """Convert an (H, W, 3) uint16 RGB signal, 0 to 65535, to (H, W, 3) uint8 sRGB.

    wide: whether its primaries are BT.2020, else BT.709.
    """
    light: NDArray[np.float32] = _light(kind)[signal >> 4]
    if kind == "HLG":  # The system gamma of the display (ITU-R BT.2100).
        light *= np.maximum(light @ _LUMINANCE, 1e-6)[..., None] ** np.float32(0.2)
        light *= np.float32(PEAK / DIFFUSE_WHITE)
    brightest = light.max(axis=-1, keepdims=True)
    light *= compressed(brightest) / np.maximum(brightest, np.float32(1e-6))
    if wide:
        light = light @ _TO_BT709.T
    levels = (light.clip(0, 1) * (LEVELS - 1) + 0.5).astype(np.uint16)
    return np.take(_encoded(), levels)


def compressed(light: NDArray[np.float32]) -> NDArray[np.float32]:
    """Compress light relative to diffuse white, up to PEAK, to 0 to 1, by a smooth rising curve.

    Above the knee it is the curve of E. Reinhard et al., "Photographic tone reproduction for
    digital images" (2002), with PEAK as its white.
    """
    over = np.maximum(light - KNEE, 0) / (1 - KNEE)
    white = (PEAK / DIFFUSE_WHITE - KNEE) / (1 - KNEE)
    rolled = KNEE + (1 - KNEE) * over * (1 + over / white**2) / (1 + over)
    return np.where(light <= KNEE, light, rolled).astype(np.float32)


@cache
def _light(kind: Transfer) -> NDArray[np.float32]:
    """(LEVELS,) float32 light of each level of a signal.

    For PQ it is that of the display, relative to diffuse white; for HLG that of the scene, relative
    to its maximum.
    """
    signal = np.asarray(np.linspace(0, 1, LEVELS), np.float64)
    if kind == "PQ":
        m1, m2, c1, c2, c3 = 1305 / 8192, 2523 / 32, 107 / 128, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1) * (10_000 / DIFFUSE_WHITE)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return np.asarray(light, np.float32)


@cache
def _encoded() -> NDArray[np.uint8]:
    """(LEVELS,) uint8 sRGB values of light from 0 to 1."""
    light = np.asarray(np.linspace(0, 1, LEVELS), np.float64)
    signal = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray(np.rint(signal * 255), np.uint8)
