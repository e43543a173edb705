"""Labelled images to judge an encoder on: a reader makes one table of a data set's own files, and `read_from_args` does the
rest for all of them: labels, parts, image files, order."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from downstream.data.choices import ALL_TEST, AUTO, BY_SUBJECT, FOLDS, PUBLISHED, refuse_useless
from downstream.data.folder import Folder
from downstream.data.labelled import MULTICLASS, MULTILABEL, PARTS, TEST, LabelledImages
from downstream.data.readers import READERS
from downstream.data.rows import Source
from downstream.data.splits import listed_parts, split_by_subject
from downstream.data.tree import read_tree, subjects_of
from util.errors import UserError
from util.subjects import MIMIC, subject_key
from util.tables import same_subjects


def read_from_args(args: argparse.Namespace, *, need_images: bool = True) -> LabelledImages:
    """The data set that the options name; need_images=False reads tables only (--dry_run).

    Raises:
        UserError: naming the file, line, column or option, and what to do.
    """
    name, paths, notes, tallies = args.dataset, [Path(path) for path in args.data_path], [], {}
    refuse_useless(args)
    if name == "tree":
        table, labels = read_tree(paths, args.min_certainty)
    else:
        if len(paths) > 1:
            raise UserError(f"--data_path: {name} has one folder, {len(paths)} are given")
        folder, (reader, patterns) = Folder(paths[0]), READERS[name]
        path = args.csv or folder.table(*patterns)
        notes.append(f"{name}: labels of {path.name}")
        table, labels = reader(Source(path, folder, args, notes))
    table, labels = table.reset_index(drop=True), labels.reset_index(drop=True)
    for label in args.labels or ():
        if label not in labels:
            raise UserError(f"{name}: --labels {label}: has {', '.join(labels)}")
    labels = labels[args.labels or list(labels)]
    if "subject" not in table:
        table["subject"] = table["id"]
        notes.append(
            f"warning: {name}: the table names no patients (csv: --subject_column), so every image counts as its own "
            "subject, and a patient's images may be on both sides of the split"
        )
    if name in ("csv", "tree"):
        table["subject"], merged = same_subjects(list(table["subject"]))
        if merged:
            notes.append(f"warning: {name}: subjects {merged[0]} and {len(merged) - 1} more such are taken for one")
    if args.split_lists:
        if args.split != AUTO:
            raise UserError(f"--split {args.split}: --split_lists says who trains and tests; leave one of them out")
        table["part"] = listed_parts(list(table["id"]), dict(zip(PARTS, args.split_lists)), notes)
    if "part" in table and (unlisted := table["part"].isna()).any():
        notes.append(f"{name}: {unlisted.sum()} images are in no list of the split and left out")
        table, labels = (frame[~unlisted].reset_index(drop=True) for frame in (table, labels))
    parts = _parts(args, table, notes)
    in_two_parts = args.split == PUBLISHED or bool(args.split_lists)
    if in_two_parts and (shared := (pd.Series(parts).groupby(table["subject"]).nunique() > 1).sum()):
        notes.append(f"warning: {name}: {shared} patients are in two parts of this split")
    if name == "tree":
        files = list(map(Path, table["id"]))
    else:
        place = Folder(args.images, "--images") if args.images else folder
        files = place.images(table["id"], notes) if need_images else [place.root / image for image in table["id"]]
    out = np.array([file is None for file in files])
    if out.any():
        if out.all() or not args.skip_missing:
            raise UserError(place.missing_message(list(table["id"][out]), len(table)))
        tallies["missing images"] = Counter(parts[out])
        notes.append(f"{name}: {out.sum()} of {len(table)} images are missing and left out")
    _check_files(name, table["id"], files)
    study = (args.study or "").strip().casefold()
    # Another word for a known study ("MIMIC-CXR") would tell of no overlap with it.
    study = next((known for known in (MIMIC, *READERS) if study.startswith(known)), study)
    study = {"tree": MIMIC, "csv": study}.get(name, name)
    if args.pretrained_on or args.leave_out_pretrained:
        out |= _tested_pretrained(args, study, table["subject"], parts, tallies, notes)
    order = np.arange(len(table))
    if name != "tree":
        order = np.argsort([PARTS.index(part) if part else 0 for part in parts], kind="stable")
    return LabelledImages(
        name,
        ids=list(table["id"]),
        files=files,
        subjects=table["subject"].to_numpy(str),
        parts=parts,
        label_names=list(labels),
        labels=labels.to_numpy(np.float32),
        task=MULTICLASS if name == "covidx" else MULTILABEL,
        strong_augmentation=name in ("nih", "chexpert"),
        notes=notes,
        shared_subjects=in_two_parts,
        study=study,
        tallies=tallies,
    ).take(order[~out[order]])


def _parts(args: argparse.Namespace, table: pd.DataFrame, notes: list[str]) -> np.ndarray:
    """The part of each image as --split says: str [N]."""
    if args.split in (FOLDS, ALL_TEST):
        return np.full(len(table), "" if args.split == FOLDS else TEST, "<U5")
    if "part" in table and args.split != BY_SUBJECT:
        return table["part"].to_numpy(str)
    if args.split == PUBLISHED:
        raise UserError(f"{args.dataset}: --split published: there is no such split here; use --split subject")
    if args.split == AUTO:
        notes.append(
            f"{args.dataset}: no split is given, so 70% of the images train, 15% validate and 15% test, drawn by "
            f"subject with --split_seed {args.split_seed}"
        )
    return split_by_subject(args.dataset, table["subject"].to_numpy(str), args.split_seed)


def _tested_pretrained(
    args: argparse.Namespace, study: str, subjects: pd.Series, parts: np.ndarray, tallies: dict, notes: list[str]
) -> np.ndarray:
    """Which images --leave_out_pretrained leaves out, bool [N]; `tallies` counts the subjects that pretraining saw."""
    if not args.pretrained_on:
        raise UserError("--leave_out_pretrained: give the trees with --pretrained_on")
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
        if file and file.exists():
            status = file.stat()
            other = owners.setdefault((status.st_dev, status.st_ino), image)
            if other != image:
                raise UserError(f"{name}: images {other!r} and {image!r} are the same file, {file}; keep one of them")
