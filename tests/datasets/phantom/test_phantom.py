"""The made-up studies: layout, anatomy, gaze that has the planted ratio, faults."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom_egd import make_egd

from datasets.analysis.measure import density_ratio, ellipse_mask
from datasets.fixations import fixation_heatmap
from datasets.phantom.chest import LESION_KINDS, Frame, Lesion, draw_lesion, render_chest
from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.real import add_real_radiograph
from datasets.phantom.reflacx import LABEL_OF_KIND, make_study
from datasets.raw.egd import read_egd
from datasets.raw.reflacx import read_reflacx
from util.errors import UserError
from util.images import read_gray
from util.radiograph import read_radiograph

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))
import make_phantom

SMALL = (128, 105)
# DATA.md
FIXATIONS = {
    "timestamp_start_fixation",
    "timestamp_end_fixation",
    "x_position",
    "y_position",
    "pupil_area_normalized",
    "angular_resolution_x_pixels_per_degree",
    "angular_resolution_y_pixels_per_degree",
    "window_width",
    "window_level",
    "xmin_shown_from_image",
    "ymin_shown_from_image",
    "xmax_shown_from_image",
    "ymax_shown_from_image",
    "xmin_in_screen_coordinates",
    "ymin_in_screen_coordinates",
    "xmax_in_screen_coordinates",
    "ymax_in_screen_coordinates",
}
METADATA = {
    "id",
    "split",
    "eye_tracking_data_discarded",
    "image",
    "dicom_id",
    "subject_id",
    "image_size_x",
    "image_size_y",
    "Support devices",
}
PHASE_1 = {
    "Airway wall thickening",
    "Atelectasis",
    "Consolidation",
    "Emphysema",
    "Enlarged cardiac silhouette",
    "Fibrosis",
    "Fracture",
    "Groundglass opacity",
    "Mass",
    "Nodule",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary edema",
    "Wide mediastinum",
    "Quality issue",
}
PHASE_23 = {
    "Abnormal mediastinal contour",
    "Acute fracture",
    "Atelectasis",
    "Consolidation",
    "Enlarged cardiac silhouette",
    "Enlarged hilum",
    "Groundglass opacity",
    "Hiatal hernia",
    "High lung volume / emphysema",
    "Interstitial lung disease",
    "Lung nodule or mass",
    "Pleural abnormality",
    "Pneumothorax",
    "Pulmonary edema",
    "Other",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_study(tmp_path_factory.mktemp("made"), 16, seed=3, size=SMALL, image_format="mixed", readers=4)


def metadata(study) -> pd.DataFrame:
    tables = [pd.read_csv(study.raw / "main_data" / f"metadata_phase_{p}.csv", dtype=str) for p in (1, 2, 3)]
    return pd.concat([table.assign(phase=p + 1) for p, table in enumerate(tables)], ignore_index=True)


def tree_bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_has_the_layout_of_reflacx(made):
    for phase, labels in ((1, PHASE_1), (2, PHASE_23), (3, PHASE_23)):
        table = pd.read_csv(made.raw / "main_data" / f"metadata_phase_{phase}.csv")
        assert set(table.columns) == METADATA | labels
        assert table["id"].str.fullmatch(rf"P{phase}\d\dR\d{{6}}").all()
    table = metadata(made)
    assert len(table) == 4 * 4 + 12 == table["id"].nunique()
    assert (table["phase"] == 3).sum() == 12
    # Phases 1 and 2 share their images, each read by all four readers.
    shared = table[table["phase"] < 3].groupby("dicom_id")
    assert (shared.size() == 4).all() and (shared["phase"].nunique() == 2).all() and len(shared) == 4
    assert (table["eye_tracking_data_discarded"] == "True").sum() == 1
    assert (table.groupby("subject_id")["split"].nunique() == 1).all()
    assert (table.drop_duplicates("dicom_id").groupby("subject_id").size() > 1).any()
    assert set(table["split"]) == {"train", "validate", "test"}
    for row in table.itertuples():
        directory = made.raw / "main_data" / row.id
        names = {path.name for path in directory.iterdir()}
        assert names == {
            "fixations.csv",
            "anomaly_location_ellipses.csv",
            "chest_bounding_box.csv",
            "timestamps_transcription.csv",
            "transcription.txt",
        }
        assert set(pd.read_csv(directory / "fixations.csv").columns) == FIXATIONS
        flags = {"Support devices"} | (PHASE_1 if row.phase == 1 else PHASE_23 - {"Other"})
        ellipses = pd.read_csv(directory / "anomaly_location_ellipses.csv")
        assert set(ellipses.columns) == {"xmin", "ymin", "xmax", "ymax", "certainty"} | flags
        assert (ellipses[sorted(flags)].sum(axis=1) == 1).all()
        text = (directory / "transcription.txt").read_text()
        assert text.startswith("Simulated reading, no radiologist looked at this image.")
        assert " ".join(pd.read_csv(directory / "timestamps_transcription.csv")["word"]) == text.strip()
        prefix = "physionet.org/files/mimic-cxr/2.0.0/"
        assert row.image.startswith(prefix)
        image = made.images / row.image.removeprefix(prefix)
        assert image.with_suffix(".jpg").is_file() != image.is_file()


def test_truth_is_what_the_files_say(made):
    readings = {reading.id: reading for reading in read_reflacx(made.raw).readings}
    seen = set()
    for image in made.truth:
        for name in image.reading_ids:
            if name not in readings:
                continue  # the discarded one
            reading = readings[name]
            seen.add(name)
            assert (reading.image_id, reading.study_id, reading.subject_id, reading.split, reading.image_size) == (
                image.dicom_id,
                image.study_id,
                image.subject_id,
                image.split,
                image.size,
            )
            ellipses = reading.load_ellipses()
            assert len(ellipses) == len(image.boxes) == len(image.lesions)
            for box, row in zip(image.boxes, ellipses.itertuples()):
                off = np.abs(np.array([row.xmin, row.ymin, row.xmax, row.ymax]) - box)
                side = np.array([box[2] - box[0], box[3] - box[1]] * 2)
                assert (off <= 0.08 * side + 0.01).all()
            present = {label for label, value in reading.labels.items() if value not in (0, False, "")}
            assert len(present) == len({LABEL_OF_KIND[reading.phase][x.kind] for x in image.lesions})
    assert len(seen) == len(readings) == 27


def test_same_arguments_same_bytes_and_images_do_not_depend_on_their_number(tmp_path):
    options = {"size": SMALL, "seed": 5, "shared_images": 1, "image_format": "mixed"}
    first = make_study(tmp_path / "a", 4, **options)
    again = make_study(tmp_path / "b", 4, **options)
    assert tree_bytes(first.root) == tree_bytes(again.root)
    more = make_study(tmp_path / "c", 6, **options)
    few, many = tree_bytes(first.root), tree_bytes(more.root)
    assert {name for name, data in few.items() if many.get(name) != data} == {"reflacx/main_data/metadata_phase_3.csv"}
    other = make_study(tmp_path / "d", 4, **{**options, "seed": 6})
    assert not {image.dicom_id for image in other.truth} & {image.dicom_id for image in first.truth}


def regions(size):
    """Mean gray of named spots, from chest coordinates."""
    frame = Frame(size)

    def spot(gray, x, y, radius=0.02):
        px, py = frame.to_pixels([x - radius, x + radius], [y - radius, y + radius])
        return gray[round(py[0]) : round(py[1]) + 1, round(px[0]) : round(px[1]) + 1].mean()

    return spot


@pytest.mark.parametrize("size", [(210, 256), (256, 210), (224, 224)])
def test_anatomy_is_the_right_way_round(size):
    spot = regions(size)
    for seed in range(4):
        gray = render_chest(size, np.random.default_rng(seed))
        assert gray.dtype == np.uint8 and gray.shape == tuple(size)
        lung = np.mean([spot(gray, side * 0.23, y) for side in (-1, 1) for y in (-0.15, -0.05)])
        assert spot(gray, 0, 0.40) > lung + 50  # abdomen
        assert spot(gray, 0, 0.0) > lung + 50  # mediastinum
        assert spot(gray, -0.43, -0.47, 0.015) < 15 < lung  # air outside
        # The apex of the heart is on the image's right, the right lung on its left is free there.
        assert spot(gray, 0.14, 0.14) > spot(gray, -0.14, 0.14) + 25
        # The right dome stands higher.
        assert spot(gray, -0.18, 0.222, 0.012) > spot(gray, 0.27, 0.222, 0.012) + 20


@pytest.mark.parametrize("kind", LESION_KINDS)
def test_lesions_are_seen_where_they_are_said_to_be(kind):
    size = (384, 315)
    frame = Frame(size)
    for seed in range(3):
        lesion = draw_lesion(kind, np.random.default_rng(seed))
        normal = render_chest(size, np.random.default_rng(9)).astype(float)
        changes = []
        for contrast in (0.5, 1.0):
            drawn = Lesion(kind, lesion.ellipse, contrast)
            changes.append(np.abs(render_chest(size, np.random.default_rng(9), (drawn,)) - normal))
        xmin, ymin, xmax, ymax = frame.box(lesion.ellipse)
        y, x = np.mgrid[: size[0], : size[1]]
        inside = ((x - (xmin + xmax) / 2) / (xmax - xmin) * 2) ** 2 + (
            (y - (ymin + ymax) / 2) / (ymax - ymin) * 2
        ) ** 2 <= 1
        # Cardiomegaly shows at the heart's border, an effusion in a corner: a tenth of the ellipse at least.
        assert np.quantile(changes[1][inside], 0.9) > 12
        assert changes[1][inside].mean() > 8 * changes[1][~inside].mean()
        if kind != "cardiomegaly":  # its contrast is its size
            assert changes[0][inside].mean() < 0.75 * changes[1][inside].mean()


def test_size_and_contrast_of_lesions_are_parameters(tmp_path):
    options = {"n_images": 4, "size": SMALL, "shared_images": 0, "lesion_kinds": ["nodule"], "normal_fraction": 0}
    small = make_study(tmp_path / "small", **options, lesion_size=0.8)
    large = make_study(tmp_path / "large", **options, lesion_size=1.6, lesion_contrast=0.3)
    for a, b in zip(small.truth, large.truth):
        assert [lesion.kind for lesion in a.lesions] == ["nodule"]
        assert b.lesions[0].ellipse[2] == pytest.approx(2 * a.lesions[0].ellipse[2], rel=1e-3)
        assert (a.lesions[0].contrast, b.lesions[0].contrast) == (1.0, 0.3)


def test_dicom_reads_as_the_drawn_picture(tmp_path):
    as_jpg = make_study(tmp_path / "jpg", 4, size=SMALL)
    as_dicom = make_study(tmp_path / "dcm", 4, size=SMALL, image_format="dcm")
    photometric = set()
    for image, other in zip(as_dicom.truth, as_jpg.truth):
        photometric.add(pydicom.dcmread(image.path).PhotometricInterpretation)
        difference = read_radiograph(image.path, "window").astype(int) - read_gray(other.path)
        assert np.abs(difference).mean() < 3  # JPG's own loss on the film's noise
        assert np.abs(difference).max() < 40
    assert photometric == {"MONOCHROME1", "MONOCHROME2"}


def test_fixations_are_plausible():
    zoomed, off = 0, 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        kinds = rng.permutation(LESION_KINDS)[:2]
        frame = Frame((512, 420))
        table = simulate_fixations(frame.size, [frame.box(draw_lesion(k, rng).ellipse) for k in kinds], rng)
        start, end = table["timestamp_start_fixation"], table["timestamp_end_fixation"]
        assert (start.iloc[1:].to_numpy() > end.iloc[:-1].to_numpy()).all() and start.iloc[0] > 0
        duration = end - start
        assert 0.05 < duration.min() and duration.max() < 1.2 and 0.15 < duration.mean() < 0.5
        assert 25 < len(table) < 200
        x, y = table["x_position"], table["y_position"]
        outside = (x < 0) | (x > 419) | (y < 0) | (y > 511)
        off += outside.sum()
        resolution = table.filter(like="angular_resolution")
        assert (resolution.iloc[:, 0] != resolution.iloc[:, 1]).all()
        assert resolution.iloc[:, 0].between(5, 25).all()
        shown = table[[f"{side}_shown_from_image" for side in ("xmin", "ymin", "xmax", "ymax")]].to_numpy()
        is_zoomed = (shown != [0, 0, 420, 512]).any(axis=1)
        zoomed += is_zoomed.sum()
        assert (shown[:, :2] >= 0).all() and (shown[:, 2:] <= [420, 512]).all()
        for row in np.flatnonzero(is_zoomed):
            assert shown[row, 0] <= x[row] <= shown[row, 2] and shown[row, 1] <= y[row] <= shown[row, 3]
            assert resolution.iloc[row, 0] < resolution.iloc[:, 0].max()
    assert zoomed > 20 and 20 < off <= 40


@given(
    seed=st.integers(0, 10_000),
    ratio=st.floats(1.0, 8.0),
    size=st.floats(0.5, 1.4),
    n=st.integers(1, 3),
    shape=st.sampled_from([(512, 420), (420, 512), (128, 128), (2000, 1900)]),
)
@settings(max_examples=25, deadline=None)
def test_gaze_has_the_ratio_asked_for(seed, ratio, size, n, shape):
    rng = np.random.default_rng(seed)
    frame = Frame(shape)
    boxes = [frame.box(draw_lesion(kind, rng, size).ellipse) for kind in rng.permutation(LESION_KINDS)[:n]]
    table = simulate_fixations(shape, boxes, rng, dwell_ratio=ratio)
    fixations = {
        "x": table["x_position"],
        "y": table["y_position"],
        "duration": table["timestamp_end_fixation"] - table["timestamp_start_fixation"],
        **{f"sigma_{a}": table[f"angular_resolution_{a}_pixels_per_degree"] for a in "xy"},
        **{side: table[f"{side}_shown_from_image"] for side in ("xmin", "ymin", "xmax", "ymax")},
    }
    out_size = (round(400 * shape[0] / shape[1]), 400)
    inside = ellipse_mask(boxes, shape, out_size)
    heatmap = fixation_heatmap(fixations, shape, out_size)
    assert density_ratio(heatmap, inside, ~inside) == pytest.approx(ratio, rel=0.04)


def test_a_ratio_that_cannot_be_is_refused():
    frame = Frame((512, 420))
    with pytest.raises(ValueError, match="nothing else to look at"):
        simulate_fixations(frame.size, [(0, 0, 419, 511)], np.random.default_rng(0))
    box = frame.box((0.052, 0.145, 0.19, 0.15))
    for ratio, message in ((1e5, "only at them"), (150.0, "400 fixations of"), (0.001, "only elsewhere")):
        with pytest.raises(ValueError, match=f"dwell_ratio {ratio} cannot be had.*{message}"):
            simulate_fixations(frame.size, [box], np.random.default_rng(0), dwell_ratio=ratio)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"n_images": 0}, "n_images 0"),
        ({"image_format": "tif"}, "image_format 'tif'"),
        ({"shared_images": 3}, "shared_images 3"),
        ({"lesion_kinds": ["cold"]}, "unknown lesion kinds"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_study(tmp_path, **{"n_images": 2, "size": SMALL, **options})
    assert not list(tmp_path.iterdir())


def test_egd_layout(tmp_path):
    study = make_egd(tmp_path / "with", 4, size=(100, 130))
    master = pd.read_csv(study.raw / "master_sheet.csv")
    table = pd.read_csv(study.raw / "fixations.csv")
    assert {
        "dicom_id",
        "path",
        "study_id",
        "patient_id",
        "image_top",
        "image_bottom",
        "image_left",
        "image_right",
        "Normal",
        "CHF",
        "pneumonia",
    } <= set(master.columns)
    strange = ~table["DICOM_ID"].isin(master["dicom_id"])
    assert strange.sum() == 10 and (table["X_ORIGINAL"] < 0).sum() == 2 * 4
    # Screen pixels map to image pixels by (image size) / (screen size - padding).
    shown = table[~strange & (table["X_ORIGINAL"] >= 0)]
    row = master.iloc[0]
    screen = 1920 - row["image_left"] - row["image_right"]
    x = (shown["FPOGX"] * 1920 - row["image_left"]) * 130 / screen
    assert np.abs(x - shown["X_ORIGINAL"]).max() < 0.6
    readings = read_egd(study.raw, sigma=20).readings
    assert [reading.image_id for reading in readings] == sorted(image.dicom_id for image in study.truth)
    # Without FPOGD durations come from the times, which includes the saccade before each fixation.
    without = read_egd(make_egd(tmp_path / "without", 4, size=(100, 130), with_duration=False).raw, sigma=20)
    assert "FPOGD" not in pd.read_csv(tmp_path / "without" / "egd-cxr" / "fixations.csv").columns
    for reading, other in zip(readings, without.readings):
        a, b = reading.load_fixations().table, other.load_fixations().table
        assert len(a) == len(b) > 20
        saccade = (b["duration"] - a["duration"]).iloc[1:]
        assert saccade.min() > 0.01 and saccade.median() < 0.07


def test_real_radiograph(tmp_path):
    study = make_study(tmp_path, 2, size=SMALL, shared_images=0)
    before = {image.path: image.path.read_bytes() for image in study.truth}
    image = add_real_radiograph(study)
    first = tree_bytes(study.root)
    assert image is study.truth[-1]
    assert image.path.parent.is_relative_to(study.images / "files")
    assert image.path.read_bytes() == Path(pydicom.data.get_testdata_file("RG1_UNCR.dcm")).read_bytes()
    assert all(path.read_bytes() == data for path, data in before.items())
    (reading,) = (r for r in read_reflacx(study.raw).readings if r.image_id == image.dicom_id)
    assert reading.image_size == (1955, 1841) and "simulated" in reading.labels["Other"]
    text = (study.raw / "main_data" / reading.id / "transcription.txt").read_text()
    assert "Simulated reading" in text and "The film is real" in text
    # The spots it dwells on are opacities: brighter than the lung beside them, where the gaze is not.
    gray = read_radiograph(image.path, "window")
    assert gray.shape == (1955, 1841)
    inside = [gray[int(b[1]) : int(b[3]), int(b[0]) : int(b[2])].mean() for b in image.boxes]
    assert min(inside) > gray[430:600, 400:560].mean() + 10
    # Once more changes nothing, also from a study made again in the same place.
    add_real_radiograph(make_study(tmp_path, 2, size=SMALL, shared_images=0))
    assert tree_bytes(study.root) == first


def test_real_radiograph_without_its_package(tmp_path, monkeypatch):
    study = make_study(tmp_path, 1, size=SMALL)
    before = tree_bytes(study.root)
    monkeypatch.setattr(pydicom.data, "get_testdata_file", lambda name, download: None)
    with pytest.raises(UserError, match="pip install pydicom-data"):
        add_real_radiograph(study)
    assert tree_bytes(study.root) == before


def test_command_line(tmp_path, capsys):
    options = ["--n_images", "3", "--width", "105", "--height", "128"]
    assert make_phantom.main(["--out", str(tmp_path / "a"), *options, "--format", "dcm"]) == 0
    printed = capsys.readouterr().out
    assert "3 images in" in printed and "3 simulated readings" in printed
    with pytest.raises(UserError, match="cannot make this study"):
        make_phantom.main(["--out", str(tmp_path / "c"), "--n_images", "1", "--dwell_ratio", "1e6"])


@pytest.mark.parametrize(
    "options",
    [
        ["--layout", "rsna", "--shared_images", "2"],
        ["--layout", "nih", "--real_radiograph"],
        ["--layout", "rsna", "--dwell_ratio", "3"],
        ["--layout", "nih", "--format", "dcm"],
        ["--layout", "nih", "--readers", "2"],
        ["--layout", "rsna", "--format", "mixed"],
    ],
)
def test_options_that_a_layout_lacks_are_refused(tmp_path, options):
    with pytest.raises(UserError, match=r"--(shared_images|real_radiograph|dwell_ratio|format|readers)|mixed"):
        make_phantom.main(["--out", str(tmp_path / "a"), "--n_images", "2", *options])
