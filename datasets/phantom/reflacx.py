"""Made-up studies in REFLACX's raw layout, with the MIMIC-CXR image tree beside it, for the tests, the demo and trying
things out. Nobody ever looked at these images."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.chest import CHEST, Lesion, pixel_box, pixels_per_unit
from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import PhantomImage, PhantomStudy, draw_chests, fixed_number, write_csv, write_image
from datasets.raw.findings import LABELS
from util.errors import UserError

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
METADATA = "id split eye_tracking_data_discarded image dicom_id subject_id image_size_x image_size_y".split()
BOX = ["xmin", "ymin", "xmax", "ymax"]
# Round opacities that anyone sees in RG1_UNCR.dcm, as shares of its width and height: centre x, y and
# semi-axes. Placed by eye by this program's authors, no radiologist.
REAL_SPOTS = ((0.800, 0.440, 0.049, 0.050), (0.790, 0.600, 0.061, 0.049), (0.262, 0.592, 0.066, 0.054))


def make_study(
    root: str | Path,
    n_images: int = 8,
    seed: int = 0,
    size: tuple[int, int] = (512, 420),
    *,
    shared_images: int | None = None,
    readers: int = 3,
    dwell_ratio: float = 6.0,
    real_radiograph: bool = False,
    **options,
) -> PhantomStudy:
    """Write a study in the raw REFLACX layout, `root`/reflacx, and its images, `root`/mimic/files.

    The first `shared_images` (default: a quarter) are each read by `readers` readers, in phases 1 and 2 by
    turns; one of these readings, the last of the first image, has its eye tracking discarded. Every
    other image has one reading in phase 3. So there are shared_images * readers + n_images -
    shared_images readings.

    `size` and the further `options` are those of `datasets.phantom.study.draw_chests`; every second DICOM is MONOCHROME1.

    `dwell_ratio`: see `datasets.phantom.gaze`. With `real_radiograph` there is one more image, `add_real_radiograph`.

    Raises:
        ValueError: a dwell_ratio that no gaze can have on lesions of that size.
        UserError: see `add_real_radiograph`.
    """
    shared = n_images // 4 if shared_images is None else shared_images
    study = PhantomStudy(Path(root, "reflacx"), Path(root, "mimic"), seed)
    rows: dict[int, dict[str, dict]] = {1: {}, 2: {}, 3: {}}  # of a phase, by their reading
    real = add_real_radiograph(study, dwell_ratio) if real_radiograph else None
    for image, gray, _ in draw_chests(study, n_images, size, 0, **options):
        index = image.index
        write_image(image, gray, inverted=index % 4 == 3)
        for reader in range(readers if index < shared else 1):
            phase = 1 + (index + reader) % 2 if index < shared else 3
            rng = np.random.default_rng([seed, index, 2, reader])
            group, number = len(rows[phase]) // 100, fixed_number(seed, index, reader)
            while (reading_id := f"P{phase}{group:02d}R{number % 1_000_000:06d}") in rows[phase]:
                number += 1
            row = write_reading(study, image, reading_id, phase, rng, dwell_ratio)
            row["eye_tracking_data_discarded"] = index == 0 and shared > 0 and reader == readers - 1
            rows[phase][reading_id] = row
    if real:
        rows[3][real["id"]] = real
    for phase, found in rows.items():
        table = pd.DataFrame(
            found.values(), columns=[*METADATA, *_labels(phase), *(LABELS[phase].keys() - _labels(phase))]
        )
        write_csv(table, study.raw / "main_data" / f"metadata_phase_{phase}.csv")
    study.mark_simulated()
    return study


def add_real_radiograph(study: PhantomStudy, dwell_ratio: float) -> dict:
    """Add one real chest film with a simulated reading that says so; returns its row of the metadata.

    The film is RG1_UNCR.dcm (CR, PA, MONOCHROME1) of the PyPI package pydicom-data, copied from where
    pip installed it; nothing is downloaded. The reading dwells on three round opacities of the film.
    Raises `UserError` if the package is not installed.
    """
    from pydicom.data import get_testdata_file

    source = get_testdata_file("RG1_UNCR.dcm", download=False)
    if source is None:
        raise UserError("RG1_UNCR.dcm is not here: install the package that ships it, `pip install pydicom-data`")
    height, width = size = (1955, 1841)
    spots = (np.array(REAL_SPOTS) - (0.5, 0.5, 0, 0)) * (width, height, width, height) / pixels_per_unit(size)
    lesions = [Lesion("mass", spot) for spot in spots.tolist()]
    path = study.images / "files/p10/p10999999/s59999999/RG1_UNCR-pydicom-data.dcm"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    image = PhantomImage(-1, path.stem, "10999999", "59999999", "train", path, size, lesions)
    study.truth.append(image)
    rng = np.random.default_rng([study.seed, 1_000_003])
    row = write_reading(study, image, "P399R999999", 3, rng, dwell_ratio)
    return row | {"Other": "real radiograph (RG1_UNCR.dcm of pydicom-data) with a simulated reading"}


def _labels(phase: int) -> list[str]:
    return sorted(label for label, kind in LABELS[phase].items() if kind != "text")


def write_reading(
    study: PhantomStudy, image: PhantomImage, reading_id: str, phase: int, rng: np.random.Generator, dwell_ratio: float
) -> dict:
    """Write the files of one reading and return its row of the metadata."""
    image.reading_ids.append(reading_id)
    boxes = [_reader_box(box, image.size, rng) for box in image.boxes]
    certainty = [int(rng.choice((3, 4, 5, 5))) for _ in boxes]
    labels = [LABEL_OF_KIND[phase][lesion.kind] for lesion in image.lesions]

    directory = study.raw / "main_data" / reading_id
    write_csv(simulate_fixations(image.size, boxes, rng, dwell_ratio=dwell_ratio), directory / "fixations.csv")
    ellipses = pd.DataFrame(boxes, columns=BOX, dtype=float).round(2)
    ellipses["certainty"] = pd.Series(certainty, dtype=int)
    for label in _labels(phase):
        ellipses[label] = [label == own for own in labels]
    write_csv(ellipses, directory / "anomaly_location_ellipses.csv")
    chest = _reader_box(pixel_box(image.size, CHEST), image.size, rng, 0.01)
    write_csv(pd.DataFrame([chest], columns=BOX).round(2), directory / "chest_bounding_box.csv")

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
    row |= {label: 0 if LABELS[phase][label] == "certainty" else False for label in _labels(phase)}
    for label, sure in zip(labels, certainty):
        row[label] = max(row[label], sure)
    return row


def _reader_box(
    box: Sequence[float], size: tuple[int, int], rng: np.random.Generator, jitter: float = 0.08
) -> list[float]:
    """The box as one reader draws it: corners off by a share of its sides, within the image."""
    low, high = corners = np.reshape(box, (2, 2))  # of x, y
    off = (high - low) * rng.uniform(-jitter, jitter, (2, 2)).T
    return np.clip(corners + off, 0, np.array(size[::-1]) - 1).ravel().tolist()
