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

from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import (
    PhantomImage,
    PhantomStudy,
    draw_chests,
    fixed_number,
    mark_simulated,
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
_LATER = {**_COMMON, **dict.fromkeys(("nodule", "mass"), "Lung nodule or mass"), "effusion": "Pleural abnormality"}
LABEL_OF_KIND = {
    1: {**_COMMON, "nodule": "Nodule", "mass": "Mass", "effusion": "Pleural effusion"},
    2: _LATER,
    3: _LATER,
}
BOX = ["xmin", "ymin", "xmax", "ymax"]
SIMULATED = "Simulated reading, no radiologist looked at this image."


def make_study(
    root: str | Path,
    n_images: int = 8,
    seed: int = 0,
    size: int | tuple[int, int] = (512, 420),
    *,
    shared_images: int | None = None,
    readers: int = 3,
    dwell_ratio: float = 6.0,
    **options,
) -> PhantomStudy:
    """Write a study in the raw REFLACX layout, `root`/reflacx, and its images, `root`/mimic/files.

    The first `shared_images` (default: a quarter) are each read by `readers` readers, in phases 1 and 2 by
    turns; one of these readings, the last of the first image, has its eye tracking discarded. Every
    other image has one reading in phase 3. So there are shared_images * readers + n_images -
    shared_images readings.

    `size` and the further `options` are those of `datasets.phantom.study.draw_chests`; every second DICOM is MONOCHROME1.

    `dwell_ratio`: see `datasets.phantom.gaze`.

    Raises `ValueError` for options out of range, among them a dwell_ratio that no gaze can have on
    lesions of that size.
    """
    shared = n_images // 4 if shared_images is None else shared_images
    if not 0 <= shared <= n_images or readers < 1:
        raise ValueError(f"shared_images {shared} of n_images {n_images}, readers {readers}: out of range")
    root = Path(root)
    study = PhantomStudy(root, root / "reflacx", root / "mimic", [], seed, dwell_ratio)
    rows: dict[int, list[dict]] = {1: [], 2: [], 3: []}
    for image, gray, _ in draw_chests(study, n_images, size, ((), (1,)), **options):
        index = image.index
        write_image(image, gray, inverted=index % 4 == 3)
        for reader in range(readers if index < shared else 1):
            phase = (1 + (index + reader) % 2) if index < shared else 3
            rng = np.random.default_rng([seed, index, 2, reader])
            reading_id = f"P{phase}{len(rows[phase]) // 100:02d}R{fixed_number(seed, index, reader) % 1_000_000:06d}"
            row = write_reading(study, image, reading_id, phase, rng)
            row["eye_tracking_data_discarded"] = index == 0 and shared > 0 and reader == readers - 1
            rows[phase].append(row)
    for phase, phase_rows in rows.items():
        table = pd.DataFrame(phase_rows, columns=metadata_columns(phase))
        write_csv(table, study.raw / "main_data" / f"metadata_phase_{phase}.csv")
    mark_simulated(study.raw)
    return study


def metadata_columns(phase: int) -> list[str]:
    head = "id split eye_tracking_data_discarded image dicom_id subject_id image_size_x image_size_y".split()
    return [*head, *_sorted_labels(phase), *TEXT_LABELS[phase]]


def _sorted_labels(phase: int) -> list[str]:
    return sorted((*CERTAINTY_LABELS[phase], *BOOL_LABELS[phase]))


def write_reading(
    study: PhantomStudy, image: PhantomImage, reading_id: str, phase: int, rng: np.random.Generator
) -> dict:
    """Write the files of one reading and return its row of the metadata."""
    image.reading_ids.append(reading_id)
    boxes = [_reader_box(box, image.size, rng) for box in image.boxes]
    certainty = [int(rng.choice((3, 4, 5, 5))) for _ in boxes]
    labels = [LABEL_OF_KIND[phase][lesion.kind] for lesion in image.lesions]
    table = simulate_fixations(image.size, boxes, rng, dwell_ratio=study.dwell_ratio)

    directory = study.raw / "main_data" / reading_id
    write_csv(table, directory / "fixations.csv")
    ellipses = pd.DataFrame(boxes, columns=BOX, dtype=float).round(2)
    ellipses["certainty"] = pd.Series(certainty, dtype=int)
    for label in _sorted_labels(phase):
        ellipses[label] = [label == own for own in labels]
    write_csv(ellipses, directory / "anomaly_location_ellipses.csv")
    chest = _reader_box(image.chest_box, image.size, rng, 0.01)
    write_csv(pd.DataFrame([chest], columns=BOX).round(2), directory / "chest_bounding_box.csv")
    _write_transcription(directory, [lesion.kind for lesion in image.lesions], table)

    path = image.path.relative_to(study.images).with_suffix(".dcm").as_posix()
    row = {
        "id": reading_id,
        "split": image.split,
        "eye_tracking_data_discarded": False,
        "image": f"physionet.org/files/mimic-cxr/2.0.0/{path}",
        "dicom_id": image.dicom_id,
        "subject_id": image.subject_id,
        "image_size_x": image.size[1],
        "image_size_y": image.size[0],
    }
    row |= dict.fromkeys(CERTAINTY_LABELS[phase], 0) | dict.fromkeys(BOOL_LABELS[phase], False)
    for label, sure in zip(labels, certainty):
        row[label] = max(row[label], sure)
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
