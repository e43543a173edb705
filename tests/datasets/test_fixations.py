"""datasets/fixations.py: the matrix product against a plain slow version, and the rules of its edges."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.fixations import FIXATION_COLUMNS, fixation_heatmap, heatmap_to_uint8, inside_image, merge_heatmaps
from datasets.raw.read_reflacx import read_reflacx
from util.errors import UserError


def fixation(x=50.0, y=40.0, duration=1.0, sigma_x=9.0, sigma_y=11.0, box=(0, 0, 120, 90)):
    return dict(zip(FIXATION_COLUMNS, (x, y, duration, sigma_x, sigma_y, *box)))


def table(*fixations):
    return pd.DataFrame(list(fixations))


def slow_heatmap(fixations, image_size, out_size):
    """One fixation after the other, one pixel after the other's formula, nothing factored."""
    (height, width), (rows, columns) = image_size, out_size
    v, u = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    px, py = (u + 0.5) * width / columns - 0.5, (v + 0.5) * height / rows - 0.5
    total = np.zeros(out_size)
    for f in fixations.to_dict("records"):
        if f["duration"] <= 0:
            continue
        z2 = ((px - f["x"]) / f["sigma_x"]) ** 2 + ((py - f["y"]) / f["sigma_y"]) ** 2
        gaussian = np.exp(-z2 / 2) / (2 * np.pi * f["sigma_x"] * f["sigma_y"])
        in_view = (px + 0.5 >= f["xmin"]) & (px + 0.5 < f["xmax"])
        in_view &= (py + 0.5 >= f["ymin"]) & (py + 0.5 < f["ymax"])
        total += f["duration"] * gaussian * in_view
    return total / total.sum()


coordinate = st.floats(-40, 160)
fixation_strategy = st.builds(
    fixation,
    x=coordinate,
    y=coordinate,
    duration=st.one_of(st.just(0.0), st.floats(-1, 3)),
    sigma_x=st.floats(4, 40),
    sigma_y=st.floats(4, 40),
    box=st.one_of(
        st.just((-np.inf, -np.inf, np.inf, np.inf)),  # uncut
        st.tuples(st.floats(-10, 40), st.floats(-10, 40), st.floats(60, 140), st.floats(60, 140)),
    ),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(fixation_strategy, min_size=1, max_size=8),
    st.sampled_from([(90, 120), (77, 131)]),
    st.sampled_from([(90, 120), (33, 20), (1, 7), (64, 64), (200, 150)]),
)
def test_equals_the_slow_version(fixations, image_size, out_size):
    fixations = table(fixation(duration=0.5), *fixations)  # at least one that counts
    fast = fixation_heatmap(fixations.to_dict("list"), image_size, out_size)
    assert fast.shape == out_size and fast.dtype == np.float64
    assert fast.min() >= 0 and fast.sum() == pytest.approx(1, abs=1e-12)
    slow = slow_heatmap(fixations, image_size, out_size)
    np.testing.assert_allclose(fast, slow, rtol=0, atol=1e-6 * fast.max())


@pytest.mark.parametrize(
    "bad, message",
    [
        (fixation(duration=0), "no fixation of positive duration"),
        (fixation(x=1e5), "no fixation reaches the image"),
        (fixation(box=(130, 0, 150, 90)), "no fixation reaches the image"),
        (fixation(sigma_x=0), "angular resolution .* not positive"),
        (fixation(y=np.nan), "or one is not finite"),
    ],
)
def test_nothing_left_or_nonsense(bad, message):
    with pytest.raises(UserError, match=message):
        fixation_heatmap(table(bad), (90, 120), (45, 60))


def test_inside_image():
    points = pd.DataFrame({"x": [0, -0.5, -0.6, 119.5, 119.6, 60], "y": [0, 0, 0, 89.5, 10, 90]})
    assert inside_image(points, (90, 120)).tolist() == [True, True, False, True, False, False]


def test_merging_gives_each_reader_the_same_weight():
    first, second = np.eye(3) / 3, np.full((3, 3), 1 / 9)
    np.testing.assert_allclose(merge_heatmaps([first, second]), (first + second) / 2, atol=1e-15)


def test_8_bit_map():
    heatmap = np.array([[0.0, 1.0], [2.0, 510.0]])  # in units of half a gray level
    assert heatmap_to_uint8(heatmap / heatmap.sum()).tolist() == [[0, 1], [1, 255]]
    with pytest.raises(UserError, match="zero everywhere"):
        heatmap_to_uint8(np.zeros((2, 2)))


def test_reflacx_columns_are_taken_as_they_are(study):
    """A fixations.csv read with pandas needs no renaming."""
    reading = read_reflacx(study.raw).readings[0]
    size = reading.image_size
    found = fixation_heatmap(pd.read_csv(reading.fixations_path), size, size)
    np.testing.assert_array_equal(found, fixation_heatmap(reading.load_fixations().table, size, size))
