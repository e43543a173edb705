"""One radiograph with its gaze, from files of any kind, to look at."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from datasets.fixations import (
    FIXATION_COLUMNS,
    RECTANGLE,
    REFLACX_COLUMNS,
    fixation_columns,
    fixation_heatmap,
    heatmap_to_uint8,
)
from datasets.shown import Shown, draw_mask
from datasets.transforms import centre_box, crop_resize_flip
from datasets.tree import check_same_size
from util.errors import UserError
from util.images import read_map
from util.radiograph import MIMIC_CXR_JPG, read_radiograph
from util.tables import numeric_columns, read_table


def single_image(
    model: nn.Module,
    args: Mapping[str, Any],
    image: str | os.PathLike,
    *,
    heatmap: str | os.PathLike | None = None,
    fixations: str | os.PathLike | None = None,
    dicom_contrast: str = MIMIC_CXR_JPG,
) -> Shown:
    """One radiograph with its gaze, resized and cut to the centre square.

    Args:
        image: JPG, PNG or DICOM (in the contrast `dicom_contrast`, of `util.radiograph.CONTRASTS`).
        heatmap: 8-bit gray picture of the image's size.
        fixations: CSV with REFLACX's columns, or with those of `datasets.fixations.FIXATION_COLUMNS`.

    Raises:
        UserError: a file that can't be read, or gaze that does not belong to an image of this size.
    """
    gray = read_radiograph(image, dicom_contrast)
    attention = np.zeros_like(gray)
    if fixations is not None:
        attention = _fixation_map(fixations, gray.shape)
    elif heatmap is not None:
        attention = read_map(heatmap)
        check_same_size(heatmap, attention.shape, image, gray.shape)
    size = (model.img_size, model.img_size)
    planes = crop_resize_flip([gray, attention], centre_box(*gray.shape), size)  # [2, S, S]
    batch = {"img": planes[None, :1], "attention": planes[None, 1]}
    return Shown(batch, draw_mask(model, batch, args, (0, 0, 0)), [0])


def read_own_fixations(path: str | os.PathLike) -> pd.DataFrame:
    """Fixations of a CSV with REFLACX's columns or with those of `datasets.fixations.FIXATION_COLUMNS`."""
    path = Path(path)
    columns = FIXATION_COLUMNS if "x" in read_table(path, ()) else list(REFLACX_COLUMNS)
    # Where a fixation is not cut to the part in view, the rectangle is infinite.
    return fixation_columns(numeric_columns(read_table(path, columns), columns, path, infinite=RECTANGLE))


def check_rectangles(fixations: pd.DataFrame, image_size: tuple[int, int], path: object) -> None:
    """Whether the parts in view fit an image of (height, width) `image_size`: `UserError` naming `path` if one reaches
    beyond it, a warning if all end before it does (both by more than a pixel; infinite ones are uncut)."""
    height, width = image_size
    ends = fixations[["xmax", "ymax"]]
    right, bottom = ends.replace(np.inf, 0).max()
    if right > width + 1 or bottom > height + 1:
        raise UserError(
            f"{path}: parts of an image of {right:g} x {bottom:g} px or more were in view, but this one has "
            f"{width} x {height}; give the image at its original size"
        )
    xmax, ymax = ends.max()
    if xmax < width - 1 or ymax < height - 1:
        print(
            f"warning: {path}: nothing beyond {xmax:g} x {ymax:g} px is said to have been in view, and this image has "
            f"{width} x {height}; is it the same, at its original size?",
            file=sys.stderr,
            flush=True,
        )


def _fixation_map(path: str | os.PathLike, size: tuple[int, int]) -> np.ndarray:
    """Heatmap of the fixations on an image of `size` = (height, width), uint8 of that size."""
    fixations = read_own_fixations(path)
    check_rectangles(fixations, size, path)
    try:
        return heatmap_to_uint8(fixation_heatmap(fixations, size, size))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
