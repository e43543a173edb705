"""RSNA pneumonia challenge: one label, one image per patient, the split as published."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from downstream.data.choices import Choices
from downstream.data.folder import Folder
from downstream.data.labelled import LabelledImages
from downstream.data.rows import check_ids, label_values, labelled_images, read_rows
from downstream.data.splits import by_row, choose_parts, split_70_15_15

TABLE = "*stage_2_train_labels*.csv"


def read_rsna(paths: list[Path], choices: Choices) -> LabelledImages:
    """stage_2_train_labels.csv has a row per box; a patient is positive where one of them is (Target 1).

    Sorted by patientId and split 70/15/15 as published: train 18,678, valid 4,003, test 4,003.
    """
    folder = Folder(paths[0])
    path = choices.csv or folder.table(TABLE)
    table = read_rows(path, ["patientId", "Target"], choices)
    check_ids(table, "patientId", path)
    notes: list[str] = []
    table = table.assign(Target=label_values(table, ["Target"], path, notes)[:, 0])
    target = table.groupby("patientId", sort=True)["Target"].max()
    subjects = target.index.to_numpy(str)
    order, parts = split_70_15_15(len(target))
    return labelled_images(
        "rsna",
        folder,
        choices,
        ids=list(target.index),
        subjects=subjects,
        parts=choose_parts(choices, "rsna", subjects, by_row(order, parts), notes),
        labels=(["Pneumonia"], target.to_numpy(np.float32)[:, None]),
        notes=notes,
        order=order,
    )
