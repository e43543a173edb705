"""8-bit gray images on disk: strict reading (PNG, JPG), header-only sizes, atomic writing.

Pillow decodes. torchvision.io was measured beside it and is no faster on gray files (24-26 ms for a
2544 x 3056 radiograph either way), truncates instead of rounding where it turns RGB into gray, and
was seen to end the whole process (segmentation fault) on a PNG with two flipped bytes.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose

from util.errors import UserError
from util.files import atomic_write

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
JPEG_END = b"\xff\xd9"
GRAY_MODES = ("L", "1", "LA", "P", "RGB", "RGBA")  # Pillow's names of what 8-bit PNG and JPG decode to
COLOUR_MODES = ("P", "RGB", "RGBA")
MORE_MODES = ("CMYK", "I;16", "I;16B", "I")  # which `read_intensities` takes too

MAX_PIXELS = 2**30  # more is no radiograph, and would fill the memory
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, 179 million, calls such files an attack
# EXIF orientation -> what brings the image upright.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # height and width change places


def read_gray(path: str | os.PathLike) -> np.ndarray:
    """Decode an 8-bit PNG or JPG to gray: uint8 [H, W], a fresh array, turned as its EXIF orientation says.

    Colour becomes gray by ITU-R 601-2 luma (Pillow's mode "L"); an alpha channel is ignored. Raises UserError,
    naming the file, where it is missing, unreadable, empty, not a PNG or JPG, truncated, damaged (any PNG checksum
    that does not match), deeper than 8 bits or larger than MAX_PIXELS.
    """
    return _decode(path)


def read_map(path: str | os.PathLike) -> np.ndarray:
    """Decode a heatmap or foreground, whose gray levels are values: like `read_gray`, but colour is an error unless
    the channels are equal, since a colour scale has no order of gray."""
    return _decode(path, colour=False)


def read_intensities(path: str | os.PathLike) -> np.ndarray:
    """Decode a PNG or JPG of any kind to gray: uint8 [H, W], or uint16 [H, W] of a 16-bit gray PNG.

    Like `read_gray`, but takes 16-bit gray PNG, whose range the caller has to scale, and CMYK JPG (by way
    of RGB). Raises UserError as `read_gray` does, also for 16-bit colour.
    """
    return _decode(path, deep=True)


def _decode(path: str | os.PathLike, *, deep: bool = False, colour: bool = True) -> np.ndarray:
    with _naming(path):
        data = Path(path).read_bytes()
        _check_whole(path, data)
        with _open(path, io.BytesIO(data), deep=deep) as image:
            if (turn := TURNS.get(_orientation(image))) is not None:  # as the header says, like `image_size`
                image = image.transpose(turn)
            if image.mode.startswith("I"):
                return np.array(image).astype(np.uint16)
            if not colour and image.mode in COLOUR_MODES:
                _refuse_colour(path, image)
            return np.array(image if image.mode == "L" else image.convert("L"))


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """What reading a file meets is a UserError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a PNG or JPG image, or its header is damaged; get the file again") from None
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"{path}: can't be read ({error.strerror})") from None
        raise UserError(f"{path}: the image is truncated or damaged ({error}); get the file again") from None


def _refuse_colour(path: str | os.PathLike, image: Image.Image) -> None:
    red, green, blue = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    if not (np.array_equal(red, green) and np.array_equal(green, blue)):
        raise UserError(
            f"{path}: is in colour, whose gray is not the order of its colour scale; save the values themselves, as "
            "8-bit gray PNG or NPY"
        )


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8, as far as the header before the pixels tells; 1 where nothing sensible is said."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif"))
        return int(exif.get(0x0112, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error, EOFError, OSError):
        return 1  # no reader turns an image by damaged EXIF data


def image_size(path: str | os.PathLike, *, deep: bool = False) -> tuple[int, int]:
    """(height, width) in pixels, turned as its EXIF orientation says, from the header of a PNG or JPG, without
    decoding it.

    Raises UserError as `read_gray` does, or with `deep` as `read_intensities`, for what can be seen in the
    header.
    """
    with _naming(path), open(path, "rb") as file, _open(path, file, deep=deep) as image:
        size = image.height, image.width
        return size[::-1] if _orientation(image) in SIDEWAYS else size


def write_gray(path: str | os.PathLike, gray: np.ndarray) -> None:
    """Write uint8 [H, W] atomically: PNG (lossless) by the suffix .png, else JPG (quality 95)."""
    # Into a file Pillow's JPEG encoder takes a write that a full disk cuts short for a whole one.
    encoded = io.BytesIO()
    # PNG level 1: a third of the default level's time for files an eighth larger (radiograph).
    kind = "PNG" if Path(path).suffix.lower() == ".png" else "JPEG"
    Image.fromarray(gray).save(encoded, kind, compress_level=1, quality=95)
    with atomic_write(path) as file:
        file.write(encoded.getvalue())


def _check_whole(path: str | os.PathLike, data: bytes) -> None:
    """Refuse a file that is not complete, as far as its container tells."""
    if data.startswith(PNG_SIGNATURE):
        # To decode a PNG, Pillow checks neither the pixels' checksums, so that a damaged file can pass as another
        # picture, nor that the end is there.
        if PNG_END not in data[-65536:]:
            raise UserError(f"{path}: the PNG is truncated (no end chunk); get the file again")
        with _open(path, io.BytesIO(data), deep=True) as image:
            image.verify()
    elif data.startswith(b"\xff\xd8") and JPEG_END not in data[-65536:]:
        # libjpeg makes up an end marker and Pillow then returns gray stripes for the missing part.
        raise UserError(f"{path}: the JPG is truncated (no end marker); get the file again")


def _open(path: str | os.PathLike, file: IO[bytes], *, deep: bool = False) -> Image.Image:
    """Pillow's lazy image, with the header checked: PNG or JPG of at most 8 bits a channel, or with `deep`
    also 16-bit gray and CMYK."""
    head = file.read(32)
    file.seek(0)
    if not head:
        raise UserError(f"{path}: the file is empty (0 bytes)")
    # IHDR holds the bit depth at byte 24, the colour type (0 = gray) at 25. Pillow silently cuts 16-bit
    # colour to 8 bits.
    if head.startswith(PNG_SIGNATURE) and len(head) > 25 and head[24] > 8 and not (deep and head[25] == 0):
        expected = "8-bit, or 16-bit gray" if deep else "8-bit"
        raise UserError(f"{path}: the PNG is {head[24]}-bit, expected {expected}; scale it to 0..255 first")
    image = Image.open(file, formats=("PNG", "JPEG"))
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{path}: {image.width} x {image.height} px are more than the {MAX_PIXELS:,} that are read; scale it down"
        )
    if image.mode not in GRAY_MODES and not (deep and image.mode in MORE_MODES):
        raise UserError(f"{path}: pixels of type {image.mode}, expected 8-bit gray or RGB")
    return image
