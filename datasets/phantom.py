"""Made-up studies in the raw layouts of the real data sets: chests with lesions, and gaze on them.

For the tests, the demo and trying things out: `make_study` writes REFLACX's layout with the MIMIC-CXR
image tree beside it, `make_egd` that of EGD-CXR. Nobody ever looked at these images: every
transcription says so. Everything follows from (seed, index): the same arguments write the same bytes,
and image i is the same however many there are.

Gaze is a survey of the chest plus dwell on the abnormalities. How much dwell: as much as makes the
gaze density inside the reading's abnormal ellipses `dwell_ratio` times that outside of them, by the
same heatmap (`util.gaze.fixation_heatmap`) and ratio (`datasets.analysis.density_ratio`) that the
analysis uses, so that it must find the ratio again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from datasets.analysis import ellipse_mask
from datasets.phantom_chest import (
    CHEST_REGIONS,
    LESION_KINDS,
    Frame,
    Lesion,
    chest_box,
    draw_lesion,
    render_chest,
)
from datasets.reflacx_raw import BOOL_LABELS, CERTAINTY_LABELS, TEXT_LABELS
from util.errors import UserError
from util.gaze import fixation_heatmap

_COMMON = {
    "consolidation": "Consolidation",
    "pneumothorax": "Pneumothorax",
    "atelectasis": "Atelectasis",
    "cardiomegaly": "Enlarged cardiac silhouette",
}
LABEL_OF_KIND = {
    1: {**_COMMON, "nodule": "Nodule", "mass": "Mass", "effusion": "Pleural effusion"},
    2: {
        **_COMMON,
        **dict.fromkeys(("nodule", "mass"), "Lung nodule or mass"),
        "effusion": "Pleural abnormality",
    },
}
LABEL_OF_KIND[3] = LABEL_OF_KIND[2]

FIXATION_FILE_COLUMNS = (
    "timestamp_start_fixation",
    "timestamp_end_fixation",
    "x_position",
    "y_position",
    "pupil_area_normalized",
    "window_level",
    "window_width",
    "angular_resolution_x_pixels_per_degree",
    "angular_resolution_y_pixels_per_degree",
    "xmin_shown_from_image",
    "ymin_shown_from_image",
    "xmax_shown_from_image",
    "ymax_shown_from_image",
    "xmin_in_screen_coordinates",
    "ymin_in_screen_coordinates",
    "xmax_in_screen_coordinates",
    "ymax_in_screen_coordinates",
)
SIMULATED = "Simulated reading, no radiologist looked at this image."
# One degree of visual angle, as a share of the longer side of an image shown whole on the screen.
DEGREE = 0.036

FAULTS = (
    "missing_image",
    "truncated_image",
    "image_size",
    "missing_fixations_file",
    "missing_column",
    "non_numeric_cell",
    "no_fixations",
    "zero_duration",
    "all_outside",
    "discarded",
    "path_traversal",
    "id_traversal",
)


@dataclass
class PhantomImage:
    """What is true of one image. Boxes are (xmin, ymin, xmax, ymax), px of the image."""

    index: int
    dicom_id: str
    subject_id: str
    study_id: str
    split: str
    path: Path
    size: tuple[int, int]
    lesions: list[Lesion]
    boxes: list[tuple[float, float, float, float]]
    chest_box: tuple[float, float, float, float]
    reading_ids: list[str] = field(default_factory=list)


@dataclass
class PhantomStudy:
    """A study on disk. `raw` is the gaze data set's root, `images` the MIMIC-CXR root. `truth` has one
    element per image, `faults` names the reading that each planted fault hit."""

    root: Path
    raw: Path
    images: Path
    truth: list[PhantomImage]
    seed: int = 0
    dwell_ratio: float = 6.0
    faults: dict[str, str] = field(default_factory=dict)


def make_study(
    root: str | Path,
    n_images: int = 8,
    seed: int = 0,
    size: int | tuple[int, int] = (420, 512),
    *,
    shared_images: int | None = None,
    readers: int = 3,
    image_format: str = "jpg",
    lesion_kinds: Sequence[str] = LESION_KINDS,
    lesions_per_image: tuple[int, int] = (1, 2),
    normal_fraction: float = 0.2,
    lesion_size: float = 1.0,
    lesion_contrast: float = 1.0,
    dwell_ratio: float = 6.0,
    faults: Sequence[str] = (),
) -> PhantomStudy:
    """Write a study in the raw REFLACX layout, `root`/reflacx, and its images, `root`/mimic/files.

    `size` is (width, height) of the images in px, or one number for square ones. The first
    `shared_images` (default: a quarter) are each read by `readers` readers, in phases 1 and 2 by
    turns; one of these readings, the last of the first image, has its eye tracking discarded. Every
    other image has one reading in phase 3. So there are shared_images * readers + n_images -
    shared_images readings.

    `image_format` is "jpg", "dcm" or "mixed" (every second image a DICOM, by turns MONOCHROME2 and
    MONOCHROME1). A `normal_fraction` of the images has no lesion, the others between
    `lesions_per_image` of the `lesion_kinds`, each kind at most once; `lesion_size` and
    `lesion_contrast` multiply the usual extent and contrast.

    `dwell_ratio`: see the module's text. `faults`, of `FAULTS`, are planted into phase 3 readings, one
    each, from the last one backwards; `study.faults` says which.

    Raises `ValueError` for options out of range, among them a dwell_ratio that no gaze can have on
    lesions of that size.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    shared = n_images // 4 if shared_images is None else shared_images
    _check_options(n_images, image_format, lesion_kinds)
    if not 0 <= shared <= n_images or readers < 1:
        raise ValueError(f"shared_images {shared} of n_images {n_images}, readers {readers}: out of range")
    if unknown := [name for name in faults if name not in FAULTS]:
        raise ValueError(f"unknown faults {unknown}: known are {', '.join(FAULTS)}")
    if len(faults) > n_images - shared:
        raise ValueError(f"{len(faults)} faults need as many phase 3 readings, there are {n_images - shared}")

    root = Path(root)
    study = PhantomStudy(root, root / "reflacx", root / "mimic", [], seed, dwell_ratio)
    rows: dict[int, list[dict]] = {1: [], 2: [], 3: []}
    for index in range(n_images):
        rng = np.random.default_rng([seed, index])
        lesions = _draw_lesions(
            rng, lesion_kinds, lesions_per_image, normal_fraction, lesion_size, lesion_contrast
        )
        image = _new_image(study, index, size, lesions, _suffix(image_format, index))
        gray = render_chest(size, np.random.default_rng([seed, index, 1]), tuple(lesions))
        _write_image(image, gray, inverted=index % 4 == 3)
        study.truth.append(image)
        for reader in range(readers if index < shared else 1):
            phase = (1 + (index + reader) % 2) if index < shared else 3
            rng = np.random.default_rng([seed, index, 2, reader])
            reading_id = (
                f"P{phase}{len(rows[phase]) // 100:02d}R{_number(seed, index, reader) % 1_000_000:06d}"
            )
            image.reading_ids.append(reading_id)
            row = _write_reading(study, image, reading_id, phase, rng)
            row["eye_tracking_data_discarded"] = index == 0 and shared > 0 and reader == readers - 1
            rows[phase].append(row)

    phase_3 = rows[3]
    for row, fault in zip(reversed(phase_3), faults):
        study.faults[fault] = row["id"]
        _plant(study, row, fault)
    for phase, phase_rows in rows.items():
        _write_metadata(study.raw, phase, phase_rows)
    return study


def _check_options(n_images: int, image_format: str, lesion_kinds: Sequence[str]) -> None:
    if n_images < 1:
        raise ValueError(f"n_images {n_images} is not at least 1")
    if image_format not in ("jpg", "dcm", "mixed"):
        raise ValueError(f"image_format {image_format!r} is not jpg, dcm or mixed")
    if unknown := [kind for kind in lesion_kinds if kind not in LESION_KINDS]:
        raise ValueError(f"unknown lesion kinds {unknown}: known are {', '.join(LESION_KINDS)}")


def _suffix(image_format: str, index: int) -> str:
    is_dicom = image_format == "dcm" or (image_format == "mixed" and index % 2 == 1)
    return ".dcm" if is_dicom else ".jpg"


def _draw_lesions(
    rng: np.random.Generator,
    kinds: Sequence[str],
    count: tuple[int, int],
    normal_fraction: float,
    size: float,
    contrast: float,
) -> list[Lesion]:
    is_normal = rng.random() < normal_fraction
    n = 0 if is_normal else min(len(kinds), int(rng.integers(count[0], count[1] + 1)))
    chosen = [kinds[i] for i in rng.permutation(len(kinds))[:n]]
    return [draw_lesion(kind, rng, size, contrast) for kind in chosen]


def _number(*key: int) -> int:
    """A fixed pseudo-random number for a key."""
    return int(np.random.default_rng([*key, 7]).integers(1 << 62))


def _new_image(
    study: PhantomStudy, index: int, size: tuple[int, int], lesions: list[Lesion], suffix: str
) -> PhantomImage:
    # Every sixth image is a second study of the subject before; a subject is in one split only.
    person = index - (index % 6 == 5)
    subject_id = str(10_000_000 + 977 * person + study.seed % 977)
    study_id = str(50_000_000 + 1013 * index + study.seed % 1013)
    digits = "".join(f"{_number(study.seed, index, part):016x}" for part in range(3))
    dicom_id = "-".join(digits[i : i + 8] for i in range(0, 40, 8))
    directory = study.images / "files" / f"p{subject_id[:2]}" / f"p{subject_id}" / f"s{study_id}"
    path = directory / f"{dicom_id}{suffix}"
    frame = Frame(size)
    split = {3: "validate", 6: "test", 9: "test"}.get(person % 10, "train")
    return PhantomImage(
        index,
        dicom_id,
        subject_id,
        study_id,
        split,
        path,
        size,
        lesions,
        [frame.box(lesion.ellipse) for lesion in lesions],
        chest_box(frame),
    )


def _write_image(image: PhantomImage, gray: np.ndarray, *, inverted: bool) -> None:
    image.path.parent.mkdir(parents=True, exist_ok=True)
    if image.path.suffix == ".jpg":
        Image.fromarray(gray).save(image.path, quality=92)
    else:
        _write_dicom(image, gray, inverted)


def _write_dicom(image: PhantomImage, gray: np.ndarray, inverted: bool) -> None:
    """A 12-bit CR image whose window shows the whole range, so that it reads as `gray` again."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[image.dicom_id])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.BodyPartExamined, data.ViewPosition = "CR", "CHEST", "PA"
    data.PatientID, data.PatientName, data.StudyID = image.subject_id, "Phantom", image.study_id
    data.ImageComments = "Made-up chest, not a patient"
    data.Rows, data.Columns = gray.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    data.WindowCenter, data.WindowWidth = 2048, 4096
    stored = gray.astype(np.uint32) * 4095 // 255  # 16 bits would overflow
    data.PixelData = (4095 - stored if inverted else stored).astype("<u2").tobytes()
    data.save_as(image.path, enforce_file_format=True)


def _write_reading(
    study: PhantomStudy, image: PhantomImage, reading_id: str, phase: int, rng: np.random.Generator
) -> dict:
    """Write the files of one reading and return its row of the metadata."""
    label_of_kind = LABEL_OF_KIND[phase]
    boxes = [_reader_box(box, image.size, rng) for box in image.boxes]
    certainty = [int(rng.choice((3, 4, 5, 5))) for _ in boxes]
    labels = [label_of_kind[lesion.kind] for lesion in image.lesions]
    table = simulate_fixations(image.size, boxes, rng, dwell_ratio=study.dwell_ratio)

    directory = study.raw / "main_data" / reading_id
    directory.mkdir(parents=True, exist_ok=True)
    _write_csv(table, directory / "fixations.csv")
    known, flags = CERTAINTY_LABELS[phase], BOOL_LABELS[phase]
    ellipses = pd.DataFrame(boxes, columns=["xmin", "ymin", "xmax", "ymax"], dtype=float).round(2)
    ellipses["certainty"] = pd.Series(certainty, dtype=int)
    for label in sorted((*known, *flags)):
        ellipses[label] = [label == own for own in labels]
    _write_csv(ellipses, directory / "anomaly_location_ellipses.csv")
    chest = _reader_box(image.chest_box, image.size, rng, 0.01)
    box = pd.DataFrame([chest], columns=["xmin", "ymin", "xmax", "ymax"])
    _write_csv(box.round(2), directory / "chest_bounding_box.csv")
    _write_transcription(directory, [lesion.kind for lesion in image.lesions], table)

    row = {
        "id": reading_id,
        "split": image.split,
        "eye_tracking_data_discarded": False,
        "image": "physionet.org/files/mimic-cxr/2.0.0/"
        + image.path.relative_to(study.images).with_suffix(".dcm").as_posix(),
        "dicom_id": image.dicom_id,
        "subject_id": image.subject_id,
        "image_size_x": image.size[0],
        "image_size_y": image.size[1],
    }
    for label in sorted((*known, *flags)):
        present = [sure for sure, own in zip(certainty, labels) if own == label]
        row[label] = False if label in flags else max(present, default=0)
    return row | {label: "" for label in TEXT_LABELS[phase]}


def _reader_box(
    box: Sequence[float], size: tuple[int, int], rng: np.random.Generator, jitter: float = 0.08
) -> tuple[float, float, float, float]:
    """The box as one reader draws it: corners off by a share of its sides, within the image."""
    xmin, ymin, xmax, ymax = box
    dx, dy = (xmax - xmin) * rng.uniform(-jitter, jitter, 2), (ymax - ymin) * rng.uniform(-jitter, jitter, 2)
    x = np.clip((xmin + dx[0], xmax + dx[1]), 0, size[0] - 1)
    y = np.clip((ymin + dy[0], ymax + dy[1]), 0, size[1] - 1)
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False)


def _write_transcription(directory: Path, kinds: list[str], table: pd.DataFrame) -> None:
    found = "Findings: " + ", ".join(kinds) + "." if kinds else "No abnormality."
    text = f"{SIMULATED} {found}"
    (directory / "transcription.txt").write_text(text + "\n", encoding="utf-8")
    words = text.split()
    end = float(table["timestamp_end_fixation"].iloc[-1]) if len(table) else 1.0
    edges = np.linspace(0.2 * end, end, len(words) + 1).round(3)
    table = pd.DataFrame({"word": words, "timestamp_start_word": edges[:-1], "timestamp_end_word": edges[1:]})
    _write_csv(table, directory / "timestamps_transcription.csv")


def _write_metadata(raw: Path, phase: int, rows: list[dict]) -> None:
    (raw / "main_data").mkdir(parents=True, exist_ok=True)
    labels = (*CERTAINTY_LABELS[phase], *BOOL_LABELS[phase])
    columns = [
        "id",
        "split",
        "eye_tracking_data_discarded",
        "image",
        "dicom_id",
        "subject_id",
        "image_size_x",
        "image_size_y",
        *sorted(labels),
        *TEXT_LABELS[phase],
    ]
    _write_csv(pd.DataFrame(rows, columns=columns), raw / "main_data" / f"metadata_phase_{phase}.csv")


# --- gaze -----------------------------------------------------------------------------------------


def simulate_fixations(
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    rng: np.random.Generator,
    *,
    dwell_ratio: float = 6.0,
) -> pd.DataFrame:
    """The fixations of one reading, as REFLACX's fixations.csv has them.

    `size` is (width, height) of the image; `boxes` bound the abnormal ellipses, px. The survey visits
    the regions of the chest, two fixations miss the image, and some abnormalities are zoomed in on.
    Fixations inside the ellipses last as long in all as gives `dwell_ratio`; there are as many as that
    takes. Raises `ValueError` where no gaze can have that ratio.
    """
    survey = _survey(Frame(size), rng)
    degree = DEGREE * max(size) * rng.uniform(0.93, 1.07) * np.array([1.0, rng.uniform(1.01, 1.05)])
    dwell = np.empty((0, 4))
    if len(boxes):
        is_zoomed = rng.random(len(boxes)) < 0.3
        survey, dwell = _calibrated_dwell(survey, size, boxes, degree, is_zoomed, dwell_ratio, rng)
    order = rng.permutation(3 * max(len(boxes), 1))  # each abnormality is looked at in up to three spells
    visit = np.sort(rng.choice(np.arange(2, 40), len(order), replace=False))[order]
    spell = 3 * dwell[:, 3].astype(int) + np.arange(len(dwell)) % 3
    when = np.concatenate([np.arange(len(survey)), visit[spell] - 0.5])
    sequence = np.argsort(when, kind="stable")
    zoom = _zoom_boxes(dwell, size, boxes, is_zoomed) if len(boxes) else np.empty((0, 4))
    fixations = np.concatenate([survey[:, :3], dwell[:, :3]])
    shown = np.concatenate([np.tile([0.0, 0.0, *map(float, size)], (len(survey), 1)), zoom])
    return _fixation_table(fixations[sequence], shown[sequence], size, degree, rng)


def _centres_and_axes(boxes: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Centres and semi-axes of the ellipses in boxes: two [n, 2]."""
    corners = np.asarray(boxes, dtype=float).reshape(-1, 2, 2)
    return corners.mean(axis=1), (corners[:, 1] - corners[:, 0]) / 2


def _durations(rng: np.random.Generator, n: int) -> np.ndarray:
    """Fixation durations, s: log-normal about 0.28, within 0.1 .. 0.9."""
    return np.clip(0.28 * np.exp(0.45 * rng.standard_normal(n)), 0.1, 0.9)


def _survey(frame: Frame, rng: np.random.Generator) -> np.ndarray:
    """A scan over the chest, with two fixations off the image: [n, 3] of x, y (px), duration (s)."""
    ellipses = np.array(CHEST_REGIONS)
    path = np.concatenate([rng.permutation(len(ellipses)) for _ in range(4)])[: int(rng.integers(36, 46))]
    offset = np.clip(0.7 * rng.standard_normal((len(path), 2)), -1.3, 1.3)
    place = ellipses[path, :2] + offset * ellipses[path, 2:]
    x, y = frame.to_pixels(place[:, 0], place[:, 1])
    width, height = frame.size
    stray = rng.choice(np.arange(5, len(path)), 2, replace=False)
    x[stray] = (-0.04 * width, 1.03 * width)
    y[stray] = height * rng.uniform(0.2, 0.8, 2)
    return np.column_stack([x, y, _durations(rng, len(path))])


def _calibrated_dwell(
    survey: np.ndarray,
    size: tuple[int, int],
    boxes: Sequence[Sequence[float]],
    degree: np.ndarray,
    is_zoomed: np.ndarray,
    ratio: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """The survey less what falls on the ellipses, and the fixations on them [n, 4] (x, y, duration, which
    ellipse) that make the density ratio come out.

    The heatmap of all fixations is a mixture w * dwell + (1 - w) * survey of the two parts' own maps.
    Scaling the dwell's durations by a multiplies w / (1 - w) by a, so three maps give a exactly; n is
    chosen to keep a near 1, durations thereby as they were drawn.
    """
    # As fine as the smallest ellipse needs for its area to be right.
    centre, axes = _centres_and_axes(boxes)
    scale = float(np.clip(5 / max(axes.min(), 1e-9), 128 / min(size), 512 / min(size)))
    out_size = (max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))
    inside = ellipse_mask(boxes, size, out_size)
    if not inside.any():
        raise ValueError(f"an abnormality is too small to be seen: boxes {boxes} on an image of {size} px")
    area = inside.mean()
    target = ratio * area / (ratio * area + 1 - area)  # share of the gaze inside

    def share_inside(*parts: tuple[np.ndarray, np.ndarray]) -> float:
        fixations, shown = (np.concatenate(columns) for columns in zip(*parts))
        heatmap = fixation_heatmap(_heatmap_columns(fixations, shown, size, degree), size, out_size)
        return float(heatmap[inside].sum())

    def part(dwell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return dwell[:, :3], _zoom_boxes(dwell, size, boxes, is_zoomed)

    # The dwell is to be all there is inside. For ratios near 1 the survey has to keep a distance, too.
    for margin in range(4):
        distance = (survey[:, None, :2] - centre) / np.maximum(axes + margin * degree, 1e-9)
        survey = survey[(np.square(distance).sum(axis=2) > 1.0).all(axis=1)]
        if len(survey) < 5:
            raise ValueError(
                f"dwell_ratio {ratio} cannot be had on these abnormalities: there is nothing else to look at"
            )
        survey_part = (survey[:, :3], np.tile([0.0, 0.0, *map(float, size)], (len(survey), 1)))
        of_survey = share_inside(survey_part)
        if of_survey < target:
            break
    # Small abnormalities get more looks per area. Where the gaze then spreads too much for the ratio,
    # it goes by area and to the middles.
    for power, spread in ((0.5, 0.9), (0.75, 0.75), (1.0, 0.6), (1.0, 0.1)):
        pool = _dwell_pool(boxes, power, spread, rng)
        of_dwell = share_inside(part(pool))
        if of_dwell > target:
            break
    n = 6
    for _ in range(20):
        dwell = pool[:n].copy()
        of_dwell, of_both = share_inside(part(dwell)), share_inside(part(dwell), survey_part)
        if not of_survey < target < of_dwell:
            if n < len(pool) and of_survey < target:
                n = min(2 * n, len(pool))
                continue
            bounds = [share / area / ((1 - share) / (1 - area)) for share in (of_survey, of_dwell)]
            raise ValueError(
                f"dwell_ratio {ratio} cannot be had on these abnormalities: looking only elsewhere "
                f"gives {bounds[0]:.2f}, only at them {bounds[1]:.2f}"
            )
        weight = (of_both - of_survey) / (of_dwell - of_survey)
        factor = (target - of_survey) / (of_dwell - target) * (1 - weight) / weight
        better = int(np.clip(round(n * factor), 1, len(pool)))
        if better == n or 0.85 < factor < 1.18:
            break
        n = better
    dwell[:, 2] *= factor
    if dwell[:, 2].mean() > 2:
        raise ValueError(
            f"dwell_ratio {ratio} cannot be had on these abnormalities: it takes {len(dwell)} fixations of "
            f"{dwell[:, 2].mean():.1f} s"
        )
    return survey, dwell


def _dwell_pool(
    boxes: Sequence[Sequence[float]], power: float, spread: float, rng: np.random.Generator, n: int = 400
) -> np.ndarray:
    """More fixations on the ellipses than a reading has [n, 4], in an order whose first few are spread
    as all of them are: each ellipse's share is its area to the `power`."""
    centre, axes = _centres_and_axes(boxes)
    weight = axes.prod(axis=1) ** power
    weight = weight / weight.sum()
    # The k-th fixation of an ellipse comes at (k - 1/2) / share: the order is even, not by chance.
    count = np.ceil(n * weight).astype(int)
    turn = np.concatenate([(np.arange(c) + 0.5) / w for c, w in zip(count, weight)])
    which = np.repeat(np.arange(len(boxes)), count)[np.argsort(turn, kind="stable")][:n]
    radius, angle = np.sqrt(rng.random(n)) * spread, rng.uniform(0, 2 * np.pi, n)
    place = centre[which] + axes[which] * (radius * np.array([np.cos(angle), np.sin(angle)])).T
    return np.column_stack([place, _durations(rng, n), which])


def _zoom_boxes(
    dwell: np.ndarray, size: tuple[int, int], boxes: Sequence[Sequence[float]], is_zoomed: np.ndarray
) -> np.ndarray:
    """The part of the image in view at each dwell fixation [n, 4]: all of it, or 0.6 of each side around
    an abnormality that was zoomed in on."""
    centre, axes = _centres_and_axes(boxes)
    whole = np.array(size, dtype=float)
    half = np.maximum(0.3 * whole, np.minimum(1.2 * axes, 0.5 * whole))
    low = np.round(np.clip(centre - half, 0, whole - 2 * half))
    view = np.where(is_zoomed[:, None], np.hstack([low, np.round(low + 2 * half)]), [0.0, 0.0, *whole])
    return view[dwell[:, 3].astype(int)]


def _degree_in_view(shown: np.ndarray, size: tuple[int, int], degree: np.ndarray) -> np.ndarray:
    """Image px per degree of visual angle [n, 2]: less where the image is enlarged."""
    return degree * ((shown[:, 2:] - shown[:, :2]) / np.array(size)).max(axis=1, keepdims=True)


def _heatmap_columns(
    fixations: np.ndarray, shown: np.ndarray, size: tuple[int, int], degree: np.ndarray
) -> dict[str, np.ndarray]:
    """What `fixation_heatmap` takes."""
    sigma = _degree_in_view(shown, size, degree)
    return {
        "x": fixations[:, 0],
        "y": fixations[:, 1],
        "duration": fixations[:, 2],
        "sigma_x": sigma[:, 0],
        "sigma_y": sigma[:, 1],
        "xmin": shown[:, 0],
        "ymin": shown[:, 1],
        "xmax": shown[:, 2],
        "ymax": shown[:, 3],
    }


def _fixation_table(
    fixations: np.ndarray,
    shown: np.ndarray,
    size: tuple[int, int],
    degree: np.ndarray,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """What fixations.csv holds of these fixations (x, y, duration) in their order."""
    n = len(fixations)
    saccade = rng.uniform(0.02, 0.06, n)
    end = 0.3 + np.cumsum(fixations[:, 2] + saccade)
    resolution = _degree_in_view(shown, size, degree)
    # The view fits a 3840 x 2160 screen by height or width, centred.
    extent = shown[:, 2:] - shown[:, :2]
    on_screen = extent * (np.array([3840.0, 2160.0]) / extent).min(axis=1, keepdims=True)
    corner = (np.array([3840.0, 2160.0]) - on_screen) / 2
    values = [
        (end - fixations[:, 2]).round(4),
        end.round(4),
        fixations[:, 0].round(2),
        fixations[:, 1].round(2),
        (1 + 0.08 * rng.standard_normal(n)).round(4),
        np.full(n, 2048),
        np.full(n, 4096),
        *resolution.round(4).T,
        *shown.round(2).T,
        *corner.round(1).T,
        *(corner + on_screen).round(1).T,
    ]
    return pd.DataFrame(dict(zip(FIXATION_FILE_COLUMNS, values)))


# --- faults, the other data set, the real film ------------------------------------------------------


def _plant(study: PhantomStudy, row: dict, fault: str) -> None:
    """Damage one reading. `row` is its row of the metadata, not yet written."""
    image = next(image for image in study.truth if row["id"] in image.reading_ids)
    path = study.raw / "main_data" / row["id"] / "fixations.csv"
    table = pd.read_csv(path)
    if fault == "missing_image":
        image.path.unlink()
    elif fault == "truncated_image":
        content = image.path.read_bytes()
        image.path.write_bytes(content[: len(content) // 2])
    elif fault == "image_size":
        row["image_size_x"] += 40
    elif fault == "missing_fixations_file":
        path.unlink()
    elif fault == "missing_column":
        _write_csv(table.drop(columns="x_position"), path)
    elif fault == "non_numeric_cell":
        table["x_position"] = table["x_position"].astype(object)
        table.loc[2, "x_position"] = "left of the heart"
        _write_csv(table, path)
    elif fault == "no_fixations":
        _write_csv(table.iloc[:0], path)
    elif fault == "zero_duration":
        table["timestamp_end_fixation"] = table["timestamp_start_fixation"]
        _write_csv(table, path)
    elif fault == "all_outside":
        table["x_position"] += 50.0 * image.size[0]
        _write_csv(table, path)
    elif fault == "discarded":
        row["eye_tracking_data_discarded"] = True
    elif fault == "path_traversal":
        row["image"] = "physionet.org/files/../../../../../../etc/passwd.dcm"
    elif fault == "id_traversal":
        row["dicom_id"] = "../../../etc/" + row["dicom_id"]


def make_egd(
    root: str | Path,
    n_images: int = 6,
    seed: int = 0,
    size: int | tuple[int, int] = (420, 512),
    *,
    with_duration: bool = True,
    image_format: str = "jpg",
    lesion_kinds: Sequence[str] = LESION_KINDS,
    lesions_per_image: tuple[int, int] = (1, 2),
    normal_fraction: float = 0.2,
    lesion_size: float = 1.0,
    lesion_contrast: float = 1.0,
    dwell_ratio: float = 6.0,
    screen: tuple[int, int] = (1920, 1080),
) -> PhantomStudy:
    """Write a study in the raw EGD-CXR layout, `root`/egd-cxr, and its images, `root`/mimic/files.

    One reading per image. fixations.csv has the column FPOGD only `with_duration`; its rows include
    fixations off the picture (negative X_ORIGINAL, Y_ORIGINAL) and, before every third reading, a
    calibration screen whose DICOM_ID is in no master sheet. The pictures stand in the middle of the
    `screen` (width, height px), at its full height or width, with padding beside them.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    _check_options(n_images, image_format, lesion_kinds)
    root = Path(root)
    study = PhantomStudy(root, root / "egd-cxr", root / "mimic", [], seed, dwell_ratio)
    study.raw.mkdir(parents=True, exist_ok=True)
    master, gaze = [], []
    for index in range(n_images):
        rng = np.random.default_rng([seed, index, 9])
        lesions = _draw_lesions(
            rng, lesion_kinds, lesions_per_image, normal_fraction, lesion_size, lesion_contrast
        )
        image = _new_image(study, index, size, lesions, _suffix(image_format, index))
        gray = render_chest(size, np.random.default_rng([seed, index, 10]), tuple(lesions))
        _write_image(image, gray, inverted=index % 4 == 3)
        study.truth.append(image)
        shrink = min(screen[0] / size[0], screen[1] / size[1])
        left = round((screen[0] - size[0] * shrink) / 2)
        top = round((screen[1] - size[1] * shrink) / 2)
        kinds = {lesion.kind for lesion in lesions}
        master.append({
            "dicom_id": image.dicom_id,
            "path": image.path.relative_to(study.images).with_suffix(".dcm").as_posix(),
            "study_id": image.study_id, "patient_id": image.subject_id, "image_top": top, "image_bottom": top,
            "image_left": left, "image_right": left, "Normal": int(not kinds),
            "CHF": int("cardiomegaly" in kinds), "pneumonia": int("consolidation" in kinds),
        })  # fmt: skip
        table = simulate_fixations(size, image.boxes, rng, dwell_ratio=dwell_ratio)
        if index % 3 == 0:
            gaze.append(_egd_rows(table.iloc[:5], f"calibration-{index}", index, size, screen, (left, top)))
        gaze.append(_egd_rows(table, image.dicom_id, index, size, screen, (left, top)))
        image.reading_ids.append(image.dicom_id)
    columns = None if with_duration else [name for name in gaze[0].columns if name != "FPOGD"]
    _write_csv(pd.DataFrame(master), study.raw / "master_sheet.csv")
    _write_csv(
        pd.concat(gaze, ignore_index=True)[columns or list(gaze[0].columns)], study.raw / "fixations.csv"
    )
    return study


def _egd_rows(
    table: pd.DataFrame,
    dicom_id: str,
    session: int,
    size: tuple[int, int],
    screen: tuple[int, int],
    corner: tuple[int, int],
) -> pd.DataFrame:
    """Fixations as EGD-CXR's fixations.csv has them; `corner` = (left, top) of the picture on the screen."""
    x, y = table["x_position"].to_numpy(), table["y_position"].to_numpy()
    fraction = [
        (lead + at * (pixels - 2 * lead) / length) / pixels
        for at, length, pixels, lead in zip((x, y), size, screen, corner)
    ]
    off = (x < 0) | (x > size[0] - 1) | (y < 0) | (y > size[1] - 1)
    return pd.DataFrame({
        "DICOM_ID": dicom_id, "SESSION_ID": f"session-{session // 4}", "CNT": np.arange(len(table)),
        "Time (in secs)": table["timestamp_end_fixation"].to_numpy(),
        "FPOGX": fraction[0].round(5), "FPOGY": fraction[1].round(5),
        "FPOGD": (table["timestamp_end_fixation"] - table["timestamp_start_fixation"]).to_numpy().round(5),
        "X_ORIGINAL": np.where(off, -1, x.round()).astype(int),
        "Y_ORIGINAL": np.where(off, -1, y.round()).astype(int),
    })  # fmt: skip


# Round opacities that anyone sees in RG1_UNCR.dcm, as shares of its width and height: centre x, y and
# semi-axes. Placed by eye by this program's authors, no radiologist.
_REAL_SPOTS = ((0.800, 0.440, 0.049, 0.050), (0.790, 0.600, 0.061, 0.049), (0.262, 0.592, 0.066, 0.054))


def add_real_radiograph(study: PhantomStudy) -> PhantomImage:
    """Add one real chest film to a REFLACX-layout study, with a simulated reading that says so.

    The film is RG1_UNCR.dcm (CR, PA, MONOCHROME1) of the PyPI package pydicom-data, copied from where
    pip installed it; nothing is downloaded. The reading dwells on three round opacities of the film.
    Raises `UserError` if the package is not installed.
    """
    from pydicom.data import get_testdata_file

    source = get_testdata_file("RG1_UNCR.dcm", download=False)
    if source is None:
        raise UserError(
            "RG1_UNCR.dcm is not here: install the package that ships it, `pip install pydicom-data`"
        )
    size = (1841, 1955)
    image = _new_image(study, len(study.truth), size, [], ".dcm")
    image.dicom_id, image.subject_id, image.study_id = "RG1_UNCR-pydicom-data", "10999999", "59999999"
    image.split = "train"
    image.path = study.images / "files" / "p10" / "p10999999" / "s59999999" / f"{image.dicom_id}.dcm"
    image.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, image.path)
    frame = Frame(size)
    for cx, cy, rx, ry in _REAL_SPOTS:
        x, y = (cx - 0.5) * size[0] / frame.unit, (cy - 0.5) * size[1] / frame.unit
        image.lesions.append(Lesion("mass", (x, y, rx * size[0] / frame.unit, ry * size[1] / frame.unit)))
    image.boxes = [frame.box(lesion.ellipse) for lesion in image.lesions]
    reading_id = "P399R999999"
    image.reading_ids.append(reading_id)
    row = _write_reading(study, image, reading_id, 3, np.random.default_rng([study.seed, 1_000_003]))
    row["Other"] = "real radiograph (RG1_UNCR.dcm of pydicom-data) with a simulated reading"
    text = f"{SIMULATED} The film is real (RG1_UNCR.dcm of pydicom-data); gaze and ellipses are made up."
    (study.raw / "main_data" / reading_id / "transcription.txt").write_text(text + "\n", encoding="utf-8")
    path = study.raw / "main_data" / "metadata_phase_3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table[table["id"] != reading_id]
    _write_csv(pd.concat([table, pd.DataFrame([row], columns=table.columns)], ignore_index=True), path)
    study.truth.append(image)
    return image
