"""The adapters: REFLACX and EGD-CXR read into the same `Reading`s; bad cells named; no join that fails looks like
absence, and none is made to another image."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd

from datasets.fixations import FIXATION_COLUMNS
from datasets.phantom.gaze_study import make_study
from datasets.raw.mimic_cxr import find_images, find_metadata
from datasets.raw.read_egd import read_egd
from datasets.raw.read_reflacx import read_reflacx
from datasets.raw.sources import find_raw
from util.errors import UserError
from util.tables import check_id


def edit(path, change):
    """`change` the table of a file, as text."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(table)
    table.to_csv(path, index=False)


def set_cell(path, column, row, value):
    def change(table):
        table.loc[row, column] = value

    edit(path, change)


def fault(raw):
    (only,) = (exclusion for exclusion in raw.exclusions if exclusion.is_fault)
    return only


# --- REFLACX ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("whole"), 4, shared_images=2, size=(64, 64), normal_fraction=0)


@pytest.fixture
def raw(whole, tmp_path):
    """Of a study that a test may damage: 2 images of 3 readings each (phases 1, 2), 2 of phase 3."""
    return shutil.copytree(whole.raw, tmp_path / "raw")


def test_every_row_becomes_a_reading_or_an_exclusion(study):
    raw = read_reflacx(study.raw)
    ids = [name for image in study.truth for name in image.reading_ids]
    assert raw.n_found == len(ids)
    assert sorted(item.id for item in [*raw.readings, *raw.exclusions]) == sorted(ids)
    assert [exclusion.reason for exclusion in raw.exclusions] == ["eye tracking discarded"]
    assert [reading.id for reading in raw.readings] == sorted(reading.id for reading in raw.readings)
    assert not any(exclusion.is_fault for exclusion in raw.exclusions)


@pytest.mark.parametrize(
    "column, value, words",
    [
        ("id", "../../P3", "not a plain identifier"),
        ("split", "", "not a plain identifier"),
        ("image", "files/a.dcm", "is not the image of dicom_id"),
        ("image_size_x", "wide", "'wide' is none of 1, ..., 99999"),
        ("image_size_y", "0", "'0' is none of 1"),
        ("Atelectasis", "6", "is none of 0, ..., 5"),
        ("Support devices", "maybe", "'maybe' is neither true nor false"),
    ],
)
def test_a_bad_cell_leaves_its_reading_out(raw, column, value, words):
    path = raw / "main_data/metadata_phase_3.csv"
    set_cell(path, column, 1, value)
    found = read_reflacx(raw)
    assert f"{path}: line 3, column {column!r}" in fault(found).detail and words in fault(found).detail
    assert sum(reading.phase == 3 for reading in found.readings) == 1


def test_rows_that_repeat_an_id(raw):
    path = raw / "main_data/metadata_phase_3.csv"
    set_cell(path, "id", 1, pd.read_csv(path, dtype=str)["id"][0])
    assert "line 3" in fault(read_reflacx(raw)).detail


@pytest.mark.parametrize("damage", ["column", "file"])
def test_unusable_metadata_stops(raw, damage):
    path = raw / "main_data/metadata_phase_3.csv"
    if damage == "file":
        path.unlink()
    else:
        pd.read_csv(path).drop(columns="dicom_id").to_csv(path, index=False)
    with pytest.raises(UserError, match="metadata_phase_3.csv: (column 'dicom_id'|file) is missing"):
        read_reflacx(raw)


def test_reflacx_ids_with_leading_zeros_and_blanks_stay_text(raw):
    def change(table):
        table["subject_id"] = ["007", " 1e5 "]
        table["dicom_id"] = " " + table["dicom_id"]

    edit(raw / "main_data/metadata_phase_3.csv", change)
    subjects = [reading.subject_id for reading in read_reflacx(raw).readings if reading.phase == 3]
    assert sorted(subjects) == ["007", "1e5"]


# --- EGD-CXR ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_egd(tmp_path_factory):
    return make_egd(tmp_path_factory.mktemp("egd"), n_images=4, size=(120, 96))


@pytest.fixture
def egd(whole_egd, tmp_path):
    raw, images = (shutil.copytree(path, tmp_path / path.name) for path in (whole_egd.raw, whole_egd.images))
    return replace(whole_egd, raw=raw, images=images)


def read(study, **options):
    return read_egd(study.raw, metadata=find_metadata(study.images), **options)


def test_egd_readings(egd):
    table = pd.read_csv(egd.raw / "fixations.csv")
    images = {image.dicom_id: image for image in egd.truth}
    n_calibration = (~table["DICOM_ID"].isin([*images])).sum()
    raw = read(egd, sigma=12)
    (note,) = raw.notes
    assert note.startswith(f"{n_calibration} fixations of 2 ids ('calibration-0', 'calibration-3', ...) are of no")
    assert [reading.image_id for reading in raw.readings] == sorted(images)
    for reading in raw.readings:
        image = images[reading.image_id]
        assert (reading.study_id, reading.subject_id) == (image.study_id, image.subject_id)
        assert (reading.split, reading.phase, reading.image_size) == (None, None, (120, 96))
        assert list(reading.labels) == ["Normal", "CHF", "pneumonia"] and reading.load_ellipses().empty
        on = table[(table["DICOM_ID"] == reading.image_id) & (table["X_ORIGINAL"] >= 0)]
        found = reading.load_fixations()
        assert list(found.table) == list(FIXATION_COLUMNS) and (found.table["sigma_x"] == 12).all()
        np.testing.assert_allclose(found.table[["x", "duration"]], on[["X_ORIGINAL", "FPOGD"]])
    assert found.left_out["off the picture"] > 0
    assert find_raw(egd.raw) == find_raw(egd.raw.parent) == ("egd", egd.raw)


def test_egd_needs_the_table_of_sizes(egd):
    with pytest.raises(UserError, match="does not say how large its images are; .* --metadata"):
        read_egd(egd.raw)
    set_cell(find_metadata(egd.images), "dicom_id", 0, "another")
    raw = read(egd)
    assert "is not in the table of metadata" in fault(raw).detail and len(raw.readings) == 3


def test_egd_bad_cells(egd):
    ids = list(pd.read_csv(egd.raw / "master_sheet.csv")["dicom_id"])
    set_cell(egd.raw / "master_sheet.csv", "path", 0, "up.dcm")
    set_cell(egd.raw / "master_sheet.csv", "path", 3, f"files/{ids[1]}.dcm")

    def change(table):
        table.loc[table["DICOM_ID"] == ids[2], "DICOM_ID"] = "somewhere-else"
        table.loc[table.index[table["DICOM_ID"] == ids[1]][2], "X_ORIGINAL"] = "left"

    edit(egd.raw / "fixations.csv", change)
    raw = read(egd)
    details = {exclusion.id: exclusion.detail for exclusion in raw.exclusions if exclusion.is_fault}
    assert "line 2, column 'path'" in details[ids[0]] and "none of DICOM_ID" in details[ids[2]]
    assert f"is not the image of dicom_id {ids[3]!r}" in details[ids[3]]
    (reading,) = raw.readings
    (bad,) = reading.load_fixations().bad
    assert bad.endswith("column 'X_ORIGINAL' is not a finite number")


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("change", [lambda name: name[:-3], lambda name: name[:-12], lambda name: f" {name} "])
def test_egd_ids_that_are_cut_off_are_completed_and_counted(egd, change, every):
    """In all rows of an image or in every second one."""
    before = read(egd)
    ids = [reading.image_id for reading in before.readings][::2]

    def cut(table):
        rows = table.index[table["DICOM_ID"].isin(ids)][::every]
        table.loc[rows, "DICOM_ID"] = table.loc[rows, "DICOM_ID"].map(change)
        cut.n_rows = len(rows)

    edit(egd.raw / "fixations.csv", cut)
    after = read(egd)
    assert after.readings == before.readings and not after.exclusions
    for one, other in zip(after.readings, before.readings):
        pd.testing.assert_frame_equal(one.load_fixations().table, other.load_fixations().table)
    told = [note.split(" (")[0] for note in after.notes if "cut off" in note]
    assert told == ([] if change("ab") == " ab " else [f"{cut.n_rows} fixations of 2 ids"])  # blanks say nothing


def test_egd_ids_that_may_be_several_or_are_empty_are_faults(egd):
    path = egd.raw / "master_sheet.csv"
    first, second = pd.read_csv(path)["dicom_id"][:2]
    twin = first[:30] + second[30:]
    path.write_text(path.read_text().replace(second, twin))
    sizes = find_metadata(egd.images)
    sizes.write_text(sizes.read_text().replace(second, twin))
    gaze = pd.read_csv(egd.raw / "fixations.csv", dtype=str)
    for written in (first[:25], ""):
        gaze.assign(DICOM_ID=gaze["DICOM_ID"].replace(first, written)).to_csv(egd.raw / "fixations.csv", index=False)
        raw = read(egd)
        faults = {exclusion.reason: exclusion for exclusion in raw.exclusions if exclusion.is_fault}
        assert set(faults) == {"ambiguous image id", "no fixations"}
        assert (
            f"{(gaze['DICOM_ID'] == first).sum()} fixations of 1 ids ({written!r}"
            in faults["ambiguous image id"].detail
        )
        assert not {first, twin} & {reading.image_id for reading in raw.readings}


# --- the helpers of every adapter ------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["", "..", "a/b", "a\\b", ".hidden", "a\n", "é"])
def test_ids_are_plain(bad):
    with pytest.raises(UserError, match="the id .* not a plain identifier"):
        check_id(bad, "the id")
    assert check_id("P102R009922-a_b.c", "the id") == "P102R009922-a_b.c"


@pytest.mark.parametrize("hint", ["{}/a.jpg", "../a.jpg", "b/../../a.jpg", "/../a.jpg"])
def test_images_are_looked_for_below_the_root_only(tmp_path, hint):
    (tmp_path / "root/b").mkdir(parents=True)
    (tmp_path / "a.jpg").touch()
    assert not find_images(tmp_path / "root", {"a": hint.format(tmp_path)}).paths
