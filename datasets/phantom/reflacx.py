"""Made-up studies in REFLACX's raw layout, with the MIMIC-CXR image tree beside it.

For the tests, the demo and trying things out. Nobody ever looked at these images: every transcription says
so. Everything follows from (seed, index): the same arguments write the same bytes, and image i is the same
however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.chest import LESION_KINDS, render_chest
from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import (
    PhantomImage,
    PhantomStudy,
    check_options,
    draw_lesions,
    fixed_number,
    image_suffix,
    mark_simulated,
    new_image,
    write_csv,
    write_image,
)
from datasets.raw.reflacx import BOOL_LABELS, CERTAINTY_LABELS, TEXT_LABELS

_COMMON = {
    "consolidation": "Consolidation",
    "pneumothorax": "Pneumothorax",
    "atelectasis": "Atelectasis",
    "cardiomegaly": "Enlarged cardiac silhouette",
}


LABEL_OF_KIND = {
    1: {**_COMMON, "nodule": "Nodule", "mass": "Mass", "effusion": "Pleural effusion"},
    2: {**_COMMON, **dict.fromkeys(("nodule", "mass"), "Lung nodule or mass"), "effusion": "Pleural abnormality"},
}


LABEL_OF_KIND[3] = LABEL_OF_KIND[2]


SIMULATED = "Simulated reading, no radiologist looked at this image."


def make_study(
    root: str | Path,
    n_images: int = 8,
    seed: int = 0,
    size: int | tuple[int, int] = (512, 420),
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
) -> PhantomStudy:
    """Write a study in the raw REFLACX layout, `root`/reflacx, and its images, `root`/mimic/files.

    `size` is (height, width) of the images in px, or one number for square ones. The first
    `shared_images` (default: a quarter) are each read by `readers` readers, in phases 1 and 2 by
    turns; one of these readings, the last of the first image, has its eye tracking discarded. Every
    other image has one reading in phase 3. So there are shared_images * readers + n_images -
    shared_images readings.

    `image_format` is "jpg", "dcm" or "mixed" (every second image a DICOM, by turns MONOCHROME2 and
    MONOCHROME1). A `normal_fraction` of the images has no lesion, the others between
    `lesions_per_image` of the `lesion_kinds`, each kind at most once; `lesion_size` and
    `lesion_contrast` multiply the usual extent and contrast.

    `dwell_ratio`: see the module's text.

    Raises `ValueError` for options out of range, among them a dwell_ratio that no gaze can have on
    lesions of that size.
    """
    size = (size, size) if isinstance(size, int) else tuple(size)
    shared = n_images // 4 if shared_images is None else shared_images
    check_options(n_images, image_format, lesion_kinds)
    if not 0 <= shared <= n_images or readers < 1:
        raise ValueError(f"shared_images {shared} of n_images {n_images}, readers {readers}: out of range")

    root = Path(root)
    study = PhantomStudy(root, root / "reflacx", root / "mimic", [], seed, dwell_ratio)
    rows: dict[int, list[dict]] = {1: [], 2: [], 3: []}
    for index in range(n_images):
        rng = np.random.default_rng([seed, index])
        lesions = draw_lesions(rng, lesion_kinds, lesions_per_image, normal_fraction, lesion_size, lesion_contrast)
        image = new_image(study, index, size, lesions, image_suffix(image_format, index))
        gray = render_chest(size, np.random.default_rng([seed, index, 1]), tuple(lesions))
        write_image(image, gray, inverted=index % 4 == 3)
        study.truth.append(image)
        for reader in range(readers if index < shared else 1):
            phase = (1 + (index + reader) % 2) if index < shared else 3
            rng = np.random.default_rng([seed, index, 2, reader])
            reading_id = f"P{phase}{len(rows[phase]) // 100:02d}R{fixed_number(seed, index, reader) % 1_000_000:06d}"
            image.reading_ids.append(reading_id)
            row = write_reading(study, image, reading_id, phase, rng)
            row["eye_tracking_data_discarded"] = index == 0 and shared > 0 and reader == readers - 1
            rows[phase].append(row)

    for phase, phase_rows in rows.items():
        _write_metadata(study.raw, phase, phase_rows)
    mark_simulated(study.raw)
    return study


def write_reading(
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
    write_csv(table, directory / "fixations.csv")
    known, flags = CERTAINTY_LABELS[phase], BOOL_LABELS[phase]
    ellipses = pd.DataFrame(boxes, columns=["xmin", "ymin", "xmax", "ymax"], dtype=float).round(2)
    ellipses["certainty"] = pd.Series(certainty, dtype=int)
    for label in sorted((*known, *flags)):
        ellipses[label] = [label == own for own in labels]
    write_csv(ellipses, directory / "anomaly_location_ellipses.csv")
    chest = _reader_box(image.chest_box, image.size, rng, 0.01)
    box = pd.DataFrame([chest], columns=["xmin", "ymin", "xmax", "ymax"])
    write_csv(box.round(2), directory / "chest_bounding_box.csv")
    _write_transcription(directory, [lesion.kind for lesion in image.lesions], table)

    row = {
        "id": reading_id,
        "split": image.split,
        "eye_tracking_data_discarded": False,
        "image": "physionet.org/files/mimic-cxr/2.0.0/"
        + image.path.relative_to(study.images).with_suffix(".dcm").as_posix(),
        "dicom_id": image.dicom_id,
        "subject_id": image.subject_id,
        "image_size_x": image.size[1],
        "image_size_y": image.size[0],
    }
    for label in sorted((*known, *flags)):
        present = [sure for sure, own in zip(certainty, labels) if own == label]
        row[label] = False if label in flags else max(present, default=0)
    return row | dict.fromkeys(TEXT_LABELS[phase], "")


def _reader_box(
    box: Sequence[float], size: tuple[int, int], rng: np.random.Generator, jitter: float = 0.08
) -> tuple[float, float, float, float]:
    """The box as one reader draws it: corners off by a share of its sides, within the image."""
    xmin, ymin, xmax, ymax = box
    dx, dy = (xmax - xmin) * rng.uniform(-jitter, jitter, 2), (ymax - ymin) * rng.uniform(-jitter, jitter, 2)
    x = np.clip((xmin + dx[0], xmax + dx[1]), 0, size[1] - 1)
    y = np.clip((ymin + dy[0], ymax + dy[1]), 0, size[0] - 1)
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def _write_transcription(directory: Path, kinds: list[str], table: pd.DataFrame) -> None:
    found = "Findings: " + ", ".join(kinds) + "." if kinds else "No abnormality."
    text = f"{SIMULATED} {found}"
    (directory / "transcription.txt").write_text(text + "\n", encoding="utf-8")
    words = text.split()
    end = float(table["timestamp_end_fixation"].iloc[-1]) if len(table) else 1.0
    edges = np.linspace(0.2 * end, end, len(words) + 1).round(3)
    table = pd.DataFrame({"word": words, "timestamp_start_word": edges[:-1], "timestamp_end_word": edges[1:]})
    write_csv(table, directory / "timestamps_transcription.csv")


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
    write_csv(pd.DataFrame(rows, columns=columns), raw / "main_data" / f"metadata_phase_{phase}.csv")
