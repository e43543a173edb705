"""The gaze analysis: recovers what was planted, agrees with plain computations, says what it cannot do."""

import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from phantom_egd import make_egd

from datasets.analysis.figure import ANY, SIZES
from datasets.analysis.gaze_density import ellipse_mask
from datasets.analysis.measure import analyze
from datasets.fixations import fixation_heatmap
from datasets.phantom.gaze_study import make_study
from datasets.prepare.readings import prepare
from datasets.raw.findings import COMMON_FINDING
from datasets.raw.mimic_cxr import find_metadata
from util.bootstrap import bootstrap_means, interval
from util.errors import UserError
from util.images import read_gray
from util.radiograph import read_radiograph

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import analyze_gaze

SMALL = (128, 105)


def copy_of(study, tmp_path):
    """A raw directory that a test may change."""
    return Path(shutil.copytree(study.raw, tmp_path / "raw"))


@pytest.mark.parametrize("seed", range(5))
def test_ellipse_mask_is_the_ellipse_at_pixel_centres(seed):
    rng = np.random.default_rng(seed)
    (left, top), sides = rng.uniform(-20, 80, 2), rng.uniform(0.5, 100, 2)
    image, out = rng.integers(20, 100, 2), tuple(rng.integers(1, 30, 2))
    v, u = np.indices(out)
    x, y = (u + 0.5) * image[1] / out[1] - 0.5, (v + 0.5) * image[0] / out[0] - 0.5
    own, other = (left, top, left + sides[0], top + sides[1]), (2, 2, 12, 8)
    inside = np.hypot((x - left) / sides[0] - 0.5, (y - top) / sides[1] - 0.5) < 0.5
    np.testing.assert_array_equal(ellipse_mask([own], image, out), inside)
    np.testing.assert_array_equal(ellipse_mask([own, other], image, out), inside | ellipse_mask([other], image, out))


def test_recovers_the_planted_ratio(tmp_path):
    planted = 9.0
    study = make_study(tmp_path, 10, seed=1, size=SMALL, dwell_ratio=planted)
    row = analyze(study.raw).tables["ratio_by_finding"].iloc[0]
    assert row["mean"] == pytest.approx(planted, rel=0.01)
    assert row["low"] <= row["mean"] <= row["high"] and row["high"] - row["low"] < 0.02 * planted


def test_tables_equal_a_plain_computation(study):
    tables = analyze(study.raw, size=96, size_thresholds=(0.004, 0.03)).tables
    readings, (height, width) = tables["readings"], study.truth[0].size
    out = (round(height * 96 / width), 96)
    y, x = ((np.indices(out).T + 0.5) * (height / out[0], width / out[1]) - 0.5).T
    rows, areas = [], []
    for name, subject in readings[["id", "subject_id"]].to_numpy():
        heat, ellipses, box = (
            pd.read_csv(study.raw / "main_data" / name / f"{table}.csv")
            for table in ("fixations", "anomaly_location_ellipses", "chest_bounding_box")
        )
        heat = fixation_heatmap(heat, (height, width), out)
        chest = (x >= box["xmin"][0]) & (x <= box["xmax"][0]) & (y >= box["ymin"][0]) & (y <= box["ymax"][0])
        findings = ellipses.iloc[:, 5:].T.idxmax().map(COMMON_FINDING)  # each has one label
        groups = {ANY: ellipses, **dict(iter(ellipses.groupby(findings)))} if len(ellipses) else {}
        masks = {name: ellipse_mask(own.iloc[:, :4].to_numpy(), (height, width), out) for name, own in groups.items()}
        for finding, mask in masks.items():
            inside, elsewhere = (heat[mask], heat[mask & chest]), (heat[~masks[ANY]], heat[~masks[ANY] & chest])
            rows.append([finding, subject, *(i.mean() / e.mean() for i, e in zip(inside, elsewhere))])
        areas += (math.pi / 4 * ellipses.eval("(xmax - xmin) * (ymax - ymin)") / (width * height)).tolist()
    rows = pd.DataFrame(rows, columns=["finding", "subject", "whole image", "chest box"])
    own = rows[rows["finding"] == ANY]
    found = readings.dropna(subset="ratio_image")
    np.testing.assert_allclose(found[["ratio_image", "ratio_chest"]], own[["whole image", "chest box"]])
    assert own["subject"].nunique() < len(own) and rows["finding"].nunique() > 4  # intervals are over subjects
    for within, table in tables["ratio_by_finding"].groupby("within"):
        expected = rows.groupby("finding")[within].agg(["count", "mean", "median"])
        assert len(table) == len(expected) and table["subjects"].iloc[0] == own["subject"].nunique()
        found = table.set_index("finding")[["readings", "mean", "median"]]
        np.testing.assert_allclose(found, expected.loc[found.index])
        means = bootstrap_means(own[[within]].to_numpy(), own["subject"], draws=2000, seed=0)
        np.testing.assert_allclose(table.iloc[0][["mean", "low", "high"]].tolist(), interval(means[:, 0]))
    np.testing.assert_allclose(tables["ellipses"]["area_share"], areas)
    sizes, areas = tables["size_by_finding"].set_index("finding"), np.array(areas)
    assert sizes.loc[ANY, "ellipses"] == len(areas) == readings["ellipses"].sum() == sizes[1:]["ellipses"].sum()
    assert sizes.loc[ANY, "small"] == (areas < 0.004).mean() and sizes.loc[ANY, "large"] == (areas >= 0.03).mean()
    np.testing.assert_allclose(sizes[list(SIZES)].sum(axis=1), 1)
    counts = tables["significant_patches"]
    assert readings["significant_patches"].value_counts().to_dict() == {n: k for n, k in counts.to_numpy() if k}


def test_patch_counts_are_those_of_preparation(study, tmp_path):
    report = prepare(raw=study.raw, images=study.images, out=tmp_path / "each", size=0, readings="each", workers=1)
    readings = analyze(study.raw, size=min(study.truth[0].size)).tables["readings"]
    assert report.counts["mean significant patches of 196"] == round(readings["significant_patches"].mean(), 2)


def test_certainty_and_labels_that_are_no_abnormality(study, tmp_path):
    raw = copy_of(study, tmp_path)
    path = next(p for p in sorted(raw.glob("main_data/P3*/anomaly*.csv")) if len(pd.read_csv(p)) == 2)
    name = path.parent.name
    table = pd.read_csv(path)
    table["certainty"] = [2, 4]

    def n_ellipses(**options):
        table.to_csv(path, index=False)
        return analyze(raw, **options).tables["readings"].set_index("id").loc[name, "ellipses"]

    assert n_ellipses() == 2 and n_ellipses(min_certainty=4) == 1
    table.loc[1, table.columns[5:]] = table.columns[5:] == "Support devices"
    assert n_ellipses() == 1


def test_damaged_readings_are_left_out_by_name(study, tmp_path, capsys):
    raw = copy_of(study, tmp_path)
    usable = analyze(raw).tables["readings"]["id"].tolist()
    main_data = raw / "main_data"
    (main_data / usable[0] / "chest_bounding_box.csv").unlink()
    path = main_data / usable[1] / "fixations.csv"
    path.write_text(path.read_text().replace("0.", "?."))
    out = tmp_path / "out"
    assert analyze_gaze.main(["--raw", str(raw), "--out", str(out)]) == 1
    told = capsys.readouterr()
    for part in (
        f"{usable[0]}/chest_bounding_box.csv: file is missing",
        f"{usable[1]}/fixations.csv: line 2, column 'timestamp_start_fixation' is not a finite number",
    ):
        assert part in told.out
    assert "2 readings left out" in told.err
    assert pd.read_csv(out / "readings.csv")["id"].tolist() == usable[2:]


def test_writes_tables_and_a_figure(study, tmp_path, capsys):
    arguments = ["--raw", str(study.raw), "--size", "128", "--images", str(study.images), "--examples", "2"]
    assert analyze_gaze.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert re.search(r"Any abnormality +whole image +\d+ +\d+ +6\.0", capsys.readouterr().out)
    names = {"ellipses.csv", "size_by_finding.csv", "readings.csv", "ratio_by_finding.csv", "significant_patches.csv"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | {"gaze_analysis.png"}
    picture = read_gray(tmp_path / "a" / "gaze_analysis.png")
    assert picture.shape[1] > 1500 and picture.std() > 20
    # Without images there are no examples.
    analyze_gaze.main([*arguments[:4], "--out", str(tmp_path / "b")])
    assert read_gray(tmp_path / "b" / "gaze_analysis.png").shape[0] < picture.shape[0]


def test_examples_show_the_image_that_was_read(tmp_path):
    study = make_study(tmp_path, 4, size=SMALL, shared_images=0, normal_fraction=0)
    damaged = study.truth[0]
    damaged.path.write_bytes(damaged.path.read_bytes()[:2000])
    analysis = analyze(study.raw, study.images, examples=4)
    truth = {name: image for image in study.truth for name in image.reading_ids}
    assert {truth[name].dicom_id for name, _ in analysis.examples} == {image.dicom_id for image in study.truth[1:]}
    for name, picture in analysis.examples:
        gray = read_radiograph(truth[name].path, "mimic-cxr-jpg") / 255
        plain = np.abs(picture[:, : SMALL[1]] - gray[..., None]).max(-1) < 1e-6
        assert picture.shape == (SMALL[0], 2 * SMALL[1], 3) and 0.5 < plain.mean() < 1  # but for the outlines
    assert len(analysis.tables["readings"]) == 4
    assert [exclusion.id for exclusion in analysis.exclusions if exclusion.is_fault] == damaged.reading_ids
    assert f"{damaged.path}: " in str(analysis)


def test_egd_has_no_ellipses_and_says_so(tmp_path, capsys):
    study = make_egd(tmp_path, 4, size=SMALL)
    arguments = ["--raw", str(study.raw), "--sigma", "5", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--metadata, or --images with it"):
        analyze_gaze.main(arguments)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ellipses.csv").write_text("of another analysis")
    for further in (["--images", str(study.images)], ["--metadata", str(find_metadata(study.images))]):
        assert analyze_gaze.main([*arguments, *further]) == 0
        printed = capsys.readouterr().out
        assert "EGD-CXR marks none" in printed and "4 readings of 4 images" in printed
        files = {path.name for path in (tmp_path / "out").iterdir()}
        assert files == {"readings.csv", "significant_patches.csv", "gaze_analysis.png"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size_thresholds", "0.05", "0.01"], "--size_thresholds"),
        (["--size", "1"], "at --size 1 no ellipse covers a part"),
        (["--split", "validate"], "no usable reading of split 'validate'"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    study = make_study(tmp_path, 2, size=SMALL, normal_fraction=0)
    with pytest.raises(UserError, match=message):
        analyze_gaze.main(["--raw", str(study.raw), "--out", str(tmp_path / "out"), *options])
