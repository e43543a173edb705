"""Processed trees: the unified findings of REFLACX's and EGD-CXR's readings, one row per image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from datasets.build import build_dataset
from datasets.tree import entry_subject
from downstream.data.labelled import PARTS
from downstream.data.rows import PART_NAMES
from util.errors import UserError
from util.subjects import subject_key

ANY_FINDING = "Any finding"
NOT_DISEASE = ["Support devices", "Quality issue", "Normal"]  # not counted by ANY_FINDING


def read_tree(paths: Sequence[Path], min_certainty: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and labels as of `downstream.data.readers`: a finding counts as present from certainty `min_certainty` on (3 =
    "possibly", about 50%); yes/no labels as they are; text is left out.

    If an image has several entries it is present if at least half of those that were asked say so. `ANY_FINDING` is
    added: any of them present. The trees' own split is used if it has images to train, validate and test on.
    """
    dataset = build_dataset(paths, use_cache=False)
    rows, findings = [], []
    for i, entry in enumerate(dataset.entries):
        labels, subject = entry.get("labels"), str(entry.get("subject_id") or "").strip()
        if not labels or not subject:
            raise UserError(
                f"{', '.join(map(str, paths))}: entry {i} ({entry['image_path']}) has no labels or no subject_id; prepare "
                "the tree with scripts/prepare_reflacx.py, or use --dataset csv"
            )
        rows.append((str(dataset.files(i).image), subject, PART_NAMES.get(entry.get("split"))))
        findings.append(
            {
                finding: float(value if isinstance(value, bool) else value >= min_certainty)
                for finding, value in labels.items()
                if not isinstance(value, str)
            }
        )
    rows = pd.DataFrame(rows, columns=["id", "subject", "part"])
    votes = pd.DataFrame(findings).sort_index(axis=1).groupby(rows["id"], sort=False).mean()
    labels = (votes >= 0.5).astype("float32").where(votes.notna())
    labels.insert(0, ANY_FINDING, labels.drop(columns=NOT_DISEASE, errors="ignore").max(axis=1))
    rows = rows.drop_duplicates("id")
    return rows if set(rows["part"]) == set(PARTS) else rows.drop(columns="part"), labels


def subjects_of(paths: Sequence[Path]) -> set[str]:
    """`subject_key` of every subject in some trees. `UserError` for an entry that names none."""
    found = {subject_key(entry_subject(entry)) for entry in build_dataset(paths, use_cache=False).entries}
    if "" in found:
        raise UserError(
            f"--pretrained_on {' '.join(map(str, paths))}: an entry names no subject; prepare the tree again"
        )
    return found
