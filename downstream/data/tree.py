"""Processed trees: the unified findings of REFLACX's and EGD-CXR's readings, one row per image."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.build import build_dataset
from datasets.tree import entry_subject
from downstream.data.labelled import PARTS, TEST, TRAIN, VALID
from downstream.data.rows import Rows, one_spelling
from util.errors import UserError
from util.subjects import subject_key

ANY_FINDING = "Any finding"
NOT_DISEASE = ["Support devices", "Quality issue", "Normal"]  # not counted by ANY_FINDING
PART_NAMES = {"train": TRAIN, "validate": VALID, "test": TEST}


def read_tree(paths: Sequence[Path], choices: argparse.Namespace, notes: list[str]) -> Rows:
    """A finding counts as present from certainty `min_certainty` on (3 = "possibly", about 50%); yes/no labels
    as they are; text is left out.

    If an image has several entries it is present if at least half of those that were asked say so. `ANY_FINDING` is
    added: any of them present. The trees' own split is used if it has images to train, validate and test on.
    """
    if not 0 < choices.min_certainty <= 5:
        raise UserError(f"--min_certainty {choices.min_certainty:g}: expected more than 0, at most 5")
    name = ", ".join(map(str, paths))
    dataset = build_dataset(paths, use_cache=False)
    rows, findings = [], []
    for i, entry in enumerate(dataset.entries):
        labels, subject = entry.get("labels"), str(entry.get("subject_id") or "").strip()
        if not isinstance(labels, dict) or not subject:
            raise UserError(
                f"{name}: entry {i} ({entry['image_path']}) has no labels or no subject_id; prepare the tree "
                "with scripts/prepare_reflacx.py, or use --dataset csv"
            )
        rows.append({"id": str(dataset.files(i).image), "subject": subject, "part": PART_NAMES.get(entry.get("split"))})
        certainties = {finding: value for finding, value in labels.items() if isinstance(value, (bool, int, float))}
        findings.append(
            {k: float(v if isinstance(v, bool) else v >= choices.min_certainty) for k, v in certainties.items()}
        )
    rows, values = pd.DataFrame(rows), pd.DataFrame(findings)
    if values.empty:
        raise UserError(f"{name}: no entry has a finding with a certainty")
    votes = values[sorted(values)].groupby(rows["id"], sort=False).mean()
    labels = (votes >= 0.5).astype("float32").where(votes.notna())
    disease = labels.drop(columns=NOT_DISEASE, errors="ignore")
    labels.insert(0, ANY_FINDING, disease.max(axis=1))
    rows = rows.drop_duplicates("id")
    rows["subject"] = one_spelling("tree", rows["subject"], notes)
    if rows["part"].isna().any() or set(rows["part"]) != set(PARTS):
        del rows["part"]
    return Rows(rows, labels, by_part=False)


def subjects_of(paths: Sequence[Path]) -> set[str]:
    """`subject_key` of every subject in some trees. `UserError` for an entry that names none."""
    found = {subject_key(entry_subject(entry)) for entry in build_dataset(paths, use_cache=False).entries}
    if "" in found:
        raise UserError(
            f"--pretrained_on {' '.join(map(str, paths))}: an entry names no subject; prepare the tree again"
        )
    return found
