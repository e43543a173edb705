"""The adapters: REFLACX and EGD-CXR read into the same `Reading`s; bad tables named to the cell."""

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd

from datasets.fixations import FIXATION_COLUMNS
from datasets.phantom.reflacx import make_study
from datasets.prepare.readings import detect_source
from datasets.raw.egd import find_egd_root, read_egd
from datasets.raw.reflacx import find_root, read_reflacx
from util.errors import UserError
from util.tables import check_id, check_relative_path

# --- REFLACX ---------------------------------------------------------------------------------------


@pytest.fixture
def own_study(tmp_path):
    """A study that a test may damage: 2 images of 3 readings each (phases 1, 2), 2 of phase 3."""
    return make_study(tmp_path, n_images=4, shared_images=2, size=(120, 96), normal_fraction=0)


def metadata(study, phase):
    return study.raw / "main_data" / f"metadata_phase_{phase}.csv"


def edit(path, column, row, value):
    table = pd.read_csv(path, dtype=str)
    table.loc[row, column] = value
    table.to_csv(path, index=False)


def test_every_row_becomes_a_reading_or_an_exclusion(study):
    raw = read_reflacx(study.raw)
    ids = [name for image in study.truth for name in image.reading_ids]
    assert raw.n_found == len(ids)
    assert sorted(item.id for item in [*raw.readings, *raw.exclusions]) == sorted(ids)
    assert [exclusion.reason for exclusion in raw.exclusions] == ["eye tracking discarded"]
    assert [reading.id for reading in raw.readings] == sorted(reading.id for reading in raw.readings)
    assert not raw.notes and not any(exclusion.is_fault for exclusion in raw.exclusions)


def test_root_is_found_from_around_it(study):
    assert find_root(study.raw) == study.raw and find_root(study.raw / "main_data") == study.raw
    assert find_root(study.raw.parent) == study.raw
    assert find_root(study.raw / "nowhere") is None
    assert detect_source(study.raw) == "reflacx"


def test_a_phase_that_is_not_there_is_noted(own_study):
    metadata(own_study, 2).unlink()
    raw = read_reflacx(own_study.raw)
    assert raw.notes == ["metadata_phase_2.csv is not there: no readings of phase 2"]
    assert {reading.phase for reading in raw.readings} == {1, 3}


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("id", "P100R000000", "is no reading of phase 3"),
        ("id", "../../P3", "not a plain identifier"),
        ("split", "val", "'val' is none of train, validate, test"),
        ("dicom_id", "a/b", "not a plain identifier"),
        ("image", "/etc/passwd", "leaves its directory"),
        ("image", "files/p10/../../../x/s5/a.dcm", "leaves its directory"),
        ("image", "files/a.dcm", "s<study>"),
        ("image_size_x", "wide", "'wide' is none of 1, ..., 99999"),
        ("image_size_y", "0", "'0' is none of 1"),
        ("Atelectasis", "6", "is none of 0, ..., 5"),
        ("Support devices", "maybe", "'maybe' is neither true nor false"),
        ("eye_tracking_data_discarded", "", "neither true nor false"),
    ],
)
def test_a_bad_cell_leaves_its_reading_out(own_study, column, value, words):
    path = metadata(own_study, 3)
    edit(path, column, 1, value)
    raw = read_reflacx(own_study.raw)
    (fault,) = (exclusion for exclusion in raw.exclusions if exclusion.is_fault)
    assert str(path) in fault.detail and "line 3" in fault.detail and words in fault.detail
    assert repr(column) in fault.detail
    assert sum(reading.phase == 3 for reading in raw.readings) == 1


def test_an_id_given_twice(own_study):
    path = metadata(own_study, 3)
    edit(path, "id", 1, pd.read_csv(path)["id"][0])
    (fault,) = (exclusion for exclusion in read_reflacx(own_study.raw).exclusions if exclusion.is_fault)
    assert "line 3" in fault.detail and "second time" in fault.detail


def test_a_missing_column_stops(own_study):
    path = metadata(own_study, 3)
    pd.read_csv(path).drop(columns="dicom_id").to_csv(path, index=False)
    with pytest.raises(UserError, match=r"metadata_phase_3.csv: column 'dicom_id' is missing"):
        read_reflacx(own_study.raw)


# --- EGD-CXR ---------------------------------------------------------------------------------------


@pytest.fixture
def egd(tmp_path):
    return make_egd(tmp_path, n_images=4, size=(120, 96))


def test_egd_readings(egd):
    raw = read_egd(egd.raw, sigma=12)
    assert [reading.image_id for reading in raw.readings] == sorted(image.dicom_id for image in egd.truth)
    reading = raw.readings[0]
    image = next(image for image in egd.truth if image.dicom_id == reading.image_id)
    assert (reading.study_id, reading.subject_id) == (image.study_id, image.subject_id)
    assert reading.split is None and reading.image_size is None and reading.phase is None
    assert set(reading.labels) == {"Normal", "CHF", "pneumonia"} and reading.load_ellipses().empty
    assert reading.load_chest_box() is None
    fixations = reading.load_fixations().table
    assert list(fixations.columns) == list(FIXATION_COLUMNS) and (fixations["sigma_x"] == 12).all()
    assert detect_source(egd.raw) == "egd" and find_egd_root(egd.raw.parent) == egd.raw


def test_egd_calibration_rows_are_counted_and_off_picture_ones_dropped(egd):
    table = pd.read_csv(egd.raw / "fixations.csv")
    calibration = ~table["DICOM_ID"].isin(pd.read_csv(egd.raw / "master_sheet.csv")["dicom_id"])
    assert calibration.sum() > 0 and (table["X_ORIGINAL"] < 0).any()
    raw = read_egd(egd.raw)
    (note,) = raw.notes
    assert note.startswith(f"{calibration.sum()} fixations of 2 ids ('calibration-0', 'calibration-3', ...) are of no")
    for reading in raw.readings:
        rows = table[table["DICOM_ID"] == reading.image_id]
        on = rows[(rows["X_ORIGINAL"] >= 0) & (rows["Y_ORIGINAL"] >= 0)]
        fixations = reading.load_fixations().table
        np.testing.assert_allclose(fixations["x"], on["X_ORIGINAL"])
        np.testing.assert_allclose(fixations["duration"], on["FPOGD"])


def test_egd_durations_from_times(egd):
    """Without FPOGD a fixation lasts since the row before it, off-picture rows included."""
    path = egd.raw / "fixations.csv"
    table = pd.read_csv(path).drop(columns="FPOGD")
    table.to_csv(path, index=False)
    reading = read_egd(egd.raw).readings[0]
    rows = table[table["DICOM_ID"] == reading.image_id]
    times = rows["Time (in secs)"].to_numpy()
    expected = np.array([times[0], *np.diff(times)])
    on = ((rows["X_ORIGINAL"] >= 0) & (rows["Y_ORIGINAL"] >= 0)).to_numpy()
    np.testing.assert_allclose(reading.load_fixations().table["duration"], expected[on])


def test_egd_bad_cells(egd):
    edit(egd.raw / "master_sheet.csv", "path", 0, "../up.dcm")
    table = pd.read_csv(egd.raw / "fixations.csv", dtype=str)
    master = pd.read_csv(egd.raw / "master_sheet.csv")
    row = table.index[table["DICOM_ID"] == master["dicom_id"][1]][2]
    edit(egd.raw / "fixations.csv", "X_ORIGINAL", row, "left")
    gone = master["dicom_id"][2]
    table = pd.read_csv(egd.raw / "fixations.csv", dtype=str)
    table.loc[table["DICOM_ID"] == gone, "DICOM_ID"] = "somewhere-else"
    table.to_csv(egd.raw / "fixations.csv", index=False)
    raw = read_egd(egd.raw)
    reasons = {exclusion.id: (exclusion.reason, exclusion.detail) for exclusion in raw.exclusions}
    assert reasons[master["dicom_id"][0]][0] == "unusable row"
    assert "line 2, column 'path'" in reasons[master["dicom_id"][0]][1]
    assert reasons[gone][0] == "no fixations"
    bad = next(reading for reading in raw.readings if reading.image_id == master["dicom_id"][1])
    assert bad.load_fixations().bad == (f"line {row + 2}, column 'X_ORIGINAL': 'left' is not a finite number",)
    with pytest.raises(UserError, match="--sigma -1 is not positive"):
        read_egd(egd.raw, sigma=-1)


# --- the helpers of every adapter ------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "..", "a/b", "a\\b", ".hidden", "a..b", "a b", "a\n", "é"])
def test_ids_are_plain(bad):
    with pytest.raises(UserError, match="the id .* not a plain identifier"):
        check_id(bad, "the id")
    assert check_id("P102R009922-a_b.c", "the id") == "P102R009922-a_b.c"


@pytest.mark.parametrize("bad", ["/etc/passwd", "..", "a/../b", "..\\a", "a\0b"])
def test_paths_stay_below(bad):
    with pytest.raises(UserError, match="leaves its directory"):
        check_relative_path(bad, "the path")
    assert check_relative_path("files/p10/a..b.dcm", "the path") == "files/p10/a..b.dcm"
