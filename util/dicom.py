"""A DICOM radiograph as an 8-bit gray picture, air dark and bone bright.

Stored values -> Modality LUT or rescale -> VOI LUT or window -> inversion -> 0..255, as DICOM
PS3.3 C.11.1 and C.11.2 define, through pydicom's own functions.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_modality_lut, apply_windowing

from util.errors import UserError

MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
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
    ds = _open(Path(path), stop_before_pixels=True, specific_tags=_HEADER_TAGS)
    if not ds.get("Rows") or not ds.get("Columns"):
        raise UserError(f"{path}: DICOM without an image (no Rows and Columns)")
    return int(ds.Rows), int(ds.Columns)


def read_dicom(path: str | os.PathLike) -> np.ndarray:
    """The radiograph of a single-frame gray DICOM file as uint8 [H, W], air dark and bone bright.

    Contrast: the first VOI LUT if there is one, else the first window, its two ends becoming 0 and
    255; with neither, the smallest and largest value in the image.

    Inversion, at most once: `PhotometricInterpretation` MONOCHROME1 shows large values dark, so the
    result is turned over. `PixelIntensityRelationshipSign` +1 says that a larger stored value means
    more X-rays, hence air: where MONOCHROME2 would leave air bright, the result is turned over too.
    The two do not add up (MONOCHROME1 with +1 is one statement made twice), and -1 does not undo
    MONOCHROME1, which is what every viewer goes by.

    Pixels of the value (or range) that `PixelPaddingValue` names are no part of the radiograph: they
    do not count for smallest and largest, and become 0.

    Raises `UserError` naming the file: not DICOM, no pixel data, several frames, colour, damaged, a
    window that cannot be, or compressed in a way no installed package decodes.
    """
    path = Path(path)
    ds = _open_gray(path)
    photometric = ds.PhotometricInterpretation
    stored = _stored_values(ds, path)
    padding = _padding(ds, stored)
    inside = stored if padding is None else stored[~padding]
    if inside.size == 0:
        raise UserError(f"{path}: DICOM whose pixels are all padding")
    # The rest maps single values to single values, so it is worked out once per distinct value.
    lowest = int(inside.min())
    values = np.arange(lowest, int(inside.max()) + 1)
    try:
        shade = _shade(values, ds)  # [n] in 0..1
    except (ValueError, NotImplementedError, TypeError, IndexError) as error:
        raise UserError(f"{path}: DICOM whose contrast cannot be applied ({_one_line(error)})") from error
    if photometric == "MONOCHROME1" or _air_is_bright(shade, ds):
        shade = 1.0 - shade
    table = np.floor(shade * 255.0 + 0.5).astype(np.uint8)
    if padding is None:
        return table[stored - np.int64(lowest)]
    result = np.zeros(stored.shape, np.uint8)
    result[~padding] = table[inside - np.int64(lowest)]
    return result


def read_dicom_by_maximum(path: str | os.PathLike) -> np.ndarray:
    """The stored values scaled so that the largest becomes 255: uint8 [H, W], MONOCHROME1 turned over.

    What the published downstream evaluation does: no rescale, no window, no padding. Negative values
    become 0. Raises `UserError` as `read_dicom` does.
    """
    path = Path(path)
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
        raise UserError(f"{path}: DICOM of {ds.NumberOfFrames} frames; a radiograph has one")
    photometric = ds.get("PhotometricInterpretation")
    if photometric not in MONOCHROME or ds.get("SamplesPerPixel", 1) != 1:
        raise UserError(
            f"{path}: DICOM in colour ({photometric}); a radiograph is MONOCHROME1 or MONOCHROME2"
        )
    return ds


def _open(path: Path, **options) -> pydicom.Dataset:
    try:
        return pydicom.dcmread(path, **options)
    except FileNotFoundError:
        raise UserError(f"{path}: file is missing") from None
    except InvalidDicomError:
        raise UserError(f"{path}: not a DICOM file") from None
    except Exception as error:  # pydicom lets whatever its parser hits in damaged input through
        raise UserError(f"{path}: damaged DICOM file ({_one_line(error)})") from error


def _stored_values(ds: pydicom.Dataset, path: Path) -> np.ndarray:
    """Stored pixel values, integer [H, W], unused high bits cleared, sign applied (pydicom does both)."""
    syntax = ds.file_meta.get("TransferSyntaxUID") if hasattr(ds, "file_meta") else None
    if syntax is None:
        raise UserError(f"{path}: DICOM without a transfer syntax, so its pixels cannot be decoded")
    if ds.get("BitsAllocated", 16) > 16:
        raise UserError(f"{path}: DICOM with {ds.BitsAllocated} bits allocated; a radiograph has 8 or 16")
    try:
        values = ds.pixel_array
    except Exception as error:  # each decoder package has its own exceptions
        message = _one_line(error)
        if syntax.is_compressed and "missing dependencies" in message:
            needs = message.partition("missing dependencies:")[2]
            raise UserError(
                f"{path}: DICOM compressed as {syntax.name}, which no installed package decodes; "
                f"pip install one of:{needs}"
            ) from error
        raise UserError(f"{path}: DICOM pixel data cannot be decoded ({message})") from error
    if values.dtype.kind not in "iu" or values.ndim != 2:
        raise UserError(
            f"{path}: DICOM pixel data of type {values.dtype}, shape {values.shape}; want integers, H x W"
        )
    return values


def _padding(ds: pydicom.Dataset, stored: np.ndarray) -> np.ndarray | None:
    """Which pixels are padding, bool [H, W], or None."""
    value = ds.get("PixelPaddingValue")
    if value is None:
        return None
    limit = ds.get("PixelPaddingRangeLimit", value)
    padding = (stored >= min(value, limit)) & (stored <= max(value, limit))
    return padding if padding.any() else None


def _shade(values: np.ndarray, ds: pydicom.Dataset) -> np.ndarray:
    """Modality and VOI transformation of stored values, scaled to 0..1 of their full output range: [n]."""
    values = apply_modality_lut(values, ds)
    voi_lut = ds.get("VOILUTSequence")
    if voi_lut and voi_lut[0].get("LUTData") is not None and voi_lut[0].get("LUTDescriptor") is not None:
        lut, first = _voi_lut(voi_lut[0], ds)
        shown = lut[np.clip(np.rint(values).astype(np.int64) - first, 0, len(lut) - 1)]
        low, high = lut.min(), lut.max()
    elif ds.get("WindowCenter") is not None and ds.get("WindowWidth") is not None:
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


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
