"""Which fixations of a reading are used: bad rows are left out and named, a reading falls only with many of them."""

import pandas as pd
import pytest

from datasets.fixations import off_the_image_shown, on_the_button
from datasets.phantom.gaze_study import make_study
from datasets.raw.read_reflacx import read_reflacx
from util.errors import UserError

SIGMA = "angular_resolution_x_pixels_per_degree"


@pytest.fixture
def reading(tmp_path):
    study = make_study(tmp_path, n_images=1, shared_images=0, size=(120, 96), readers=1, normal_fraction=0)
    return read_reflacx(study.raw).readings[0]


@pytest.fixture
def table(reading):
    """Its file, as text."""
    return pd.read_csv(reading.fixations_path, dtype=str)


def load(reading, table, **options):
    table.to_csv(reading.fixations_path, index=False)
    return reading.load_fixations(**options)


def test_bad_rows_are_left_out_counted_and_named(reading, table, monkeypatch):
    monkeypatch.setattr("datasets.raw.readings.MAX_BAD", 0.5)
    whole = load(reading, table)
    assert len(whole.table) > 20 and not whole.left_out
    table.loc[:2, "x_position"] = ["nan", "inf", "left"]
    table.loc[3:4, SIGMA] = ["0", "-2"]
    table.loc[5, "timestamp_end_fixation"] = "-1"
    table.loc[6, "xmin_shown_from_image"] = ""
    found = load(reading, table)
    pd.testing.assert_frame_equal(found.table, whole.table.iloc[7:])
    assert found.left_out == {"not a finite number": 4, "angular resolution not positive": 2, "negative duration": 1}
    assert len(found.bad) == 7 and found.bad[0] == "line 2, column 'x_position' is not a finite number"
    assert found.bad[3] == "line 5, angular resolution not positive"


def test_a_row_given_twice_does_not_count_twice(reading, table):
    whole = load(reading, table).table
    found = load(reading, pd.concat([table, table.iloc[[2, 5]]]))
    pd.testing.assert_frame_equal(found.table, whole)
    assert found.left_out == {"the same row again": 2}
    assert found.bad[0] == f"line {len(table) + 2}, the same row again"
    with pytest.raises(UserError, match="the same row again; .* more than 10%"):
        load(reading, pd.concat([table, table]))


def test_a_reading_falls_with_more_bad_rows_than_allowed(reading, table):
    n, allowed = len(table), len(table) // 10
    table.loc[: allowed - 1, "y_position"] = "?"
    assert len(load(reading, table).table) == n - allowed
    table.loc[allowed, "y_position"] = "?"
    words = f"{reading.fixations_path}: line 2, column 'y_position' is not a finite number; {allowed + 1} of {n}"
    with pytest.raises(UserError, match=words):
        load(reading, table)


def test_screen_filter_needs_its_columns_and_is_counted(reading, table):
    table = table.astype(float)
    table[["x_position", "y_position"]] = table[["x_position", "y_position"]].clip(0, 90)
    # The view at the top left of the screen, 1:1; the first fixation on the button, the second beside the image.
    for axis in "xy":
        table[[f"{axis}min_shown_from_image", f"{axis}min_in_screen_coordinates"]] = 0.0
        table[[f"{axis}max_shown_from_image", f"{axis}max_in_screen_coordinates"]] = 2000.0
    table.loc[0, ["x_position", "y_position"]] = 300, 1000
    table.loc[1, ["x_position", "y_position"]] = 2000 + 0.51 * table.loc[1, SIGMA], 50
    found = load(reading, table, screen_filter=True)
    assert found.left_out == {"on the screen's button": 1, "outside of the image shown": 1} and not found.bad
    assert list(found.table.index) == list(range(4, len(table) + 2))
    table = table.drop(columns="xmax_in_screen_coordinates")
    with pytest.raises(UserError, match="column 'xmax_in_screen_coordinates' is missing"):
        load(reading, table, screen_filter=True)


def one(**values):
    return pd.DataFrame(values, index=[0], dtype=float)


WHOLE = {"xmin": 100, "xmax": 300, "ymin": 0, "ymax": 400, "sigma_x": 20, "sigma_y": 30}


@pytest.mark.parametrize(
    "x, y, outside",
    [(100, 0, 0), (90, 50, 0), (89.9, 50, 1), (310, 50, 0), (310.1, 50, 1), (200, -15, 0), (200, 415.1, 1)],
)
def test_half_a_degree_outside_of_the_image_shown(x, y, outside):
    assert off_the_image_shown(one(x=x, y=y, **WHOLE)).tolist() == [bool(outside)]


@pytest.mark.parametrize(
    "screen_x, screen_y, near",
    [(10, 933, 1), (-40, 883, 1), (-41, 933, 0), (700, 1172, 1), (701, 1000, 0), (300, 882, 0), (300, 1173, 0)],
)
def test_on_the_button_of_the_screen(screen_x, screen_y, near):
    """The view: x 100..300 shown at 1000..3000 on the screen, y 0..400 at 500..1500."""
    screen = one(xmin=1000, xmax=3000, ymin=500, ymax=1500)
    x, y = 100 + (screen_x - 1000) / 10, (screen_y - 500) / 2.5
    assert on_the_button(one(x=x, y=y, **WHOLE), screen).tolist() == [bool(near)]
    empty = one(x=x, y=y, **(WHOLE | {"xmin": 100, "xmax": 100}))
    assert on_the_button(empty, screen).tolist() == [False]
