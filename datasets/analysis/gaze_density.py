"""Gaze on marked regions against gaze elsewhere, and what a mean of it is worth: pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from datasets.prepare.pixels import PATCH_GRID
from util.gaze import pixel_middles

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


def bootstrap_mean(
    values: Sequence[float], groups: Sequence[object], *, n_samples: int, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Mean of `values` and its 95% percentile-bootstrap interval: (mean, low, high).

    Whole groups are drawn (the readings of one subject are not independent of each other). With fewer
    than two groups there is no interval: NaN.
    """
    values = np.asarray(values, dtype=float)
    _, index = np.unique(np.asarray(groups).astype(str), return_inverse=True)
    count = np.bincount(index).astype(float)  # [G]
    total = np.bincount(index, weights=values)  # [G]
    if len(count) < 2:
        return float(values.mean()), float("nan"), float("nan")
    means = np.empty(n_samples)
    chunk = max(1, 2_000_000 // len(count))
    for start in range(0, n_samples, chunk):
        n = min(chunk, n_samples - start)
        drawn = rng.multinomial(len(count), np.full(len(count), 1 / len(count)), size=n)  # [n, G]
        means[start : start + n] = drawn @ total / (drawn @ count)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values.mean()), float(low), float(high)
