"""Gaze heatmaps: from the fixations of one reading to an attention map.

The rule is the one of the REFLACX authors: every fixation puts a Gaussian on the image, as wide as
one degree of visual angle and as heavy as the fixation is long, cut to the part of the image that
was in view. Gaussian and rectangle are both separable, so the whole map is one matrix product, at
any output size directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from util.errors import UserError

RECTANGLE = ("xmin", "ymin", "xmax", "ymax")
FIXATION_COLUMNS = ("x", "y", "duration", "sigma_x", "sigma_y", *RECTANGLE)
# REFLACX's columns of its fixations.csv: the same, but for two times whose difference is the duration.
REFLACX_COLUMNS = {
    "timestamp_start_fixation": "start",
    "timestamp_end_fixation": "end",
    "x_position": "x",
    "y_position": "y",
    "angular_resolution_x_pixels_per_degree": "sigma_x",
    "angular_resolution_y_pixels_per_degree": "sigma_y",
    **{f"{edge}_shown_from_image": edge for edge in RECTANGLE},
}


def fixation_columns(table: pd.DataFrame | Mapping[str, Sequence[float]]) -> pd.DataFrame:
    """`FIXATION_COLUMNS` as float64, from a table that has them or REFLACX's own columns."""
    table = pd.DataFrame(table)
    if "x" not in table:
        table = table[list(REFLACX_COLUMNS)].rename(columns=REFLACX_COLUMNS).astype(np.float64)
        table["duration"] = table["end"] - table["start"]
    return table[list(FIXATION_COLUMNS)].astype(np.float64)


def fixation_heatmap(
    fixations: pd.DataFrame | Mapping[str, Sequence[float]], image_size: tuple[int, int], out_size: tuple[int, int]
) -> np.ndarray:
    """Gaze density of one reading: float64 [height, width], >= 0, sums to 1.

    `image_size` and `out_size` are (height, width) in pixels, of the original image and of the map.
    `fixations` is a table with the columns of REFLACX's fixations.csv, or with one element per fixation
    in each of the columns

    - x, y: position, pixels of the original image, (0, 0) is the centre of the top left pixel;
    - duration: seconds; a fixation of zero or negative duration counts for nothing;
    - sigma_x, sigma_y: standard deviation of its Gaussian, pixels of the original image (one degree
      of visual angle: the angular resolution);
    - xmin, ymin, xmax, ymax: the rectangle of the image that was in view, pixel edges: pixel i is in
      view where xmin <= i + 0.5 < xmax. -inf and inf mean uncut.

    The map is sum over fixations of duration * N(x; sigma_x) * N(y; sigma_y), N being the normal
    density (so a fixation weighs what it lasted, however far the reader had zoomed in), each cut to
    its rectangle, sampled at the centres of the output pixels, (j + 0.5) * width / out_width - 0.5,
    and divided by its sum. A fixation outside the image is kept: what its Gaussian spills into the
    image counts, as for any other.

    Raises `UserError` when nothing is left: no fixation of positive duration, or none that reaches
    the image within the rectangle in view; and for a value that is no number or a sigma that is not positive.
    """
    columns = fixation_columns(fixations)
    columns = columns[columns["duration"] > 0]
    if columns.empty:
        raise UserError("no fixation of positive duration")
    if not (columns[["sigma_x", "sigma_y"]] > 0).all(axis=None):
        raise UserError("the angular resolution of a fixation is not positive")
    columns = {name: values.to_numpy() for name, values in columns.items()}

    height, width = image_size
    out_height, out_width = out_size
    gx = _axis_factor(columns["x"], columns["sigma_x"], columns["xmin"], columns["xmax"], width, out_width)
    gy = _axis_factor(columns["y"], columns["sigma_y"], columns["ymin"], columns["ymax"], height, out_height)
    heatmap = gy.T @ (columns["duration"][:, None] * gx)  # [out_height, out_width]
    total = heatmap.sum()
    if not total > 0:
        raise UserError("no fixation reaches the image within the rectangle in view, or one is not finite")
    return heatmap / total


def pixel_middles(length: int, out_length: int) -> np.ndarray:
    """Middles of the `out_length` pixels that stand for `length` original ones: float64 [out_length],
    counted from the outer edge of the first, so 0.5 less where (0, 0) is that pixel's centre."""
    return (np.arange(out_length) + 0.5) * (length / out_length)


def _axis_factor(
    centre: np.ndarray, sigma: np.ndarray, low: np.ndarray, high: np.ndarray, length: int, out_length: int
) -> np.ndarray:
    """Normal density of each fixation along one axis, zero outside the rectangle: [n, out_length]."""
    edge = pixel_middles(length, out_length)
    z = (edge - 0.5 - centre[:, None]) / sigma[:, None]
    density = np.exp(-0.5 * z * z) / (np.sqrt(2 * np.pi) * sigma[:, None])
    density[(edge < low[:, None]) | (edge >= high[:, None])] = 0.0
    return density


def inside_image(fixations: pd.DataFrame, image_size: tuple[int, int]) -> pd.Series:
    """Which fixations lie in the image of (height, width) `image_size`, borders included: bool [n]."""
    height, width = image_size
    return fixations["x"].between(-0.5, width - 0.5) & fixations["y"].between(-0.5, height - 0.5)


def merge_heatmaps(heatmaps: Sequence[np.ndarray]) -> np.ndarray:
    """Heatmap of several readings of one image: their mean, [H, W], sums to 1.

    Each reading's map sums to 1 by then, so every reader counts the same, however long they looked;
    the maps are added before they are quantised to 8 bits.
    """
    merged = np.sum(heatmaps, axis=0)
    return merged / merged.sum()


def heatmap_to_uint8(heatmap: np.ndarray) -> np.ndarray:
    """The stored attention: heatmap / max * 255, rounded to the nearest level (half up): uint8 [H, W]."""
    peak = heatmap.max()
    if not peak > 0:
        raise UserError("the heatmap is zero everywhere")
    return np.floor(heatmap * (255.0 / peak) + 0.5).astype(np.uint8)
