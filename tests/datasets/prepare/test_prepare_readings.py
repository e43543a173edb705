"""datasets/prepare/readings.py: raw -> tree, on the phantom; exact counts, exact maps, nothing half-done."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd
from PIL import Image
from trees import contents

from datasets.fixations import fixation_heatmap, heatmap_to_uint8
from datasets.phantom.reflacx import make_study
from datasets.prepare.pixels import count_significant
from datasets.prepare.readings import SOURCES, prepare
from datasets.raw.mimic_cxr import find_images
from datasets.raw.read_egd import read_egd
from datasets.raw.read_reflacx import read_reflacx
from datasets.raw.readings import Fixations, RawReadings, Reading
from scripts.prepare_reflacx import main
from util.errors import UserError
from util.images import read_gray
from util.radiograph import read_dicom

SCRIPT = Path(__file__).parents[3] / "scripts" / "prepare_reflacx.py"


def entries_of(out):
    return json.loads((out / "reflacx.json").read_text())


def maps_of(out, entry):
    name = f"{entry['study_id']}/{entry['reflacx_id']}.png"
    return read_gray(out / "attention" / name), read_gray(out / "foreground" / name)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """12 images, JPG and DICOM by turns, 3 of them read 3 times: 18 readings, 1 discarded."""
    return make_study(tmp_path_factory.mktemp("mixed"), n_images=12, size=(200, 160), image_format="mixed")


@pytest.fixture(scope="module")
def each(mixed, tmp_path_factory):
    out = tmp_path_factory.mktemp("each")
    report = prepare(mixed.raw, mixed.images, out, size=120, readings="each")
    return out, report


# --- what the tree holds ---------------------------------------------------------------------------


def test_attention_is_the_readings_heatmap(each, mixed):
    out, _ = each
    entries = {entry["reflacx_id"]: entry for entry in entries_of(out)}
    for reading in read_reflacx(mixed.raw).readings:
        attention, foreground = maps_of(out, entries[reading.id])
        assert attention.shape == foreground.shape == (150, 120)
        expected = fixation_heatmap(reading.load_fixations().table, reading.image_size, (150, 120))
        np.testing.assert_array_equal(attention, heatmap_to_uint8(expected))
        assert set(np.unique(foreground)) == {0, 255}
        threshold = attention[foreground == 0].max()  # a threshold splits the two
        assert threshold < attention[foreground == 255].min()


def test_entries(each, mixed):
    out, _ = each
    entries = entries_of(out)
    assert [entry["reflacx_id"] for entry in entries] == sorted(entry["reflacx_id"] for entry in entries)
    images = {image.dicom_id: image for image in mixed.truth}
    for entry in entries:
        image = images[entry["dicom_id"]]
        assert entry["reflacx_id"] in image.reading_ids and entry["raw_ids"] == [entry["reflacx_id"]]
        assert (entry["study_id"], entry["subject_id"]) == (image.study_id, image.subject_id)
        assert entry["split"] == image.split
        assert entry["phase"] == int(entry["reflacx_id"][1]) and entry["source"] == "reflacx"
        assert {"Pneumothorax", "Lung nodule or mass"} <= set(entry["labels"])
        assert (out / entry["image_path"]).is_file()


def test_images_are_the_radiographs(each, mixed):
    """JPG and DICOM (both photometric interpretations) of phantom chests: lungs darker than the rest."""
    out, _ = each
    for entry in entries_of(out):
        stored = read_gray(out / entry["image_path"])
        source = Path(find_images(mixed.images, {entry["dicom_id"]: ""}).paths[entry["dicom_id"]])
        original = read_dicom(source, "mimic-cxr-jpg") if source.suffix == ".dcm" else read_gray(source)
        resized = np.asarray(Image.fromarray(original).resize((120, 150), Image.Resampling.BICUBIC))
        difference = np.abs(stored.astype(int) - resized)  # Pillow's kernel rounds some pixels the other way
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02
        lung, spine = stored[40:70, 28:40].mean(), stored[70:110, 57:63].mean()
        assert lung + 30 < spine, source


def test_bad_fixations_are_left_out_counted_and_listed(tmp_path, capsys):
    study = make_study(tmp_path, n_images=2, size=(120, 96), shared_images=0, normal_fraction=0)
    reading = read_reflacx(study.raw).readings[0]
    table = pd.read_csv(reading.fixations_path, dtype=str)
    table.loc[1, "x_position"], table.loc[2, "timestamp_end_fixation"] = "?", "-9"
    table.to_csv(reading.fixations_path, index=False)
    flags = ["--raw", str(study.raw), "--images", str(study.images), "--size", "0", "--out"]
    assert main([*flags, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    bad = f"{reading.id}: line 3, column 'x_position' is not a finite number"
    assert f"2 bad fixations were left out, listed in prepare.json, such as {bad}" in printed
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    assert record["bad_fixations"] == [bad, f"{reading.id}: line 4, negative duration"]
    assert record["counts"]["fixations left out: not a finite number"] == 1
    assert record["counts"]["fixations left out: negative duration"] == 1
    entry = next(entry for entry in entries_of(tmp_path / "out") if entry["reflacx_id"] == reading.id)
    expected = fixation_heatmap(table.drop([1, 2]), reading.image_size, reading.image_size)
    np.testing.assert_array_equal(maps_of(tmp_path / "out", entry)[0], heatmap_to_uint8(expected))


def test_one_takes_the_first_usable_reading_by_id(mixed, tmp_path):
    report = prepare(mixed.raw, mixed.images, tmp_path / "out", size=64)
    entries = entries_of(tmp_path / "out")
    usable = {reading.id for reading in read_reflacx(mixed.raw).readings}
    expected = sorted(min(set(image.reading_ids) & usable) for image in mixed.truth)
    assert [entry["reflacx_id"] for entry in entries] == expected
    assert report.counts["- further readings of an image, not needed"] == 5


@pytest.mark.parametrize("readings", ["one", "merge"])
def test_a_reading_that_was_mended_changes_no_finished_tree(tmp_path, readings):
    study = make_study(tmp_path, n_images=1, shared_images=1, size=(120, 96))
    first, second = sorted(reading.id for reading in read_reflacx(study.raw).readings)
    path = study.raw / "main_data" / first / "fixations.csv"
    whole = path.read_text()
    path.write_text(whole[:30])
    assert prepare(study.raw, study.images, tmp_path / "out", readings=readings).faults[0].id == first
    path.write_text(whole)
    with pytest.raises(UserError, match=f"would lose 2 of its files, .*give others now, .*{second}.* --overwrite"):
        prepare(study.raw, study.images, tmp_path / "out", readings=readings)
    assert entries_of(tmp_path / "out")[0]["raw_ids"] == [second]
    prepare(study.raw, study.images, tmp_path / "out", readings=readings, overwrite=True)
    assert entries_of(tmp_path / "out")[0]["raw_ids"][0] == first


def test_merge_adds_the_maps(each, mixed, tmp_path):
    prepare(mixed.raw, mixed.images, tmp_path / "out", size=120, readings="merge")
    readings = {reading.id: reading for reading in read_reflacx(mixed.raw).readings}
    entries = entries_of(tmp_path / "out")
    assert len(entries) == 12 and sum(len(entry["raw_ids"]) for entry in entries) == 17
    for entry in entries:
        ids = entry["raw_ids"]
        assert entry["reflacx_id"] == (ids[0] if len(ids) == 1 else f"{ids[0]}+{len(ids) - 1}")
        maps = [fixation_heatmap(readings[i].load_fixations().table, readings[i].image_size, (150, 120)) for i in ids]
        expected = heatmap_to_uint8(sum(maps) / len(maps))
        np.testing.assert_array_equal(maps_of(tmp_path / "out", entry)[0], expected)


def test_split(mixed, tmp_path):
    wanted = [image for image in mixed.truth if image.split == "train"]
    assert 0 < len(wanted) < 12
    report = prepare(mixed.raw, mixed.images, tmp_path / "out", size=32, split="train")
    assert {e["dicom_id"] for e in entries_of(tmp_path / "out")} == {image.dicom_id for image in wanted}
    assert report.counts["- of another split"] == sum(
        reading.split != "train" for reading in read_reflacx(mixed.raw).readings
    )


def test_significant_patches_of_known_maps():
    foreground = np.zeros((448, 448), np.uint8)
    foreground[:64, :96] = 255  # 2 x 3 patches of 32 px, which are 16 px at 224
    assert count_significant(foreground) == 6
    foreground[64:80, :32] = 255  # half a patch is enough
    assert count_significant(foreground) == 7


# --- faults ----------------------------------------------------------------------------------------


def rewrite(path, change):
    change(pd.read_csv(path)).to_csv(path, index=False)


FAULTS = {  # damage to a reading's image, row or fixations.csv; its reason, and whether it counts as a fault
    "missing image": (lambda image, row, path: image.path.unlink(), "image missing", False),
    "truncated image": (
        lambda image, row, path: image.path.write_bytes(image.path.read_bytes()[:999]),
        "image unusable",
        True,
    ),
    "image size": (lambda image, row, path: row.update(image_size_x="136"), "image size differs", True),
    "missing file": (lambda image, row, path: path.unlink(), "unusable fixations", True),
    "missing column": (
        lambda image, row, path: rewrite(path, lambda t: t.drop(columns="x_position")),
        "unusable fixations",
        True,
    ),
    "text": (lambda image, row, path: rewrite(path, lambda t: t.assign(x_position="left")), "unusable fixations", True),
    "no rows": (lambda image, row, path: rewrite(path, lambda t: t[:0]), "no fixations", False),
    "no duration": (
        lambda image, row, path: rewrite(path, lambda t: t.assign(timestamp_end_fixation=t.timestamp_start_fixation)),
        "no fixations",
        False,
    ),
    "outside": (
        lambda image, row, path: rewrite(path, lambda t: t.assign(x_position=t.x_position + 5000.0)),
        "all fixations outside",
        False,
    ),
    "discarded": (
        lambda image, row, path: row.update(eye_tracking_data_discarded="True"),
        "eye tracking discarded",
        False,
    ),
    "path": (
        lambda image, row, path: row.update(image="physionet.org/files/../../../etc/passwd.dcm"),
        "unusable row",
        True,
    ),
    "id": (lambda image, row, path: row.update(dicom_id="../../etc/" + row["dicom_id"]), "unusable row", True),
}


def plant_faults(study, faults):
    """Damage one phase 3 reading by each fault, from the last one backwards; returns which."""
    path = study.raw / "main_data" / "metadata_phase_3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    planted = {}
    for place, fault in zip(reversed(table.index), faults):
        row = table.loc[place].to_dict()
        planted[fault] = row["id"]
        image = next(image for image in study.truth if row["id"] in image.reading_ids)
        FAULTS[fault][0](image, row, study.raw / "main_data" / row["id"] / "fixations.csv")
        table.loc[place] = row
    table.to_csv(path, index=False)
    return planted


def test_each_planted_fault_is_found_and_the_rest_is_made(tmp_path, capsys):
    study = make_study(tmp_path, n_images=len(FAULTS) + 2, shared_images=0, size=(120, 96))
    planted = plant_faults(study, FAULTS)
    arguments = ["--raw", str(study.raw), "--images", str(study.images), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry_run"]) == 1 and not (tmp_path / "out").exists()
    capsys.readouterr()
    assert main(arguments) == 1
    printed = capsys.readouterr()
    record = json.loads((tmp_path / "out" / "prepare.json").read_text())
    left_out = {item["id"]: item for item in record["left_out"]}
    assert set(left_out) == set(planted.values())
    for fault, name in planted.items():
        _, reason, is_fault = FAULTS[fault]
        assert (left_out[name]["reason"], left_out[name]["is_fault"]) == (reason, is_fault), fault
        if reason != "eye tracking discarded":
            assert f"{name}: {reason}: {left_out[name]['detail']}" in printed.out
            assert str(tmp_path) in left_out[name]["detail"]
    n_faults = sum(is_fault for *_, is_fault in FAULTS.values())
    assert f"{n_faults} readings left out for damaged input" in printed.err
    assert len(entries_of(tmp_path / "out")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mimic", "out", "reflacx"]  # nothing escaped
    assert main([*arguments, "--accept_damaged"]) == 0
    assert f"{n_faults} readings left out for damaged input" in capsys.readouterr().err


def test_one_pixel_of_difference_is_tolerated_two_are_not(tmp_path):
    study = make_study(tmp_path, n_images=2, shared_images=0, size=(120, 96))
    for image, more in zip(study.truth, (1, 2)):
        Image.fromarray(np.pad(read_gray(image.path), ((0, 0), (0, more)))).save(image.path)
    report = prepare(study.raw, study.images, tmp_path / "out")
    assert [fault.id for fault in report.faults] == study.truth[1].reading_ids
    assert "is 98 x 120 px, the readings were made on 96 x 120" in report.faults[0].detail
    (entry,) = entries_of(tmp_path / "out")
    image = read_gray(tmp_path / "out" / entry["image_path"])
    assert maps_of(tmp_path / "out", entry)[0].shape == image.shape


def test_unusable_arguments(mixed, tmp_path):
    with pytest.raises(UserError, match="no such directory; --images"):
        prepare(mixed.raw, tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="not one entry is left .*image missing"):
        prepare(mixed.raw, tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--size -1"):
        main(["--raw", "x", "--images", "x", "--out", "x", "--size", "-1"])


# --- again, interrupted, with other options --------------------------------------------------------


def test_workers_end_with_a_killed_program():
    program = "import time; from datasets.prepare.work import run_tasks; list(run_tasks(time.sleep, [99] * 64, 2))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=Path(SCRIPT).parent.parent, start_new_session=True)

    def alive() -> list[int]:
        pids = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue  # it has just ended
            if int(session) == process.pid and state != "Z":
                pids.append(int(path.parent.name))
        return pids

    def wait_until(condition) -> None:
        end = time.monotonic() + 60
        while not condition() and time.monotonic() < end:
            time.sleep(0.05)

    try:
        wait_until(lambda: len(alive()) >= 5)  # the program, its two helpers and two workers
        assert len(alive()) >= 5
        process.kill()
        process.wait()
        wait_until(lambda: not alive())
        assert not alive()
    finally:
        for pid in alive():
            os.kill(pid, signal.SIGKILL)


def test_number_of_workers_does_not_matter(tmp_path, monkeypatch):
    study = make_study(tmp_path, n_images=5, size=(80, 64))
    plant_faults(study, ["truncated image"])
    one = prepare(study.raw, study.images, tmp_path / "one", workers=1)
    monkeypatch.setattr("datasets.prepare.work.IMAGES_PER_WORKER", 2)
    two = prepare(study.raw, study.images, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (one.counts, one.exclusions) == (two.counts, two.exclusions) and len(one.faults) == 1


# --- finding images --------------------------------------------------------------------------------


def place(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    "prefix", ["physionet.org/files/mimic-cxr/2.0.0/files/p10/p1/s2", "files/p10/p1/s2", "p10/p1/s2", "", "x/y/z"]
)
def test_images_are_found_below_any_prefix(tmp_path, prefix):
    place(tmp_path / prefix, "a-b.jpg", "other.jpg")
    hint = "physionet.org/files/mimic-cxr/2.0.0/files/p10/p1/s2/a-b.dcm"
    found = find_images(tmp_path, {"a-b": hint, "c-d": hint}).paths
    assert found == {"a-b": str(tmp_path / prefix / "a-b.jpg")}


def test_which_of_several_images_wins(tmp_path):
    place(tmp_path, "b/a.dcm", "b/a.jpg", "b/a.png", "a/a.jpg", "a/a.dcm", "a/a.JPG.part", "c/b.DCM", "c/b.txt")
    found = find_images(tmp_path, {"a": "", "b": ""})  # all empty, hence the same
    assert found.paths == {"a": str(tmp_path / "a/a.jpg"), "b": str(tmp_path / "c/b.DCM")}
    for name in ("b/a.dcm", "b/a.jpg", "b/a.png", "a/a.jpg", "a/a.dcm"):
        (tmp_path / name).write_text(name)
    assert find_images(tmp_path, {"a": "files/b/a.dcm"}).paths == {"a": str(tmp_path / "b/a.jpg")}
    found = find_images(tmp_path, {"a": "", "b": ""})
    assert set(found.paths) == {"b"} and set(found.ambiguous) == {"a"}
    for name in ("a/a.jpg", "a/a.dcm", "b/a.jpg", "b/a.dcm", "b/a.png"):
        assert str(tmp_path / name) in found.ambiguous["a"]


# --- EGD-CXR ---------------------------------------------------------------------------------------


def test_egd_gives_the_same_kind_of_tree(tmp_path):
    study = make_egd(tmp_path, n_images=4, size=(120, 96), image_format="mixed")
    sizes = study.images / "mimic-cxr-2.0.0-metadata.csv"
    report = prepare(study.raw, study.images, tmp_path / "out", sigma=9)
    entries = entries_of(tmp_path / "out")
    assert report.counts["entries"] == 4 and "calibration" in report.notes[0] and not report.faults
    readings = {reading.id: reading for reading in read_egd(study.raw, sigma=9, metadata=sizes).readings}
    for entry in entries:
        assert entry["source"] == "egd" and set(entry["labels"]) == {"Normal", "CHF", "Pneumonia"}
        expected = fixation_heatmap(readings[entry["reflacx_id"]].load_fixations().table, (120, 96), (120, 96))
        np.testing.assert_array_equal(maps_of(tmp_path / "out", entry)[0], heatmap_to_uint8(expected))
    with pytest.raises(UserError, match="no usable reading of split 'train'"):
        prepare(study.raw, study.images, tmp_path / "no", split="train")
    with pytest.raises(UserError, match="other options"):
        prepare(study.raw, study.images, tmp_path / "out", sigma=10)


def resize(study, size):
    """Give every image of the study another (height, width)."""
    for image in study.truth:
        Image.open(image.path).resize(size[::-1]).save(image.path)


@pytest.mark.parametrize("make", [make_egd, make_study])
def test_scaled_copies_of_the_images_have_the_same_maps_and_cropped_ones_are_faults(tmp_path, make):
    study = make(tmp_path, n_images=3, size=(240, 192))
    prepare(study.raw, study.images, tmp_path / "whole", size=48)
    entries = entries_of(tmp_path / "whole")
    for scaled in ((120, 96), (480, 384)):
        out = tmp_path / str(scaled)
        resize(study, scaled)
        assert not prepare(study.raw, study.images, out, size=48).faults
        assert entries_of(out) == entries
        assert (out / "fixations.csv").read_bytes() == (tmp_path / "whole" / "fixations.csv").read_bytes()
        for entry in entries:
            np.testing.assert_array_equal(maps_of(out, entry), maps_of(tmp_path / "whole", entry))
    resize(study, (192, 192))
    with pytest.raises(UserError, match="is 192 x 192 px, the readings were made on 192 x 240"):
        prepare(study.raw, study.images, tmp_path / "square", size=48)


def test_egd_needs_the_table_of_sizes(tmp_path):
    study = make_egd(tmp_path, n_images=2, size=(240, 192))
    (study.images / "mimic-cxr-2.0.0-metadata.csv").rename(tmp_path / "sizes.csv")
    with pytest.raises(UserError, match="does not say how large its images are; .* --metadata"):
        prepare(study.raw, study.images, tmp_path / "out")
    assert not prepare(study.raw, study.images, tmp_path / "out", metadata=tmp_path / "sizes.csv").faults


class LeftEyeReading(Reading):
    """Of a data set made up here: one fixation in the middle of the image's left half."""

    def load_fixations(self, *, screen_filter=False):
        height, width = self.image_size
        box = {"xmin": 0, "ymin": 0, "xmax": width, "ymax": height}
        gaze = {"x": width / 4, "y": height / 2, "duration": 1, "sigma_x": 9, "sigma_y": 9}
        return Fixations(pd.DataFrame([gaze | box]))


def read_left_eye(raw):
    image_id = (raw / "left_eye.txt").read_text()
    reading = LeftEyeReading(
        id="L1",
        study_id="5",
        subject_id="6",
        image_id=image_id,
        image_size=None,
        labels={"Nodule": 3},
        split=None,
        phase=None,
        source="left_eye",
        fixations_path=raw / "left_eye.txt",
    )
    return RawReadings([reading])


def test_a_third_data_set_needs_one_function(mixed, tmp_path, monkeypatch):
    """What docs/extend.md says: a `Reading`, a reader, a line in SOURCES."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "left_eye.txt").write_text(mixed.truth[0].dicom_id)
    find = lambda raw: raw if (raw / "left_eye.txt").exists() else None  # noqa: E731
    monkeypatch.setitem(SOURCES, "left_eye", (find, read_left_eye))
    report = prepare(tmp_path / "raw", mixed.images, tmp_path / "out")
    (entry,) = entries_of(tmp_path / "out")
    attention, _ = maps_of(tmp_path / "out", entry)
    assert report.counts["entries"] == 1 and entry["labels"] == {"Lung nodule or mass": 3}
    assert np.unravel_index(attention.argmax(), attention.shape) == (100, 40)


def test_made_up_gaze_says_so_in_every_entry(study, tmp_path):
    """The mark of the raw study goes into the index, and into nothing without it."""
    raw = tmp_path / "raw"
    shutil.copytree(study.raw, raw)
    for marked in (True, False):
        out = tmp_path / f"tree-{marked}"
        prepare(raw, study.images, out, size=0, workers=1)
        entries = json.loads((out / "reflacx.json").read_text())
        assert entries and all(entry.get("simulated", False) == marked for entry in entries)
        (raw / "SIMULATED_GAZE.txt").unlink(missing_ok=True)
