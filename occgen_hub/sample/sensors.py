"""Errors of real depth sensors and networks, applied to exact depth images.

Every model takes a `View` and a depth image (H, W) in metres along the optical axis, 0 for none,
and returns such an image. Each call draws new errors from its generator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from occgen_hub.sample.mesh import Floats

Bools = NDArray[np.bool_]
EDGE = 0.05  # a discontinuity: the share of the depth by which neighbours differ

# Kinect, version 1
NEAREST = 0.4  # metres: nothing nearer is measured
GRAZING = np.radians(84.0)  # incidence beyond which the pattern does not come back
PROJECTOR = 0.075  # metres between the projector and the camera
DISPARITIES = 351.3  # metres: disparity, in eighths of a pixel, times depth
# Stereo
BASELINE = 0.05  # metres
IMAGER = 848  # pixels: the width of the images that are matched
SUBPIXEL = 0.08  # pixels: the deviation of a disparity
WINDOW = 7  # pixels: the side of a matching window
COARSE = 12.0  # pixels: the deviation of the filter of the coarser component
COARSE_SHARE = 0.35  # of the variance
FATTENING = 1  # pixels
# Network
SCALE = 0.01  # the deviation of a frame's scale
FIELD = 0.01  # the deviation of a smooth factor at its nodes: about 2 % to either side
NODES = (4, 5)  # of the factor, down and across
BLUR = 0.4  # pixels: makes edges into ramps that go from 5 % to 95 % in 1.3 pixels
# Flying pixels
FLYING = 0.5  # the share of the pixels beside a discontinuity
# Speckle
SINGLES = 0.0008  # the share of the pixels in wrong single pixels
BLOBS = 0.0017  # the share of the pixels in wrong blobs
HOLES = 1 / 3  # the share of the blobs that are holes
WRONG = (0.4, 6.0)  # metres: the range of wrong depths


@dataclass(frozen=True)
class View:
    """The true surface that a camera sees."""

    depth: Floats  # (H, W) metres along the optical axis, 0 where there is nothing
    K: Floats  # (3, 3) intrinsics, pixels; pixel (u, v) has its centre at (u + 0.5, v + 0.5)

    @cached_property
    def inverse(self) -> Floats:
        """1 / depth (H, W), 0 for none. It is linear in the pixels of a plane."""
        return _inverse(self.depth)

    @cached_property
    def slope(self) -> tuple[Floats, Floats]:
        """The change of `inverse` per pixel, across (H, W) and down (H, W), within one surface."""
        return _slope(self.inverse, 1), _slope(self.inverse, 0)

    @cached_property
    def incidence(self) -> Floats:
        """Radians (H, W) between the surface's normal and the ray to the camera."""
        v, u = np.indices(self.depth.shape) + 0.5
        x, y = (u - self.K[0, 2]) / self.K[0, 0], (v - self.K[1, 2]) / self.K[1, 1]
        # For a plane n . p = d, 1 / depth is (n / d) . (x, y, 1).
        nx, ny = self.K[0, 0] * self.slope[0], self.K[1, 1] * self.slope[1]
        nz = self.inverse - x * nx - y * ny
        length = np.sqrt((nx**2 + ny**2 + nz**2) * (x**2 + y**2 + 1))
        cosine = self.inverse / np.where(length > 0, length, 1)
        return np.asarray(np.arccos(np.clip(cosine, 0, 1)))

    @cached_property
    def edges(self) -> Bools:
        """The pixels (H, W) on either side of a depth discontinuity.

        Neighbours differ by more than EDGE of their depth, both from one another and from the
        linear continuation of the surface on each side. So a floor seen at a grazing angle has no
        edges.
        """
        return np.asarray(_jumps(self.inverse) | _jumps(self.inverse.T).T)


Model = Callable[[View, Floats, np.random.Generator], Floats]


def flying(view: View, depth: Floats, rng: np.random.Generator) -> Floats:
    """Flying pixels: half of the pixels at a discontinuity mix the depth of its two sides.

    Such a pixel collects light of both surfaces, as in time-of-flight cameras and laser scanners
    (Sabov and Krueger, "Identification and correction of flying pixels in range camera data",
    2008). The pixels on both sides of the discontinuity are affected.
    """
    far = ndimage.maximum_filter(depth, 5, mode="nearest")
    near = 1 / ndimage.maximum_filter(_inverse(depth), 5, mode="nearest").clip(1e-6)
    chosen = view.edges & (depth > 0) & (rng.random(depth.shape) < FLYING)
    share = rng.random(depth.shape)
    return np.where(chosen, near + share * (far - near), depth)


def network(view: View, depth: Floats, rng: np.random.Generator) -> Floats:
    """A network's depth: with errors of scale, smooth errors over the image, and blurred edges.

    Each frame has its own scale (deviation 1 %) and a smooth factor, which is interpolated
    bicubically from values of deviation 1 % on a coarse grid, so about 2 % to either side.
    These magnitudes are assumptions, similar to those of feed-forward networks in rooms after
    their depth is aligned to the world.
    """
    inverse, known = _inverse(depth), (depth > 0).astype(np.float64)
    weight = ndimage.gaussian_filter(known, BLUR, mode="nearest", truncate=3)
    # Planes are linear in inverse depth, so the blur does not change them.
    blurred = ndimage.gaussian_filter(inverse, BLUR, mode="nearest", truncate=3)
    scale = np.exp(SCALE * rng.standard_normal())
    factor = np.exp(FIELD * smooth_field(depth.shape, NODES, rng))
    return np.where(depth > 0, weight / blurred.clip(1e-6) * scale * factor, 0)


def stereo(view: View, depth: Floats, rng: np.random.Generator) -> Floats:
    """Stereo matching: disparity errors that are correlated over the window, and wide edges.

    The deviation is depth**2 * SUBPIXEL / (focal * BASELINE) (Keselman et al., "Intel RealSense
    stereoscopic depth cameras", 2017). Neighbouring pixels share most of their matching window,
    so their errors are correlated; a coarser component models smoothing and lack of texture. In a
    window with a discontinuity the nearer side wins, so the foreground grows by some pixels.
    """
    inverse = _inverse(depth)
    size = 2 * FATTENING + 1
    about = ndimage.binary_dilation(view.edges, np.ones((size, size)))
    nearest = ndimage.maximum_filter(inverse, size, mode="nearest")
    inverse = np.where(about & (nearest > (1 + EDGE) * inverse), nearest, inverse)
    error = correlated(depth.shape, rng) * stereo_disparity_sigma(view.K, depth.shape[1])
    inverse = inverse + np.where(inverse > 0, error, 0)
    # A surface with a disparity near zero cannot be measured.
    return _inverse(np.where(inverse > 0.05, inverse, 0))


def stereo_disparity_sigma(K: Floats, width: int) -> float:
    """The deviation of 1 / depth, 1 / metres, of `stereo` in images `width` pixels wide."""
    return SUBPIXEL / (float(K[0, 0]) * IMAGER / width * BASELINE)


def kinect(view: View, depth: Floats, rng: np.random.Generator) -> Floats:
    """A Kinect of the first version.

    Axial and lateral noise are those of Nguyen, Izadi and Lovell, "Modeling Kinect sensor noise
    for improved 3D reconstruction and tracking", 2012. Disparity has steps of 1/8 pixel, as in
    Handa et al., "A benchmark for RGB-D visual odometry, 3D reconstruction and SLAM", 2014. There
    is no depth under 0.4 m, at grazing angles, and in the shadow of the projector, which is beside
    the camera: to the left of near objects.
    """
    angle = np.minimum(view.incidence, np.radians(89.0))
    lost = (view.depth < NEAREST) | (view.incidence > GRAZING) | _shadow(view)
    lateral = 0.8 + 0.035 * angle / (np.pi / 2 - angle)
    jittered = _sample_depth(view, depth, lateral * rng.standard_normal((2, *depth.shape)))
    noisy = jittered + kinect_sigma(jittered, angle) * rng.standard_normal(depth.shape)
    steps = np.rint(DISPARITIES * _inverse(noisy))
    measured = DISPARITIES / np.maximum(steps, 1)
    return np.where(lost | (jittered <= 0) | (noisy < NEAREST / 2), 0, measured)


def kinect_sigma(depth: Floats, angle: Floats) -> Floats:
    """The deviation, metres, of a Kinect's depth at an incidence `angle`, radians (Nguyen 2012)."""
    slant = angle**2 / (np.pi / 2 - angle) ** 2 * 1e-4 / np.sqrt(np.maximum(depth, 0.1))
    return np.asarray(0.0012 + 0.0019 * (depth - 0.4) ** 2 + np.where(angle > np.pi / 3, slant, 0))


def speckle(view: View, depth: Floats, rng: np.random.Generator) -> Floats:
    """False matches: 0.25 % of the pixels, single or in blobs 3 to 5 pixels across, are wrong.

    A blob has one random depth, or is a hole. Matching without a consistency check leaves such
    pixels (Hirschmueller, "Stereo processing by semiglobal matching and mutual information", 2008,
    calls them peaks and removes them by their size).
    """
    out = depth.copy()
    height, width = depth.shape
    count = rng.poisson(SINGLES * depth.size)
    out[rng.integers(height, size=count), rng.integers(width, size=count)] = rng.uniform(
        *WRONG, count
    )
    v, u = np.indices(depth.shape)
    mean_area = np.pi * np.mean([1.5**2, 2.5**2])
    for _ in range(rng.poisson(BLOBS * depth.size / mean_area)):
        cv, cu = rng.uniform(0, height), rng.uniform(0, width)
        radius = rng.uniform(1.5, 2.5)
        value = 0.0 if rng.random() < HOLES else rng.uniform(*WRONG)
        near = slice(max(0, int(cv) - 4), int(cv) + 5), slice(max(0, int(cu) - 4), int(cu) + 5)
        inside = np.hypot(v[near] + 0.5 - cv, u[near] + 0.5 - cu) < radius
        out[near][inside] = value
    return out


# In their physical order: the light, its measurement, wrong matches.
MODELS: dict[str, Model] = {
    "flying": flying,
    "network": network,
    "stereo": stereo,
    "kinect": kinect,
    "speckle": speckle,
}


def corrupt(
    depth: NDArray[np.floating[Any]], K: Floats, noise: Collection[str], seed: list[int]
) -> Floats:
    """Depth with the errors of the named models, in the order of MODELS.

    Args:
        depth: (H, W) metres along the optical axis; not finite for none.
        K: (3, 3) intrinsics, pixels.
        noise: names in MODELS.
        seed: of the frame; each model derives a generator from it.

    Returns:
        (H, W) metres, 0 for none.
    """
    exact = np.where(np.isfinite(depth), depth, 0).astype(np.float64)
    view, out = View(exact, K), exact
    for number, (name, model) in enumerate(MODELS.items()):
        if name in noise:
            out = model(view, out, np.random.default_rng([*seed, number]))
    return out


def correlated(shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """Noise (H, W) of unit variance that is correlated over a matching window and beyond."""
    fine = ndimage.uniform_filter(rng.standard_normal(shape), WINDOW, mode="wrap") * WINDOW
    coarse = ndimage.gaussian_filter(rng.standard_normal(shape), COARSE, mode="wrap")
    coarse *= 2 * np.sqrt(np.pi) * COARSE
    return np.asarray(np.sqrt(1 - COARSE_SHARE) * fine + np.sqrt(COARSE_SHARE) * coarse)


def smooth_field(
    shape: tuple[int, ...], nodes: tuple[int, int], rng: np.random.Generator
) -> Floats:
    """Smooth noise (H, W): cubic between normal values of unit variance at `nodes`."""
    down, across = (_cubic(n, count) for n, count in zip(shape, nodes, strict=True))
    return np.asarray(down @ rng.standard_normal(nodes) @ across.T)


def _cubic(n: int, nodes: int) -> Floats:
    """The weights (n, nodes) of evenly spaced nodes in a cubic spline through them."""
    at = np.linspace(0, nodes - 1, n)
    columns = [
        ndimage.map_coordinates(node, at[None], order=3, mode="nearest") for node in np.eye(nodes)
    ]
    return np.stack(columns, axis=1)


def _inverse(depth: Floats) -> Floats:
    return np.asarray(np.where(depth > 0, 1 / np.where(depth > 0, depth, 1), 0))


def _slope(values: Floats, axis: int) -> Floats:
    """The smaller of the differences to the two neighbours, which is within one surface."""
    step = np.diff(values, axis=axis)
    first, last = np.take(step, [0], axis), np.take(step, [-1], axis)
    before = np.concatenate([first, step], axis)
    after = np.concatenate([step, last], axis)
    return np.where(np.abs(before) < np.abs(after), before, after)


def _jumps(inverse: Floats) -> Bools:
    """The pixels (H, W) on either side of a discontinuity between neighbours of a row."""
    wide = np.pad(inverse, ((0, 0), (1, 1)), mode="reflect", reflect_type="odd")
    before, a, b, after = wide[:, :-3], wide[:, 1:-2], wide[:, 2:-1], wide[:, 3:]
    least = EDGE * np.maximum(a, b)
    jump = (
        (np.abs(a - b) > least) & (np.abs(2 * a - before - b) > least)
        & (np.abs(2 * b - after - a) > least)
    )  # fmt: skip
    out = np.zeros(inverse.shape, bool)
    out[:, :-1] |= jump
    out[:, 1:] |= jump
    return out


def _shadow(view: View) -> Bools:
    """The pixels (H, W) in the shadow of the projector, which is to the right of the camera."""
    height, width = view.depth.shape
    depth = np.where(view.depth > 0, view.depth, np.inf)
    row = np.broadcast_to(np.arange(height)[:, None], depth.shape)
    shift = PROJECTOR * view.K[0, 0] * view.inverse
    column = np.arange(width) - shift
    margin = int(shift.max()) + 2
    low = np.floor(column).astype(np.int64) + margin
    lit = np.full((height, width + margin + 1), np.inf)
    for side in (low, low + 1):
        np.minimum.at(lit, (row, side), depth)
    nearest = np.minimum(lit[row, low], lit[row, low + 1])
    # Neighbouring pixels may fall into one column; only those well behind are in the shadow.
    hidden = (view.depth > 0) & (nearest < (1 - EDGE) * depth)
    steep = np.abs(view.slope[0]) > EDGE * view.inverse
    return np.asarray(hidden & ~steep)


def _sample_depth(view: View, depth: Floats, offset: Floats) -> Floats:
    """The depth at pixels shifted by offset (2, H, W), down and across.

    Within a surface it is interpolated; across a discontinuity it is that of the nearest pixel.
    """
    at = np.indices(depth.shape) + offset
    inverse = _inverse(depth)
    # mode="nearest" uses the border if the shift leaves the image.
    between = ndimage.map_coordinates(inverse, at, order=1, mode="nearest")
    nearest = ndimage.map_coordinates(inverse, at, order=0, mode="nearest")
    beside = np.abs(between - nearest) > EDGE * nearest
    return _inverse(np.where(beside, nearest, between))
