"""PadChest: PA and AP images, findings from its lists, split by patient."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from downstream.data.choices import Choices
from downstream.data.folder import Folder
from downstream.data.labelled import LabelledImages
from downstream.data.rows import check_ids, join_same, labelled_images, one_hot, read_rows
from downstream.data.splits import choose_parts
from util.errors import UserError

TABLE = "PADCHEST_chest_x_ray_images_labels*.csv"
ID, LABELS, PATIENT, VIEW = "ImageID", "Labels", "PatientID", "Projection"
FRONTAL = ("PA", "AP")
NO_FINDING = ("normal", "exclude", "unchanged", "suboptimal study", "")
COMMON = 0.01  # share of the images that a label needs to be among the default ones


def read_padchest(paths: list[Path], choices: Choices) -> LabelledImages:
    """The table's Labels are Python lists in text; rows without one are left out.

    Labels are those that 1% of the images have, unless --labels names others.
    """
    folder = Folder(paths[0])
    path = choices.csv or folder.table(TABLE)
    table = read_rows(path, [ID, LABELS, PATIENT, VIEW], choices)
    check_ids(table, ID, path)
    check_ids(table, PATIENT, path, subjects=True)
    notes: list[str] = []
    frontal = table[table[VIEW].isin(FRONTAL)]
    known = frontal[~frontal[LABELS].isin(("", "nan"))]  # the real table has the word in one row
    if known.empty:
        raise UserError(f"{path}: no row has {VIEW} {' or '.join(FRONTAL)} and {LABELS}")
    notes.append(
        f"padchest: {len(table) - len(frontal)} images of other projections than {' and '.join(FRONTAL)} and "
        f"{len(frontal) - len(known)} without labels are left out"
    )
    known = join_same(known, ID, [LABELS, PATIENT], path, notes)
    rows = [_labels(cell, path, line) for line, cell in zip(known.index, known[LABELS], strict=True)]
    counts = Counter(label for row in rows for label in row)
    if choices.labels is None:
        names = sorted(label for label, count in counts.items() if count >= COMMON * len(rows))
        notes.append(f"padchest: the {len(names)} of {len(counts)} labels that {COMMON:.0%} of the images have")
    else:
        names = sorted(counts)
    subjects = known[PATIENT].to_numpy(str)
    return labelled_images(
        "padchest",
        folder,
        choices,
        ids=list(known[ID]),
        subjects=subjects,
        parts=choose_parts(choices, "padchest", subjects, None, notes),
        labels=(names, one_hot(rows, names)),
        notes=notes,
    )


def _labels(cell: str, path: Path, line: int) -> set[str]:
    try:
        found = ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise UserError(f"{path}: line {line}, column {LABELS!r}: {cell[:60]!r} is no list of labels")
    return {label.strip() for label in found} - set(NO_FINDING)
