"""COVIDx: classes, judged by accuracy; train.txt, test.txt, and val.txt or a fifth of train.txt's patients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from downstream.data.choices import PUBLISHED, Choices
from downstream.data.folder import Folder
from downstream.data.labelled import MULTICLASS, TEST, TRAIN, VALID, LabelledImages
from downstream.data.rows import join_same, keep_where, labelled_images, one_hot
from downstream.data.splits import choose_parts, draw_subjects
from util.errors import UserError
from util.tables import read_text

COLUMNS = ("patient", "filename", "class", "source")
DIRECTORIES = {TRAIN: "train", VALID: "val", TEST: "test"}  # also how a part's list is called
VALID_SHARE = 0.2


def read_covidx(paths: list[Path], choices: Choices) -> LabelledImages:
    """Lines "patient filename class source" of train.txt, test.txt and, in newer releases, val.txt, images in train/,
    test/ and val/. Lists of older releases are called train_COVIDx9A.txt and so on.

    Patients are told apart within their source, whose numbers another source may use again. Without val.txt a fifth of
    train.txt validates, as published drawn by image; here by patient unless --split published asks for the former.
    """
    folder = Folder(paths[0])
    notes: list[str] = []
    table = pd.concat([_read(path, part, notes) for part, path in _lists(folder, choices).items()], ignore_index=True)
    table = keep_where(table, folder.root, choices)
    if table["id"].duplicated().any():
        raise UserError(f"{folder.root}: {table['id'][table['id'].duplicated()].iloc[0]} is there twice")
    subjects = (table["source"] + " " + table["patient"]).to_numpy(str)
    official = table["part"].to_numpy(str)
    train = np.flatnonzero(official == TRAIN)
    order = None
    if VALID not in official and choices.split == PUBLISHED:
        kept, drawn = train_test_split(np.arange(len(train)), test_size=VALID_SHARE, random_state=0)
        official[train[drawn]] = VALID
        order = np.concatenate([train[kept], train[drawn], np.flatnonzero(official == TEST)])
    elif VALID not in official:
        count = max(1, round(VALID_SHARE * len(train)))
        official[train[draw_subjects(subjects[train], count, choices.split_seed)]] = VALID
    if choices.split == PUBLISHED:
        shared = int((pd.Series(official).groupby(subjects).nunique() > 1).sum())
        notes.append(f"warning: covidx: --split published: {shared} patients are in two parts")
    classes = sorted(set(table["class"]))
    return labelled_images(
        "covidx",
        folder,
        choices,
        ids=list(table["id"]),
        subjects=subjects,
        parts=choose_parts(choices, "covidx", subjects, official, notes),
        labels=(classes, one_hot([{name} for name in table["class"]], classes)),
        notes=notes,
        task=MULTICLASS,
        shared_subjects=choices.split == PUBLISHED,
        order=order,
    )


def _lists(folder: Folder, choices: Choices) -> dict[str, Path]:
    """The list of each part: train's, and those beside it with the same name but for the part's."""
    train = choices.csv or folder.table("train.txt", "train_COVIDx*.txt")
    if not train.name.startswith("train"):
        raise UserError(f"--csv {train}: expected the list that trains, train.txt or train_COVIDx9A.txt")
    lists = {part: train.with_name(train.name.replace("train", name, 1)) for part, name in DIRECTORIES.items()}
    return {part: path for part, path in lists.items() if part != VALID or path.is_file()}


def _read(path: Path, part: str, notes: list[str]) -> pd.DataFrame:
    """Rows of one list: `COLUMNS`, part, and the id, the file's path from the root."""
    rows, lines = [], []
    for line, content in enumerate(read_text(path).splitlines(), start=1):
        words = content.split()
        if not words:
            continue
        if len(words) < len(COLUMNS):
            raise UserError(f"{path}: line {line}: expected '{' '.join(COLUMNS)}', found {content.strip()!r}")
        # Only a file's name can have blanks.
        rows.append([words[0], " ".join(words[1:-2]), *words[-2:]])
        lines.append(line)
    if not rows:
        raise UserError(f"{path}: no rows")
    table = pd.DataFrame(rows, index=lines, columns=list(COLUMNS), dtype=str)
    table = join_same(table, "filename", ["patient", "class", "source"], path, notes)
    return table.assign(part=part, id=f"{DIRECTORIES[part]}/" + table["filename"])
