"""One door to all radiographs: 8-bit gray from JPG, PNG or DICOM."""

from __future__ import annotations

import os

import numpy as np

from util.dicom import dicom_size, is_dicom, read_dicom
from util.images import image_size, read_gray


def read_radiograph(path: str | os.PathLike, contrast: str) -> np.ndarray:
    """The radiograph as uint8 [H, W], air dark and bone bright; `contrast` of DICOM is one of
    `util.contrast.CONTRASTS`. Raises `UserError` naming the file."""
    return read_dicom(path, contrast) if is_dicom(path) else read_gray(path)


def radiograph_size(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) from the header, without decoding. Raises `UserError` naming the file."""
    return dicom_size(path) if is_dicom(path) else image_size(path)
