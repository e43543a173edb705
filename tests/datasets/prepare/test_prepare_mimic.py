"""From MIMIC-CXR and heatmaps made elsewhere to the MIMIC tree."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from trees import contents

from datasets.build import build_dataset
from datasets.check import check_data
from datasets.fixations import heatmap_to_uint8
from datasets.phantom.gaze_study import make_study
from datasets.prepare.heatmaps import find_heatmaps, read_heatmap
from datasets.prepare.mimic import FRONTAL, IMAGES_INDEX, INDEX, prepare_mimic
from util.errors import UserError
from util.images import read_gray, write_gray
from util.radiograph import read_radiograph

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import prepare_mimic as script

SIZE = (128, 105)
VIEWS = ["PA", "AP", "LATERAL", "PA", "", "LL", "AP", "PA"]


def blob(shape, x, y):
    """A heatmap with its peak at the shares (x, y) of its sides."""
    height, width = shape
    u = (np.arange(width) + 0.5) / width - x
    v = (np.arange(height) + 0.5) / height - y
    return np.exp(-(u[None] ** 2 + v[:, None] ** 2) / 0.02).astype(np.float32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """MIMIC-CXR with both kinds of files, its metadata, and a heatmap per image: PNG and NPY by turns."""
    root = tmp_path_factory.mktemp("mimic")
    study = make_study(root, 8, size=SIZE, shared_images=0, image_format="mixed")
    rows = [
        {"dicom_id": i.dicom_id, "subject_id": i.subject_id, "study_id": i.study_id, "ViewPosition": view, "Rows": 1}
        for i, view in zip(study.truth, VIEWS)
    ]
    pd.DataFrame(rows).to_csv(study.images / "mimic-cxr-2.0.0-metadata.csv.gz", index=False)
    heatmaps = root / "heatmaps"
    for number, image in enumerate(study.truth):
        directory = heatmaps / (image.path.parent.relative_to(study.images) if number % 3 else "flat")
        directory.mkdir(parents=True, exist_ok=True)
        if number % 2:
            np.save(directory / f"{image.dicom_id}.npy", 7.5 * blob((56, 56), 0.7, 0.3)[None])
        else:
            write_gray(directory / f"gaze_{image.dicom_id}_v2.png", (255 * blob((64, 80), 0.7, 0.3)).astype(np.uint8))
    return study, heatmaps


def test_builds_a_tree_that_trains(source, tmp_path):
    study, heatmaps = source
    report = prepare_mimic(study.images, heatmaps, tmp_path, size=0)
    counts = {"images with heatmaps": 8, "- other view": 3, "entries": 5, "made by this run": 5}
    assert report.counts.items() >= counts.items() and len(report.counts) == 5 and not report.faults
    entries = {entry["dicom_id"]: entry for entry in json.loads((tmp_path / INDEX).read_text())}
    frontal = [image for image, view in zip(study.truth, VIEWS) if view in FRONTAL]
    assert set(entries) == {image.dicom_id for image in frontal}
    for image in frontal:
        entry = entries[image.dicom_id]
        place = f"p{image.subject_id[:2]}/p{image.subject_id}/s{image.study_id}/{image.dicom_id}"
        assert entry["image_path"] == f"{place}.jpg"
        assert (entry["study_id"], entry["subject_id"]) == (image.study_id, image.subject_id)
        gray = read_gray(tmp_path / f"files/{place}.jpg").astype(int)
        assert gray.shape == SIZE and np.abs(gray - read_radiograph(image.path, "mimic-cxr-jpg")).mean() < 4
        attention, foreground = (read_gray(tmp_path / kind / f"{place}.png") for kind in ("attention", "foreground"))
        assert np.abs(attention - 255 * blob(SIZE, 0.7, 0.3)).max() < 12 and attention.max() == 255
        assert set(np.unique(foreground)) == {0, 255}
        assert attention[foreground == 255].min() > attention[foreground == 0].max()
    assert check_data(tmp_path, preload=True) == []
    dataset = build_dataset(tmp_path, preload=True, augment=False, use_cache=False)
    assert len(dataset) == 5 and dataset[0, 0]["foreground"].float().mean() > 0.02


def paths_of(out, index=INDEX):
    return [entry["image_path"] for entry in json.loads((out / index).read_text())]


def test_views_and_size_are_options(source, tmp_path):
    study, heatmaps = source
    assert prepare_mimic(study.images, heatmaps, tmp_path / "l", views=("LATERAL", "LL")).counts["entries"] == 2
    assert prepare_mimic(study.images, heatmaps, tmp_path / "all", views=("all",), size=64).counts["entries"] == 8
    assert {read_gray(path).shape for path in (tmp_path / "all").rglob("*.png")} == {(78, 64)}
    files = study.images / "files"  # no table in it: all views need none
    with pytest.raises(UserError, match="give its path with --metadata, or take any view"):
        prepare_mimic(files, heatmaps, tmp_path / "none")
    for maps, index in ((heatmaps, INDEX), (None, IMAGES_INDEX)):
        prepare_mimic(files, maps, tmp_path / index, views=("all",))
        assert paths_of(tmp_path / index, index) == paths_of(tmp_path / "all")


def test_images_alone(source, tmp_path):
    study, heatmaps = source
    out = tmp_path / "out"
    report = prepare_mimic(study.images, None, out)
    assert report.counts["entries"] == 5 and not report.faults
    assert all((out / "files" / path).is_file() for path in paths_of(out, IMAGES_INDEX))
    with pytest.raises(UserError, match="no heatmaps yet; scripts/predict_gaze.py --weights .* --tree"):
        build_dataset(out)
    with pytest.raises(UserError, match="other options: heatmaps False there, heatmaps True asked for"):
        prepare_mimic(study.images, heatmaps, out)
    prepare_mimic(study.images, heatmaps, out, overwrite=True)
    prepare_mimic(study.images, heatmaps, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_excluded_ids_and_subjects(source, tmp_path):
    study, heatmaps = source
    first, second = study.truth[:2]
    listed, out = tmp_path / "test_images.txt", tmp_path / "out"
    kept = [
        i.dicom_id
        for i, view in zip(study.truth, VIEWS)
        if view in FRONTAL and i is not first and i.subject_id != second.subject_id
    ]
    for name in (first.dicom_id, f"{first.dicom_id}.jpg", f"{first.dicom_id.upper()}.DCM"):
        listed.write_text(f"\ufeffdicom_id\n\n{name}  # of REFLACX\n{second.subject_id}\nnowhere\n")
        report = prepare_mimic(study.images, heatmaps, out, exclude=listed)
        assert sorted(Path(path).stem for path in paths_of(out)) == sorted(kept)
        assert report.counts["- of --exclude"] == 5 - len(kept) == 2
    assert "1 of 3 ids are of no image here: nowhere" in str(report)
    with pytest.raises(UserError, match=r"exclude 3 ids \(\w+\) there, exclude None asked for"):
        prepare_mimic(study.images, heatmaps, out)
    # An id that is cut off excludes nothing, so the image would be trained on.
    for text, message in (
        ("a,b\n", "test_images.txt: line 1: one dicom_id or subject_id a line"),
        (first.dicom_id[:-5], "but the beginning of one's dicom_id: is it cut off"),
    ):
        listed.write_text(text)
        with pytest.raises(UserError, match=message):
            prepare_mimic(study.images, heatmaps, tmp_path / "other", exclude=listed)


def test_damaged_files_are_left_out_by_name(source, tmp_path, capsys):
    study, _ = source
    images = Path(shutil.copytree(study.images, tmp_path / "images"))
    heatmaps, out = tmp_path / "heatmaps", tmp_path / "out"
    heatmaps.mkdir()
    ids, good = [image.dicom_id for image in study.truth], blob((32, 32), 0.5, 0.5)
    picture = (255 * good).astype(np.uint8)
    for name, heatmap in zip([*ids[:3], *ids[4:7], "stranger"], [-good, np.ones((8, 8)), *[good] * 5]):
        np.save(heatmaps / f"{name}.npy", heatmap)
    for name in ids[2:4]:
        write_gray(heatmaps / f"{name}.png", picture)
    broken, lost = (images / study.truth[number].path.relative_to(study.images) for number in (4, 5))
    for path in (heatmaps / f"{ids[3]}.png", broken):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    lost.unlink()
    arguments = ["--images", str(images), "--heatmaps", str(heatmaps), "--out", str(out), "--views", "all"]
    assert script.main([*arguments, "--workers", "1"]) == 1
    told = capsys.readouterr()
    for part in (
        f"{ids[0]}.npy: has negative",
        f"{ids[1]}.npy: all values are equal",
        f"{ids[2]}: several heatmaps",
        f"{ids[3]}.png: the PNG is truncated",
        f"{broken.name}: the",
        f"{ids[5]}: image missing",
        "stranger: not in the metadata",
    ):
        assert part in told.out
    assert "5 images left out for damaged input" in told.err
    assert [Path(path).stem for path in paths_of(out)] == [ids[6]]
    assert check_data(out, preload=True) == []
    assert script.main([*arguments, "--accept_damaged"]) == 0


@pytest.mark.parametrize(
    "content, message",
    [
        (np.full((4, 4), np.nan), "not finite"),
        (np.zeros((3, 4, 4)), "shape"),
        (np.array([[{}]], dtype=object), "cannot be read as NPY"),
        (b"\x93NUMPY\x01\x00rubbish", "cannot be read as NPY"),
    ],
)
def test_npy_that_is_no_heatmap(tmp_path, content, message):
    path = tmp_path / "x.npy"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError, match=f"x.npy: .*{message}"):
        read_heatmap(path, (8, 8))


@pytest.mark.parametrize("peak", [1e-300, 5e-37, 1e300])
def test_the_scale_of_an_npy_heatmap_does_not_matter(tmp_path, peak):
    heatmap = np.random.default_rng(0).random((40, 30))
    np.save(tmp_path / "x.npy", heatmap * peak)
    levels = heatmap_to_uint8(read_heatmap(tmp_path / "x.npy", (40, 30)))
    assert np.abs(levels - 255 * heatmap / heatmap.max()).max() < 0.501


def test_heatmaps_keep_their_place_when_resized(tmp_path):
    np.save(tmp_path / "x.npy", blob((200, 50), 0.2, 0.8).astype(np.float64))
    heatmap = read_heatmap(tmp_path / "x.npy", (40, 30))
    assert heatmap.shape == (40, 30) and heatmap.min() >= 0
    assert np.unravel_index(heatmap.argmax(), heatmap.shape) in {(31, 5), (31, 6), (32, 5), (32, 6)}


def test_dicom_ids_are_found_in_names(tmp_path):
    name = "02aa804e-bde0afdd-112c0b34-7bc16630-4e384014"
    for file in (f"{name}.png", "a/other.npy", f"b/c/pred-{name[:-1]}f_epoch3.NPY", "notes.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "lost+found").mkdir()
    for file in ("._other.npy", "lost+found/other.npy"):
        (tmp_path / file).write_bytes(b"macOS")
    found = find_heatmaps(tmp_path)
    assert set(found.paths) == {name, "other", f"{name[:-1]}f"} and not found.ambiguous


def test_bad_metadata_and_places(source, tmp_path):
    study, heatmaps = source
    table = pd.read_csv(study.images / "mimic-cxr-2.0.0-metadata.csv.gz", dtype=str)
    tables = {
        "view": table.drop(columns="ViewPosition"),
        "twice": pd.concat([table, table.iloc[:1]]),
        "id": table.assign(subject_id="../../../tmp"),
    }
    for name, own in tables.items():
        own.to_csv(tmp_path / f"{name}.csv", index=False)
    for images, maps, options, message in (
        (heatmaps, heatmaps, {}, "give its path with --metadata"),
        (study.images, tmp_path / "nowhere", {}, "no such directory; --heatmaps"),
        (
            study.images,
            heatmaps,
            {"views": ("SWIMMERS",)},
            "no row has the view SWIMMERS of --views; there are AP, LATERAL, LL, PA",
        ),
        (study.images, heatmaps, {"metadata": "view"}, "view.csv: column 'ViewPosition' is missing"),
        (study.images, heatmaps, {"metadata": "twice"}, "twice.csv: line 10, column 'dicom_id': .* appears twice"),
        (study.images, heatmaps, {"metadata": "id"}, "id.csv: line 2, column 'subject_id': .* not a plain identifier"),
    ):
        if "metadata" in options:
            options["metadata"] = tmp_path / f"{options['metadata']}.csv"
        with pytest.raises(UserError, match=message):
            prepare_mimic(images, maps, tmp_path / "out", **options)
