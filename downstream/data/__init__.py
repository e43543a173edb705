"""Labelled images to judge an encoder on: a reader makes one table of a data set's own files, and `read_from_args` does the
rest for all of them: labels, parts, image files, order."""

from __future__ import annotations

import argparse
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data import choices
from downstream.data.choices import ALL_TEST, AUTO, BY_SUBJECT, FOLDS, OPTIONS
from downstream.data.csv import read_csv
from downstream.data.folder import Folder
from downstream.data.labelled import PARTS, TEST, LabelledImages
from downstream.data.readers import (
    read_chexpert,
    read_covidx,
    read_mimic,
    read_nih,
    read_padchest,
    read_rsna,
    read_siim,
    read_vindr,
)
from downstream.data.splits import UNLISTED, listed_parts, split_by_subject
from downstream.data.tree import read_tree, subjects_of
from util.errors import UserError
from util.subjects import MIMIC, subject_key

DATASETS = {
    "rsna": read_rsna,
    "nih": read_nih,
    "chexpert": read_chexpert,
    "mimic": read_mimic,
    "siim": read_siim,
    "covidx": read_covidx,
    "vindr": read_vindr,
    "padchest": read_padchest,
    "csv": read_csv,
    "tree": read_tree,
}
RESERVED = {"id": "split.csv", "subject": "split.csv", "split": "split.csv", "mean": "results.csv"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data_path and `OPTIONS`, which `read_from_args` reads."""
    # fmt: off
    parser.add_argument("--dataset", required=True, choices=list(DATASETS), help="which data set")
    parser.add_argument("--data_path", required=True, nargs="+",
        help="its folder, as its site gives it; tree: one or several processed trees")
    # fmt: on
    choices.add_choices(parser)


def read_dataset(
    name: str, data_path: str | os.PathLike | Sequence, *, need_images: bool = True, **chosen: object
) -> LabelledImages:
    """`read_from_args` from code: a data set of `DATASETS`, its folder (several for `tree`), and `OPTIONS` by name."""
    if unknown := chosen.keys() - OPTIONS.keys():
        raise TypeError(f"no such option: {min(unknown)}")
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
    values = {option: choices.default_of(option) for option in OPTIONS} | chosen
    return read_from_args(argparse.Namespace(dataset=name, data_path=paths, **values), need_images=need_images)


def read_from_args(args: argparse.Namespace, *, need_images: bool = True) -> LabelledImages:
    """The data set that the options name; need_images=False reads tables only (--dry_run).

    Raises:
        UserError: naming the file, line, column or option, and what to do.
    """
    name, paths, notes = args.dataset, [Path(path) for path in args.data_path], []
    choices.refuse_useless(args, name)
    if len(paths) != 1 and name != "tree":
        raise UserError(f"--data_path: {name} has one folder, {len(paths)} are given")
    own = (args.study or "").strip().casefold()
    if near := [known for known in (MIMIC, *DATASETS) if re.match(f"{known}[^a-z]", own)]:
        raise UserError(f"--study {args.study}: if these are patients of {near[0]}, pass --study {near[0]}")
    folder = paths if name == "tree" else Folder(paths[0])
    rows = DATASETS[name](folder, args, notes)
    table, labels = (frame.reset_index(drop=True) for frame in (rows.table, rows.labels))
    if args.labels:
        if unknown := [label for label in args.labels if label not in labels]:
            raise UserError(f"{name}: --labels {unknown[0]}: has {', '.join(labels)}")
        labels = labels[args.labels]
    for label in labels.columns:
        if label in RESERVED:
            raise UserError(f"{name}: label {label!r} is a column of {RESERVED[label]}; give the label another name")
    if rows.no_patients and table["subject"].is_unique:
        notes.append(
            f"warning: {name}: every image counts as its own subject ({rows.no_patients}); a patient's images may be on "
            "both sides of the split"
        )
    if args.split_lists:
        if args.split != AUTO:
            raise UserError(f"--split {args.split}: --split_lists says who trains and tests; leave one of them out")
        named = table["file" if "file" in table else "id"]
        table["part"] = listed_parts(list(named), dict(zip(PARTS, args.split_lists)), notes)
    if "part" in table and (unlisted := table["part"] == UNLISTED).any():
        notes.append(f"{name}: {unlisted.sum()} images are in no list of the split and left out")
        table, labels = table[~unlisted].reset_index(drop=True), labels[~unlisted]
    parts = _parts(args, table, notes)
    in_two_parts = rows.shared_subjects or bool(args.split_lists)
    if in_two_parts:
        shared = (pd.Series(parts).groupby(table["subject"]).nunique() > 1).sum()
        notes.append(f"warning: {name}: {shared} patients are in two parts of this split")
    files = list(map(Path, table["id"])) if name == "tree" else _files(args, folder, table, need_images, notes)
    _check_files(name, table["id"], files)
    study = {"tree": MIMIC, "csv": own}.get(name, name)
    out, tallies = np.array([file is None for file in files]), {}
    if out.any():
        tallies["missing images"] = Counter(parts[out])
    if args.pretrained_on or args.leave_out_pretrained:
        out |= _tested_pretrained(args, study, table["subject"], parts, tallies, notes)
    order = np.argsort([PARTS.index(part) if part else 0 for part in parts], kind="stable")
    kept = [i for i in (order if rows.by_part else range(len(table))) if not out[i]]
    return LabelledImages(
        name,
        ids=[table["id"][i] for i in kept],
        files=[files[i] for i in kept],
        subjects=table["subject"].to_numpy(str)[kept],
        parts=parts[kept],
        label_names=list(labels),
        labels=labels.to_numpy(np.float32)[kept],
        task=rows.task,
        strong_augmentation=rows.strong_augmentation,
        notes=notes,
        shared_subjects=in_two_parts,
        study=study,
        tallies=tallies,
    )


def _parts(args: argparse.Namespace, table: pd.DataFrame, notes: list[str]) -> np.ndarray:
    """The part of each image as --split says: str [N]."""
    if args.split in (FOLDS, ALL_TEST):
        return np.full(len(table), "" if args.split == FOLDS else TEST, "<U5")
    if "part" in table and args.split != BY_SUBJECT:
        return table["part"].to_numpy(str)
    if args.split not in (AUTO, BY_SUBJECT):
        raise UserError(f"{args.dataset}: --split {args.split}: there is no such split here; use --split subject")
    if args.split == AUTO:
        notes.append(
            f"{args.dataset}: no split is given, so 70% of the images train, 15% validate and 15% test, drawn by "
            f"subject with --split_seed {args.split_seed}"
        )
    return split_by_subject(args.dataset, table["subject"].to_numpy(str), args.split_seed)


def _files(
    args: argparse.Namespace, folder: Folder, table: pd.DataFrame, need_images: bool, notes: list[str]
) -> list[Path | None]:
    """Where the images are, None for those that --skip_missing leaves out; their places unseen if not `need_images`."""
    place = Folder(args.images, "--images") if args.images else folder
    names = list(table["file" if "file" in table else "id"])
    if not need_images:
        return [place.root / name for name in names]
    files = place.images(names, notes)
    missing = [i for i, file in enumerate(files) if file is None]
    if missing:
        if not args.skip_missing or len(missing) == len(files):
            raise UserError(place.missing_message([names[i] for i in missing], len(names)))
        notes.append(f"{args.dataset}: {len(missing)} of {len(names)} images are missing and left out")
    return files


def _tested_pretrained(
    args: argparse.Namespace, study: str, subjects: pd.Series, parts: np.ndarray, tallies: dict, notes: list[str]
) -> np.ndarray:
    """Which images --leave_out_pretrained leaves out, bool [N]; `tallies` counts the subjects that pretraining saw."""
    if not args.pretrained_on:
        raise UserError("--leave_out_pretrained: name the trees by --pretrained_on")
    if study != MIMIC:
        raise UserError("--pretrained_on: its subjects are MIMIC's; if a csv's are too, pass --study mimic")
    seen = subjects.map(subject_key).isin(subjects_of(args.pretrained_on)).to_numpy()
    tallies["subjects of pretraining"] = subjects[seen].groupby(parts[seen]).nunique().to_dict()
    tested = seen & np.isin(parts, ("", TEST))
    if args.leave_out_pretrained:
        tallies["left out for it, images"] = Counter(parts[tested])
        return tested
    if tested.any():
        notes.append(
            "warning: test subjects are in the trees of --pretrained_on; --leave_out_pretrained leaves them out"
        )
    return np.zeros(len(parts), bool)


def _check_files(name: str, ids: Sequence[str], files: Sequence[Path | None]) -> None:
    """`UserError` if two ids are the same file, by a link too: it could train under one and test under the other."""
    owners: dict[object, str] = {}
    for image, file in zip(ids, files, strict=True):
        if file is None:
            continue
        try:
            status = file.stat()
            key = (status.st_dev, status.st_ino)
        except OSError:  # read from the table alone
            key = os.path.abspath(file)
        if (other := owners.setdefault(key, image)) != image:
            raise UserError(f"{name}: images {other!r} and {image!r} are the same file, {file}; keep one of them")
