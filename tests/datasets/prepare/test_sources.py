"""What counts as a source of a tree, and what must never become one."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageOps
from trees import contents

from datasets.fixations import inside_image
from datasets.phantom.gaze_study import make_study
from datasets.prepare.heatmaps import read_heatmap
from datasets.prepare.mimic import prepare_mimic
from datasets.prepare.readings import prepare
from datasets.raw.read_reflacx import read_reflacx
from util.errors import UserError
from util.images import image_size, read_gray, write_gray


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("small"), 3, size=(64, 80), shared_images=0)


@pytest.fixture
def images(small, tmp_path):
    """A copy of the images, in a directory that MIMIC-CXR's own paths do not lead to."""
    root = tmp_path / "images"
    for image in small.truth:
        (root / "mine").mkdir(parents=True, exist_ok=True)
        shutil.copy(image.path, root / "mine" / image.path.name)
    return root


def entries_of(out):
    return json.loads((out / "reflacx.json").read_text())


def test_trees_below_the_images_are_no_sources(small, images):
    first = images / "tree"
    assert prepare(small.raw, images, first, size=32).counts["entries"] == 3
    (first / "reflacx.json").unlink()
    again = prepare(small.raw, images, first, size=32)  # its own pictures are not read
    assert again.counts["entries"] == 3 and not again.faults
    second = images / "second"  # nor those of another tree, which are of another size
    report = prepare(small.raw, images, second, size=0)
    assert report.counts["entries"] == 3 and not report.faults
    assert read_gray(second / entries_of(second)[0]["image_path"]).shape == (64, 80)
    with pytest.raises(UserError, match="lies in a prepared tree .* no originals"):
        prepare(small.raw, first / "images", images / "third")


def table(small, tmp_path):
    path = tmp_path / "metadata.csv"
    rows = [f"{i.dicom_id},{i.subject_id},{i.study_id}" for i in small.truth]
    path.write_text("\n".join(["dicom_id,subject_id,study_id", *rows]) + "\n")
    return path


def test_heatmaps_and_caches_are_no_images_and_another_kind_of_tree_leaves_nothing_of_the_first(
    small, images, tmp_path
):
    for place in ("heatmaps", ".cache"):
        (images / place).mkdir()
        for image in small.truth:
            write_gray(images / place / f"{image.dicom_id}.png", np.eye(8, dtype=np.uint8) * 255)
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    prepare(small.raw, small.images, out)
    options = {"views": ("all",), "metadata": table(small, tmp_path)}
    for tree in (out, fresh):
        report = prepare_mimic(images, images / "heatmaps", tree, **options, overwrite=True)
        assert report.counts["entries"] == 3 and not report.faults
    assert {read_gray(path).shape for path in (out / "files").rglob("*.jpg")} == {(64, 80)}
    assert contents(out) == contents(fresh)


def test_of_different_files_for_one_image_none_is_taken(small, images, tmp_path):
    image = small.truth[0]
    other = images / "a"
    other.mkdir()
    shutil.copy(image.path, other / image.path.name)  # the same bytes: no question
    assert not prepare(small.raw, images, tmp_path / "out").faults
    Image.fromarray(np.zeros((64, 80), np.uint8)).save(other / image.path.name)
    report = prepare(small.raw, images, tmp_path / "two")
    (fault,) = report.faults
    assert fault.id == image.reading_ids[0] and fault.reason == "several images"
    assert str(other / image.path.name) in fault.detail and str(images / "mine") in fault.detail
    with pytest.raises(UserError, match="would lose 3 of its files"):
        prepare(small.raw, images, tmp_path / "out")


def test_one_path_has_many_spellings(small, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(small.raw, small.images, out)
    before, root = contents(out), small.raw.parent
    (tmp_path / "link").symlink_to(root)
    monkeypatch.chdir(root)
    for raw in (small.raw.relative_to(root), tmp_path / "link" / small.raw.name, small.raw / ".." / small.raw.name):
        assert prepare(raw, small.images, out).counts["made by this run"] == 0
        assert contents(out) == before


def test_fixations_are_kept(small, tmp_path):
    prepare(small.raw, small.images, tmp_path)
    stored = pd.read_csv(tmp_path / "fixations.csv")
    assert [*stored] == ["reflacx_id", "x", "y", "duration"]
    assert [*stored["reflacx_id"].unique()] == [entry["reflacx_id"] for entry in entries_of(tmp_path)]
    for reading in read_reflacx(small.raw).readings:
        height, width = reading.image_size
        own = reading.load_fixations().table
        own = own[inside_image(own, (height, width))]
        expected = np.stack([(own["x"] + 0.5) / width, (own["y"] + 0.5) / height, own["duration"]], 1)
        found = stored[stored["reflacx_id"] == reading.id][["x", "y", "duration"]]
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


# --- pictures ----------------------------------------------------------------------------------------


def test_a_coloured_heatmap_is_refused(tmp_path):
    gray = (np.eye(8) * 255).astype(np.uint8)
    jet = Image.fromarray(np.stack([gray, gray // 2, 255 - gray], -1))
    for name, picture in {"jet.png": jet, "palette.png": jet.convert("P")}.items():
        picture.save(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: is in colour"):
            read_heatmap(tmp_path / name, (8, 8))
    Image.fromarray(np.stack([gray] * 3, -1)).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(read_heatmap(tmp_path / "rgb.png", (8, 8)) * 256, gray)


@pytest.mark.parametrize(("orientation", "suffix"), [(2, "png"), (3, "jpg"), (6, "jpg"), (8, "png")])
def test_exif_orientation(tmp_path, orientation, suffix):
    pixels = np.linspace(0, 255, 40 * 24).reshape(40, 24).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.array(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_gray(path), expected)
    assert image_size(path) == expected.shape


def test_a_large_picture_is_a_picture(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((14000, 13000), np.uint8)).save(path, compress_level=1)  # 182 megapixels
    assert image_size(path) == (14000, 13000) and read_gray(path).shape == (14000, 13000)
