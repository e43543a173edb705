"""Processed trees: the unified findings of REFLACX's and EGD-CXR's readings, one row per image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

import datasets
from datasets.build import detect_trees
from downstream.data.choices import Choices
from downstream.data.labelled import TEST, TRAIN, VALID, LabelledImages
from downstream.data.rows import check_files, one_spelling
from downstream.data.splits import choose_parts
from util.errors import UserError

ANY_FINDING = "Any finding"
NOT_DISEASE = ("Support devices", "Quality issue", "Normal")  # not counted by ANY_FINDING
PART_NAMES = {"train": TRAIN, "validate": VALID, "test": TEST}
CERTAINTY = (0, 5)


def read_tree(paths: list[Path], choices: Choices) -> LabelledImages:
    """A finding counts as present from certainty `min_certainty` on (3 = "possibly", about 50%); yes/no labels
    as they are; text is left out.

    Where an image has several entries it is present if at least half of those that were asked say so.
    `ANY_FINDING` is added: any of them present. The trees' own split is used where it has images to train,
    validate and test on.
    """
    if not CERTAINTY[0] < choices.min_certainty <= CERTAINTY[1]:
        raise UserError(f"--min_certainty {choices.min_certainty:g}: expected more than 0, at most 5")
    name = ", ".join(map(str, paths))
    detect_trees(paths)  # none twice
    dataset = datasets.build_dataset(paths, use_cache=False)
    rows = []
    for i, entry in enumerate(dataset.entries):
        labels = entry.get("labels")
        if not isinstance(labels, dict) or not str(entry.get("subject_id") or "").strip():
            raise UserError(
                f"{name}: entry {i} ({entry['image_path']}) has no labels or no subject_id; prepare the tree "
                "with scripts/prepare_reflacx.py, or use --dataset csv"
            )
        row = {
            "file": str(dataset.files(i).image),
            "subject": str(entry["subject_id"]).strip(),
            "split": entry.get("split"),
        }
        for finding, value in labels.items():
            if isinstance(value, bool):
                row[f"label {finding}"] = float(value)
            elif isinstance(value, (int, float)):
                row[f"label {finding}"] = float(value >= choices.min_certainty)
        rows.append(row)
    table = pd.DataFrame(rows)
    columns = sorted(column for column in table.columns if column.startswith("label "))
    if not columns:
        raise UserError(f"{name}: no entry has a finding with a certainty")
    grouped = table.groupby("file", sort=False)
    votes = grouped[columns].mean().to_numpy()
    values = np.where(np.isnan(votes), np.nan, (votes >= 0.5).astype(float))
    findings = [column.removeprefix("label ") for column in columns]
    disease = np.array([finding not in NOT_DISEASE for finding in findings])
    present = (values[:, disease] == 1).any(1).astype(float)
    known = ~np.isnan(values[:, disease]).all(1)
    values = np.column_stack([np.where(known, present, np.nan), values])
    first = grouped.first()
    check_files("tree", list(first.index), [Path(file) for file in first.index])
    notes: list[str] = []
    subjects = one_spelling("tree", first["subject"], notes)
    official = first["split"].map(PART_NAMES) if "split" in first else pd.Series(dtype=str)
    whole = official.notna().all() and set(official) == set(PART_NAMES.values())
    parts = choose_parts(choices, "tree", subjects, official.to_numpy(str) if whole else None, notes)
    label_names = [ANY_FINDING, *findings]
    kept = choices.labels or tuple(label_names)
    if unknown := [label for label in kept if label not in label_names]:
        raise UserError(f"tree: --labels {unknown[0]}: has {', '.join(label_names)}")
    return LabelledImages(
        "tree",
        list(first.index),
        [Path(file) for file in first.index],
        subjects,
        parts,
        list(kept),
        values[:, [label_names.index(label) for label in kept]].astype(np.float32),
        notes=notes,
    )
