"""Made-up studies in EGD-CXR's raw layout, with the MIMIC-CXR image tree beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.gaze import simulate_fixations
from datasets.phantom.study import PhantomStudy, draw_chests, mark_simulated, write_csv, write_image


def make_egd(
    root: str | Path,
    n_images: int = 6,
    seed: int = 0,
    size: int | tuple[int, int] = (512, 420),
    *,
    with_duration: bool = True,
    dwell_ratio: float = 6.0,
    screen: tuple[int, int] = (1080, 1920),
    **options,
) -> PhantomStudy:
    """Write a study in the raw EGD-CXR layout, `root`/egd-cxr, and its images, `root`/mimic/files,
    with their table of metadata.

    One reading per image. fixations.csv has the column FPOGD only `with_duration`; its rows include
    fixations off the picture (negative X_ORIGINAL, Y_ORIGINAL) and, before every third reading, a
    calibration screen whose DICOM_ID is in no master sheet. The pictures stand in the middle of the
    `screen` (height, width px), at its full height or width, with padding beside them.
    """
    root = Path(root)
    study = PhantomStudy(root, root / "egd-cxr", root / "mimic", [], seed, dwell_ratio)
    master, metadata, gaze = [], [], []
    for image, gray, rng in draw_chests(study, n_images, size, ((9,), (10,)), **options):
        index, size, lesions = image.index, image.size, image.lesions
        write_image(image, gray, inverted=index % 4 == 3)
        shrink = min(screen[0] / size[0], screen[1] / size[1])
        left = round((screen[1] - size[1] * shrink) / 2)
        top = round((screen[0] - size[0] * shrink) / 2)
        metadata.append(
            {
                "dicom_id": image.dicom_id,
                "subject_id": image.subject_id,
                "study_id": image.study_id,
                "ViewPosition": "PA",
                "Rows": size[0],
                "Columns": size[1],
            }
        )
        kinds = {lesion.kind for lesion in lesions}
        master.append(
            {
                "dicom_id": image.dicom_id,
                "path": image.path.relative_to(study.images).with_suffix(".dcm").as_posix(),
                "study_id": image.study_id,
                "patient_id": image.subject_id,
                "image_top": top,
                "image_bottom": top,
                "image_left": left,
                "image_right": left,
                "Normal": int(not kinds),
                "CHF": int("cardiomegaly" in kinds),
                "pneumonia": int("consolidation" in kinds),
            }
        )
        table = simulate_fixations(size, image.boxes, rng, dwell_ratio=dwell_ratio)
        if index % 3 == 0:
            gaze.append(_egd_rows(table.iloc[:5], f"calibration-{index}", index, size, screen, (left, top)))
        gaze.append(_egd_rows(table, image.dicom_id, index, size, screen, (left, top)))
        image.reading_ids.append(image.dicom_id)
    columns = None if with_duration else [name for name in gaze[0].columns if name != "FPOGD"]
    write_csv(pd.DataFrame(master), study.raw / "master_sheet.csv")
    write_csv(pd.concat(gaze, ignore_index=True)[columns or list(gaze[0].columns)], study.raw / "fixations.csv")
    write_csv(pd.DataFrame(metadata), study.images / "mimic-cxr-2.0.0-metadata.csv")
    mark_simulated(study.raw)
    return study


def _egd_rows(
    table: pd.DataFrame,
    dicom_id: str,
    session: int,
    size: tuple[int, int],
    screen: tuple[int, int],
    corner_xy: tuple[int, int],
) -> pd.DataFrame:
    """Fixations as EGD-CXR's fixations.csv has them; `corner_xy` = (left, top) of the picture on the screen."""
    x, y = table["x_position"].to_numpy(), table["y_position"].to_numpy()
    fraction = [
        (lead + at * (pixels - 2 * lead) / length) / pixels
        for at, length, pixels, lead in zip((x, y), size[::-1], screen[::-1], corner_xy)
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
