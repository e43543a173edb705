"""Heatmaps that others made: finding them by dicom_id and reading them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.files_by_id import FoundFiles, check_originals, files_below, find_by_id
from datasets.raw.mimic_cxr import DICOM_ID
from util.errors import UserError
from util.images import read_map

LOOSE_INDEX = "heatmaps.json"  # of the heatmaps that scripts/predict_gaze.py makes for loose images


def heatmap_id(stem: str) -> str:
    """The dicom_id in a heatmap's name, wherever it is; a name without one is taken whole."""
    match = DICOM_ID.search(stem)
    return match.group().lower() if match else stem


def find_heatmaps(root: Path, *, without: Iterable[Path] = ()) -> FoundFiles:
    """Heatmap files (.png, .npy) below `root` by dicom_id (`heatmap_id`) in small letters: `<dicom_id>.png`,
    `pred_<dicom_id>_gaze.npy`, ..."""
    check_originals(root, "--heatmaps holds one PNG or NPY per image, as a predictor wrote them", but=LOOSE_INDEX)
    files = files_below(root, without, but=LOOSE_INDEX)
    return find_by_id(root, files, lambda stem: heatmap_id(stem).casefold(), (".npy", ".png"))


def read_heatmap(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """A heatmap over the whole image, resized to (height, width) `size`: float32 [H, W] >= 0.

    PNG is 8-bit gray (colour is refused unless its channels are equal: a colour scale has no order of gray); NPY an
    array of numbers [H, W] (axes of length 1 are dropped) without negatives. Its own size may be any, also of
    another aspect ratio: predictors often work on squares. Raises `UserError` naming the file for anything else,
    also where all values are equal: such a map attends to nothing.
    """
    if os.fspath(path).lower().endswith(".png"):
        values = read_map(path).astype(np.float64)
    else:
        try:
            values = np.load(path, allow_pickle=False).astype(np.float64).squeeze()
        except Exception as error:  # NumPy has a kind of its own for each kind of damage
            raise UserError(f"{path}: cannot be read as NPY ({' '.join(str(error).split())})") from None
    if values.ndim != 2:
        raise UserError(f"{path}: is of shape {list(values.shape)}, expected one map [height, width]")
    if not np.isfinite(values).all() or values.min() < 0:
        raise UserError(f"{path}: has negative or not finite values; a heatmap is a density, 0 or more")
    # By a power of two to a peak below 1: the smallest have no room in float32, and this rounds nothing.
    values = np.ldexp(values, -np.frexp(values.max())[1]).astype(np.float32)
    if values.min() == values.max():
        raise UserError(f"{path}: all values are equal, so it shows no gaze")
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BILINEAR)).clip(0)
