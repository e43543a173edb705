"""A join that fails never looks like absence: cut-off ids, letter case, blanks, ids that look like numbers."""

import gzip

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd

from datasets.phantom.reflacx import make_study
from datasets.raw.egd import read_egd
from datasets.raw.reflacx import read_reflacx


@pytest.fixture
def egd(tmp_path):
    return make_egd(tmp_path, n_images=6, size=(60, 48))


def change_ids(study, change, images=slice(0, None, 2)):
    """Write the DICOM_IDs of some images otherwise in fixations.csv; how many rows that are."""
    path = study.raw / "fixations.csv"
    table = pd.read_csv(path, dtype=str)
    ids = sorted(image.dicom_id for image in study.truth)[images]
    rows = table["DICOM_ID"].isin(ids)
    table.loc[rows, "DICOM_ID"] = table.loc[rows, "DICOM_ID"].map(change)
    table.to_csv(path, index=False)
    return int(rows.sum())


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name[:-3],
        lambda name: name[:-12],
        str.upper,
        lambda name: f" {name} ",
        lambda name: name[:-3].upper(),
    ],
)
def test_egd_ids_that_are_cut_off_are_completed_and_counted(egd, change):
    before = read_egd(egd.raw)
    n_rows = change_ids(egd, change)
    after = read_egd(egd.raw)
    assert after.readings == before.readings and not after.exclusions
    for one, other in zip(after.readings, before.readings):
        pd.testing.assert_frame_equal(one.load_fixations().table, other.load_fixations().table)
    told = [note for note in after.notes if "cut off" in note]
    if change("ab") == " ab ":  # blanks say nothing
        assert not told
    else:
        assert told[0].startswith(f"{n_rows} fixations of 3 ids")


def test_egd_rows_of_whole_and_cut_off_ids_are_one_reading(egd):
    before = read_egd(egd.raw).readings[0]
    path = egd.raw / "fixations.csv"
    table = pd.read_csv(path, dtype=str)
    rows = table.index[table["DICOM_ID"] == before.image_id]
    table.loc[rows[::2], "DICOM_ID"] = before.image_id[:20]
    table.to_csv(path, index=False)
    after = read_egd(egd.raw).readings[0]
    pd.testing.assert_frame_equal(after.load_fixations().table, before.load_fixations().table)


def test_egd_id_that_may_be_several_is_a_fault_that_lists_them(egd):
    path = egd.raw / "master_sheet.csv"
    master = pd.read_csv(path, dtype=str)
    first, second = master["dicom_id"][:2]
    twin = first[:30] + second[30:]
    master["path"] = [name.replace(second, twin) for name in master["path"]]
    master["dicom_id"] = master["dicom_id"].replace(second, twin)
    master.to_csv(path, index=False)
    change_ids(egd, lambda name: name[:25] if name == first else name, slice(None))
    raw = read_egd(egd.raw)
    faults = {exclusion.reason: exclusion for exclusion in raw.exclusions if exclusion.is_fault}
    assert set(faults) == {"ambiguous image id", "no fixations"}
    detail = faults["ambiguous image id"].detail
    assert first in detail and twin in detail and "fixations.csv: line 7, column 'DICOM_ID'" in detail


def test_egd_fixations_without_an_id_are_a_fault(egd):
    ids = [image.dicom_id for image in egd.truth]
    path = egd.raw / "fixations.csv"
    table = pd.read_csv(path, dtype=str)
    lost = table.index[table["DICOM_ID"] == ids[0]][::2]  # half of one image's gaze
    table.loc[lost, "DICOM_ID"] = ""
    table.to_csv(path, index=False)
    found = read_egd(egd.raw)
    (fault,) = (one for one in found.exclusions if one.is_fault)
    assert fault.reason == "ambiguous image id"
    assert f"line {lost[0] + 2}, " in fault.detail and f"{len(lost) - 1} more rows" in fault.detail


def test_egd_path_of_another_image(egd):
    path = egd.raw / "master_sheet.csv"
    master = pd.read_csv(path, dtype=str)
    master.loc[0, "path"] = master.loc[1, "path"]
    master.to_csv(path, index=False)
    faults = [exclusion.detail for exclusion in read_egd(egd.raw).exclusions if exclusion.is_fault]
    assert any("is not the image of dicom_id" in detail and "line 2" in detail for detail in faults)


@pytest.fixture
def reflacx(tmp_path):
    return make_study(tmp_path, n_images=3, shared_images=0, size=(60, 48), readers=1)


def metadata(study):
    path = study.raw / "main_data" / "metadata_phase_3.csv"
    return path, pd.read_csv(path, dtype=str)


def test_reflacx_row_that_names_another_image(reflacx):
    path, table = metadata(reflacx)
    table.loc[0, "dicom_id"] = table.loc[1, "dicom_id"]
    table.to_csv(path, index=False)
    (fault,) = (exclusion for exclusion in read_reflacx(reflacx.raw).exclusions if exclusion.is_fault)
    assert "line 2, column 'image'" in fault.detail and "is not the image of dicom_id" in fault.detail


def test_reflacx_ids_with_leading_zeros_and_blanks_stay_text(reflacx):
    path, table = metadata(reflacx)
    table["subject_id"] = ["007", " 1e5 ", "10.0"]
    table["dicom_id"] = [f" {name}" for name in table["dicom_id"]]
    table["id"] = [f"{name} " for name in table["id"]]
    table.to_csv(path, index=False)
    raw = read_reflacx(reflacx.raw)
    by_id = {reading.id: reading.subject_id for reading in raw.readings}
    assert by_id == dict(zip(table["id"].str.strip(), ["007", "1e5", "10.0"]))
    assert all(np.isfinite(reading.load_fixations().table["x"]).all() for reading in raw.readings)


@pytest.mark.parametrize("layout", ["reflacx", "egd"])
def test_gzipped_tables_are_those_of_the_data_set(layout, tmp_path):
    """With .gz behind their names: not there would be no readings, in silence."""
    if layout == "egd":
        raw, read = make_egd(tmp_path, n_images=3, size=(60, 48)).raw, read_egd
    else:
        study = make_study(tmp_path, n_images=3, shared_images=1, size=(60, 48), readers=2)
        raw, read = study.raw, read_reflacx
    before = read(raw)
    for path in list(raw.rglob("*.csv")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    after = read(raw)
    assert [reading.id for reading in after.readings] == [reading.id for reading in before.readings] != []
    assert (after.notes, len(after.exclusions)) == (before.notes, len(before.exclusions))
    assert all(len(reading.load_fixations().table) for reading in after.readings)
    if layout == "reflacx":
        assert all(reading.load_chest_box() and reading.load_ellipses() is not None for reading in after.readings)
