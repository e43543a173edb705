"""Damage planted into a made-up REFLACX study, one kind at a time, for the tests of its readers."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from datasets.phantom.study import PhantomStudy, write_csv

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


def plant_faults(study: PhantomStudy, faults: Sequence[str]) -> dict[str, str]:
    """Damage one phase 3 reading by each fault, from the last one backwards; returns which."""
    path = study.raw / "main_data" / "metadata_phase_3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    planted = {}
    for place, fault in zip(reversed(table.index), faults):
        row = table.loc[place].to_dict()
        planted[fault] = row["id"]
        _plant_fault(study, row, fault)
        table.loc[place] = row
    table.to_csv(path, index=False)
    return planted


def _plant_fault(study: PhantomStudy, row: dict, fault: str) -> None:
    image = next(image for image in study.truth if row["id"] in image.reading_ids)
    path = study.raw / "main_data" / row["id"] / "fixations.csv"
    table = pd.read_csv(path)
    if fault == "missing_image":
        image.path.unlink()
    elif fault == "truncated_image":
        content = image.path.read_bytes()
        image.path.write_bytes(content[: len(content) // 2])
    elif fault == "image_size":
        row["image_size_x"] = str(int(row["image_size_x"]) + 40)
    elif fault == "missing_fixations_file":
        path.unlink()
    elif fault == "missing_column":
        write_csv(table.drop(columns="x_position"), path)
    elif fault == "non_numeric_cell":
        table["x_position"] = table["x_position"].astype(object)
        table.loc[2::4, "x_position"] = "left of the heart"
        write_csv(table, path)
    elif fault == "no_fixations":
        write_csv(table.iloc[:0], path)
    elif fault == "zero_duration":
        table["timestamp_end_fixation"] = table["timestamp_start_fixation"]
        write_csv(table, path)
    elif fault == "all_outside":
        table["x_position"] += 50.0 * image.size[1]
        write_csv(table, path)
    elif fault == "discarded":
        row["eye_tracking_data_discarded"] = "True"
    elif fault == "path_traversal":
        row["image"] = "physionet.org/files/../../../../../../etc/passwd.dcm"
    elif fault == "id_traversal":
        row["dicom_id"] = "../../../etc/" + row["dicom_id"]
