"""Simulated fixations: a survey of the chest plus dwell on the abnormalities.

How much dwell: as much as makes the gaze density inside the reading's abnormal ellipses `dwell_ratio` times that
outside of them, by the same heatmap (`datasets.fixations.fixation_heatmap`) and ratio (`datasets.analysis.gaze_density.density_ratio`)
that the analysis uses, so that it must find the ratio again.

Within this file *looks* are fixations as float64 [n, 9], with the columns `datasets.fixations.FIXATION_COLUMNS`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from datasets.analysis.gaze_density import ellipse_mask
from datasets.fixations import FIXATION_COLUMNS, fixation_heatmap
from datasets.phantom.chest import CHEST_REGIONS, to_pixels

# Of fixations.csv, in which the window never changes.
NUMBERS = """
timestamp_start_fixation timestamp_end_fixation x_position y_position pupil_area_normalized
angular_resolution_x_pixels_per_degree angular_resolution_y_pixels_per_degree
xmin_shown_from_image ymin_shown_from_image xmax_shown_from_image ymax_shown_from_image
xmin_in_screen_coordinates ymin_in_screen_coordinates xmax_in_screen_coordinates ymax_in_screen_coordinates
""".split()
SCREEN = (3840.0, 2160.0)  # width, height, px
# One degree of visual angle, as a share of the longer side of an image shown whole on the screen.
DEGREE = 0.036
REACH = 0.9  # looks at an ellipse fall within this share of its semi-axes
POOL = 400  # more looks at the abnormalities than a reading has


def simulate_fixations(
    size: tuple[int, int], boxes: Sequence[Sequence[float]], rng: np.random.Generator, *, dwell_ratio: float = 6.0
) -> pd.DataFrame:
    """The fixations of one reading, as REFLACX's fixations.csv has them.

    `size` is (height, width) of the image; `boxes` bound the abnormal ellipses, px. The survey visits
    the regions of the chest, two fixations miss the image, and some abnormalities are zoomed in on.
    Fixations inside the ellipses last as long in all as gives `dwell_ratio`; there are as many as that
    takes. Raises `ValueError` where no gaze with that ratio is found, as above 15 for some abnormalities.
    """
    place, duration = _survey(size, rng)
    degree = DEGREE * max(size) * rng.uniform(0.93, 1.07) * np.array([1.0, rng.uniform(1.01, 1.05)])
    survey = _looks(place, duration, np.tile([0.0, 0.0, *size[::-1]], (len(place), 1)), degree, size)
    dwell, which = survey[:0], np.arange(0)
    if len(boxes):
        survey, dwell, which = _calibrated(survey, size, np.array(boxes), degree, dwell_ratio, rng)
    order = rng.permutation(3 * max(len(boxes), 1))  # each abnormality is looked at in up to three spells
    visit = np.sort(rng.choice(np.arange(2, 40), len(order), replace=False))[order]
    when = np.concatenate([np.arange(len(survey)), visit[3 * which + np.arange(len(which)) % 3] - 0.5])
    return _fixation_table(np.concatenate([survey, dwell])[np.argsort(when, kind="stable")], rng)


def _looks(
    place: np.ndarray, duration: np.ndarray, shown: np.ndarray, degree: np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Looks at [n, 2] px for [n] s with the rectangles [n, 4] in view, which are enlarged: the smaller, the fewer px
    is a degree."""
    sigma = degree * ((shown[:, 2:] - shown[:, :2]) / size[::-1]).max(axis=1, keepdims=True)
    return np.column_stack([place, duration, sigma, shown])


def _durations(rng: np.random.Generator, n: int) -> np.ndarray:
    """Fixation durations, s: log-normal about 0.28, within 0.1 .. 0.9."""
    return np.clip(0.28 * np.exp(0.45 * rng.standard_normal(n)), 0.1, 0.9)


def _survey(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scan over the chest, with two fixations off the image: places [n, 2], px, and durations [n], s."""
    regions = np.array(CHEST_REGIONS)
    path = np.concatenate([rng.permutation(len(regions)) for _ in range(4)])[: int(rng.integers(36, 46))]
    offset = np.clip(0.7 * rng.standard_normal((len(path), 2)), -1.3, 1.3)
    place = to_pixels(size, *(regions[path, :2] + offset * regions[path, 2:]).T)
    stray = rng.choice(np.arange(5, len(path)), 2, replace=False)
    place[:, stray] = np.array([-0.04, 1.03]) * size[1], size[0] * rng.uniform(0.2, 0.8, 2)
    return place.T, _durations(rng, len(path))


def _calibrated(
    survey: np.ndarray,
    size: tuple[int, int],
    boxes: np.ndarray,
    degree: np.ndarray,
    ratio: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The survey less what falls on the ellipses, the looks at them that make the density ratio come out, and at
    which ellipse each is.

    The heatmap of all fixations is a mixture w * dwell + (1 - w) * survey of the two parts' own maps.
    Scaling the dwell's durations by a multiplies w / (1 - w) by a, so three maps give a exactly; n is
    chosen to keep a near 1, durations thereby as they were drawn.
    """
    low, high = np.split(boxes, 2, axis=1)
    centre, axes = (low + high) / 2, (high - low) / 2  # [n, 2] each
    # As fine as the smallest ellipse needs for its area to be right.
    scale = np.clip(5 / axes.min(), 128 / min(size), 512 / min(size))
    out_size = tuple(round(side * scale) for side in size)
    inside = ellipse_mask(boxes, size, out_size)
    area = inside.mean()
    target = ratio * area / (ratio * area + 1 - area)  # share of the gaze inside

    def share_inside(looks: np.ndarray) -> float:
        return fixation_heatmap(dict(zip(FIXATION_COLUMNS, looks.T)), size, out_size)[inside].sum()

    # The dwell is to be all there is inside. For ratios near 1 the survey has to keep a distance, too.
    for margin in range(4):
        distance = (survey[:, None, :2] - centre) / (axes + margin * degree)
        survey = survey[(np.square(distance).sum(axis=2) > 1.0).all(axis=1)]
        of_survey = share_inside(survey)
        if of_survey < target:
            break
    # The part of the image in view: all of it, or 0.6 of each side around what is zoomed in on.
    whole = np.array(size[::-1])
    half = np.clip(1.2 * axes, 0.3 * whole, 0.5 * whole)
    corner = np.round(np.clip(centre - half, 0, whole - 2 * half))
    is_zoomed = rng.random((len(boxes), 1)) < 0.3
    view = np.where(is_zoomed, np.hstack([corner, np.round(corner + 2 * half)]), [0.0, 0.0, *whole])
    # An ellipse's share is the root of its area: small abnormalities get more looks per area. The k-th look at one
    # comes at (k - 1/2) / share: the first few are spread as all of them are.
    weight = axes.prod(axis=1, keepdims=True) ** 0.5
    turn = (np.arange(POOL) + 0.5) / (weight / weight.sum())  # [n, POOL]
    which = np.argsort(turn, axis=None, kind="stable")[:POOL] // POOL
    radius, angle = np.sqrt(rng.random(POOL)) * REACH, rng.uniform(0, 2 * np.pi, POOL)
    place = centre[which] + axes[which] * (radius * np.array([np.cos(angle), np.sin(angle)])).T
    pool = _looks(place, _durations(rng, POOL), view[which], degree, size)
    n = 6
    for _ in range(20):
        dwell = pool[:n].copy()
        of_dwell, of_both = share_inside(dwell), share_inside(np.concatenate([dwell, survey]))
        if not of_survey < target < of_dwell:
            raise ValueError(
                f"found no gaze of dwell_ratio {ratio} on an image of {size} px, for abnormalities of this size"
            )
        weight = (of_both - of_survey) / (of_dwell - of_survey)
        factor = (target - of_survey) / (of_dwell - target) * (1 - weight) / weight
        better = int(np.clip(round(n * factor), 1, POOL))
        if better == n or 0.85 < factor < 1.18:
            break
        n = better
    dwell[:, 2] *= factor
    return survey, dwell, which[: len(dwell)]


def _fixation_table(looks: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """What fixations.csv holds of looks in their order."""
    place, duration, sigma, shown = np.split(looks, (2, 3, 5), axis=1)
    n = len(looks)
    end = 0.3 + np.cumsum(duration[:, 0] + rng.uniform(0.02, 0.06, n))[:, None]
    # The view fits the screen by height or width, centred.
    extent = shown[:, 2:] - shown[:, :2]
    on_screen = extent * (SCREEN / extent).min(axis=1, keepdims=True)
    corner = (SCREEN - on_screen) / 2
    columns = [
        (end - duration).round(4),
        end.round(4),
        place.round(2),
        (1 + 0.08 * rng.standard_normal((n, 1))).round(4),
        sigma.round(4),
        shown.round(2),
        corner.round(1),
        (corner + on_screen).round(1),
    ]
    table = pd.DataFrame(np.hstack(columns), columns=NUMBERS)
    table.insert(5, "window_level", 2048)
    table.insert(6, "window_width", 4096)
    return table
