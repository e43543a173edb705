"""Made-up studies in REFLACX's raw layout, with the MIMIC-CXR image tree beside it, for the tests, the demo and trying
things out. Nobody ever looked at these images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.fixations import RECTANGLE
from datasets.phantom.chest import CHEST, pixel_box
from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import (
    PhantomImage,
    PhantomStudy,
    draw_chests,
    fixed_number,
    start_study,
    write_csv,
    write_image,
)
from datasets.raw.findings import COMMON_FINDING, LABELS

LABEL_OF_KIND = {  # of phase 1; the later phases have its common finding
    "nodule": "Nodule",
    "mass": "Mass",
    "consolidation": "Consolidation",
    "effusion": "Pleural effusion",
    "pneumothorax": "Pneumothorax",
    "cardiomegaly": "Enlarged cardiac silhouette",
    "atelectasis": "Atelectasis",
}
METADATA = "id split eye_tracking_data_discarded image dicom_id subject_id image_size_x image_size_y".split()


def make_study(
    root: str | Path,
    n_images: int = 8,
    seed: int = 0,
    size: tuple[int, int] = (512, 420),
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

    Raises:
        ValueError: a dwell_ratio that no gaze can have on lesions of that size.
    """
    shared = n_images // 4 if shared_images is None else shared_images
    study = start_study(Path(root, "reflacx"), Path(root, "mimic"), seed)
    rows: dict[int, dict[str, dict]] = {1: {}, 2: {}, 3: {}}  # of a phase, by their reading
    for image, gray, _ in draw_chests(study, n_images, size, 0, **options):
        index = image.index
        write_image(image, gray, inverted=index % 4 == 3)
        path = image.path.relative_to(study.images).with_suffix(".dcm").as_posix()
        for reader in range(readers if index < shared else 1):
            phase = 1 + (index + reader) % 2 if index < shared else 3
            rng = np.random.default_rng([seed, index, 2, reader])
            group, number = len(rows[phase]) // 100, fixed_number(seed, index, reader)
            while (reading_id := f"P{phase}{group:02d}R{number % 1_000_000:06d}") in rows[phase]:
                number += 1
            image.reading_ids.append(reading_id)
            rows[phase][reading_id] = {
                "id": reading_id,
                "split": image.split,
                "eye_tracking_data_discarded": index == 0 and shared > 0 and reader == readers - 1,
                "image": f"physionet.org/files/mimic-cxr/2.0.0/{path}",
                "dicom_id": image.dicom_id,
                "subject_id": image.subject_id,
                "image_size_x": size[1],
                "image_size_y": size[0],
                **write_reading(study.raw / "main_data" / reading_id, image, phase, rng, dwell_ratio),
            }
    for phase, found in rows.items():
        columns = [*METADATA, *_labels(phase), *(LABELS[phase].keys() - _labels(phase))]
        table = pd.DataFrame(found.values(), columns=columns)
        write_csv(table, study.raw / "main_data" / f"metadata_phase_{phase}.csv")
    return study


def _labels(phase: int) -> list[str]:
    return sorted(label for label, kind in LABELS[phase].items() if kind != "text")


def write_reading(
    directory: Path, image: PhantomImage, phase: int, rng: np.random.Generator, dwell_ratio: float
) -> dict[str, int | bool]:
    """Write the files of one reading and return its labels."""
    boxes = [_reader_box(box, image.size, rng) for box in image.boxes]
    certainty = [int(rng.choice((3, 4, 5, 5))) for _ in boxes]
    found = [LABEL_OF_KIND[lesion.kind] for lesion in image.lesions]
    if phase > 1:
        found = [COMMON_FINDING[label] for label in found]
    write_csv(simulate_fixations(image.size, boxes, rng, dwell_ratio=dwell_ratio), directory / "fixations.csv")
    ellipses = pd.DataFrame(boxes, columns=RECTANGLE, dtype=float).round(2)
    ellipses["certainty"] = pd.Series(certainty, dtype=int)
    for label in _labels(phase):
        ellipses[label] = [label == own for own in found]
    write_csv(ellipses, directory / "anomaly_location_ellipses.csv")
    chest = _reader_box(pixel_box(image.size, CHEST), image.size, rng, 0.01)
    write_csv(pd.DataFrame([chest], columns=RECTANGLE).round(2), directory / "chest_bounding_box.csv")
    sure = dict(sorted(zip(found, certainty)))  # the highest of each
    return {label: LABELS[phase][label] == "certainty" and sure.get(label, 0) for label in _labels(phase)}


def _reader_box(
    box: Sequence[float], size: tuple[int, int], rng: np.random.Generator, jitter: float = 0.08
) -> list[float]:
    """The box as one reader draws it: corners off by a share of its sides, within the image."""
    low, high = corners = np.reshape(box, (2, 2))  # of x, y
    off = (high - low) * rng.uniform(-jitter, jitter, (2, 2)).T
    return np.clip(corners + off, 0, np.array(size[::-1]) - 1).ravel().tolist()
