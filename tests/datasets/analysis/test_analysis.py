"""The gaze analysis: recovers what was planted, agrees with plain computations, says what it cannot do."""

import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom_egd import make_egd

from datasets.analysis.measure import ANY, SIZES, analyze, density_ratio, ellipse_mask, size_class
from datasets.phantom.reflacx import make_study
from datasets.prepare.readings import prepare
from datasets.raw.findings import COMMON_FINDING
from util.bootstrap import bootstrap_means, interval
from util.errors import UserError
from util.images import read_gray
from util.radiograph import read_radiograph

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import analyze_gaze

SMALL = (128, 105)


def ratio_row(analysis, within="whole image", finding=ANY):
    table = analysis.ratio_by_finding
    return table[(table["finding"] == finding) & (table["within"] == within)].iloc[0]


def copy_of(study, tmp_path):
    """A raw directory that a test may change."""
    return Path(shutil.copytree(study.raw, tmp_path / "raw"))


@given(
    box=st.tuples(*[st.floats(-20, 120)] * 4),
    image=st.tuples(st.integers(20, 100), st.integers(20, 100)),
    out=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
@settings(max_examples=60, deadline=None)
def test_ellipse_mask_is_the_ellipse_at_pixel_centres(box, image, out):
    xmin, xmax = sorted(box[::2])
    ymin, ymax = sorted(box[1::2])
    if xmax - xmin < 0.5 or ymax - ymin < 0.5:
        return
    mask = ellipse_mask([(xmin, ymin, xmax, ymax)], image, out)
    for i in range(out[0]):
        for j in range(out[1]):
            x = (j + 0.5) * image[1] / out[1] - 0.5
            y = (i + 0.5) * image[0] / out[0] - 0.5
            r = (2 * x - xmin - xmax) ** 2 / (xmax - xmin) ** 2 + (2 * y - ymin - ymax) ** 2 / (ymax - ymin) ** 2
            if abs(r - 1) > 1e-9:
                assert mask[i, j] == (r < 1)


def test_masks_of_several_ellipses_are_united():
    boxes = [(2, 2, 12, 8), (6, 4, 18, 16)]
    parts = [ellipse_mask([box], (20, 20), (20, 20)) for box in boxes]
    assert (ellipse_mask(boxes, (20, 20), (20, 20)) == parts[0] | parts[1]).all()
    assert not ellipse_mask([], (20, 20), (20, 20)).any()


def test_density_ratio_is_mass_per_area():
    heatmap = np.array([[4.0, 4.0, 1.0], [1.0, 1.0, 1.0]])
    inside = np.array([[1, 1, 0], [0, 0, 0]], dtype=bool)
    assert density_ratio(heatmap, inside, ~inside) == pytest.approx(4)
    assert density_ratio(3 * heatmap / 7, inside, ~inside) == pytest.approx(4)
    assert math.isnan(density_ratio(heatmap, np.zeros_like(inside), inside))
    assert math.isnan(density_ratio(heatmap * inside, inside, ~inside))


def test_size_classes_begin_at_their_thresholds():
    shares = [0.0, 0.00999, 0.01, 0.0499, 0.05, 0.9]
    assert [size_class(share, (0.01, 0.05)) for share in shares] == [
        "small",
        "small",
        "medium",
        "medium",
        "large",
        "large",
    ]


@pytest.mark.parametrize("planted", [1.5, 3.0, 6.0, 9.0])
def test_recovers_the_planted_ratio(tmp_path, planted):
    study = make_study(tmp_path, 10, seed=1, size=SMALL, dwell_ratio=planted)
    row = ratio_row(analyze(study.raw))
    assert row["mean"] == pytest.approx(planted, rel=0.01)
    assert row["low"] <= row["mean"] <= row["high"] and row["high"] - row["low"] < 0.02 * planted
    lesions = [image for image in study.truth if image.lesions]
    discarded = bool(study.truth[0].lesions)
    assert row["readings"] == sum(len(image.reading_ids) for image in lesions) - discarded
    assert row["subjects"] == len({image.subject_id for image in lesions})


def test_gaze_that_is_everywhere_has_ratio_one(study, tmp_path):
    raw = copy_of(study, tmp_path)
    for path in raw.glob("main_data/P*/fixations.csv"):
        table = pd.read_csv(path)
        table[[f"angular_resolution_{axis}_pixels_per_degree" for axis in "xy"]] = 1e5
        table[["xmin_shown_from_image", "ymin_shown_from_image"]] = 0
        table[["xmax_shown_from_image", "ymax_shown_from_image"]] = 1000
        table.to_csv(path, index=False)
    analysis = analyze(raw)
    for within in ("whole image", "chest box"):
        row = ratio_row(analysis, within)
        assert (row["mean"], row["low"], row["high"]) == pytest.approx((1, 1, 1), abs=1e-3)


def test_ratios_equal_a_plain_computation(study):
    analysis = analyze(study.raw, size=96)
    by_finding: dict[str, list[float]] = {}
    for row in analysis.readings[analysis.readings["ellipses"] > 0].itertuples():
        directory = study.raw / "main_data" / row.id
        height, width = study.truth[0].size
        h, w = round(height * 96 / width), 96
        x, y = np.meshgrid((np.arange(w) + 0.5) * width / w - 0.5, (np.arange(h) + 0.5) * height / h - 0.5)
        heat = np.zeros((h, w))
        for f in pd.read_csv(directory / "fixations.csv").itertuples():
            sx, sy = f.angular_resolution_x_pixels_per_degree, f.angular_resolution_y_pixels_per_degree
            bump = np.exp(-0.5 * ((x - f.x_position) / sx) ** 2 - 0.5 * ((y - f.y_position) / sy) ** 2)
            bump[(x + 0.5 < f.xmin_shown_from_image) | (x + 0.5 >= f.xmax_shown_from_image)] = 0
            bump[(y + 0.5 < f.ymin_shown_from_image) | (y + 0.5 >= f.ymax_shown_from_image)] = 0
            heat += bump / (2 * np.pi * sx * sy) * (f.timestamp_end_fixation - f.timestamp_start_fixation)
        ellipses = pd.read_csv(directory / "anomaly_location_ellipses.csv")
        each = [
            ((x - (e.xmin + e.xmax) / 2) / (e.xmax - e.xmin)) ** 2
            + ((y - (e.ymin + e.ymax) / 2) / (e.ymax - e.ymin)) ** 2
            <= 0.25
            for e in ellipses.itertuples()
        ]
        abnormal = np.any(each, axis=0)
        box = pd.read_csv(directory / "chest_bounding_box.csv").iloc[0]
        chest = (x >= box.xmin) & (x <= box.xmax) & (y >= box.ymin) & (y <= box.ymax)
        assert row.ratio_image == pytest.approx(heat[abnormal].mean() / heat[~abnormal].mean(), rel=1e-6)
        within = heat[abnormal & chest].mean() / heat[~abnormal & chest].mean()
        assert row.ratio_chest == pytest.approx(within, rel=1e-6)
        labels = [COMMON_FINDING[ellipses.columns[5:][flags][0]] for flags in ellipses.iloc[:, 5:].to_numpy()]
        for finding in set(labels):
            own = np.any([mask for mask, label in zip(each, labels) if label == finding], axis=0)
            by_finding.setdefault(finding, []).append(heat[own].mean() / heat[~abnormal].mean())
    assert max(map(len, by_finding.values())) >= 3 and len(by_finding) >= 4
    table = analysis.ratio_by_finding
    table = table[(table["within"] == "whole image") & (table["finding"] != ANY)].set_index("finding")
    assert set(table.index) == set(by_finding)
    for finding, ratios in by_finding.items():
        assert table.loc[finding, "readings"] == len(ratios)
        assert table.loc[finding, "mean"] == pytest.approx(np.mean(ratios), rel=1e-6)
        assert table.loc[finding, "median"] == pytest.approx(np.median(ratios), rel=1e-6)


def test_intervals_are_over_subjects(study):
    readings = analyze(study.raw, seed=4).readings.dropna(subset="ratio_image")
    assert readings["subject_id"].nunique() < len(readings)
    row = ratio_row(analyze(study.raw, seed=4))
    values, subjects = readings["ratio_image"].to_numpy()[:, None], readings["subject_id"].to_numpy(str)
    expected = interval(bootstrap_means(values, subjects, draws=2000, seed=4)[:, 0])
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(expected, abs=1e-12)


def test_tables_agree_with_each_other_and_with_the_raw_data(study):
    analysis = analyze(study.raw, size_thresholds=(0.004, 0.03))
    table = analysis.ellipses
    assert len(table) == analysis.readings["ellipses"].sum()
    assert set(table["size"]) <= set(SIZES)
    csv = pd.concat(
        [
            pd.read_csv(study.raw / "main_data" / name / "anomaly_location_ellipses.csv").iloc[:, :4]
            for name in analysis.readings["id"]
        ],
        ignore_index=True,
    )
    height, width = study.truth[0].size
    area = math.pi / 4 * (csv["xmax"] - csv["xmin"]) * (csv["ymax"] - csv["ymin"]) / (width * height)
    assert table["area_share"].to_numpy() == pytest.approx(area.to_numpy())
    sizes = analysis.size_by_finding.set_index("finding")
    assert sizes.loc[ANY, "ellipses"] == len(table)
    assert sizes.loc[ANY, "small"] == pytest.approx((area < 0.004).mean())
    assert sizes.loc[ANY, "large"] == pytest.approx((area >= 0.03).mean())
    assert sizes[list(SIZES)].sum(axis=1).to_numpy() == pytest.approx(1)
    assert sizes.drop(ANY)["ellipses"].sum() == len(table)  # the phantom gives each ellipse one finding
    # Nodule and Mass of phase 1 are one finding with phase 2's.
    assert not {"Nodule", "Mass"} & set(sizes.index)
    assert analysis.significant_patches["readings"].sum() == len(analysis.readings)
    mean = np.average(
        analysis.significant_patches["significant_patches"], weights=analysis.significant_patches["readings"]
    )
    assert mean == pytest.approx(analysis.readings["significant_patches"].mean())


def test_patch_counts_are_those_of_preparation(study, tmp_path):
    report = prepare(raw=study.raw, images=study.images, out=tmp_path / "each", size=0, readings="each", workers=1)
    readings = analyze(study.raw, size=min(study.truth[0].size)).readings
    assert report.counts["mean significant patches of 196"] == round(readings["significant_patches"].mean(), 2)


def test_certainty_and_labels_that_are_no_abnormality(study, tmp_path):
    raw = copy_of(study, tmp_path)
    path = next(p for p in sorted(raw.glob("main_data/P3*/anomaly*.csv")) if len(pd.read_csv(p)) == 2)
    name = path.parent.name
    table = pd.read_csv(path)
    labels = table.columns[5:]
    table["certainty"] = [2, 4]
    table.to_csv(path, index=False)
    assert analyze(raw).readings.set_index("id").loc[name, "ellipses"] == 2
    sure = analyze(raw, min_certainty=4)
    assert sure.readings.set_index("id").loc[name, "ellipses"] == 1
    assert sure.ellipses["certainty"].min() == 4
    table.loc[1, labels] = False
    table.loc[1, "Support devices"] = True
    table.to_csv(path, index=False)
    assert analyze(raw).readings.set_index("id").loc[name, "ellipses"] == 1


def test_damaged_readings_are_left_out_by_name(study, tmp_path, capsys):
    raw = copy_of(study, tmp_path)
    usable = analyze(raw).readings["id"].tolist()
    main_data = raw / "main_data"
    (main_data / usable[0] / "chest_bounding_box.csv").unlink()
    path = main_data / usable[1] / "anomaly_location_ellipses.csv"
    path.write_text(path.read_text().replace("xmax", "x_max"))
    path = main_data / usable[2] / "fixations.csv"
    table = pd.read_csv(path)
    table["x_position"] = table["x_position"].astype(object)
    table.loc[4::4, "x_position"] = "?"
    table.to_csv(path, index=False)
    out = tmp_path / "out"
    assert analyze_gaze.main(["--raw", str(raw), "--out", str(out)]) == 1
    told = capsys.readouterr()
    for part in (
        f"{usable[0]}/chest_bounding_box.csv: file is missing",
        f"{usable[1]}/anomaly_location_ellipses.csv: column 'xmax' is missing",
        f"{usable[2]}/fixations.csv: line 6, column 'x_position': '?'",
    ):
        assert part in told.out
    assert "3 readings left out" in told.err
    assert pd.read_csv(out / "readings.csv")["id"].tolist() == usable[3:]


def test_writes_tables_and_a_figure(study, tmp_path, capsys):
    arguments = ["--raw", str(study.raw), "--images", str(study.images), "--examples", "2", "--size", "128"]
    assert analyze_gaze.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert "gaze density ratio, whole image: mean 6.0" in capsys.readouterr().out
    names = {"ellipses.csv", "size_by_finding.csv", "readings.csv", "ratio_by_finding.csv", "significant_patches.csv"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | {"gaze_analysis.png"}
    picture = read_gray(tmp_path / "a" / "gaze_analysis.png")
    assert picture.shape[1] > 1500 and picture.std() > 20
    # Without images there are no examples; and everything is the same again.
    analyze_gaze.main([*arguments[:2], *arguments[6:], "--out", str(tmp_path / "b")])
    assert read_gray(tmp_path / "b" / "gaze_analysis.png").shape[0] < picture.shape[0]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_examples_show_the_image_that_was_read(study):
    analysis = analyze(study.raw, study.images, n_examples=4)
    truth = {name: image for image in study.truth for name in image.reading_ids}
    assert len({example.reading.image_id for example in analysis.examples}) == 4
    for example in analysis.examples:
        image = truth[example.reading.id]
        assert example.size == image.size and example.gray.shape == example.heatmap.shape
        np.testing.assert_array_equal(example.gray, read_radiograph(image.path, "window"))
        assert len(example.boxes) == len(image.boxes) > 0


def test_a_study_of_one_reading(tmp_path):
    study = make_study(tmp_path, 1, size=SMALL, normal_fraction=0)
    analysis = analyze(study.raw, study.images)
    row = ratio_row(analysis)
    assert row["readings"] == 1 and math.isnan(row["low"])
    assert analysis.write(tmp_path / "out")[-1].stat().st_size > 10_000


def test_normal_images_only(tmp_path):
    study = make_study(tmp_path, 3, size=SMALL, normal_fraction=1)
    analysis = analyze(study.raw, study.images)
    assert analysis.ellipses.empty and analysis.ratio_by_finding.empty
    assert "no ellipse sizes and no density ratios" in str(analysis)
    assert len(analysis.write(tmp_path / "out")) == 3


def test_egd_has_no_ellipses_and_says_so(tmp_path, capsys):
    study = make_egd(tmp_path, 4, size=SMALL)
    arguments = ["--raw", str(study.raw), "--sigma", "5", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="--images, with them, is needed"):
        analyze_gaze.main(arguments)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ellipses.csv").write_text("of another analysis")
    assert analyze_gaze.main([*arguments, "--images", str(study.images)]) == 0
    printed = capsys.readouterr().out
    assert "EGD-CXR marks no abnormalities" in printed and "4 readings of 4 images" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "readings.csv",
        "significant_patches.csv",
        "gaze_analysis.png",
    }
    study.truth[0].path.unlink()  # whose size the table has all the same
    sizes = study.images / "mimic-cxr-2.0.0-metadata.csv"
    assert analyze_gaze.main([*arguments, "--metadata", str(sizes)]) == 0
    assert "4 readings of 4 images" in capsys.readouterr().out


def test_an_unreadable_example_is_listed_and_another_one_shown(tmp_path, capsys):
    study = make_study(tmp_path, 4, size=SMALL, shared_images=0, normal_fraction=0)
    arguments = ["--raw", str(study.raw), "--images", str(study.images), "--out", str(tmp_path / "out")]
    whole = analyze(study.raw, study.images, n_examples=2)
    damaged = next(i for i in study.truth if i.reading_ids[0] == whole.examples[0].reading.id)
    damaged.path.write_bytes(damaged.path.read_bytes()[:2000])
    analysis = analyze(study.raw, study.images, n_examples=2)
    assert len(analysis.examples) == 2 and len(analysis.readings) == 4
    assert damaged.reading_ids[0] not in {example.reading.id for example in analysis.examples}
    assert [fault.id for fault in analysis.faults] == damaged.reading_ids
    assert analyze_gaze.main([*arguments, "--examples", "2"]) == 1
    assert f"{damaged.path}: " in capsys.readouterr().out and (tmp_path / "out/gaze_analysis.png").exists()


def test_raw_may_be_the_working_directory(tmp_path, monkeypatch):
    study = make_study(tmp_path, 2, size=SMALL)
    monkeypatch.chdir(study.raw / "main_data")
    assert len(analyze(Path(".")).readings) == len(analyze(study.raw).readings)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size_thresholds": (0.05, 0.01)}, "--size_thresholds"),
        ({"size": 0}, "--size 0"),
        ({"split": "validate"}, "no usable reading of split 'validate'"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    study = make_study(tmp_path, 2, size=SMALL)
    with pytest.raises(UserError, match=message):
        analyze(study.raw, **options)


def test_too_high_a_certainty_is_not_blamed_on_the_data(tmp_path):
    study = make_study(tmp_path, 1, size=(40, 48), shared_images=0, normal_fraction=0)
    for path in study.raw.glob("main_data/*/anomaly_location_ellipses.csv"):
        pd.read_csv(path).assign(certainty=2).to_csv(path, index=False)
    (note,) = (n for n in analyze(study.raw, min_certainty=3, size=24).notes if "ellipse sizes" in n)
    assert "certainty of --min_certainty 3 or more" in note
