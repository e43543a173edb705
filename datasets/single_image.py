"""One radiograph with its gaze, from files of any kind, to look at."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from datasets.fixations import (
    FIXATION_COLUMNS,
    RECTANGLE,
    REFLACX_COLUMNS,
    REFLACX_TIMES,
    check_rectangles,
    fixation_heatmap,
    heatmap_to_uint8,
)
from datasets.replay import Shown, draw_mask
from datasets.transforms import centre_box, crop_resize_flip
from util.errors import UserError
from util.images import read_map
from util.masking import mask_generator
from util.radiograph import MIMIC_CXR_JPG, read_radiograph
from util.tables import numeric_columns, read_header, read_table


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
    if fixations is not None:
        columns = read_fixations(fixations)
        if (doubt := check_rectangles(columns, gray.shape, fixations)) is not None:
            print(f"warning: {doubt}", file=sys.stderr, flush=True)
        try:
            density = fixation_heatmap(columns, gray.shape, gray.shape)
        except UserError as error:
            raise UserError(f"{fixations}: {error}") from None
        attention = heatmap_to_uint8(density)
    elif heatmap is not None:
        attention = read_map(heatmap)
        if attention.shape != gray.shape:
            raise UserError(
                f"{heatmap}: {attention.shape[1]} x {attention.shape[0]} px, but {image} has "
                f"{gray.shape[1]} x {gray.shape[0]}; give the heatmap of this image at its size"
            )
    else:
        attention = np.zeros_like(gray)
    size = (model.img_size, model.img_size)
    planes = crop_resize_flip([gray, attention], centre_box(*gray.shape), size)  # [2, S, S]
    batch = {"img": planes[None, :1], "attention": planes[None, 1]}
    generator = mask_generator(args.get("seed", 0), 0, 0, 0, model.cls_token.device)
    return Shown(batch, draw_mask(model, batch, args, generator), [Path(image).name])


def read_fixations(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Fixations of a CSV with REFLACX's columns or with those of `datasets.fixations.FIXATION_COLUMNS`."""
    path = Path(path)
    ours = "x" in read_header(path, ())
    columns = FIXATION_COLUMNS if ours else (*REFLACX_COLUMNS.values(), *REFLACX_TIMES)
    # Where a fixation is not cut to the part in view, the rectangle is infinite.
    return numeric_columns(read_table(path, columns), columns, path, infinite=RECTANGLE if ours else ())
