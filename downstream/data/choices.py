"""What a user may choose about labelled images: one list of options for argparse, for calls and for every reader."""

from __future__ import annotations

import argparse
from pathlib import Path

from util.cli import seed_number
from util.errors import UserError

AUTO, PUBLISHED, BY_SUBJECT, FOLDS, ALL_TEST = SPLITS = ("auto", "published", "subject", "folds", "test")
ZEROS, ONES, IGNORE = CELL_RULES = ("zeros", "ones", "ignore")
NAMES = ("rsna", "nih", "chexpert", "mimic", "siim", "covidx", "vindr", "padchest", "csv", "tree")
SITES = NAMES[:-1]  # tables and images, not a processed tree
CELLS, CSV, MIMICS = ("chexpert", "mimic", "csv"), ("csv",), ("mimic", "csv", "tree")

# fmt: off
# The data sets that read an option, its help, and argparse's settings.
OPTIONS = {
    "images": (SITES, "folder of the images, if it is not --data_path or several copies are below it", {"type": Path}),
    "csv": (SITES, "table of labels, if it is not below --data_path under its usual name", {"type": Path}),
    "labels": (set(NAMES) - {"covidx"}, "labels to keep (default: those of the data set)", {"nargs": "+"}),
    "where": (SITES, "rows of the table to keep; several values of one column are alternatives",
        {"nargs": "+", "default": [], "metavar": "COLUMN=VALUE"}),
    "split": (NAMES, "auto: the official or published split, if none by subject; published: to the row, even where subjects "
        "are in two parts; subject: 70/15/15%% by subject; folds: none, for grouped folds; test: all images are test images (default: %(default)s)",
        {"choices": SPLITS, "default": AUTO}),
    "split_lists": (NAMES, "lists of a split, text or csv: the first word of a line names an image; images in none are left "
        "out", {"nargs": 3, "type": Path, "metavar": ("TRAIN", "VALID", "TEST")}),
    "split_seed": (NAMES, "seed of the draws by subject (default: %(default)s)", {"type": seed_number, "default": 0}),
    "uncertain": (CELLS, "what -1 counts as: ignore: neither in the loss nor in the AUC; published: 1 for Atelectasis, Edema "
        "and Pleural Effusion, else 0 (default: published for chexpert and mimic, ignore for csv)",
        {"choices": (PUBLISHED, *CELL_RULES)}),
    "empty": (CELLS, "what an empty cell counts as (default: zeros for chexpert and mimic, as published; ignore for csv)",
        {"choices": CELL_RULES}),
    "skip_missing": (SITES, "leave out and count missing images", {"action": "store_true"}),
    "skip_damaged": (NAMES, "leave out, count and list damaged images", {"action": "store_true"}),
    "pretrained_on": (MIMICS, "processed trees that the encoders were pretrained on: counts the test subjects that are in "
        "them", {"nargs": "+", "metavar": "TREE"}),
    "leave_out_pretrained": (MIMICS, "leave these subjects out of the test", {"action": "store_true"}),
    "image_column": (CSV, "csv: column of the image's path, file name or id (default: %(default)s)", {"default": "path"}),
    "label_columns": (CSV, "csv: one column per label, or one column of names joined by --separator (default: %(default)s)",
        {"nargs": "+", "default": ["labels"]}),
    "separator": (CSV, "csv: between the names in a joined column (default: %(default)s)", {"default": "|"}),
    "subject_column": (CSV, "csv: column of the subject (default: subject_id, if present)", {}),
    "split_column": (CSV, "csv: column of train, valid, test (default: split, if there is one)", {}),
    "study": (CSV, "csv: study that its subjects are patients of, e.g. mimic or nih: shows if they trained an encoder", {}),
    "min_certainty": (("tree",), "tree: a finding counts as present from this certainty on (default: %(default)s)",
        {"type": int, "choices": range(1, 6), "default": 3}),
}
# fmt: on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data_path and `OPTIONS`, which `read_from_args` reads."""
    # fmt: off
    parser.add_argument("--dataset", required=True, choices=NAMES, help="which data set")
    parser.add_argument("--data_path", required=True, nargs="+",
        help="its folder, as its site gives it; tree: one or several processed trees")
    # fmt: on
    group = parser.add_argument_group("labelled images")
    for option, (_, helped, settings) in OPTIONS.items():
        group.add_argument(f"--{option}", help=helped, **settings)


def refuse_useless(args: argparse.Namespace) -> None:
    """`UserError` for an option that the data set does not read."""
    for option, (datasets, _, settings) in OPTIONS.items():
        if args.dataset not in datasets and getattr(args, option) not in (None, False, settings.get("default")):
            raise UserError(f"--{option} has no effect with --dataset {args.dataset}; leave it out")
