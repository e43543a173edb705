"""What counts as a source of a tree, and what must never become one."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from datasets.fixations import inside_image
from datasets.phantom.reflacx import make_study
from datasets.prepare.heatmaps import find_heatmaps, read_heatmap
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


def test_heatmaps_and_caches_are_no_images(small, images, tmp_path):
    for place in ("heatmaps", ".cache"):
        (images / place).mkdir()
        for image in small.truth:
            write_gray(images / place / f"{image.dicom_id}.png", np.eye(8, dtype=np.uint8) * 255)
    report = prepare_mimic(
        images, images / "heatmaps", tmp_path / "out", views=("all",), metadata=table(small, tmp_path)
    )
    assert report.counts["entries"] == 3 and not report.faults
    stored = sorted((tmp_path / "out/files").rglob("*.jpg"))
    assert [read_gray(path).shape for path in stored] == [(64, 80)] * 3


def table(small, tmp_path):
    path = tmp_path / "metadata.csv"
    rows = [f"{i.dicom_id},{i.subject_id},{i.study_id}" for i in small.truth]
    path.write_text("\n".join(["dicom_id,subject_id,study_id", *rows]) + "\n")
    return path


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
    record = (out / "prepare.json").read_bytes()
    (tmp_path / "link").symlink_to(small.raw.parent)
    monkeypatch.chdir(small.raw.parent)
    for raw in (
        small.raw.relative_to(small.raw.parent),
        tmp_path / "link" / small.raw.name,
        small.raw / ".." / small.raw.name,
    ):
        assert prepare(raw, small.images, out).counts["made by this run"] == 0
        assert (out / "prepare.json").read_bytes() == record


def test_fixations_are_kept(small, tmp_path):
    out = tmp_path / "out"
    prepare(small.raw, small.images, out)
    lines = (out / "fixations.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    assert lines[0] == "reflacx_id,x,y,duration"
    assert list(dict.fromkeys(row[0] for row in rows)) == [entry["reflacx_id"] for entry in entries_of(out)]
    assert all(0 <= float(x) <= 1 and 0 <= float(y) <= 1 and float(d) > 0 for _, x, y, d in rows)
    reading = read_reflacx(small.raw).readings[0]
    height, width = reading.image_size
    own = reading.load_fixations().table
    own = own[inside_image(own, (height, width))]
    stored = np.array([row[1:3] for row in rows if row[0] == reading.id], float)
    np.testing.assert_allclose(stored, np.stack([(own["x"] + 0.5) / width, (own["y"] + 0.5) / height], 1), atol=1e-6)


def test_another_kind_of_tree_leaves_nothing_of_the_first(small, images, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    for image in small.truth:
        np.save(maps / f"{image.dicom_id}.npy", np.eye(4))
    out = tmp_path / "out"
    prepare(small.raw, small.images, out)
    prepare_mimic(images, maps, out, views=("all",), metadata=table(small, tmp_path), overwrite=True)
    assert not (out / "reflacx.json").exists() and not (out / "fixations.csv").exists()
    assert not (out / "images").exists() and (out / "mimic-cxr-jpg-cleanv4.json").exists()


# --- looking for heatmaps ----------------------------------------------------------------------------


def test_what_lies_among_heatmaps(tmp_path):
    maps = tmp_path / "maps"
    (maps / "lost+found").mkdir(parents=True)
    np.save(maps / "a.npy", np.eye(4))
    (maps / "._a.npy").write_bytes(b"macOS")
    np.save(maps / "lost+found" / "a.npy", np.ones(4))
    (maps / "self").symlink_to(maps)
    found = find_heatmaps(maps)
    assert found.paths == {"a": str(maps / "a.npy")} and not found.ambiguous


def test_a_coloured_heatmap_is_refused(tmp_path):
    gray = (np.eye(8) * 255).astype(np.uint8)
    jet = np.stack([gray, gray // 2, 255 - gray], -1)
    Image.fromarray(jet).save(tmp_path / "jet.png")
    Image.fromarray(np.stack([gray] * 3, -1)).save(tmp_path / "rgb.png")
    Image.fromarray(jet).convert("P").save(tmp_path / "palette.png")
    for name in ("jet.png", "palette.png"):
        with pytest.raises(UserError, match=f"{name}: is in colour"):
            read_heatmap(tmp_path / name, (8, 8))
    np.testing.assert_array_equal(read_heatmap(tmp_path / "rgb.png", (8, 8)) * 256, gray)


# --- pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation(tmp_path, orientation, suffix):
    from PIL import ImageOps

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
