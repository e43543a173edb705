"""Radiographs as 8-bit gray pictures, air dark and bone bright, from JPG, PNG or DICOM; DICOM in one of three contrasts.

- "window": stored values -> Modality LUT or rescale -> VOI LUT or window -> inversion -> 0..255, as
  DICOM PS3.3 C.11.1 and C.11.2 define, by pydicom's functions.
- "minmax": the same, but the smallest and largest value in the image become 0 and 255.
- "mimic-cxr-jpg": as the JPGs of MIMIC-CXR-JPG were made, save for their JPEG compression.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError
from util.images import image_size, read_gray

MIMIC_CXR_JPG = "mimic-cxr-jpg"  # what the paper's pictures have
MEANINGS = {
    MIMIC_CXR_JPG: "as MIMIC-CXR-JPG was made, histogram equalised (the paper's)",
    "window": "the file's own VOI LUT or window",
    "minmax": "its smallest and largest value",
}
CONTRASTS = tuple(MEANINGS)  # what `util.radiograph.read_dicom` takes


def add_dicom_contrast(
    parser: argparse._ActionsContainer, *, default: str | None = MIMIC_CXR_JPG, further: Mapping[str, str] | None = None
) -> None:
    """The option of every program that reads DICOM; `further` values of one of them, with what they do. None as
    `default` tells that the option is not given; its first value is meant."""
    choices = {**(further or {}), **MEANINGS}
    told = "; ".join(f"{name}: {text}" for name, text in choices.items())
    # fmt: off
    parser.add_argument("--dicom_contrast", choices=tuple(choices), default=default,
        help=f"gray of DICOM files (JPG and PNG are used as they are); {told} (default: {next(iter(choices))})")
    # fmt: on


# What pydicom logs about damaged files, tracebacks among it, is in our errors; a program's own handlers get it.
logging.getLogger("pydicom").addHandler(logging.NullHandler())


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
    with _opened(path, stop_before_pixels=True, specific_tags=["Rows", "Columns"]) as ds:
        if not ds.get("Rows") or not ds.get("Columns"):
            raise ValueError("no image in it: no Rows and Columns")
        return int(ds.Rows), int(ds.Columns)


def read_dicom(path: str | os.PathLike, contrast: str = "window") -> np.ndarray:
    """The radiograph of a single-frame gray DICOM file as uint8 [H, W], air dark and bone bright.

    `contrast` is one of `CONTRASTS`. "window": the first VOI LUT, else the first window, its two ends becoming 0 and
    255; with neither, as "minmax". In both, pixels of `PixelPaddingValue` (or its range) become 0 and do not count
    for smallest and largest, and the result is turned over, at most once, where `PhotometricInterpretation` is
    MONOCHROME1 or `PixelIntensityRelationshipSign` says that air would be bright. "mimic-cxr-jpg": see
    `_as_mimic_cxr_jpg`.

    Raises `UserError` naming the file whatever is wrong with it.
    """
    with _opened(path) as ds:
        stored = _stored_values(ds)
        inverted = ds.PhotometricInterpretation == "MONOCHROME1"
        if contrast == MIMIC_CXR_JPG:
            return _as_mimic_cxr_jpg(stored, inverted)
        inside = np.ones(stored.shape, bool)
        if (padding := ds.get("PixelPaddingValue")) is not None:
            limit = ds.get("PixelPaddingRangeLimit")
            low, high = sorted((padding, padding if limit is None else limit))
            inside = (stored < low) | (stored > high)
        # The rest maps single values to single values, so it is worked out once per distinct value.
        values = np.arange(int(stored[inside].min()), int(stored[inside].max()) + 1)
        shade = _shade(values, ds, contrast)  # [n] in 0..1
        sign = ds.get("PixelIntensityRelationshipSign")  # of stored values, which `shade` may have turned over
        if inverted or (sign in (1, -1) and (shade[-1] - shade[0]) * sign > 0):
            shade = 1.0 - shade
        gray = np.floor(shade * 255.0 + 0.5).astype(np.uint8)
        result = np.zeros(stored.shape, np.uint8)
        result[inside] = gray[stored[inside].astype(np.int64) - values[0]]
        if len(values) > 1 and np.ptp(result[inside]) == 0:
            raise ValueError(
                "its rescaling or window makes all pixels the same gray; --dicom_contrast mimic-cxr-jpg uses neither"
            )
        return result


def read_dicom_by_maximum(path: str | os.PathLike) -> np.ndarray:
    """The stored values scaled so that the largest becomes 255, negative ones 0: uint8 [H, W], MONOCHROME1 turned
    over, as the published downstream evaluation has it. Raises `UserError` as `read_dicom` does."""
    with _opened(path) as ds:
        stored = np.maximum(_stored_values(ds), 0)
        highest = int(stored.max())
        # Worked out once per distinct value; rint as OpenCV's convertScaleAbs rounds.
        gray = np.rint(np.arange(highest + 1) * (255.0 / max(highest, 1))).astype(np.uint8)[stored]
        return 255 - gray if ds.PhotometricInterpretation == "MONOCHROME1" else gray


def _as_mimic_cxr_jpg(stored: np.ndarray, inverted: bool) -> np.ndarray:
    """How MIMIC-CXR-JPG's makers came to 8 bits: subtract the minimum, divide by the maximum of that, times 255,
    truncated; turned over for MONOCHROME1; histogram equalised. No rescaling, window or padding."""
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


@contextlib.contextmanager
def _opened(path: str | os.PathLike, **options) -> Iterator[Any]:
    """The data set of a file. Whatever goes wrong while it is used, and pydicom parses a damaged file value by value
    as they are asked for, is a `UserError` that names the file; its warnings, which don't name it, are left out."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from pydicom import dcmread

            yield dcmread(path, **options)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or _one_line(error)})") from None
    except Exception as error:  # pydicom and each decoder package have exceptions of their own
        raise UserError(f"{path}: can't be read as a DICOM radiograph ({_one_line(error)})") from error


def _stored_values(ds: Any) -> np.ndarray:
    """Stored values of one gray frame, integer [H, W], unused high bits cleared, sign applied (pydicom does both)."""
    if "PixelData" not in ds:
        raise ValueError("no pixel data")
    if (frames := int(ds.get("NumberOfFrames") or 1)) != 1:
        raise ValueError(f"{frames} frames, expected one")
    photometric = ds.get("PhotometricInterpretation")
    if photometric not in ("MONOCHROME1", "MONOCHROME2") or ds.get("SamplesPerPixel", 1) != 1:
        raise ValueError(f"{photometric}, expected MONOCHROME1 or MONOCHROME2")
    if ds.get("BitsAllocated", 16) > 16:
        raise ValueError(f"{ds.BitsAllocated} bits allocated, expected 8 or 16")
    return ds.pixel_array


def _shade(values: np.ndarray, ds: Any, contrast: str) -> np.ndarray:
    """Modality and VOI transformation of stored values, scaled to 0..1 of their full output range: [n]."""
    from pydicom.pixels import apply_modality_lut, apply_voi, apply_windowing

    for name in ("RescaleSlope", "RescaleIntercept", "VOILUTFunction"):  # an empty one says nothing
        if name in ds and ds.get(name) in (None, ""):
            del ds[name]
    shown = np.asarray(apply_modality_lut(values, ds), np.float64)
    low, high = shown.min(), shown.max()
    if contrast == "window" and ds.get("VOILUTSequence"):
        descriptor = ds.VOILUTSequence[0].LUTDescriptor
        n_entries, first = descriptor[0] % 65536 or 65536, descriptor[1]
        # pydicom keeps positions in the type of the entries, where those of a long table would wrap round.
        descriptor[0], descriptor[2] = n_entries, 16
        entries = apply_voi(np.arange(first, first + n_entries), ds)
        low, high = float(entries.min()), float(entries.max())
        shown = entries[np.clip(np.rint(shown).astype(np.int64) - first, 0, n_entries - 1)].astype(np.float64)
    elif contrast == "window" and ds.get("WindowCenter") is not None and ds.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):  # exp in a sigmoid window
            # The ends are not sorted: with a negative slope pydicom's output falls where the window rises.
            low, high = apply_windowing(np.array([-1e12, 1e12]), ds)
            shown = apply_windowing(shown, ds)
    shade = np.clip((shown - low) / (high - low), 0.0, 1.0) if high != low else np.zeros(shown.shape)
    if not np.isfinite(shade).all():
        raise ValueError("its contrast gives values that are no numbers")
    return shade


def _one_line(error: object) -> str:
    """Text of an exception, which may hold anything, fit for a message."""
    return " ".join(str(error).split())[:500] or type(error).__name__


def read_radiograph(path: str | os.PathLike, contrast: str) -> np.ndarray:
    """The radiograph as uint8 [H, W], air dark and bone bright; `contrast` of DICOM is one of
    `util.radiograph.CONTRASTS`. Raises `UserError` naming the file."""
    return read_dicom(path, contrast) if is_dicom(path) else read_gray(path)


def radiograph_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) from the header, without decoding. Raises `UserError` naming the file."""
    return dicom_size(path) if is_dicom(path) else image_size(path)
