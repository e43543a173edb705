"""A DICOM radiograph as an 8-bit gray picture, air dark and bone bright, in one of three contrasts.

- "window": stored values -> Modality LUT or rescale -> VOI LUT or window -> inversion -> 0..255, as
  DICOM PS3.3 C.11.1 and C.11.2 define, through pydicom's own functions.
- "minmax": the same, but the smallest and largest value in the image become 0 and 255.
- "mimic-cxr-jpg": as the JPGs of MIMIC-CXR-JPG were made from the stored values, with histogram
  equalisation; save for their JPEG compression.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from util.contrast import CONTRASTS, MIMIC_CXR_JPG
from util.errors import UserError

if TYPE_CHECKING:  # imported where it is used: who has no DICOM files needs no pydicom
    import pydicom

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
# What it logs about damaged files, tracebacks among it, is in our errors; a program's own handlers get it.
logging.getLogger("pydicom").addHandler(logging.NullHandler())
_HEADER_TAGS = ["Rows", "Columns"]


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether the file has DICOM's preamble, or at least the suffix .dcm."""
    path = Path(path)
    if path.suffix.lower() == ".dcm":
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False  # the reader of the other formats reports it


def dicom_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) in pixels from the header."""
    path = Path(path)
    with _damage_named(path):
        ds = _open(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
        if not ds.get("Rows") or not ds.get("Columns"):
            raise UserError(f"{path}: DICOM without an image (no Rows and Columns)")
        return int(ds.Rows), int(ds.Columns)


def read_dicom(path: str | os.PathLike, contrast: str = "window") -> np.ndarray:
    """The radiograph of a single-frame gray DICOM file as uint8 [H, W], air dark and bone bright.

    `contrast` is one of `CONTRASTS`. "window": the first VOI LUT if there is one, else the first
    window, its two ends becoming 0 and 255; with neither, as "minmax": the smallest and largest value
    in the image become 0 and 255. "mimic-cxr-jpg": see `_as_mimic_cxr_jpg`; what follows here is not
    looked at there, save MONOCHROME1.

    Inversion, at most once: `PhotometricInterpretation` MONOCHROME1 shows large values dark, so the
    result is turned over. `PixelIntensityRelationshipSign` +1 says that a larger stored value means
    more X-rays, hence air: where MONOCHROME2 would leave air bright, the result is turned over too.
    The two do not add up (MONOCHROME1 with +1 is one statement made twice), and -1 does not undo
    MONOCHROME1, which is what every viewer goes by.

    Pixels of the value (or range) that `PixelPaddingValue` names are no part of the radiograph: they
    do not count for smallest and largest, and become 0.

    Raises `UserError` naming the file, and nothing else whatever is in it: not DICOM, no pixel data,
    several frames, colour, damaged, a window or rescaling that cannot be, or compressed in a way no
    installed package decodes. ValueError for an unknown `contrast`.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast {contrast!r} is none of {', '.join(CONTRASTS)}")
    path = Path(path)
    with _damage_named(path):
        return _read(path, contrast)


def _read(path: Path, contrast: str) -> np.ndarray:
    ds = _open_gray(path)
    photometric = ds.PhotometricInterpretation
    stored = _stored_values(ds, path)
    if contrast == MIMIC_CXR_JPG:
        return _as_mimic_cxr_jpg(stored, photometric == "MONOCHROME1")
    padding = _padding(ds, stored)
    inside = stored if padding is None else stored[~padding]
    if inside.size == 0:
        raise UserError(f"{path}: DICOM whose pixels are all padding")
    # The rest maps single values to single values, so it is worked out once per distinct value.
    lowest = int(inside.min())
    values = np.arange(lowest, int(inside.max()) + 1)
    try:
        shade = _shade(values, ds, contrast)  # [n] in 0..1
        if not np.isfinite(shade).all():
            raise ValueError("it gives values that are no numbers")
    except (ValueError, NotImplementedError, TypeError, IndexError) as error:
        raise UserError(f"{path}: DICOM whose contrast cannot be applied ({_one_line(error)})") from error
    if photometric == "MONOCHROME1" or _air_is_bright(shade, ds):
        shade = 1.0 - shade
    table = np.floor(shade * 255.0 + 0.5).astype(np.uint8)
    gray = table[inside.astype(np.int64) - lowest]
    if len(values) > 1 and gray.min() == gray.max():
        raise UserError(
            f"{path}: DICOM whose rescaling or window makes all pixels the same gray; --dicom_contrast "
            "mimic-cxr-jpg does without both"
        )
    if padding is None:
        return gray
    result = np.zeros(stored.shape, np.uint8)
    result[~padding] = gray
    return result


def _as_mimic_cxr_jpg(stored: np.ndarray, inverted: bool) -> np.ndarray:
    """How MIMIC-CXR-JPG's makers came to 8 bits: subtract the minimum, divide by the maximum of that,
    times 255, truncated; turned over for MONOCHROME1; histogram equalised. No rescaling, window or
    padding. Where all pixels are equal, 0 (255 turned over)."""
    values = stored.astype(np.int64)
    values -= values.min()
    gray = (values / max(int(values.max()), 1) * 255).astype(np.uint8)
    return equalize_histogram(255 - gray if inverted else gray)


def equalize_histogram(gray: np.ndarray) -> np.ndarray:
    """Histogram equalisation of uint8 [H, W] as OpenCV's equalizeHist does it, bit for bit: the lowest
    level that occurs becomes 0, a level above it 255 times the share of the other pixels up to it."""
    counts = np.bincount(gray.ravel(), minlength=256)
    lowest = int(np.flatnonzero(counts)[0])
    if counts[lowest] == gray.size:
        return gray.copy()
    # In OpenCV's float32, rounded half to even.
    scale = np.float32(255) / np.float32(gray.size - counts[lowest])
    up_to = np.cumsum(counts) - counts[: lowest + 1].sum()
    levels = np.rint(up_to.clip(0).astype(np.float32) * scale).clip(0, 255)
    return levels.astype(np.uint8)[gray]


def read_dicom_by_maximum(path: str | os.PathLike) -> np.ndarray:
    """The stored values scaled so that the largest becomes 255: uint8 [H, W], MONOCHROME1 turned over.

    What the published downstream evaluation does: no rescale, no window, no padding. Negative values
    become 0. Raises `UserError` as `read_dicom` does.
    """
    path = Path(path)
    with _damage_named(path):
        ds = _open_gray(path)
        stored = np.maximum(_stored_values(ds, path), 0)
        highest = int(stored.max())
        # Worked out once per distinct value; rint as OpenCV's convertScaleAbs rounds.
        table = np.rint(np.arange(highest + 1) * (255.0 / max(highest, 1))).astype(np.uint8)
        gray = table[stored]
        return 255 - gray if ds.PhotometricInterpretation == "MONOCHROME1" else gray


def _open_gray(path: Path) -> pydicom.Dataset:
    """A file with one gray frame; `UserError` for any other."""
    ds = _open(path)
    if "PixelData" not in ds:
        raise UserError(f"{path}: DICOM without pixel data")
    if int(ds.get("NumberOfFrames") or 1) != 1:
        raise UserError(f"{path}: DICOM of {_one_line(ds.NumberOfFrames)} frames; a radiograph has one")
    photometric = ds.get("PhotometricInterpretation")
    if photometric not in MONOCHROME or ds.get("SamplesPerPixel", 1) != 1:
        raise UserError(
            f"{path}: DICOM in colour ({_one_line(photometric)}); a radiograph is MONOCHROME1 or MONOCHROME2"
        )
    return ds


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Whatever pydicom meets in a damaged file, which it parses value by value as they are asked for, is
    a `UserError` that names the file; its warnings, which don't name it, are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"{path}: damaged DICOM file ({what})") from error


def _open(path: Path, **options) -> pydicom.Dataset:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: to read DICOM, pip install {error.name}") from None
    try:
        return pydicom.dcmread(path, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except InvalidDicomError:
        raise UserError(f"{path}: not a DICOM file") from None


def _stored_values(ds: pydicom.Dataset, path: Path) -> np.ndarray:
    """Stored pixel values, integer [H, W], unused high bits cleared, sign applied (pydicom does both)."""
    syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    if syntax is None:
        raise UserError(f"{path}: DICOM without a transfer syntax, so its pixels cannot be decoded")
    if syntax.is_private:
        raise UserError(
            f"{path}: DICOM of a private or unknown transfer syntax ({_one_line(syntax)}), which can't be decoded"
        )
    if ds.get("BitsAllocated", 16) > 16:
        raise UserError(f"{path}: DICOM with {_one_line(ds.BitsAllocated)} bits allocated; a radiograph has 8 or 16")
    try:
        values = ds.pixel_array
    except Exception as error:  # each decoder package has its own exceptions
        message = _one_line(error)
        if syntax.is_compressed and "missing dependencies" in message:
            needs = message.partition("missing dependencies:")[2]
            raise UserError(
                f"{path}: DICOM compressed as {_one_line(syntax.name)}, which no installed package decodes; "
                f"pip install one of:{needs}"
            ) from error
        raise UserError(f"{path}: DICOM pixel data cannot be decoded ({message})") from error
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise UserError(f"{path}: DICOM pixel data of type {values.dtype}, shape {values.shape}; want integers, H x W")
    return values


def _padding(ds: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Which pixels are padding, bool [H, W], or None."""
    value = ds.get("PixelPaddingValue")
    if value is None:
        return None
    limit = ds.get("PixelPaddingRangeLimit")
    limit = value if limit is None else limit
    padding = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return padding if padding.any() else None


def _shade(values: np.ndarray, ds: pydicom.Dataset, contrast: str) -> np.ndarray:
    """Modality and VOI transformation of stored values, scaled to 0..1 of their full output range: [n]."""
    for name in ("RescaleSlope", "RescaleIntercept", "VOILUTFunction"):  # an empty one says nothing
        if name in ds and ds.get(name) in (None, ""):
            del ds[name]
    if ("RescaleSlope" in ds) != ("RescaleIntercept" in ds) and "ModalityLUTSequence" not in ds:
        raise ValueError("of RescaleSlope and RescaleIntercept only one has a value")
    from pydicom.pixels import apply_modality_lut, apply_windowing

    values = apply_modality_lut(values, ds)
    voi_lut = ds.get("VOILUTSequence") if contrast == "window" else None
    if voi_lut and voi_lut[0].get("LUTData") is not None and voi_lut[0].get("LUTDescriptor") is not None:
        lut, first = _voi_lut(voi_lut[0], ds)
        shown = lut[np.clip(np.rint(values).astype(np.int64) - first, 0, len(lut) - 1)]
        low, high = lut.min(), lut.max()
    elif contrast == "window" and ds.get("WindowCenter") is not None and ds.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):  # exp in a sigmoid window
            shown = apply_windowing(values, ds)
            low, high = sorted(apply_windowing(np.array([-1e12, 1e12]), ds))
    else:
        shown = np.asarray(values, np.float64)
        low, high = float(shown.min()), float(shown.max())
    return np.clip((shown - low) / (high - low), 0.0, 1.0) if high > low else np.zeros(shown.shape)


def _voi_lut(item: pydicom.Dataset, ds: pydicom.Dataset) -> tuple[np.ndarray, int]:
    """Entries of a VOI LUT, float64 [n], and the value that the first one stands for.

    pydicom's apply_voi keeps the positions in the type of the entries, so that tables of 8-bit
    entries longer than 256 (which is how a 12-bit image comes by them) wrap round.
    """
    n_entries, first, bits = item.LUTDescriptor
    n_entries = n_entries % 65536 or 65536  # 0 stands for 65536; a signed descriptor may be negative
    data = item.LUTData
    if isinstance(data, bytes):
        order = "<" if ds.is_little_endian is not False else ">"
        data = np.frombuffer(data, np.uint8 if len(data) < 2 * n_entries else f"{order}u2")
    if len(data) < n_entries or not 8 <= bits <= 16:
        raise ValueError(f"VOI LUT of {len(data)} entries with descriptor {list(item.LUTDescriptor)}")
    return np.asarray(data, np.float64)[:n_entries], first


def _air_is_bright(shade: np.ndarray, ds: pydicom.Dataset) -> bool:
    """Whether PixelIntensityRelationshipSign, which speaks of stored values, leaves air bright after
    the transformations `shade` went through, which may have turned the values over."""
    sign = ds.get("PixelIntensityRelationshipSign")
    return sign in (1, -1) and (shade[-1] - shade[0]) * sign > 0


def _one_line(value: object) -> str:
    """Text of an exception or of a value of the header, which may hold anything, fit for a message."""
    return " ".join(str(value).split())[:500] or type(value).__name__
