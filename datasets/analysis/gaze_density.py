"""Gaze on marked regions against gaze elsewhere: pure functions."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from datasets.fixations import pixel_middles
from datasets.prepare.pixels import PATCH_GRID

Box = tuple[float, float, float, float]

ANY = "Any abnormality"
SIZES = ("small", "medium", "large")
N_PATCHES = PATCH_GRID**2


def ellipse_mask(boxes: Iterable[Box], image_size: tuple[int, int], out_size: tuple[int, int]) -> np.ndarray:
    """Union of axis-aligned ellipses, each given by its bounding box (xmin, ymin, xmax, ymax) in px of
    the original image: bool [height, width] of `out_size` = (height, width), sampled at pixel centres.
    `image_size` is (height, width) of the original."""
    x = pixel_middles(image_size[1], out_size[1])[None, :] - 0.5
    y = pixel_middles(image_size[0], out_size[0])[:, None] - 0.5
    mask = np.zeros(out_size, dtype=bool)
    for xmin, ymin, xmax, ymax in boxes:
        rx, ry = max((xmax - xmin) / 2, 1e-9), max((ymax - ymin) / 2, 1e-9)
        mask |= ((x - (xmin + xmax) / 2) / rx) ** 2 + ((y - (ymin + ymax) / 2) / ry) ** 2 <= 1.0
    return mask


def density_ratio(heatmap: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    """Gaze density in `inside` over that in `outside`: the mean of the heatmap over one bool [H, W]
    region divided by that over the other (mass per area over mass per area). NaN where a region is
    empty or nothing was looked at in `outside`."""
    if not inside.any() or not outside.any():
        return float("nan")
    elsewhere = heatmap[outside].mean()
    return float(heatmap[inside].mean() / elsewhere) if elsewhere > 0 else float("nan")


def size_class(area_share: float, thresholds: tuple[float, float]) -> str:
    """small below the first threshold, large from the second on, else medium."""
    return SIZES[int(np.searchsorted(thresholds, area_share, side="right"))]
