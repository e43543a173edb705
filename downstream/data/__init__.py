"""Labelled images to judge an encoder on: `read_dataset` reads each data set from its own files."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

from downstream.data.chexpert import read_chexpert
from downstream.data.choices import Choices, add_choices, choices_from_args
from downstream.data.covidx import read_covidx
from downstream.data.csv import read_csv
from downstream.data.labelled import LabelledImages
from downstream.data.nih import read_nih
from downstream.data.padchest import read_padchest
from downstream.data.rsna import read_rsna
from downstream.data.siim import read_siim
from downstream.data.tree import read_tree
from downstream.data.vindr import read_vindr
from util.errors import UserError
from util.subjects import MIMIC

TABLE_CHOICES = frozenset({"images", "csv", "labels", "where", "skip_missing"})
CELL_CHOICES = frozenset({"uncertain", "empty"})
CSV_CHOICES = frozenset({"image_column", "label_columns", "separator", "subject_column", "split_column", "study"})
ANY_CHOICES = frozenset({"split", "split_seed", "need_images"})


class Source(NamedTuple):
    """How a data set is read, and which choices it heeds beside `ANY_CHOICES`."""

    read: Callable[[list[Path], Choices], LabelledImages]
    heeds: frozenset[str] = TABLE_CHOICES


DATASETS: dict[str, Source] = {
    "rsna": Source(read_rsna),
    "nih": Source(read_nih),
    "chexpert": Source(read_chexpert, TABLE_CHOICES | CELL_CHOICES),
    "siim": Source(read_siim),
    "covidx": Source(read_covidx, frozenset({"images", "csv", "where", "skip_missing"})),
    "vindr": Source(read_vindr),
    "padchest": Source(read_padchest),
    "csv": Source(read_csv, TABLE_CHOICES | CELL_CHOICES | CSV_CHOICES),
    "tree": Source(read_tree, frozenset({"labels", "min_certainty"})),
}


def read_dataset(name: str, data_path: str | os.PathLike | Sequence, **choices) -> LabelledImages:
    """The labelled images of a data set from the files of its site.

    Args:
        name: of `DATASETS`.
        data_path: its folder, whatever it is called; several only for `tree`.
        choices: see `Choices`.

    Raises:
        UserError: naming the file, line, column or option, and what to do.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: expected one of {', '.join(DATASETS)}")
    paths = [data_path] if isinstance(data_path, (str, os.PathLike)) else list(data_path)
    return _read(name, [Path(path) for path in paths], Choices(**choices))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data_path and the options that `read_from_args` reads."""
    # fmt: off
    parser.add_argument("--dataset", required=True, choices=list(DATASETS), help="which data set")
    helped = "its folder, as its site gives it; tree: one or several processed trees"
    parser.add_argument("--data_path", required=True, nargs="+", help=helped)
    # fmt: on
    add_choices(parser)


def read_from_args(args: argparse.Namespace, *, need_images: bool = True) -> LabelledImages:
    """The data set that the options name; need_images=False reads tables only (--dry_run)."""
    choices = choices_from_args(args, need_images=need_images)
    return _read(args.dataset, [Path(path) for path in args.data_path], choices)


def _read(name: str, paths: list[Path], choices: Choices) -> LabelledImages:
    source = DATASETS[name]
    if len(paths) != 1 and name != "tree":
        raise UserError(f"--data_path: {name} has one folder, {len(paths)} are given")
    default = Choices()
    for choice in (field.name for field in fields(Choices)):
        if choice not in ANY_CHOICES | source.heeds and getattr(choices, choice) != getattr(default, choice):
            raise UserError(f"--{choice} has no effect with --dataset {name}; leave it out")
    own = (choices.study or "").strip().casefold()
    if near := [known for known in (MIMIC, *DATASETS) if re.match(f"{known}[^a-z]", own)]:
        raise UserError(f"--study {choices.study}: if these are patients of {near[0]}, pass --study {near[0]}")
    study = {"tree": MIMIC, "csv": own}.get(name, name)
    return replace(source.read(paths, choices), study=study)
