"""Images with findings to judge a backbone on: from a processed tree, or any folder with a CSV."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

import datasets
from datasets.transforms import centre_box, crop_resize_flip
from datasets.tree import SampleError
from util.errors import UserError
from util.radiograph import read_radiograph
from util.tables import read_table

ANY_FINDING = "Any finding"
NO_FINDING = "No Finding"  # ChestX-ray14's word for an empty list
NOT_DISEASE = ("Support devices", "Quality issue", "Normal")  # not counted by ANY_FINDING
TRAIN, VALIDATE, TEST = "train", "validate", "test"
SUBJECT_COLUMN, SPLIT_COLUMN = "subject_id", "split"  # of a CSV, where it has them
SPLIT_NAMES = {"train": TRAIN, "validate": VALIDATE, "val": VALIDATE, "valid": VALIDATE, "test": TEST}


@dataclass(frozen=True)
class LabelledImages:
    """N images and F findings.

    Attributes:
        paths: the image files.
        findings: F names.
        labels: float [N, F], 1 present, 0 absent, NaN not known.
        subjects: N identifiers; the images of one subject never stand on both sides of a split.
        splits: N of train, validate, test, or None where the data don't tell.
    """

    paths: list[Path]
    findings: list[str]
    labels: np.ndarray
    subjects: np.ndarray
    splits: np.ndarray | None

    def __len__(self) -> int:
        return len(self.paths)

    def check_splits(self) -> None:
        """`UserError` if there are no splits, none to train or test on, or a subject on both sides."""
        if self.splits is None:
            raise UserError("--split column: these data have no split column; use --split kfold")
        for name in (TRAIN, TEST):
            if not (self.splits == name).any():
                raise UserError(f"--split column: no image is of split {name}; use --split kfold")
        frame = pd.DataFrame(
            {"subject": self.subjects, "test": self.splits == TEST, "validate": self.splits == VALIDATE}
        )
        for name in ("test", "validate"):
            shared = frame.groupby("subject")[name].agg(["any", "all"])
            mixed = shared.index[shared["any"] & ~shared["all"]]
            if len(mixed):
                raise UserError(
                    f"--split column: subject {mixed[0]} (and {len(mixed) - 1} more) has images inside and "
                    f"outside of {name}; mend the split column, or use --split kfold"
                )


def read_tree_labels(data_path: str | Sequence[str], *, min_certainty: float = 3) -> LabelledImages:
    """The unified findings of processed trees, one row per image.

    A finding counts as present from certainty `min_certainty` (of 0 to 5; 3 = "possibly", about 50%)
    on; yes/no labels as they are; text is left out. Where an image has several entries it is present
    if at least half of those that were asked say so. `ANY_FINDING` is added: any of them present.

    Raises:
        UserError: no tree, or no labels or subjects in its index.
    """
    dataset = datasets.build_dataset(data_path, use_cache=False)
    rows = []
    for i, entry in enumerate(dataset.entries):
        labels = entry.get("labels")
        if not isinstance(labels, dict) or "subject_id" not in entry:
            raise UserError(
                f"{_text(data_path)}: entry {i} ({entry['image_path']}) has no labels or no subject_id; "
                "prepare the tree with scripts/prepare_reflacx.py, or name labels with --csv"
            )
        row = {
            "path": str(dataset.files(i).image),
            "subject": str(entry["subject_id"]),
            "split": entry.get("split"),
        }
        for finding, value in labels.items():
            if isinstance(value, bool):
                row[f"label {finding}"] = float(value)
            elif isinstance(value, (int, float)):
                row[f"label {finding}"] = float(value >= min_certainty)
        rows.append(row)
    table = pd.DataFrame(rows)
    columns = sorted(name for name in table.columns if name.startswith("label "))
    if not columns:
        raise UserError(f"{_text(data_path)}: no entry has a finding with a certainty")
    grouped = table.groupby("path", sort=False)
    votes = grouped[columns].mean().to_numpy()
    labels = np.where(np.isnan(votes), np.nan, (votes >= 0.5).astype(float))
    findings = [name.removeprefix("label ") for name in columns]
    disease = np.array([finding not in NOT_DISEASE for finding in findings])
    present = (labels[:, disease] == 1).any(1)
    known = ~np.isnan(labels[:, disease]).all(1)
    labels = np.column_stack([np.where(known, present.astype(float), np.nan), labels])
    first = grouped.first()
    splits = first["split"].to_numpy(object) if "split" in first and first["split"].notna().all() else None
    images = LabelledImages(
        [Path(path) for path in first.index],
        [ANY_FINDING, *findings],
        labels,
        first["subject"].to_numpy(str),
        splits,
    )
    images.check_splits()
    return images


def read_csv_labels(
    csv: str | os.PathLike,
    images: str | os.PathLike,
    *,
    path_column: str = "path",
    label_column: str = "labels",
    subject_column: str = SUBJECT_COLUMN,
    split_column: str = SPLIT_COLUMN,
) -> LabelledImages:
    """Labels of any image folder from a CSV: a path and findings joined by "|" in each row.

    "No Finding" and an empty cell mean none. Without a column of the default name every image is a
    subject of its own, or there are no splits; a column of another name must be there. E.g.
    ChestX-ray14: path_column "Image Index", label_column "Finding Labels", subject_column "Patient ID".

    Raises:
        UserError: missing column or image, an image named twice, or no finding at all.
    """
    csv, images = Path(csv), Path(images)
    text = (path_column, label_column)
    named = [
        column
        for column, default in ((subject_column, SUBJECT_COLUMN), (split_column, SPLIT_COLUMN))
        if column != default
    ]
    table = read_table(csv, (*text, *named), text=text)
    if table.empty:
        raise UserError(f"{csv}: no rows")
    paths = [images / name for name in table[path_column]]
    lacking = [path for path in paths if not path.is_file()]
    if lacking:
        raise UserError(
            f"{csv}: {len(lacking)} of {len(paths)} images are not there, e.g. {lacking[0]}; check --images "
            f"and column {path_column!r}"
        )
    if len(set(paths)) != len(paths):
        twice = table[path_column][table[path_column].duplicated()].iloc[0]
        raise UserError(
            f"{csv}: {twice} stands in more than one row; one row per image, findings joined by |"
        )
    present = [_split_findings(cell) for cell in table[label_column]]
    findings = sorted(set().union(*present))
    if not findings:
        raise UserError(f"{csv}: column {label_column!r} has no finding in any row")
    labels = np.array([[finding in row for finding in findings] for row in present], float)
    subjects = table[subject_column].astype(str) if subject_column in table else pd.Series(map(str, paths))
    splits = None
    if split_column in table:
        names = table[split_column].astype(str).str.strip().str.lower()
        unknown = names[~names.isin(SPLIT_NAMES.keys())]
        if len(unknown):
            raise UserError(
                f"{csv}: column {split_column!r} has {unknown.iloc[0]!r}; expected train, validate or test"
            )
        splits = names.map(SPLIT_NAMES).to_numpy(object)
    return LabelledImages(paths, findings, labels, subjects.to_numpy(str), splits)


def _split_findings(cell: str) -> set[str]:
    return {part.strip() for part in cell.split("|")} - {"", NO_FINDING}


def _text(data_path: str | Iterable[str]) -> str:
    return data_path if isinstance(data_path, str) else ", ".join(map(str, data_path))


def read_sample(path: Path) -> np.ndarray:
    """`read_radiograph`, whose error stays one line when a loader worker meets it."""
    try:
        return read_radiograph(path)
    except UserError as error:
        raise SampleError(str(error)) from None


class Squares(Dataset):
    """Images as uint8 [1, S, S]: short side resized to S, centre square, as pretraining shows them whole."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths = list(paths)
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        gray = read_sample(self.paths[index])
        return crop_resize_flip([gray], centre_box(*gray.shape), (self.size, self.size))


def normalize(gray: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [B, 1, H, W] -> float [B, 3, H, W], scaled to 0..1, repeated and normalised."""
    mean_, std_ = (torch.tensor(values, device=gray.device).view(1, -1, 1, 1) for values in (mean, std))
    return (gray.float() / 255 - mean_) / std_
