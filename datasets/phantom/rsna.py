"""Made-up images in the layout of the RSNA pneumonia challenge: consolidations are the pneumonias."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from datasets.phantom.labelled import Chests
from datasets.phantom.study import PhantomStudy, fixed_number, write_csv, write_image


def make_rsna(root: str | Path, chests: Chests, *, image_format: str = "dcm") -> PhantomStudy:
    """Write `root`/rsna: stage_2_train_labels.csv and stage_2_train_images/<patientId>.dcm (or .jpg).

    One image per patient; a row per box, in px, every fourth of them cut in two.
    """
    if image_format not in ("dcm", "jpg"):
        raise ValueError(f"image_format {image_format!r} is not dcm or jpg")
    study = chests.study(Path(root), "rsna")
    rows = []
    for image, gray in chests.draw(study, f".{image_format}"):
        digits = f"{fixed_number(chests.seed, image.index, 1):016x}{fixed_number(chests.seed, image.index, 2):016x}"
        patient = "-".join(digits[start:end] for start, end in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))
        image.dicom_id = image.subject_id = patient
        image.path = study.raw / "stage_2_train_images" / f"{patient}.{image_format}"
        write_image(image, gray, inverted=False)
        boxes = [box for lesion, box in zip(image.lesions, image.boxes, strict=True) if lesion.kind == "consolidation"]
        if boxes and image.index % 4 == 0:
            left, top, right, bottom = boxes[0]
            middle = (top + bottom) / 2
            boxes = [(left, top, right, middle), (left, middle, right, bottom)]
        for left, top, right, bottom in boxes:
            sides = [round(value, 1) for value in (left, top, right - left, bottom - top)]
            rows.append([patient, *sides, 1])
        if not boxes:
            rows.append([patient, *[None] * 4, 0])
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    write_csv(pd.DataFrame(rows, columns=columns), study.raw / "stage_2_train_labels.csv")
    return study
