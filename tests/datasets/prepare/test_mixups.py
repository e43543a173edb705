"""What would make a wrong or smaller tree without a word: old times, lost lists, other letters, several versions, a full
disk, another layer."""

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd
from trees import add_metadata_and_heatmaps, brightness, contents

from datasets.analysis.measure import analyze
from datasets.phantom.gaze_study import make_study
from datasets.prepare.mimic import prepare_mimic
from datasets.prepare.pixels import make_image
from datasets.prepare.readings import prepare
from gaze.fill import Predictor, fill_tree
from util.errors import UserError
from util.images import read_gray, write_gray

INDEX = "mimic-cxr-jpg-cleanv4.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    study = make_study(root, 3, size=(32, 40), shared_images=0)
    add_metadata_and_heatmaps(root, study, ["PA"] * len(study.truth))
    return root


@pytest.fixture
def root(base, tmp_path):
    return shutil.copytree(base, tmp_path / "root")


def mimic(root, out="out", heatmaps="heatmaps", **options):
    return prepare_mimic(root / "mimic", heatmaps and root / heatmaps, root / out, **options)


def test_a_directory_that_is_not_ours_is_never_touched(root):
    (root / "out").mkdir()
    (root / "out/thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not made by this script .*thesis.txt"):
            mimic(root, overwrite=overwrite)
    assert os.listdir(root / "out") == ["thesis.txt"]


def test_a_source_that_changes_meanwhile_is_an_error(root, monkeypatch):
    def make(unit, **options):
        made = make_image(unit, **options)
        Path(unit.sources[0]).write_bytes(b"another")
        return made

    monkeypatch.setattr("datasets.prepare.pixels.make_image", make)
    with pytest.raises(UserError, match="jpg: changed while the tree was made from it"):
        mimic(root)


def test_a_tree_that_is_being_moved_has_no_index(root, monkeypatch):
    mimic(root)
    changed = next((root / "heatmaps").iterdir())
    np.save(changed, np.load(changed).T)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "move", killed)
        mimic(root)
    assert not (root / "out" / INDEX).exists()
    mimic(root)
    assert (root / "out" / INDEX).exists()


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(root):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(UserError, match="can't be read or written .File too large"):
            mimic(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {*os.listdir(root / "out")} == {".prepare.lock", ".making"}
    mimic(root)
    mimic(root, "fresh")
    assert contents(root / "out") == contents(root / "fresh")


def test_the_layer_above_follows_the_tree_of_images(root):
    def filled(name):
        fill_tree(root / name, Predictor(brightness, 32, "plain"))
        return {file: content for file, content in contents(root / name).items() if not file.startswith("gaze.")}

    mimic(root, heatmaps=None)
    before = filled("out")
    image = next((root / "mimic").rglob("*.jpg"))
    write_gray(image, 255 - read_gray(image))
    mimic(root, heatmaps=None)  # replaces a file that the layer above was made from
    assert INDEX in before and not (root / "out" / INDEX).exists()
    mimic(root, "fresh", None)
    assert filled("out") == filled("fresh") != before


def test_other_heatmaps_of_the_same_sizes_and_times(root):
    for number, name in enumerate(("first", "second")):  # as if unpacked from archives without times
        (root / name).mkdir()
        for path in (root / "heatmaps").iterdir():
            np.save(root / name / path.name, np.random.default_rng(number).random((4, 4)))
            os.utime(root / name / path.name, (315532800, 315532800))
    mimic(root, heatmaps="first")
    assert mimic(root, heatmaps="second").counts["made by this run"] == 3
    mimic(root, "fresh", "second")
    assert contents(root / "out") == contents(root / "fresh")


def test_a_finished_tree_needs_its_list_of_origins(root):
    mimic(root)
    path = root / "out/prepare.origins"
    text = path.read_text()
    next((root / "mimic").rglob("*.jpg")).unlink()  # the tree would shrink
    for damaged in (None, "", text[: text.index("\n") + 1], text.replace('"significant":[', '"s":[')):
        path.unlink() if damaged is None else path.write_text(damaged)
        before = contents(root / "out")
        for overwrite in (False, True):
            with pytest.raises(UserError, match="prepare.origins: is missing, damaged or changed"):
                mimic(root, overwrite=overwrite)
        assert contents(root / "out") == before


@pytest.mark.parametrize("where", ["heatmaps", "images", "metadata"])
def test_letter_case_is_no_absence(root, where):
    if where == "metadata":
        table = pd.read_csv(root / "mimic/mimic-cxr-2.0.0-metadata.csv", dtype=str)
        table["dicom_id"] = table["dicom_id"].str.upper()
        table["ViewPosition"] = "pa"
        table.to_csv(root / "mimic/mimic-cxr-2.0.0-metadata.csv", index=False)
    else:
        for path in [*(root / {"heatmaps": "heatmaps", "images": "mimic"}[where]).rglob("*-*-*-*.*")]:
            if path.suffix in (".npy", ".jpg"):
                path.rename(path.with_name(path.stem.upper() + path.suffix))
    report = mimic(root, views=("Pa",))
    assert report.counts["entries"] == 3 and not report.exclusions
    if where == "images":
        assert prepare(root / "reflacx", root / "mimic", root / "readings").counts["entries"] == 3
        assert mimic(root, "alone", None, views=("all",)).counts["entries"] == 3


def test_one_of_several_versions_of_the_gaze_is_not_chosen(root, tmp_path):
    for name in ("1.0.0", "1.0.1"):
        shutil.copytree(root / "reflacx", tmp_path / "versions" / name)
    with pytest.raises(UserError, match="holds 1.0.0/main_data/.* and 1.0.1/main_data/.*; give the root of one"):
        prepare(tmp_path / "versions", root / "mimic", root / "out")
    shutil.rmtree(tmp_path / "versions/1.0.1")
    make_egd(tmp_path / "other", n_images=1, size=(20, 20))
    egd = next((tmp_path / "other").rglob("master_sheet.csv")).parent
    shutil.copytree(egd, tmp_path / "versions/egd")
    with pytest.raises(UserError, match="holds 1.0.0/main_data/.* and egd/master_sheet.csv"):
        prepare(tmp_path / "versions", root / "mimic", root / "out")


def test_a_trees_own_maps_are_no_heatmaps(root):
    mimic(root)
    for place in ("out", "out/attention"):
        with pytest.raises(UserError, match="lies in a prepared tree"):
            mimic(root, heatmaps=place)


def test_options_of_egd_are_refused_for_reflacx(root):
    for options in ({"sigma": 9.0}, {"metadata": root / "a.csv"}):
        with pytest.raises(UserError, match="is for EGD-CXR"):
            prepare(root / "reflacx", root / "mimic", root / "out", **options)
        with pytest.raises(UserError, match="is for EGD-CXR"):
            analyze(root / "reflacx", **options)
