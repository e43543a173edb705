"""What a user may choose about labelled images: one list of options for argparse, for calls and for every reader."""

from __future__ import annotations

import argparse
from pathlib import Path

from util.cli import finite_float, seed_number
from util.errors import UserError

AUTO, PUBLISHED, BY_SUBJECT, FOLDS, ALL_TEST = SPLITS = ("auto", "published", "subject", "folds", "test")
ZEROS, ONES, IGNORE = CELL_RULES = ("zeros", "ones", "ignore")
NAMES = ("rsna", "nih", "chexpert", "mimic", "siim", "covidx", "vindr", "padchest", "csv", "tree")
SITES = NAMES[:-1]  # tables and images, not a processed tree
CELLS, CSV, MIMICS = ("chexpert", "mimic", "csv"), ("csv",), ("mimic", "csv", "tree")

# fmt: off
# The data sets that read an option, and argparse's settings of it.
OPTIONS = {
    "images": (SITES, {"type": Path, "help": "folder of the images, if it is not --data_path or several copies are below it"}),
    "csv": (SITES, {"type": Path, "help": "table of labels, if it is not below --data_path under its usual name"}),
    "labels": (set(NAMES) - {"covidx"}, {"nargs": "+", "help": "labels to keep (default: those of the data set)"}),
    "where": (SITES, {"nargs": "+", "default": [], "metavar": "COLUMN=VALUE",
        "help": "rows of the table to keep; several values of one column are alternatives"}),
    "split": (NAMES, {"choices": SPLITS, "default": AUTO,
        "help": "auto: the official or published split, if none by subject; published: to the row, "
        "even where subjects are in two parts; subject: 70/15/15%% by subject; folds: none, for grouped "
        "folds; test: all images are test images (default: %(default)s)"}),
    "split_lists": (NAMES, {"nargs": 3, "type": Path, "metavar": ("TRAIN", "VALID", "TEST"),
        "help": "lists of a split, text or csv: the first word of a line names an image; images in none are left out"}),
    "split_seed": (NAMES, {"type": seed_number, "default": 0, "help": "of the draws by subject (default: %(default)s)"}),
    "uncertain": (CELLS, {"choices": (PUBLISHED, *CELL_RULES),
        "help": "what -1 counts as: ignore: neither in the loss nor in the AUC; published: 1 for Atelectasis, Edema "
        "and Pleural Effusion, else 0 (default: published for chexpert and mimic, ignore for csv)"}),
    "empty": (CELLS, {"choices": CELL_RULES,
        "help": "what an empty cell counts as (default: zeros for chexpert and mimic, as published; ignore for csv)"}),
    "skip_missing": (SITES, {"action": "store_true", "help": "leave out and count missing images"}),
    "skip_damaged": (NAMES, {"action": "store_true", "help": "leave out, count and list damaged images"}),
    "pretrained_on": (MIMICS, {"nargs": "+", "metavar": "TREE",
        "help": "processed trees that the encoders were pretrained on: counts the test subjects that are in them"}),
    "leave_out_pretrained": (MIMICS, {"action": "store_true", "help": "leave these subjects out of the test"}),
    "image_column": (CSV, {"default": "path", "help": "csv: column of the image's path, file name or id (default: %(default)s)"}),
    "label_columns": (CSV, {"nargs": "+", "default": ["labels"],
        "help": "csv: one column per label, or one column of names joined by --separator (default: %(default)s)"}),
    "separator": (CSV, {"default": "|", "help": "csv: between the names in a joined column (default: %(default)s)"}),
    "subject_column": (CSV, {"help": "csv: column of the subject (default: subject_id, if there is one)"}),
    "split_column": (CSV, {"help": "csv: column of train, valid, test (default: split, if there is one)"}),
    "study": (CSV, {"help": "csv: study that its subjects are patients of, e.g. mimic or nih: shows if they trained an encoder"}),
    "min_certainty": (("tree",), {"type": finite_float, "default": 3,
        "help": "tree: a finding counts as present from this certainty (0-5) on (default: %(default)s)"}),
}
# fmt: on


def add_choices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labelled images")
    for option, (_, settings) in OPTIONS.items():
        group.add_argument(f"--{option}", **settings)


def default_of(option: str) -> object:
    settings = OPTIONS[option][1]
    return settings.get("default", False if "action" in settings else None)


def refuse_useless(choices: argparse.Namespace, dataset: str) -> None:
    """`UserError` for an option that this data set does not read."""
    for option, (datasets, _) in OPTIONS.items():
        if dataset not in datasets and getattr(choices, option) != default_of(option):
            raise UserError(f"--{option} has no effect with --dataset {dataset}; leave it out")
