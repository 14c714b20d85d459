"""Images, decoded with bounded time and memory, and with errors that name the file."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from occgen_hub.errors import SourceError
from occgen_hub.files import opened
from occgen_hub.media.decode_errors import DAMAGE, MAX_PIXELS, RESTORE, damaged


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) in pixels from an image's header. Raises SourceError."""
    with _opened(path) as image:
        return image.size


def read_rgb(
    path: Path, size: tuple[int, int], target: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Read an image of `size` (width, height) as (H, W, 3) uint8 RGB.

    target: the (width, height) to resize it to; a JPEG is then decoded at a reduced size. Raises
    SourceError if it is damaged or has another size.
    """
    with _opened(path, size) as image:
        return _rgb(image, path, target)


def decode_rgb(
    content: bytes, path: Path, size: tuple[int, int], target: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Like `read_rgb`, for an image in memory. path: its file, for errors."""
    with _image(io.BytesIO(content), path, size) as image:
        return _rgb(image, path, target)


def _rgb(image: Image.Image, path: Path, target: tuple[int, int] | None) -> NDArray[np.uint8]:
    try:
        if target is None or target == image.size:
            return np.asarray(image.convert("RGB"))
        image.draft("RGB", target)
        return np.asarray(image.convert("RGB").resize(target, Image.Resampling.BILINEAR))
    except DAMAGE as error:
        raise damaged(path, error) from None


def fitted(pixels: NDArray[np.uint8], target: tuple[int, int] | None) -> NDArray[np.uint8]:
    """Resize (H, W, 3) uint8 RGB to `target` (width, height); None for no change."""
    if target is None or target == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.BILINEAR))


def read_depth(path: Path, size: tuple[int, int]) -> NDArray[np.uint16]:
    """Read a 16-bit grey image of `size` (width, height) as (H, W) uint16. Raises SourceError."""
    with _opened(path, size) as image:
        return _depth(image, path)


def decode_depth(content: bytes, path: Path, size: tuple[int, int]) -> NDArray[np.uint16]:
    """Like `read_depth`, for an image in memory. path: its file, for errors."""
    with _image(io.BytesIO(content), path, size) as image:
        return _depth(image, path)


def decode_color(content: bytes, path: Path) -> NDArray[np.uint8]:
    """Decode a JPEG or PNG in memory, of any size, as (H, W, 3) uint8 RGB.

    path: its file, for errors. Raises SourceError.
    """
    with _image(io.BytesIO(content), path) as image:
        return _rgb(image, path, None)


def decode_grey(content: bytes, path: Path) -> NDArray[Any]:
    """Decode a grey PNG or TIFF in memory as (H, W) uint16, int32 or float32, as stored.

    path: its file, for errors. Raises SourceError for other types of pixels.
    """
    with _image(io.BytesIO(content), path, formats=("PNG", "TIFF")) as image:
        if image.mode not in ("I;16", "I;16B", "I", "F"):
            problem = f"has an image of mode {image.mode}, expected 16 or 32-bit grey"
            raise SourceError(path, problem, "name another column of depth")
        try:
            return np.asarray(image)
        except DAMAGE as error:
            raise damaged(path, error) from None


def read_labels(path: Path, size: tuple[int, int]) -> NDArray[Any]:
    """Read a label image of `size` (width, height) as (H, W) integers, one per pixel.

    For an image with a palette, these are its indices. Raises SourceError.
    """
    with _opened(path, size) as image:
        if image.mode not in ("L", "P", "I;16", "I;16B", "I") or image.format != "PNG":
            problem = f"is not a label image: a {image.format} whose pixels are {image.mode}"
            remedy = "save labels as a PNG with one whole number of 8 or 16 bits a pixel"
            raise SourceError(path, problem, remedy)
        try:
            return np.asarray(image)
        except DAMAGE as error:
            raise damaged(path, error) from None


def _depth(image: Image.Image, path: Path) -> NDArray[np.uint16]:
    if image.mode not in ("I;16", "I;16B", "I"):
        raise SourceError(
            path,
            f"is not a 16-bit grey image (its mode is {image.mode})",
            "save depth as 16-bit PNG",
        )
    try:
        values = np.asarray(image)
    except DAMAGE as error:
        raise damaged(path, error) from None
    if values.dtype != np.uint16:
        if values.min() < 0 or values.max() > 65535:
            raise SourceError(path, "has values beyond 16 bits", RESTORE)
        values = values.astype(np.uint16)
    return values


class ImageSequence[Pixel: np.generic]:
    """Images of one size, decoded on demand, numbered from 0.

    read: `read_rgb`, `read_depth` or `read_picture`; size: (width, height).
    """

    def __init__(
        self,
        paths: Sequence[Path],
        size: tuple[int, int],
        read: Callable[[Path, tuple[int, int]], NDArray[Pixel]],
    ) -> None:
        self._paths, self._size, self._read = paths, size, read
        self._decoded: set[int] = set()

    def __call__(self, number: int) -> NDArray[Pixel]:
        """Decode the image with that number."""
        image = self._read(self._paths[number], self._size)
        self._decoded.add(number)
        return image

    def check(self, number: int) -> None:
        """Decode an image if that was not done yet. Raises SourceError if it is damaged."""
        if number not in self._decoded:
            self(number)


def is_jpeg(path: Path) -> bool:
    """Whether an image is a JPEG, by its header and not its name. Raises SourceError."""
    with _opened(path) as image:
        return image.format in ("JPEG", "MPO")


def write_jpeg(path: Path, image: NDArray[np.uint8]) -> None:
    """Write (H, W, 3) uint8 RGB as JPEG. Equal images give equal bytes."""
    Image.fromarray(image).save(path, "JPEG", quality=JPEG_QUALITY, subsampling=0)


def encode_jpeg(image: NDArray[np.uint8]) -> bytes:
    """Encode (H, W, 3) uint8 RGB as `write_jpeg` does."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def write_depth(path: Path, metres: NDArray[np.floating], units_per_metre: int) -> bool:
    """Write (H, W) depth in metres, 0 for none, as a 16-bit grey PNG in the given unit.

    Depth beyond the range of 16 bits is stored as 0. Returns whether there was any.
    """
    units = np.rint(metres * units_per_metre)
    beyond = units > np.iinfo(np.uint16).max
    stored = np.where(beyond, 0, units).astype(np.uint16)
    Image.fromarray(stored).save(path, "PNG", compress_level=3)
    return bool(beyond.any())


JPEG_QUALITY = 95
"""Quality of converted images. Above it, files grow and errors hardly shrink."""


@dataclass(frozen=True)
class PictureFacts:
    """Facts from an image's header.

    size: (width, height) when upright; plain: whether it is an upright RGB JPEG; depth: whether it
    is a 16-bit grey image.
    """

    size: tuple[int, int]
    plain: bool
    depth: bool


def picture_facts(path: Path) -> PictureFacts:
    """The facts of an image from a camera, without decoding it. Raises SourceError."""
    with _opened(path) as image:
        turn = _TURNS.get(_orientation(image))
        plain = turn is None and image.format in ("JPEG", "MPO") and image.mode == "RGB"
        size = image.size[::-1] if turn in _SIDEWAYS else image.size
        return PictureFacts(size, plain, depth=image.mode.startswith("I"))


def read_picture(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Read an image from a camera as (H, W, 3) uint8 RGB, rotated upright by its EXIF data.

    size: (width, height) when upright. Grey, palette and CMYK images are converted; transparent
    pixels become black. Raises SourceError.
    """
    with _opened(path) as image:
        try:
            turn = _TURNS.get(_orientation(image))
            flat = _in_rgb(image)
        except DAMAGE as error:
            raise damaged(path, error) from None
        upright = np.array(flat if turn is None else flat.transpose(turn))
    if upright.shape[1::-1] != size:
        text = f"is {upright.shape[1]} x {upright.shape[0]} pixels, expected {size[0]} x {size[1]}"
        raise SourceError(path, text, RESTORE)
    return upright


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that makes an image upright, by its EXIF orientation."""

_SIDEWAYS = tuple(_TURNS[n] for n in (5, 6, 7, 8))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is missing or unreadable.

    Pillow's reader is not used: it warns about damaged EXIF data, and decodes a whole PNG to find
    it.
    """
    tiff = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, place)
            if tag == ExifTags.Base.Orientation:
                size = "I" if kind == _LONG else "H"
                (number,) = struct.unpack_from(f"{order}{size}", tiff, place + 8)
                return int(number) if number in _TURNS else 1
    except struct.error:  # The data are truncated.
        pass
    return 1


_LONG = 4
"""The EXIF type of 32-bit numbers. Orientations usually have 16 bits."""


MAX_SCANS = 100
"""Limit for progressive JPEG. Encoders write ten scans; each costs a pass over the whole image."""


def _has_too_many_scans(file: BinaryIO) -> bool:
    """Whether a JPEG has more than MAX_SCANS start-of-scan markers, which do not occur in data."""
    place, found, last = file.tell(), 0, b""
    file.seek(0)
    while found <= MAX_SCANS and (piece := file.read(1 << 20)):
        found += (last + piece).count(b"\xff\xda")
        last = piece[-1:] if piece.endswith(b"\xff") else b""
    file.seek(place)
    return found > MAX_SCANS


@contextmanager
def _opened(path: Path, size: tuple[int, int] | None = None) -> Iterator[Image.Image]:
    """Open a JPEG or PNG of `size` and read its header. Other formats are refused."""
    with opened(path) as file, _image(file, path, size) as image:
        yield image


@contextmanager
def _image(
    file: BinaryIO,
    path: Path,
    size: tuple[int, int] | None = None,
    formats: tuple[str, ...] = ("JPEG", "PNG"),
) -> Iterator[Image.Image]:
    """Like `_opened`, for an open file."""
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise SourceError(path, f"is not a {' or '.join(formats)} image", RESTORE) from None
    except (*DAMAGE, Image.DecompressionBombError) as error:
        raise damaged(path, error) from None
    if image.width * image.height > MAX_PIXELS:
        raise SourceError(path, f"claims {image.width} x {image.height} pixels", RESTORE)
    if "progressive" in image.info and _has_too_many_scans(file):
        problem = f"is a progressive JPEG with more than {MAX_SCANS} scans"
        raise SourceError(path, problem, RESTORE)
    if size is not None and image.size != size:
        text = f"is {image.width} x {image.height} pixels, expected {size[0]} x {size[1]}"
        raise SourceError(path, text, RESTORE)
    yield image
