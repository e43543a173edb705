"""Simulated fixations: a survey of the chest plus dwell on the abnormalities.

How much dwell: as much as makes the gaze density inside the reading's abnormal ellipses `dwell_ratio` times that
outside of them, by the same heatmap (`datasets.fixations.fixation_heatmap`) and ratio (`datasets.analysis.gaze_density.density_ratio`)
that the analysis uses, so that it must find the ratio again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from datasets.analysis.gaze_density import ellipse_mask
from datasets.fixations import fixation_heatmap
from datasets.phantom.chest import CHEST_REGIONS, Frame

FIXATION_FILE_COLUMNS = (
    "timestamp_start_fixation",
    "timestamp_end_fixation",
    "x_position",
    "y_position",
    "pupil_area_normalized",
    "window_level",
    "window_width",
    "angular_resolution_x_pixels_per_degree",
    "angular_resolution_y_pixels_per_degree",
    "xmin_shown_from_image",
    "ymin_shown_from_image",
    "xmax_shown_from_image",
    "ymax_shown_from_image",
    "xmin_in_screen_coordinates",
    "ymin_in_screen_coordinates",
    "xmax_in_screen_coordinates",
    "ymax_in_screen_coordinates",
)


# One degree of visual angle, as a share of the longer side of an image shown whole on the screen.
DEGREE = 0.036


def simulate_fixations(
    size: tuple[int, int], boxes: Sequence[Sequence[float]], rng: np.random.Generator, *, dwell_ratio: float = 6.0
) -> pd.DataFrame:
    """The fixations of one reading, as REFLACX's fixations.csv has them.

    `size` is (height, width) of the image; `boxes` bound the abnormal ellipses, px. The survey visits
    the regions of the chest, two fixations miss the image, and some abnormalities are zoomed in on.
    Fixations inside the ellipses last as long in all as gives `dwell_ratio`; there are as many as that
    takes. Raises `ValueError` where no gaze can have that ratio.
    """
    survey = _survey(Frame(size), rng)
    degree = DEGREE * max(size) * rng.uniform(0.93, 1.07) * np.array([1.0, rng.uniform(1.01, 1.05)])
    dwell = np.empty((0, 4))
    if len(boxes):
        is_zoomed = rng.random(len(boxes)) < 0.3
        survey, dwell = _calibrated_dwell(survey, size, boxes, degree, is_zoomed, dwell_ratio, rng)
    order = rng.permutation(3 * max(len(boxes), 1))  # each abnormality is looked at in up to three spells
    visit = np.sort(rng.choice(np.arange(2, 40), len(order), replace=False))[order]
    spell = 3 * dwell[:, 3].astype(int) + np.arange(len(dwell)) % 3
    when = np.concatenate([np.arange(len(survey)), visit[spell] - 0.5])
    sequence = np.argsort(when, kind="stable")
    zoom = _zoom_boxes(dwell, size, boxes, is_zoomed) if len(boxes) else np.empty((0, 4))
    fixations = np.concatenate([survey[:, :3], dwell[:, :3]])
    shown = np.concatenate([np.tile([0.0, 0.0, *map(float, size[::-1])], (len(survey), 1)), zoom])
    return _fixation_table(fixations[sequence], shown[sequence], size, degree, rng)


def _centres_and_axes(boxes: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Centres and semi-axes of the ellipses in boxes: two [n, 2]."""
    corners = np.asarray(boxes, dtype=float).reshape(-1, 2, 2)
    return corners.mean(axis=1), (corners[:, 1] - corners[:, 0]) / 2


def _durations(rng: np.random.Generator, n: int) -> np.ndarray:
    """Fixation durations, s: log-normal about 0.28, within 0.1 .. 0.9."""
    return np.clip(0.28 * np.exp(0.45 * rng.standard_normal(n)), 0.1, 0.9)


def _survey(frame: Frame, rng: np.random.Generator) -> np.ndarray:
    """A scan over the chest, with two fixations off the image: [n, 3] of x, y (px), duration (s)."""
    ellipses = np.array(CHEST_REGIONS)
    path = np.concatenate([rng.permutation(len(ellipses)) for _ in range(4)])[: int(rng.integers(36, 46))]
    offset = np.clip(0.7 * rng.standard_normal((len(path), 2)), -1.3, 1.3)
    place = ellipses[path, :2] + offset * ellipses[path, 2:]
    x, y = frame.to_pixels(place[:, 0], place[:, 1])
    height, width = frame.size
    stray = rng.choice(np.arange(5, len(path)), 2, replace=False)
    x[stray] = (-0.04 * width, 1.03 * width)
    y[stray] = height * rng.uniform(0.2, 0.8, 2)
    return np.column_stack([x, y, _durations(rng, len(path))])


def _calibrated_dwell(
    survey: np.ndarray,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    degree: np.ndarray,
    is_zoomed: np.ndarray,
    ratio: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The survey less what falls on the ellipses, and the fixations on them [n, 4] (x, y, duration, which
    ellipse) that make the density ratio come out.

    The heatmap of all fixations is a mixture w * dwell + (1 - w) * survey of the two parts' own maps.
    Scaling the dwell's durations by a multiplies w / (1 - w) by a, so three maps give a exactly; n is
    chosen to keep a near 1, durations thereby as they were drawn.
    """
    # As fine as the smallest ellipse needs for its area to be right.
    centre, axes = _centres_and_axes(boxes)
    scale = float(np.clip(5 / max(axes.min(), 1e-9), 128 / min(size), 512 / min(size)))
    out_size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    inside = ellipse_mask(boxes, size, out_size)
    if not inside.any():
        raise ValueError(f"an abnormality is too small to be seen: boxes {boxes} on an image of {size} px")
    area = inside.mean()
    target = ratio * area / (ratio * area + 1 - area)  # share of the gaze inside

    def share_inside(*parts: tuple[np.ndarray, np.ndarray]) -> float:
        fixations, shown = (np.concatenate(columns) for columns in zip(*parts))
        heatmap = fixation_heatmap(_heatmap_columns(fixations, shown, size, degree), size, out_size)
        return float(heatmap[inside].sum())

    def part(dwell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return dwell[:, :3], _zoom_boxes(dwell, size, boxes, is_zoomed)

    # The dwell is to be all there is inside. For ratios near 1 the survey has to keep a distance, too.
    for margin in range(4):
        distance = (survey[:, None, :2] - centre) / np.maximum(axes + margin * degree, 1e-9)
        survey = survey[(np.square(distance).sum(axis=2) > 1.0).all(axis=1)]
        if len(survey) < 5:
            raise ValueError(
                f"dwell_ratio {ratio} cannot be had on these abnormalities: there is nothing else to look at"
            )
        survey_part = (survey[:, :3], np.tile([0.0, 0.0, *map(float, size[::-1])], (len(survey), 1)))
        of_survey = share_inside(survey_part)
        if of_survey < target:
            break
    # Small abnormalities get more looks per area. Where the gaze then spreads too much for the ratio,
    # it goes by area and to the middles.
    for power, spread in ((0.5, 0.9), (0.75, 0.75), (1.0, 0.6), (1.0, 0.1)):
        pool = _dwell_pool(boxes, power, spread, rng)
        of_dwell = share_inside(part(pool))
        if of_dwell > target:
            break
    n = 6
    for _ in range(20):
        dwell = pool[:n].copy()
        of_dwell, of_both = share_inside(part(dwell)), share_inside(part(dwell), survey_part)
        if not of_survey < target < of_dwell:
            if n < len(pool) and of_survey < target:
                n = min(2 * n, len(pool))
                continue
            bounds = [share / area / ((1 - share) / (1 - area)) for share in (of_survey, of_dwell)]
            raise ValueError(
                f"dwell_ratio {ratio} cannot be had on these abnormalities: looking only elsewhere "
                f"gives {bounds[0]:.2f}, only at them {bounds[1]:.2f}"
            )
        weight = (of_both - of_survey) / (of_dwell - of_survey)
        factor = (target - of_survey) / (of_dwell - target) * (1 - weight) / weight
        better = int(np.clip(round(n * factor), 1, len(pool)))
        if better == n or 0.85 < factor < 1.18:
            break
        n = better
    dwell[:, 2] *= factor
    if dwell[:, 2].mean() > 2:
        raise ValueError(
            f"dwell_ratio {ratio} cannot be had on these abnormalities: it takes {len(dwell)} fixations of "
            f"{dwell[:, 2].mean():.1f} s"
        )
    return survey, dwell


def _dwell_pool(
    boxes: Sequence[Sequence[float]], power: float, spread: float, rng: np.random.Generator, n: int = 400
) -> np.ndarray:
    """More fixations on the ellipses than a reading has [n, 4], in an order whose first few are spread
    as all of them are: each ellipse's share is its area to the `power`."""
    centre, axes = _centres_and_axes(boxes)
    weight = axes.prod(axis=1) ** power
    weight = weight / weight.sum()
    # The k-th fixation of an ellipse comes at (k - 1/2) / share: the order is even, not by chance.
    count = np.ceil(n * weight).astype(int)
    turn = np.concatenate([(np.arange(c) + 0.5) / w for c, w in zip(count, weight)])
    which = np.repeat(np.arange(len(boxes)), count)[np.argsort(turn, kind="stable")][:n]
    radius, angle = np.sqrt(rng.random(n)) * spread, rng.uniform(0, 2 * np.pi, n)
    place = centre[which] + axes[which] * (radius * np.array([np.cos(angle), np.sin(angle)])).T
    return np.column_stack([place, _durations(rng, n), which])


def _zoom_boxes(
    dwell: np.ndarray, size: tuple[int, int], boxes: Sequence[Sequence[float]], is_zoomed: np.ndarray
) -> np.ndarray:
    """The part of the image in view at each dwell fixation [n, 4]: all of it, or 0.6 of each side around
    an abnormality that was zoomed in on."""
    centre, axes = _centres_and_axes(boxes)
    whole = np.array(size[::-1], dtype=float)  # x, y
    half = np.maximum(0.3 * whole, np.minimum(1.2 * axes, 0.5 * whole))
    low = np.round(np.clip(centre - half, 0, whole - 2 * half))
    view = np.where(is_zoomed[:, None], np.hstack([low, np.round(low + 2 * half)]), [0.0, 0.0, *whole])
    return view[dwell[:, 3].astype(int)]


def _degree_in_view(shown: np.ndarray, size: tuple[int, int], degree: np.ndarray) -> np.ndarray:
    """Image px per degree of visual angle [n, 2]: less where the image is enlarged."""
    return degree * ((shown[:, 2:] - shown[:, :2]) / np.array(size[::-1])).max(axis=1, keepdims=True)


def _heatmap_columns(
    fixations: np.ndarray, shown: np.ndarray, size: tuple[int, int], degree: np.ndarray
) -> dict[str, np.ndarray]:
    """What `fixation_heatmap` takes."""
    sigma = _degree_in_view(shown, size, degree)
    return {
        "x": fixations[:, 0],
        "y": fixations[:, 1],
        "duration": fixations[:, 2],
        "sigma_x": sigma[:, 0],
        "sigma_y": sigma[:, 1],
        "xmin": shown[:, 0],
        "ymin": shown[:, 1],
        "xmax": shown[:, 2],
        "ymax": shown[:, 3],
    }


def _fixation_table(
    fixations: np.ndarray, shown: np.ndarray, size: tuple[int, int], degree: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """What fixations.csv holds of these fixations (x, y, duration) in their order."""
    n = len(fixations)
    saccade = rng.uniform(0.02, 0.06, n)
    end = 0.3 + np.cumsum(fixations[:, 2] + saccade)
    resolution = _degree_in_view(shown, size, degree)
    # The view fits a 3840 x 2160 screen by height or width, centred.
    extent = shown[:, 2:] - shown[:, :2]
    on_screen = extent * (np.array([3840.0, 2160.0]) / extent).min(axis=1, keepdims=True)
    corner = (np.array([3840.0, 2160.0]) - on_screen) / 2
    values = [
        (end - fixations[:, 2]).round(4),
        end.round(4),
        fixations[:, 0].round(2),
        fixations[:, 1].round(2),
        (1 + 0.08 * rng.standard_normal(n)).round(4),
        np.full(n, 2048),
        np.full(n, 4096),
        *resolution.round(4).T,
        *shown.round(2).T,
        *corner.round(1).T,
        *(corner + on_screen).round(1).T,
    ]
    return pd.DataFrame(dict(zip(FIXATION_FILE_COLUMNS, values)))
