"""datasets/prepare/readings.py: raw -> tree, on the phantom; exact counts, exact maps, nothing half-done."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd
from PIL import Image
from trees import contents

from datasets.fixations import fixation_heatmap, heatmap_to_uint8
from datasets.phantom.gaze_study import make_study
from datasets.prepare.pixels import count_significant
from datasets.prepare.readings import prepare
from datasets.prepare.work import run_tasks
from datasets.raw.mimic_cxr import find_images
from datasets.raw.read_egd import read_egd
from datasets.raw.read_reflacx import read_reflacx
from datasets.raw.readings import Fixations, RawReadings, Reading
from datasets.raw.sources import SOURCES
from scripts.prepare_reflacx import main
from util.errors import UserError
from util.images import read_gray
from util.radiograph import read_dicom

ROOT = Path(__file__).parents[3]


def entries_of(out):
    return json.loads((out / "reflacx.json").read_text())


def maps_of(out, entry):
    name = f"{entry['study_id']}/{entry['reflacx_id']}.png"
    return read_gray(out / "attention" / name), read_gray(out / "foreground" / name)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """12 images, JPG and DICOM by turns, 3 of them read 3 times: 18 readings, 1 discarded."""
    return make_study(tmp_path_factory.mktemp("mixed"), n_images=12, size=(200, 160), image_format="mixed")


# --- what the tree holds ---------------------------------------------------------------------------


@pytest.mark.parametrize("readings", ["each", "merge"])
def test_entries_and_their_maps(mixed, tmp_path, readings):
    """A map is the mean of its readings' heatmaps, each of which sums to 1."""
    prepare(mixed.raw, mixed.images, tmp_path, size=120, readings=readings)
    by_id = {reading.id: reading for reading in read_reflacx(mixed.raw).readings}
    images = {image.dicom_id: image for image in mixed.truth}
    entries = entries_of(tmp_path)
    assert sorted(name for entry in entries for name in entry["raw_ids"]) == sorted(by_id)
    assert len(entries) == (17 if readings == "each" else 12)
    assert [entry["reflacx_id"] for entry in entries] == sorted(entry["reflacx_id"] for entry in entries)
    for entry in entries:
        first, *others = ids = entry["raw_ids"]
        assert entry["reflacx_id"] == (f"{first}+{len(others)}" if others else first)
        image = images[entry["dicom_id"]]
        facts = (image.study_id, image.subject_id, image.split, int(first[1]), "reflacx")
        assert tuple(entry[name] for name in ("study_id", "subject_id", "split", "phase", "source")) == facts
        assert {*ids} <= {*image.reading_ids} and {"Pneumothorax", "Lung nodule or mass"} <= {*entry["labels"]}
        attention, foreground = maps_of(tmp_path, entry)
        maps = [fixation_heatmap(by_id[i].load_fixations().table, by_id[i].image_size, (150, 120)) for i in ids]
        np.testing.assert_array_equal(attention, heatmap_to_uint8(sum(maps) / len(maps)))
        assert {*np.unique(foreground)} == {0, 255}
        assert attention[foreground == 0].max() < attention[foreground == 255].min()  # a threshold splits the two


def test_images_are_the_radiographs(mixed, tmp_path):
    """JPG and DICOM (both photometric interpretations)."""
    prepare(mixed.raw, mixed.images, tmp_path, size=120)
    for entry in entries_of(tmp_path):
        stored = read_gray(tmp_path / entry["image_path"])
        source = Path(find_images(mixed.images, {entry["dicom_id"]: ""}).paths[entry["dicom_id"]])
        original = read_dicom(source, "mimic-cxr-jpg") if source.suffix == ".dcm" else read_gray(source)
        resized = np.asarray(Image.fromarray(original).resize((120, 150), Image.Resampling.BICUBIC))
        difference = np.abs(stored.astype(int) - resized)  # Pillow's kernel rounds some pixels the other way
        assert difference.max() <= 1 and (difference > 0).mean() < 0.02


def test_bad_fixations_are_left_out_counted_and_listed(tmp_path):
    study, out = make_study(tmp_path, n_images=2, size=(120, 96), shared_images=0, normal_fraction=0), tmp_path / "out"
    reading = read_reflacx(study.raw).readings[0]
    table = pd.read_csv(reading.fixations_path, dtype=str)
    table.loc[1, "x_position"], table.loc[2, "timestamp_end_fixation"] = "?", "-9"
    table.to_csv(reading.fixations_path, index=False)
    report = prepare(study.raw, study.images, out, size=0)
    first, second = json.loads((out / "prepare.json").read_text())["bad_fixations"]
    assert f"2 bad fixations were left out, listed in prepare.json, such as {first}" in str(report)
    assert first.startswith(f"{reading.id}: line 3, column 'x_position'") and not report.faults
    assert second == f"{reading.id}: line 4, negative duration"
    assert report.counts["fixations left out: negative duration"] == 1
    entry = next(entry for entry in entries_of(out) if entry["reflacx_id"] == reading.id)
    expected = fixation_heatmap(table.drop([1, 2]), reading.image_size, reading.image_size)
    np.testing.assert_array_equal(maps_of(out, entry)[0], heatmap_to_uint8(expected))


@pytest.mark.parametrize("split, spare", [("all", 5), ("train", None)])
def test_one_takes_the_first_usable_reading_by_id_of_the_split(mixed, tmp_path, split, spare):
    report = prepare(mixed.raw, mixed.images, tmp_path, size=32, split=split)
    usable = read_reflacx(mixed.raw).readings
    images = [image for image in mixed.truth if split in ("all", image.split)]
    expected = sorted(min({*image.reading_ids} & {reading.id for reading in usable}) for image in images)
    assert [entry["reflacx_id"] for entry in entries_of(tmp_path)] == expected
    assert report.counts["- of another split"] == sum(split not in ("all", reading.split) for reading in usable)
    assert spare in (None, report.counts["- further readings of an image, not needed"])


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


def test_readings_of_two_splits_are_not_merged(tmp_path):
    study = make_study(tmp_path, n_images=2, shared_images=1, size=(120, 96))
    for phase, split in enumerate(("train", "test", "test"), 1):
        path = study.raw / f"main_data/metadata_phase_{phase}.csv"
        pd.read_csv(path, dtype=str, keep_default_na=False).assign(split=split).to_csv(path, index=False)
    report = prepare(study.raw, study.images, tmp_path / "out", readings="merge")
    assert len(entries_of(tmp_path / "out")) == 1 and report.faults
    assert "to be merged, but of the splits test and train; choose one with --split" in str(report)
    prepare(study.raw, study.images, tmp_path / "train", readings="merge", split="train")


def test_significant_patches_of_known_maps():
    foreground = np.zeros((448, 448), np.uint8)
    foreground[:64, :96] = 255  # 2 x 3 patches of 32 px, which are 16 px at 224
    assert count_significant(foreground) == 6
    foreground[64:80, :32] = 255  # half a patch is enough
    assert count_significant(foreground) == 7


# --- faults ----------------------------------------------------------------------------------------


def plant_faults(study):
    """Damage the last six readings of phase 3, each in its way; {reading id: (reason, is it a fault)}."""
    path = study.raw / "main_data" / "metadata_phase_3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    *_, lost, cut, resized, missing, empty, outside = table["id"]
    images = {name: image.path for image in study.truth for name in image.reading_ids}
    gaze = {name: path.parent / name / "fixations.csv" for name in table["id"]}
    images[lost].unlink()
    images[cut].write_bytes(images[cut].read_bytes()[:999])
    table.loc[table["id"] == resized, "image_size_x"] = "136"
    table.to_csv(path, index=False)
    gaze[missing].unlink()
    gaze[empty].write_text(gaze[empty].read_text().splitlines()[0])
    fixations = pd.read_csv(gaze[outside])
    fixations.assign(x_position=fixations["x_position"] + 5000).to_csv(gaze[outside], index=False)
    return {
        lost: ("image missing", False),
        cut: ("image unusable", True),
        resized: ("image size differs", True),
        missing: ("unusable fixations", True),
        empty: ("no fixations", False),
        outside: ("all fixations outside", False),
    }


def test_each_planted_fault_is_found_and_the_rest_is_made(tmp_path, capsys):
    study, out = make_study(tmp_path, n_images=8, shared_images=0, size=(120, 96)), tmp_path / "out"
    planted = plant_faults(study)
    arguments = ["--raw", str(study.raw), "--images", str(study.images), "--out", str(out)]
    assert main([*arguments, "--dry_run"]) == 1 and not out.exists()
    capsys.readouterr()
    assert main(arguments) == 1
    printed = capsys.readouterr()
    left_out = {item["id"]: item for item in json.loads((out / "prepare.json").read_text())["left_out"]}
    found = {name: (item["reason"], item["is_fault"]) for name, item in left_out.items()}
    assert found == planted
    for name, item in left_out.items():
        told = f"{name}: {item['reason']}: {item['detail']}"
        assert told in printed.out and str(tmp_path) in told
    assert "3 readings left out for damaged input" in printed.err
    assert len(entries_of(out)) == 2
    assert main([*arguments, "--accept_damaged"]) == 0


def test_one_pixel_of_difference_is_tolerated_two_are_not(mixed):
    reading = read_reflacx(mixed.raw).readings[0]
    reading.check_copy((200, 161))
    with pytest.raises(UserError, match="is 162 x 200 px, the readings were made on 160 x 200"):
        reading.check_copy((200, 162))


def test_unusable_arguments(mixed, tmp_path):
    with pytest.raises(UserError, match="no such directory; --images"):
        prepare(mixed.raw, tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="not one entry is left .*image missing"):
        prepare(mixed.raw, tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="--size -1"):
        main(["--raw", "x", "--images", "x", "--out", "x", "--size", "-1"])


# --- again, interrupted, with other options --------------------------------------------------------


def test_workers_end_with_a_killed_program():
    """All of them have its standard output open, which ends with the last."""
    program = (
        "import time; from multiprocessing import context; from datasets.prepare.work import run_tasks\n"
        "context.ForkServerContext.set_forkserver_preload = lambda *_: None  # time.sleep needs no torch\n"
        "for _ in run_tasks(time.sleep, [0] * 9 + [99] * 99, 2): print('made', flush=True)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == b"made\n"
            process.kill()
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def test_number_of_workers_does_not_matter(tmp_path, monkeypatch):
    study = make_study(tmp_path, n_images=5, size=(80, 64))
    damaged = study.truth[-1].path
    damaged.write_bytes(damaged.read_bytes()[:999])
    one = prepare(study.raw, study.images, tmp_path / "one", workers=1)
    monkeypatch.setattr("datasets.prepare.work.IMAGES_PER_WORKER", 2)
    two = prepare(study.raw, study.images, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert (one.counts, one.exclusions) == (two.counts, two.exclusions) and len(one.faults) == 1
    probe = "{*__import__('sys').modules} & {'torch', 'matplotlib', 'timm'}"  # what a worker has imported
    assert [*run_tasks(eval, [probe] * 4, 2)] == [{"torch"}] * 4


# --- finding images --------------------------------------------------------------------------------


def place(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_images_are_found_below_any_prefix(tmp_path):
    hint = "physionet.org/files/mimic-cxr/2.0.0/files/p10/p1/s2/a-b.dcm"
    for number, prefix in enumerate((Path(hint).parent, "files/p10/p1/s2", "p10/p1/s2", "", "x/y/z")):
        root = tmp_path / str(number)
        place(root / prefix, "a-b.jpg", "other.jpg")
        assert find_images(root, {"a-b": hint, "c-d": hint}).paths == {"a-b": str(root / prefix / "a-b.jpg")}


def test_which_of_several_images_wins(tmp_path):
    names = ["a/a.jpg", "a/a.dcm", "b/a.jpg", "b/a.dcm", "b/a.png"]
    place(tmp_path, *names, "a/a.JPG.part", "c/b.DCM", "c/b.txt")
    found = find_images(tmp_path, {"a": "", "b": ""})  # all empty, hence the same
    assert found.paths == {"a": str(tmp_path / "a/a.jpg"), "b": str(tmp_path / "c/b.DCM")}
    for name in names:
        (tmp_path / name).write_text(name)
    assert find_images(tmp_path, {"a": "files/b/a.dcm"}).paths == {"a": str(tmp_path / "b/a.jpg")}
    found = find_images(tmp_path, {"a": "", "b": ""})
    assert {*found.paths} == {"b"} and sorted(found.ambiguous["a"]) == sorted(str(tmp_path / name) for name in names)


# --- EGD-CXR ---------------------------------------------------------------------------------------


def test_egd_gives_the_same_kind_of_tree(tmp_path):
    study, out = make_egd(tmp_path, n_images=4, size=(120, 96), image_format="mixed"), tmp_path / "out"
    report = prepare(study.raw, study.images, out, sigma=9)
    assert report.counts["entries"] == 4 and "calibration" in report.notes[0] and not report.faults
    readings = read_egd(study.raw, sigma=9, metadata=study.images / "mimic-cxr-2.0.0-metadata.csv").readings
    maps = {reading.id: fixation_heatmap(reading.load_fixations().table, (120, 96), (120, 96)) for reading in readings}
    for entry in entries_of(out):
        assert entry["source"] == "egd" and set(entry["labels"]) == {"Normal", "CHF", "Pneumonia"}
        np.testing.assert_array_equal(maps_of(out, entry)[0], heatmap_to_uint8(maps[entry["reflacx_id"]]))
    before, record = contents(out), out / "prepare.json"
    record.write_text(record.read_text().replace('"sigma"', '"screen_filter": false, "sigma"'))  # of an earlier version
    assert prepare(study.raw, study.images, out, sigma=9).counts["made by this run"] == 0 and contents(out) == before
    for options, message in (
        ({"split": "train"}, "no usable reading of split 'train'"),
        ({"sigma": 10}, "other options"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(study.raw, study.images, tmp_path / "no" if "split" in options else out, **options)


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


class LeftEyeReading(Reading):
    """Of a data set made up here: one fixation in the middle of the image's left half."""

    def load_fixations(self):
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
        image_size=(200, 160),
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
    monkeypatch.setitem(SOURCES, "left_eye", ("left_eye.txt", read_left_eye))
    report = prepare(tmp_path / "raw", mixed.images, tmp_path / "out")
    (entry,) = entries_of(tmp_path / "out")
    attention, _ = maps_of(tmp_path / "out", entry)
    assert report.counts["entries"] == 1 and entry["labels"] == {"Lung nodule or mass": 3}
    assert np.unravel_index(attention.argmax(), attention.shape) == (100, 40)


def test_made_up_gaze_says_so_in_every_entry(study, tmp_path):
    """The mark of the raw study goes into the index, and into nothing without it."""
    raw = shutil.copytree(study.raw, tmp_path / "raw")
    for marked in (True, False):
        prepare(raw, study.images, tmp_path / str(marked), size=32)
        assert {entry.get("simulated", False) for entry in entries_of(tmp_path / str(marked))} == {marked}
        (raw / "SIMULATED_GAZE.txt").unlink(missing_ok=True)
