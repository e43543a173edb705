"""Which fixations of a reading are used: bad rows are left out and named, a reading falls only with many of them."""

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd

from datasets.fixations import off_the_image_shown, on_the_button
from datasets.phantom.reflacx import make_study
from datasets.raw.egd import read_egd
from datasets.raw.reflacx import read_reflacx
from util.errors import UserError


@pytest.fixture
def reading(tmp_path):
    study = make_study(tmp_path, n_images=1, shared_images=0, size=(120, 96), readers=1, normal_fraction=0)
    return read_reflacx(study.raw).readings[0]


def damage(reading, **cells):
    """Put cells into the reading's file: column=[(row, value), ...]; returns the table before."""
    table = pd.read_csv(reading.fixations_path, dtype=str)
    before = table.copy()
    for column, changes in cells.items():
        for row, value in changes:
            table.loc[row, column] = value
    table.to_csv(reading.fixations_path, index=False)
    return before


SIGMA = "angular_resolution_x_pixels_per_degree"


def test_bad_rows_are_left_out_counted_and_named(reading, monkeypatch):
    monkeypatch.setattr("datasets.raw.readings.MAX_BAD", 0.5)
    whole = reading.load_fixations().table
    assert len(whole) > 20 and not reading.load_fixations().left_out
    damage(
        reading,
        x_position=[(0, "nan"), (1, "inf"), (2, "left")],
        **{SIGMA: [(3, "0"), (4, "-2")]},
        timestamp_end_fixation=[(5, "-1")],
        xmin_shown_from_image=[(6, "")],
    )
    found = reading.load_fixations()
    pd.testing.assert_frame_equal(found.table, whole.iloc[7:])
    assert found.left_out == {"not a finite number": 4, "angular resolution not positive": 2, "negative duration": 1}
    assert len(found.bad) == 7 and found.bad[0].endswith("line 2, column 'x_position': 'nan' is not a finite number")
    assert found.bad[3] == "line 5, angular resolution not positive"


def test_a_row_given_twice_does_not_count_twice(reading):
    whole = reading.load_fixations().table
    table = pd.read_csv(reading.fixations_path, dtype=str)
    pd.concat([table, table.iloc[[2, 5]]]).to_csv(reading.fixations_path, index=False)
    found = reading.load_fixations()
    pd.testing.assert_frame_equal(found.table, whole)
    assert found.left_out == {"the same row again": 2} and len(found.bad) == 2
    assert found.bad[0] == f"line {len(table) + 2}, the same row again"
    pd.concat([table, table]).to_csv(reading.fixations_path, index=False)  # written twice over
    with pytest.raises(UserError, match="the same row again; .* more than 10%"):
        reading.load_fixations()


def test_a_reading_falls_with_more_bad_rows_than_allowed(reading):
    n = len(reading.load_fixations().table)
    allowed = int(0.1 * n)
    damage(reading, y_position=[(row, "?") for row in range(allowed)])
    assert len(reading.load_fixations().table) == n - allowed
    damage(reading, y_position=[(allowed, "?")])
    with pytest.raises(UserError) as error:
        reading.load_fixations()
    message = str(error.value)
    assert f"line 2, column 'y_position': '?' is not a finite number; {allowed + 1} of {n} fixations" in message
    assert "are bad, more than 10%" in message and str(reading.fixations_path) in message


def test_egd_bad_rows(tmp_path):
    study = make_egd(tmp_path, n_images=2, size=(120, 96), with_duration=False)
    before = read_egd(study.raw).readings[1]
    whole = before.load_fixations()
    path = study.raw / "fixations.csv"
    table = pd.read_csv(path, dtype=str)
    row = table.index[table["DICOM_ID"] == before.image_id][3]
    table.loc[row, "Time (in secs)"] = "?"
    table.to_csv(path, index=False)
    found = read_egd(study.raw).readings[1].load_fixations()
    line = f"line {row + 2}, column 'Time (in secs)': '?' is not a finite number"
    assert found.bad[0] == line
    # The duration of the next one is not known either.
    assert [text.split("line ")[1].split(",")[0] for text in found.bad] == [str(row + 2), str(row + 3)]
    assert set(whole.table.index) - set(found.table.index) == {row + 2, row + 3} & set(whole.table.index)
    assert found.left_out["off the picture"] == whole.left_out["off the picture"] > 0


def test_screen_filter_needs_its_columns_and_is_counted(reading):
    whole = reading.load_fixations().table
    found = reading.load_fixations(screen_filter=True)
    assert not found.bad and set(found.table.index) <= set(whole.index)
    table = pd.read_csv(reading.fixations_path)
    table[["x_position", "y_position"]] = table[["x_position", "y_position"]].clip(0, 90)
    # The view at the top left of the screen, 1:1; the first fixation on the button, the second beside the image.
    for axis, length in (("x", 2000), ("y", 2000)):
        table[f"{axis}min_shown_from_image"] = table[f"{axis}min_in_screen_coordinates"] = 0
        table[f"{axis}max_shown_from_image"] = table[f"{axis}max_in_screen_coordinates"] = length
    table.loc[0, ["x_position", "y_position"]] = 300, 1000
    table.loc[1, ["x_position", "y_position"]] = 2000 + 0.51 * table.loc[1, SIGMA], 50
    table.to_csv(reading.fixations_path, index=False)
    found = reading.load_fixations(screen_filter=True)
    assert found.left_out == {"on the screen's button": 1, "outside of the image shown": 1}
    assert set(found.table.index) == set(range(4, len(table) + 2))
    table.drop(columns="xmax_in_screen_coordinates").to_csv(reading.fixations_path, index=False)
    assert len(reading.load_fixations().table) == len(table)
    with pytest.raises(UserError, match="column 'xmax_in_screen_coordinates' is missing"):
        reading.load_fixations(screen_filter=True)


def one(**values):
    return {name: np.array([value], float) for name, value in values.items()}


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
