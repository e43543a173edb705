"""Made-up studies in EGD-CXR's raw layout, with the MIMIC-CXR image tree beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import PhantomStudy, draw_chests, write_csv, write_image

SCREEN = (1080, 1920)  # (height, width), px


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
    study = PhantomStudy(Path(root, "egd-cxr"), Path(root, "mimic"), seed)
    shrink = min(SCREEN[0] / size[0], SCREEN[1] / size[1])
    top, left = (round((whole - own * shrink) / 2) for whole, own in zip(SCREEN, size))
    master, metadata, gaze = [], [], []
    for image, gray, rng in draw_chests(study, n_images, size, 9, **options):
        index, name, kinds = image.index, image.dicom_id, {lesion.kind for lesion in image.lesions}
        write_image(image, gray, inverted=index % 4 == 3)
        metadata.append([name, image.subject_id, image.study_id, "PA", *size])
        path = image.path.relative_to(study.images).with_suffix(".dcm").as_posix()
        findings = [int(found) for found in (not kinds, "cardiomegaly" in kinds, "consolidation" in kinds)]
        master.append([name, path, image.study_id, image.subject_id, top, top, left, left, *findings])
        table = simulate_fixations(size, image.boxes, rng, dwell_ratio=dwell_ratio)
        if index % 3 == 0:
            gaze.append(_egd_rows(table.iloc[:5], f"calibration-{index}", index, size, (left, top)))
        gaze.append(_egd_rows(table, name, index, size, (left, top)))
        image.reading_ids.append(name)
    columns = "dicom_id path study_id patient_id image_top image_bottom image_left image_right Normal CHF pneumonia"
    write_csv(pd.DataFrame(master, columns=columns.split()), study.raw / "master_sheet.csv")
    gaze = pd.concat(gaze, ignore_index=True)
    write_csv(gaze, study.raw / "fixations.csv")
    columns = "dicom_id subject_id study_id ViewPosition Rows Columns"
    write_csv(pd.DataFrame(metadata, columns=columns.split()), study.images / "mimic-cxr-2.0.0-metadata.csv")
    study.mark_simulated()
    return study


def _egd_rows(
    table: pd.DataFrame, dicom_id: str, session: int, size: tuple[int, int], corner_xy: tuple[int, int]
) -> pd.DataFrame:
    """Fixations as EGD-CXR's fixations.csv has them; `corner_xy` = (left, top) of the picture on the screen."""
    x, y = table["x_position"].to_numpy(), table["y_position"].to_numpy()
    fraction = [
        (lead + at * (pixels - 2 * lead) / length) / pixels
        for at, length, pixels, lead in zip((x, y), size[::-1], SCREEN[::-1], corner_xy)
    ]
    off = (x < 0) | (x > size[1] - 1) | (y < 0) | (y > size[0] - 1)
    return pd.DataFrame(
        {
            "DICOM_ID": dicom_id,
            "SESSION_ID": f"session-{session // 4}",
            "CNT": np.arange(len(table)),
            "Time (in secs)": table["timestamp_end_fixation"].to_numpy(),
            "FPOGX": fraction[0].round(5),
            "FPOGY": fraction[1].round(5),
            "FPOGD": (table["timestamp_end_fixation"] - table["timestamp_start_fixation"]).to_numpy().round(5),
            "X_ORIGINAL": np.where(off, -1, x.round()).astype(int),
            "Y_ORIGINAL": np.where(off, -1, y.round()).astype(int),
        }
    )
