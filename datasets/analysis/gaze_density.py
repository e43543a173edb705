"""Gaze on marked regions against gaze elsewhere: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from datasets.fixations import pixel_middles


def ellipse_mask(
    boxes: Iterable[Sequence[float]], image_size: tuple[int, int], out_size: tuple[int, int]
) -> np.ndarray:
    """Union of axis-aligned ellipses, each given by its bounding box (xmin, ymin, xmax, ymax) in px of
    the original image: bool [height, width] of `out_size` = (height, width), sampled at pixel centres.
    `image_size` is (height, width) of the original."""
    y, x = pixel_centres(image_size, out_size)
    mask = np.zeros(out_size, dtype=bool)
    for xmin, ymin, xmax, ymax in boxes:
        rx, ry = (xmax - xmin) / 2, (ymax - ymin) / 2
        mask |= ((x - (xmin + xmax) / 2) / rx) ** 2 + ((y - (ymin + ymax) / 2) / ry) ** 2 <= 1.0
    return mask


def box_mask(box: Sequence[float], image_size: tuple[int, int], out_size: tuple[int, int]) -> np.ndarray:
    """The box (xmin, ymin, xmax, ymax) itself, as `ellipse_mask`."""
    y, x = pixel_centres(image_size, out_size)
    xmin, ymin, xmax, ymax = box
    return (y >= ymin) & (y <= ymax) & (x >= xmin) & (x <= xmax)


def pixel_centres(image_size: tuple[int, int], out_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """y [height, 1] and x [1, width] of the pixel centres of a map of `out_size` = (height, width), in px of the
    original image of `image_size` = (height, width)."""
    return np.ix_(*(pixel_middles(length, out) - 0.5 for length, out in zip(image_size, out_size)))


def density_ratio(heatmap: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    """Gaze density in `inside` over that in `outside`: the mean of the heatmap over one bool [H, W]
    region divided by that over the other (mass per area over mass per area). NaN where a region is
    empty or nothing was looked at in `outside`."""
    if not inside.any() or not heatmap[outside].any():
        return float("nan")
    return float(heatmap[inside].mean() / heatmap[outside].mean())
