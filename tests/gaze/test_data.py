"""Images with gaze maps: parts by subject, targets, fixations, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaze_trees import edit_index, make_gaze_tree

from datasets.cache import open_planes
from gaze.data import PARTS, GazeSamples, GazeStudy, draw_parts, read_fixations
from util.errors import UserError
from util.images import write_gray
from util.subjects import subject_marks


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_gaze_tree(tmp_path_factory.mktemp("gaze"))


def subjects(study):
    return [[image.subject for image in study.parts[part]] for part in PARTS]


def test_readings_of_an_image_are_one_sample(tree, tmp_path):
    study, cached = GazeStudy([tree]), GazeStudy([tree])
    assert [sum(len(image.entries) for image in study.parts[part]) for part in PARTS] == [10, 2, 4]
    cached.trees[0].cache = open_planes(cached.trees[0], tmp_path)
    for part in PARTS:
        samples = GazeSamples(study.parts[part], 32, 8)
        assert samples[0]["img"].shape == (1, 32, 32) and samples[0]["img"].dtype == torch.uint8
        for image, one, other in zip(samples.images, samples, GazeSamples(cached.parts[part], 32, 8), strict=True):
            levels = image.read(8)[1].double()
            plain = sum(values / values.sum() for values in levels) / len(levels)
            assert torch.allclose(one["target"].double(), plain, atol=1e-7)
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_parts_without_a_split_are_drawn_by_subject(tmp_path):
    tree = make_gaze_tree(tmp_path, 20)
    edit_index(tree, lambda _, entry: {"subject_id": str(int(entry["subject_id"]) // 2), "split": None})
    study = GazeStudy([tree])
    parts = [set(names) for names in subjects(study)]
    assert [len(names) for names in parts] == [7, 1, 2] and len(set.union(*parts)) == 10
    assert "10 subjects have no split" in study.describe()
    assert draw_parts(["a", "b", "c"]) == draw_parts(["c", "a", "b"])


def test_a_subject_follows_its_part_in_another_tree_under_any_spelling(tree, tmp_path):
    other = make_gaze_tree(tmp_path / "b")
    edit_index(other, lambda _, entry: {"subject_id": f"p{entry['subject_id']} ", "split": None})
    study = GazeStudy([tree, other])
    assert subjects(study) == [2 * names for names in subjects(GazeStudy([tree]))]
    assert "taken for one" in study.describe()
    edit_index(other, lambda number, _: {} if number else {"split": "test"})
    with pytest.raises(UserError, match=r"b/reflacx.json: entry 0: subject 10000 is in test here and in train"):
        GazeStudy([tree, other])


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        (4, {"split": "valid"}, "entry 4: split 'valid', expected one of train, validate, test"),
        (3, {"gaze": "predicted"}, "entry 3: a predicted heatmap"),
        (2, {"subject_id": None}, "entry 2: no subject_id"),
        (None, {"split": "train"}, "no image is in validate"),
    ],
)
def test_entries_that_are_refused(tmp_path, entry, change, message):
    tree = make_gaze_tree(tmp_path)
    edit_index(tree, lambda number, _: change if entry in (None, number) else {})
    with pytest.raises(UserError, match=message):
        GazeStudy([tree])


def test_subject_from_the_folder(tree, tmp_path):
    other = make_gaze_tree(tmp_path)
    edit_index(
        other, lambda _, entry: {"image_path": entry["image_path"].replace("images/s", "p10/p"), "subject_id": None}
    )
    assert subjects(GazeStudy([other])) == subjects(GazeStudy([tree]))


def test_empty_heatmaps_and_missing_images_are_named(tmp_path):
    tree = make_gaze_tree(tmp_path)
    samples = GazeSamples(GazeStudy([tree]).parts["train"], 32, 16)
    (tree / "images/s10002/i10002.png").unlink()
    with pytest.raises(UserError, match=r"i10002.png: no such file"):
        samples[2]
    dot = np.zeros((48, 40), np.uint8)
    for value in (0, 1):  # 1: it vanishes when it is made smaller
        dot[3, 3] = value
        write_gray(tree / "attention/s10001/P10001R1.png", dot)
        with pytest.raises(UserError, match="P10001R1.png: the heatmap is zero everywhere at 16 x 16 px"):
            samples[1]


def test_fixations(tree, tmp_path):
    found = read_fixations(tree / "fixations.csv")
    assert len(found) == 16 and all(places.shape == (5, 2) for places in found.values())
    (bad := tmp_path / "bad.csv").write_text("reflacx_id,x,y,duration\na,0.5,1.2,1\n")
    with pytest.raises(UserError, match="line 2: x and y are fractions"):
        read_fixations(bad)


def test_test_images_of_subjects_that_a_model_has_seen_are_left_out(tree, tmp_path):
    seen = GazeStudy([tree]).seen()
    assert seen == subject_marks([str(10000 + n) for n in range(12) if n % 6 != 4], "mimic")
    other = make_gaze_tree(tmp_path / "more", 18)  # the same twelve and six new subjects
    edit_index(other, lambda _, entry: {"split": (*PARTS[::-1], "train")[int(entry["subject_id"]) % 4]})
    study = GazeStudy([other])
    assert study.leave_out(seen).startswith("warning: 2 of 5 test images")
    assert subjects(study)[2] == ["10004", "10012", "10016"]
    assert study.leave_out([]) == ""
    with pytest.raises(UserError, match="judge it on images that it has not seen"):
        study.leave_out(subject_marks(subjects(study)[2], "mimic"))
