"""Images with gaze maps: parts by subject, targets, fixations, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gaze_trees import edit_index, make_gaze_tree

from datasets.tree import SampleError
from gaze.data import PARTS, GazeSamples, GazeStudy, draw_parts, read_fixations
from util.errors import UserError
from util.images import read_gray, write_gray
from util.subjects import subject_marks


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_gaze_tree(tmp_path_factory.mktemp("gaze"))


def subjects_by_part(study):
    return {part: {image.subject for image in study.part(part)} for part in PARTS}


def test_readings_of_an_image_are_one_sample(tree):
    study = GazeStudy([tree])
    assert len(study.images) == 12
    assert [len(image.entries) for image in study.images] == [1, 2, 1] * 4
    assert [len(study.part(part)) for part in PARTS] == [8, 2, 2]
    samples = GazeSamples(study, study.images, 32, 8)
    assert set(samples[0]) == {"img", "target"}
    assert samples[0]["img"].shape == (1, 32, 32) and samples[0]["img"].dtype == torch.uint8
    for number in (0, 1):
        target = samples[number]["target"]
        assert target.shape == (8, 8) and float(target.sum()) == pytest.approx(1, abs=1e-6)
        levels = study.levels(study.images[number], 8).double()
        plain = sum(values / values.sum() for values in levels) / len(levels)
        assert torch.allclose(target.double(), plain, atol=1e-7)
    assert torch.equal(samples[0]["img"], samples[3, 0]["img"])


def test_cache_changes_nothing(tree, tmp_path):
    plain, cached = GazeStudy([tree]), GazeStudy([tree])
    cached.add_cache(str(tmp_path), None)
    for a, b in zip(GazeSamples(plain, plain.images, 32, 8), GazeSamples(cached, cached.images, 32, 8), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_parts_without_a_split_are_drawn_by_subject(tmp_path):
    tree = make_gaze_tree(tmp_path / "a", 20, splits=False)
    edit_index(tree, lambda number, entry: entry.update(subject_id=str(int(entry["subject_id"]) // 2)))
    study = GazeStudy([tree])
    parts = subjects_by_part(study)
    assert [len(parts[part]) for part in PARTS] == [7, 1, 2]
    assert not parts["train"] & (parts["validate"] | parts["test"]) and not parts["validate"] & parts["test"]
    assert study.n_drawn == 10
    assert subjects_by_part(GazeStudy([tree])) == parts
    assert draw_parts(["a", "b", "c"]) == draw_parts(["c", "a", "b"])


def test_a_subject_follows_its_part_in_another_tree(tmp_path):
    split = make_gaze_tree(tmp_path / "a")
    other = make_gaze_tree(tmp_path / "b", splits=False)  # the same subjects
    study = GazeStudy([split, other])
    assert study.n_drawn == 0
    assert [image.part for image in study.images[:12]] == [image.part for image in study.images[12:]]


def test_a_subject_on_both_sides_is_refused(tmp_path):
    first, second = make_gaze_tree(tmp_path / "a"), make_gaze_tree(tmp_path / "b")
    edit_index(second, lambda number, entry: number == 0 and entry.update(split="test"))
    with pytest.raises(
        UserError, match=r"b/reflacx.json: entry 0: subject 10000 is in train here.* test|subject 10000"
    ):
        GazeStudy([first, second])


def test_subject_from_the_folder_or_refused(tmp_path):
    tree = make_gaze_tree(tmp_path)
    edit_index(tree, lambda number, entry: entry.pop("subject_id"))
    with pytest.raises(UserError, match="entry 0: no subject_id"):
        GazeStudy([tree])
    edit_index(tree, lambda number, entry: entry.update(image_path=entry["image_path"].replace("images/s", "p10/p")))
    assert GazeStudy([tree]).images[0].subject == "10000"


@pytest.mark.parametrize("split", ["valid", "Test", 3])
def test_unknown_split_is_refused(tmp_path, split):
    tree = make_gaze_tree(tmp_path)
    edit_index(tree, lambda number, entry: number == 4 and entry.update(split=split))
    with pytest.raises(UserError, match="entry 4: split .* expected one of train, validate, test"):
        GazeStudy([tree])


def test_no_test_images_is_refused(tmp_path):
    tree = make_gaze_tree(tmp_path)
    edit_index(tree, lambda number, entry: entry.update(split="train"))
    with pytest.raises(UserError, match="no image is in validate"):
        GazeStudy([tree])


def test_predicted_heatmaps_are_no_readings(tmp_path):
    tree = make_gaze_tree(tmp_path)
    edit_index(tree, lambda number, entry: entry.update(gaze="predicted" if number == 3 else "real"))
    with pytest.raises(UserError, match="entry 3: a predicted heatmap"):
        GazeStudy([tree])


def test_heatmap_of_zeros_and_missing_image_are_named(tmp_path):
    tree = make_gaze_tree(tmp_path)
    zero = tree / "attention/s10001/P10001R0.png"
    write_gray(zero, np.zeros_like(read_gray(zero)))
    (tree / "images/s10002/i10002.png").unlink()
    study = GazeStudy([tree])
    samples = GazeSamples(study, study.images, 32, 8)
    with pytest.raises(SampleError, match=r"P10001R0.png: the heatmap is zero everywhere"):
        samples[1]
    with pytest.raises(SampleError, match=r"i10002.png: no such file"):
        samples[2]


def test_fixations(tree, tmp_path):
    found = read_fixations(tree / "fixations.csv")
    assert len(found) == 16 and all(values.shape == (5, 3) for values in found.values())
    assert read_fixations(tmp_path / "none.csv") == {}
    bad = tmp_path / "fixations.csv"
    bad.write_text("reflacx_id,x,y,duration\na,0.5,1.2,1\n")
    with pytest.raises(UserError, match="line 2: x and y are fractions"):
        read_fixations(bad)
    bad.write_text("reflacx_id,x,y\na,0.5,1\n")
    with pytest.raises(UserError, match="'duration' is missing"):
        read_fixations(bad)


def test_spellings_of_a_subject_are_one_and_can_be_on_two_sides(tree, tmp_path):
    """Of two trees with the same people, one writes them as MIMIC's folders are called."""
    other = make_gaze_tree(tmp_path / "other")
    edit_index(other, lambda _, entry: entry.update(subject_id=f"p{entry['subject_id']} ", split=None))
    study = GazeStudy([tree, other])
    assert len({image.subject for image in study.images}) == 12 and len(study.merged) == 12
    assert study.n_drawn == 0
    edit_index(other, lambda number, entry: entry.update(split="test"))
    with pytest.raises(UserError, match="can't be on both sides"):
        GazeStudy([tree, other])


def test_test_images_of_subjects_that_a_model_has_seen_are_left_out(tree, tmp_path):
    seen = GazeStudy([tree]).seen()
    assert len(seen) == 10
    other = make_gaze_tree(tmp_path / "more", 18)  # the same twelve and six new subjects
    edit_index(other, lambda _, entry: entry.update(split=(*PARTS[::-1], "train")[int(entry["subject_id"]) % 4]))
    study = GazeStudy([other])
    n_test = len(study.part("test"))
    told = study.leave_out(frozenset(seen))
    left = study.part("test")
    assert told.startswith(f"warning: {n_test - len(left)} of {n_test} test images") and 0 < len(left) < n_test
    assert study.leave_out(frozenset()) == ""
    marks = subject_marks([image.subject for image in GazeStudy([other]).images], "mimic")
    with pytest.raises(UserError, match="judge it on images that it has not seen"):
        GazeStudy([other]).leave_out(frozenset(marks))


def test_a_heatmap_that_vanishes_when_made_smaller_is_named(tmp_path):
    root = make_gaze_tree(tmp_path)
    study = GazeStudy([root])
    path = study.trees[0].files(study.images[0].entries[0]).attention
    dot = np.zeros((48, 40), np.uint8)
    dot[3, 3] = 1
    write_gray(path, dot)
    with pytest.raises(SampleError, match=f"{path.name}: the heatmap is zero everywhere at 16 x 16 px"):
        GazeSamples(study, study.images, 32, 16)[0]
