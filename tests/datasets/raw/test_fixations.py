"""Which fixations of a reading are used: bad rows are left out and named, a reading falls only with many of them."""

import pandas as pd
import pytest

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


def load(reading, table):
    table.to_csv(reading.fixations_path, index=False)
    return reading.load_fixations()


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
