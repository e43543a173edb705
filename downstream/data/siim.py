"""SIIM-ACR pneumothorax: one label, the split as published, by image (the table knows no patients)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from downstream.data.choices import Choices
from downstream.data.folder import Folder
from downstream.data.labelled import LabelledImages
from downstream.data.rows import check_ids, labelled_images, own_subjects_note, read_rows
from downstream.data.splits import by_row, choose_parts, split_70_15_15
from util.errors import UserError

TABLES = ("*train-rle*.csv", "stage_2_train.csv")
ID, MASK = "ImageId", "EncodedPixels"  # the header has a blank before the second
NONE = "-1"


def read_siim(paths: list[Path], choices: Choices) -> LabelledImages:
    """train-rle.csv has a row per mask; an image is positive where one is not "-1".

    Sorted by ImageId and split 70/15/15 as published.
    """
    folder = Folder(paths[0])
    path = choices.csv or folder.table(*TABLES)
    table = read_rows(path, [ID, MASK], choices)
    check_ids(table, ID, path)
    is_mask = (table[MASK] != NONE).to_numpy()
    odd = is_mask & ~table[MASK].str.fullmatch(r"\d+( +\d+)*").to_numpy(bool)
    if odd.any():
        line, cell = table.index[odd][0], table[MASK][odd].iloc[0]
        raise UserError(f"{path}: line {line}, column {MASK!r}: {cell[:40]!r} is neither -1 nor pairs of numbers")
    positive = table.assign(positive=is_mask).groupby(ID, sort=True)["positive"].max()
    ids = positive.index.to_numpy(str)
    order, parts = split_70_15_15(len(ids))
    notes = own_subjects_note("siim", ids, f"{path.name} names no patients")
    return labelled_images(
        "siim",
        folder,
        choices,
        ids=list(ids),
        subjects=ids,
        parts=choose_parts(choices, "siim", ids, by_row(order, parts), notes),
        labels=(["Pneumothorax"], positive.to_numpy(np.float32)[:, None]),
        notes=notes,
        order=order,
    )
