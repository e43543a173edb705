"""Predicted heatmaps in a tree: its layout, interruptions, real gaze, damage, other predictors, loose files."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from trees import brightness, contents, smooth

from datasets.build import build_dataset
from datasets.fixations import heatmap_to_uint8
from datasets.phantom.gaze_study import make_study
from datasets.prepare.mimic import prepare_mimic
from datasets.prepare.pixels import attention_maps
from datasets.prepare.readings import prepare
from gaze.data import resize_whole
from gaze.fill import Predictor, fill_tree, predict_files
from gaze.metrics import resize_density
from util.errors import UserError
from util.images import read_gray, write_gray

INDEX = "mimic-cxr-jpg-cleanv4.json"
PLAIN = Predictor(brightness, 32, "plain")


@pytest.fixture(scope="module")
def images_only(study, tmp_path_factory):
    """A tree of the 12 images of the made-up study, without heatmaps."""
    out = tmp_path_factory.mktemp("images") / "tree"
    prepare_mimic(study.images, None, out, views=("all",), size=64)
    return out


@pytest.fixture
def tree(images_only, tmp_path):
    return shutil.copytree(images_only, tmp_path / "tree")


def fill(tree, predictor=PLAIN, **options):
    return fill_tree(tree, predictor, **{"batch_size": 5, **options})


def by_hand(image: Path) -> np.ndarray:
    """What PLAIN predicts of an image alone, of its size."""
    gray = read_gray(image)
    return resize_density(brightness(resize_whole(gray, 32)[None]), gray.shape)[0].numpy()


def test_a_filled_tree_is_what_training_and_the_published_loader_read(tree):
    report = fill(tree)
    assert report.counts["entries"] == report.counts["- predicted"] == report.counts["made by this run"] == 12
    entries = json.loads((tree / INDEX).read_text())
    dataset = build_dataset(tree, input_size=64, augment=False, preload=True, use_cache=False)
    assert len(entries) == len(dataset) == 12 and dataset[0, 11]["foreground"].any()
    for entry in entries:
        assert entry["image_path"].startswith("p10/") and entry["gaze"] == "predicted"
        maps = attention_maps(by_hand(tree / "files" / entry["image_path"]))
        for kind, expected in zip(("attention", "foreground"), maps):
            stored = read_gray(tree / kind / Path(entry["image_path"]).with_suffix(".png"))
            assert np.array_equal(stored, expected)
    before = contents(tree)
    assert fill(tree, batch_size=3, workers=2).counts["made by this run"] == 0
    assert contents(tree) == before


def killed_at_call(number: int, tree: Path) -> None:
    """Fill a tree, and die at a Python call: anywhere, in the middle of a commit too."""
    calls = itertools.count()

    def count(frame, event, argument):
        if event == "call" and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    fill(tree, batch_size=2)
    sys.setprofile(None)


@pytest.mark.parametrize("seed", range(3))
def test_killed_anywhere_the_next_run_ends_with_the_same_bytes(images_only, tmp_path, seed):
    whole, killed = (shutil.copytree(images_only, tmp_path / name) for name in ("whole", "killed"))
    calls = itertools.count()
    sys.setprofile(lambda *_: next(calls))
    fill(whole, batch_size=2)
    sys.setprofile(None)
    n_calls, rng = next(calls) // 2, random.Random(seed)  # half of the events are returns
    for _ in range(3):
        context = multiprocessing.get_context("fork")
        process = context.Process(target=killed_at_call, args=(rng.randrange(n_calls), killed))
        process.start()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)  # 0: little was left to do
        if not (killed / INDEX).exists():
            with pytest.raises(UserError, match="has images but no heatmaps yet; scripts/predict_gaze.py"):
                build_dataset(killed)
    fill(killed, batch_size=3)
    assert contents(killed) == contents(whole)


def test_real_gaze_is_kept_and_predictions_are_not_taken_for_it(tree, images_only, study, tmp_path):
    real, other = tmp_path / "real", shutil.copytree(images_only, tmp_path / "other")
    prepare(raw=study.raw, images=study.images, out=real, size=64, readings="each")
    readings: dict[str, list[Path]] = {}
    for entry in json.loads((real / "reflacx.json").read_text()):
        path = real / "attention" / entry["study_id"] / f"{entry['reflacx_id']}.png"
        readings.setdefault(entry["dicom_id"], []).append(path)
    report = fill(tree, real=[real])
    assert report.counts["- of real readings"] == len(readings) and {*map(len, readings.values())} > {1}
    for entry in json.loads((tree / INDEX).read_text()):
        stored = read_gray(tree / "attention" / Path(entry["image_path"]).with_suffix(".png"))
        maps = [read_gray(path) for path in readings.get(entry["dicom_id"], ())]
        assert entry["gaze"] == ("real" if maps else "predicted")
        if maps:
            mean = np.mean([levels / levels.sum() for levels in maps], 0)
            assert np.array_equal(stored, heatmap_to_uint8(mean) if maps[1:] else maps[0])
    assert fill(tree, real=[real]).counts["made by this run"] == 0
    assert fill(other, real=[tree]).counts["- of real readings"] == len(readings)
    write_gray(path := next(iter(readings.values()))[0], np.zeros_like(read_gray(path)))
    with pytest.raises(UserError, match=r"would lose|the heatmap is zero"):
        fill(tree, real=[real])
    assert (tree / INDEX).exists()


def test_an_unreadable_image_is_left_out_and_made_later(tree):
    image = tree / "files" / json.loads((tree / "images.json").read_text())[4]["image_path"]
    whole = image.read_bytes()
    image.write_bytes(whole[: len(whole) // 2])
    report = fill(tree)
    assert [str(image) in fault.detail for fault in report.faults] == [True] and report.counts["entries"] == 11
    image.write_bytes(whole)
    report = fill(tree)
    assert not report.faults and report.counts["entries"] == 12 and report.counts["made by this run"] == 1


def test_another_predictor_is_refused_or_replaces_all(tree):
    fill(tree)
    before = contents(tree)
    other = Predictor(lambda images: brightness(255 - images), 32, "other")
    with pytest.raises(UserError, match="predictor plain there, predictor other asked for"):
        fill(tree, other)
    assert contents(tree) == before
    assert fill(tree, other, overwrite=True).counts["made by this run"] == 12
    after = contents(tree)
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in before if name.startswith("attention"))


def test_a_changed_image_is_predicted_anew(study, tmp_path):
    images, tree = shutil.copytree(study.images, tmp_path / "mimic"), tmp_path / "tree"
    prepare_mimic(images, None, tree, views=("all",), size=64)
    fill(tree)
    entry = json.loads((tree / "images.json").read_text())[4]
    picture = next(images.rglob(f"{entry['dicom_id']}.jpg"))
    write_gray(picture, 255 - read_gray(picture))
    prepare_mimic(images, None, tree, views=("all",), size=64)
    assert fill(tree).counts["made by this run"] == 1
    stored = read_gray((tree / "attention" / entry["image_path"]).with_suffix(".png"))
    assert np.array_equal(stored, heatmap_to_uint8(by_hand(tree / "files" / entry["image_path"])))


def test_trees_with_heatmaps_are_refused(study, tmp_path):
    predict_files(study.images, tmp_path / "loose", PLAIN)
    report = prepare_mimic(study.images, tmp_path / "loose", tmp_path / "mimic", views=("all",), size=32)
    assert report.counts["entries"] == len(study.truth) and not report.faults  # heatmaps of loose files make a tree
    before = contents(tmp_path)
    for root in (tmp_path / "mimic", tmp_path):
        with pytest.raises(UserError, match="no images.json in it"):
            fill(root)
    assert contents(tmp_path) == before


def test_loose_files(tmp_path):
    images, out = tmp_path / "films", tmp_path / "out"
    (images / "a b").mkdir(parents=True)
    rng = np.random.default_rng(0)
    write_gray(images / "one.png", smooth(rng, 50, 70))
    write_gray(images / "a b" / "two*.jpg", smooth(rng, 64, 33))
    assert predict_files(images, out, PLAIN).counts["entries"] == 2
    for name in ("one.png", "a b/two*.jpg"):
        stored = read_gray((out / name).with_suffix(".png"))
        assert np.array_equal(stored, heatmap_to_uint8(by_hand(images / name)))
    (images / "broken.png").write_bytes(b"no image")
    report = predict_files(images, out, PLAIN)
    assert [fault.reason for fault in report.faults] == ["unreadable"] and report.counts["made by this run"] == 0
    write_gray(images / "one.jpg", smooth(rng, 50, 70))
    with pytest.raises(UserError, match="would have the same"):
        predict_files(images, out, PLAIN)


def test_the_contrast_of_loose_dicom_files_decides_their_heatmaps(tmp_path):
    dicom = make_study(tmp_path / "raw", n_images=1, size=(64, 64), image_format="dcm", shared_images=0).images
    made = []
    for name, options in (("default", {}), *((name, {"dicom_contrast": name}) for name in ("mimic-cxr-jpg", "window"))):
        predict_files(dicom, tmp_path / name, PLAIN, **options)
        made.append(next((tmp_path / name).rglob("*.png")).read_bytes())
    assert made[0] == made[1] != made[2]
    with pytest.raises(UserError, match="dicom_contrast window there, dicom_contrast minmax asked for"):
        predict_files(dicom, tmp_path / "window", PLAIN, dicom_contrast="minmax")
