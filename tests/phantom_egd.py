"""Made-up studies in EGD-CXR's raw layout, with the MIMIC-CXR image tree beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import PhantomStudy, draw_chests, start_study, write_csv, write_image

SCREEN = np.array([1080, 1920])  # (height, width), px
COLUMNS = {
    "master": "dicom_id,path,study_id,patient_id,image_top,image_bottom,image_left,image_right,Normal,CHF,pneumonia",
    "metadata": "dicom_id,subject_id,study_id,ViewPosition,Rows,Columns",
    "fixations": "DICOM_ID,SESSION_ID,CNT,Time (in secs),FPOGX,FPOGY,FPOGD,X_ORIGINAL,Y_ORIGINAL",
}


def make_egd(
    root: str | Path,
    n_images: int = 6,
    seed: int = 0,
    size: tuple[int, int] = (512, 420),
    *,
    dwell_ratio: float = 6.0,
    **options,
) -> PhantomStudy:
    """Write a study in the raw EGD-CXR layout, `root`/egd-cxr, and its images, `root`/mimic/files,
    with their table of metadata.

    One reading per image. The rows of fixations.csv include
    fixations off the picture (negative X_ORIGINAL, Y_ORIGINAL) and, before every third reading, a
    calibration screen whose DICOM_ID is in no master sheet. The pictures stand in the middle of the
    screen, at its full height or width, with padding beside them.
    """
    study = start_study(Path(root, "egd-cxr"), Path(root, "mimic"), seed)
    own = np.array(size)
    corner = np.round((SCREEN - own * (SCREEN / own).min()) / 2).astype(int)  # top, left
    tables = {"master": [], "metadata": [], "fixations": []}
    for image, gray, rng in draw_chests(study, n_images, size, 9, **options):
        index, name, kinds = image.index, image.dicom_id, {lesion.kind for lesion in image.lesions}
        write_image(image, gray, inverted=index % 4 == 3)
        tables["metadata"].append([name, image.subject_id, image.study_id, "PA", *size])
        path = image.path.relative_to(study.images).with_suffix(".dcm").as_posix()
        findings = [int(found) for found in (not kinds, "cardiomegaly" in kinds, "consolidation" in kinds)]
        master = [name, path, image.study_id, image.subject_id, *np.repeat(corner, 2), *findings]
        tables["master"].append(master)
        table = simulate_fixations(size, image.boxes, rng, dwell_ratio=dwell_ratio)
        if index % 3 == 0:
            tables["fixations"] += _egd_rows(table.iloc[:5], f"calibration-{index}", index, own, corner)
        tables["fixations"] += _egd_rows(table, name, index, own, corner)
        image.reading_ids.append(name)
    files = {name: pd.DataFrame(rows, columns=COLUMNS[name].split(",")) for name, rows in tables.items()}
    write_csv(files["master"], study.raw / "master_sheet.csv")
    write_csv(files["fixations"], study.raw / "fixations.csv")
    write_csv(files["metadata"], study.images / "mimic-cxr-2.0.0-metadata.csv")
    return study


def _egd_rows(table: pd.DataFrame, dicom_id: str, session: int, own: np.ndarray, corner: np.ndarray) -> list[tuple]:
    """Fixations as EGD-CXR's fixations.csv has them; `own` = (height, width) of the picture, `corner` = (top, left) on
    the screen."""
    place = table[["y_position", "x_position"]].to_numpy()
    top, left = ((corner + place * (SCREEN - 2 * corner) / own) / SCREEN).round(5).T
    off = ((place < 0) | (place > own - 1)).any(axis=1, keepdims=True)
    y, x = np.where(off, -1, place.round()).astype(int).T
    end = table["timestamp_end_fixation"]
    duration = (end - table["timestamp_start_fixation"]).round(5)
    return [
        (dicom_id, f"session-{session // 4}", *row)
        for row in zip(range(len(table)), end, left, top, duration, x, y, strict=True)
    ]
