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

FIXATION_COLUMNS = ("x", "y", "duration", "sigma_x", "sigma_y", "xmin", "ymin", "xmax", "ymax")
# The same in REFLACX's fixations.csv, where the duration is the difference of two times.
REFLACX_COLUMNS = {
    "x": "x_position",
    "y": "y_position",
    "sigma_x": "angular_resolution_x_pixels_per_degree",
    "sigma_y": "angular_resolution_y_pixels_per_degree",
    "xmin": "xmin_shown_from_image",
    "ymin": "ymin_shown_from_image",
    "xmax": "xmax_shown_from_image",
    "ymax": "ymax_shown_from_image",
}
REFLACX_TIMES = ("timestamp_start_fixation", "timestamp_end_fixation")
REFLACX_SCREEN_COLUMNS = {
    "xmin": "xmin_in_screen_coordinates",
    "ymin": "ymin_in_screen_coordinates",
    "xmax": "xmax_in_screen_coordinates",
    "ymax": "ymax_in_screen_coordinates",
}
RECTANGLE = ("xmin", "ymin", "xmax", "ymax")
# The filter of the REFLACX authors' example: how far a fixation may lie outside of the image shown,
# and how near to the button that their readers clicked, in pixels of their screen.
MAX_DEGREES_OUTSIDE = 0.5
BUTTON_X, BUTTON_Y, BUTTON_MARGIN = (10.0, 650.0), (933.0, 1122.0), 50.0


def fixation_columns(table: pd.DataFrame | Mapping[str, Sequence[float]]) -> dict[str, np.ndarray]:
    """`FIXATION_COLUMNS` as float64 arrays, from a table that has them or REFLACX's own columns."""
    if REFLACX_COLUMNS["x"] in table and "x" not in table:
        columns = {ours: np.asarray(table[theirs], dtype=np.float64) for ours, theirs in REFLACX_COLUMNS.items()}
        start, end = (np.asarray(table[name], dtype=np.float64) for name in REFLACX_TIMES)
        return columns | {"duration": end - start}
    return {name: np.asarray(table[name], dtype=np.float64) for name in FIXATION_COLUMNS}


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
    the image within the rectangle in view; and for values that are not finite or a sigma that is
    not positive.
    """
    columns = fixation_columns(fixations)
    keep = columns["duration"] > 0
    if not keep.any():
        raise UserError("no fixation of positive duration")
    columns = {name: values[keep] for name, values in columns.items()}
    for name in ("x", "y", "duration", "sigma_x", "sigma_y"):
        if not np.isfinite(columns[name]).all():
            raise UserError(f"fixation column {name} has a value that is not a finite number")
    for name in ("sigma_x", "sigma_y"):
        if (columns[name] <= 0).any():
            raise UserError(f"fixation column {name} (angular resolution) has a value that is not positive")

    height, width = image_size
    out_height, out_width = out_size
    gx = _axis_factor(columns["x"], columns["sigma_x"], columns["xmin"], columns["xmax"], width, out_width)
    gy = _axis_factor(columns["y"], columns["sigma_y"], columns["ymin"], columns["ymax"], height, out_height)
    heatmap = gy.T @ (columns["duration"][:, None] * gx)  # [out_height, out_width]
    total = heatmap.sum()
    if not total > 0:
        raise UserError("no fixation reaches the image within the rectangle in view")
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


def check_rectangles(fixations: Mapping[str, Sequence[float]], image_size: tuple[int, int], path: object) -> str | None:
    """Whether the parts in view fit an image of (height, width) `image_size`: None if they do, a doubt where they
    can't tell, `UserError` naming `path` where one reaches beyond it (by more than a pixel)."""
    columns = fixation_columns(fixations)
    edges = {name: columns[name][np.isfinite(columns[name])] for name in RECTANGLE}
    if not all(values.size for values in edges.values()):
        return f"{path}: has no parts in view, so it can't be checked that it is of an image of this size"
    height, width = image_size
    right, bottom = max(edges["xmax"]), max(edges["ymax"])
    if min(*edges["xmin"], *edges["ymin"]) < -1 or right > width + 1 or bottom > height + 1:
        raise UserError(
            f"{path}: parts of an image of {right:g} x {bottom:g} px or more were in view, but this one has "
            f"{width} x {height}; give the image at its original size"
        )
    if right < width - 1 or bottom < height - 1:
        return (
            f"{path}: nothing beyond {right:g} x {bottom:g} px was ever in view, and this image has {width} x {height}; "
            "is it the same, at its original size?"
        )
    return None


def inside_image(fixations: pd.DataFrame | Mapping[str, Sequence[float]], image_size: tuple[int, int]) -> np.ndarray:
    """Which fixations lie in the image of (height, width) `image_size`, borders included: bool [n]."""
    x, y = np.asarray(fixations["x"], dtype=np.float64), np.asarray(fixations["y"], dtype=np.float64)
    height, width = image_size
    return (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)


def off_the_image_shown(fixations: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which fixations lie more than half a degree outside of the rectangle in view: bool [n]."""
    far = np.zeros(len(fixations["x"]), bool)
    for axis in "xy":
        at, slack = fixations[axis], MAX_DEGREES_OUTSIDE * fixations[f"sigma_{axis}"]
        far |= (at < fixations[f"{axis}min"] - slack) | (at > fixations[f"{axis}max"] + slack)
    return far


def on_the_button(fixations: Mapping[str, np.ndarray], screen: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which fixations lie on the button of REFLACX's screen or within `BUTTON_MARGIN` px above, below or
    beside it: bool [n]. `screen` has the rectangle in view again, xmin ... ymax, px of the screen."""
    near = np.ones(len(fixations["x"]), bool)
    for axis, (low, high) in (("x", BUTTON_X), ("y", BUTTON_Y)):
        start, end = fixations[f"{axis}min"], fixations[f"{axis}max"]
        with np.errstate(divide="ignore", invalid="ignore"):  # an empty rectangle: nowhere, not near
            share = (fixations[axis] - start) / (end - start)
        at = screen[f"{axis}min"] + share * (screen[f"{axis}max"] - screen[f"{axis}min"])
        near &= (at >= low - BUTTON_MARGIN) & (at <= high + BUTTON_MARGIN)
    return near


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
