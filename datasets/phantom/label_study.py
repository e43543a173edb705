"""A made-up labelled data set, whose labels are the kinds of the lesions: the RSNA pneumonia challenge."""

from __future__ import annotations

import uuid
from pathlib import Path

import pandas as pd

from datasets.phantom.study import PhantomStudy, draw_chests, fixed_digits, start_study, write_csv, write_image

STREAM = 11  # of random numbers, see `draw_chests`


def make_rsna(
    root: str | Path,
    n_images: int = 24,
    seed: int = 0,
    size: tuple[int, int] = (512, 420),
    *,
    image_format: str = "dcm",
    **options,
) -> PhantomStudy:
    """Write `root`/rsna: stage_2_train_labels.csv and stage_2_train_images/<patientId>.dcm (or .jpg); arguments as of
    `draw_chests`.

    Consolidations are the pneumonias. One image per patient; a row per box, in px, every fourth of them cut in two.
    """
    folder = Path(root, "rsna")
    study = start_study(folder, folder, seed, "MADE_UP.txt")
    rows = []
    for image, gray, _ in draw_chests(study, n_images, size, STREAM, image_format=image_format, **options):
        image.dicom_id = image.subject_id = patient = str(uuid.UUID(fixed_digits(seed, image.index, range(1, 3))))
        image.path = study.raw / "stage_2_train_images" / f"{patient}{image.path.suffix}"
        write_image(image, gray)
        boxes = [box for lesion, box in zip(image.lesions, image.boxes) if lesion.kind == "consolidation"]
        if boxes and image.index % 4 == 0:
            left, top, right, bottom = boxes[0]
            middle = (top + bottom) / 2
            boxes = [(left, top, right, middle), (left, middle, right, bottom)]
        found = [[patient, left, top, right - left, bottom - top, 1] for left, top, right, bottom in boxes]
        rows += found or [[patient, *[None] * 4, 0]]
    table = pd.DataFrame(rows, columns=["patientId", "x", "y", "width", "height", "Target"])
    write_csv(table.round(1), study.raw / "stage_2_train_labels.csv")
    return study
