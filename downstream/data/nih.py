"""ChestX-ray14: 14 findings, the official test list, an eighth of the other patients to validate."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from downstream.data.choices import Choices
from downstream.data.folder import Folder
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.rows import check_ids, join_same, labelled_images, one_hot, read_rows
from downstream.data.splits import choose_parts
from util.errors import UserError
from util.tables import read_text

TABLE = "Data_Entry_2017*.csv"
LISTS = ("train_val_list.txt", "test_list.txt")
ID, LABELS, PATIENT = "Image Index", "Finding Labels", "Patient ID"
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
NO_FINDING = "No Finding"
VALID_SHARE = 1 / 8  # of the patients of train_val_list.txt: the authors' own lists are not published


def read_nih(paths: list[Path], choices: Choices) -> LabelledImages:
    """Data_Entry_2017*.csv with train_val_list.txt and test_list.txt beside it."""
    folder = Folder(paths[0])
    path = choices.csv or folder.table(TABLE)
    table = read_rows(path, [ID, LABELS, PATIENT], choices)
    check_ids(table, ID, path)
    check_ids(table, PATIENT, path, subjects=True)
    notes: list[str] = []
    table = join_same(table, ID, [LABELS, PATIENT], path, notes)
    rows = []
    for line, cell in zip(table.index, table[LABELS], strict=True):
        found = {part.strip() for part in cell.split("|")}
        if not found <= {*FINDINGS, NO_FINDING}:
            word = sorted(found - {*FINDINGS, NO_FINDING})[0]
            raise UserError(f"{path}: line {line}, column {LABELS!r}: {word!r} is none of the 14 findings")
        rows.append(found)
    ids, subjects = list(table[ID]), table[PATIENT].to_numpy(str)
    official = _official(folder, ids, subjects, choices.split_seed, notes)
    parts = choose_parts(choices, "nih", subjects, official, notes)
    values = one_hot(rows, FINDINGS)
    if (unlisted := parts == "-").any():
        notes.append(f"nih: {int(unlisted.sum())} images are in neither list and left out")
        ids = [ids[i] for i in np.flatnonzero(~unlisted)]
        subjects, parts, values = subjects[~unlisted], parts[~unlisted], values[~unlisted]
    return labelled_images(
        "nih",
        folder,
        choices,
        ids=ids,
        subjects=subjects,
        parts=parts,
        labels=(FINDINGS, values),
        notes=notes,
        strong_augmentation=True,
    )


def _official(folder: Folder, ids: list[str], subjects: np.ndarray, seed: int, notes: list[str]) -> np.ndarray | None:
    """Parts by the official lists, "-" for images in neither; None where there are no lists."""
    found = {name: folder.tables(name) for name in LISTS}
    if not any(found.values()):
        notes.append(
            f"warning: nih: {' and '.join(LISTS)} are not in {folder.root}, so this is not the official split "
            "and no result compares with a published one"
        )
        return None
    listed = {}
    for name, paths in found.items():
        if len(paths) != 1:
            what = "is missing, while the other list is there" if not paths else "is there twice"
            raise UserError(f"{folder.root}: {name} {what}; both lists come with the data set")
        listed[name] = set(map(str.strip, read_text(paths[0]).splitlines()))
    both = sorted((listed[LISTS[0]] & listed[LISTS[1]]) - {""})
    if both:
        raise UserError(f"{folder.root}: {both[0]} is in {LISTS[0]} and in {LISTS[1]}; get the lists again")
    parts = np.array([TRAIN if name in listed[LISTS[0]] else TEST if name in listed[LISTS[1]] else "-" for name in ids])
    if (parts == "-").all():
        raise UserError(f"{found[LISTS[0]][0]}: names no image of the table, e.g. {ids[0]!r}")
    train = np.flatnonzero(parts == TRAIN)
    patients = np.unique(subjects[train])
    drawn = np.random.default_rng(seed).permutation(patients)[: max(1, round(VALID_SHARE * len(patients)))]
    parts[train[np.isin(subjects[train], drawn)]] = VALID
    return parts
