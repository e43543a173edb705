"""Command-line options that say where labelled images are."""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets.downstream.labels import LabelledImages, read_csv_labels, read_tree_labels
from util.cli import finite_float
from util.errors import UserError


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that say where images and findings are, read by `read_labels`."""
    add = parser.add_argument_group("images and findings").add_argument
    add(
        "--data_path",
        nargs="+",
        help="processed tree or trees, whose index has unified findings; with --csv: as --images",
    )
    add(
        "--min_certainty",
        type=finite_float,
        default=3,
        help="a tree's finding is present from this certainty (0-5) on",
    )
    add("--csv", help="instead of a tree: a CSV with one image per row")
    add("--images", help="folder that the CSV's paths start from (default: the CSV's own)")
    add("--path_column", default="path", help="CSV column of the image's path")
    add("--label_column", default="labels", help='CSV column of its findings, joined by "|"')
    add("--subject_column", default="subject_id", help="CSV column of the subject, if there is one")
    add("--split_column", default="split", help="CSV column with train, validate or test, if there is one")


def read_labels(args: argparse.Namespace) -> LabelledImages:
    """The labelled images that the options name. Raises `UserError`."""
    if args.csv is None:
        if args.data_path is None:
            raise UserError("give --data_path, or --csv with --images")
        return read_tree_labels(args.data_path, min_certainty=args.min_certainty)
    folders = [args.images] if args.images else args.data_path or [Path(args.csv).parent]
    if len(folders) != 1 or (args.images and args.data_path):
        raise UserError("--csv takes one folder of images: by --images or --data_path, not several")
    return read_csv_labels(
        args.csv,
        folders[0],
        path_column=args.path_column,
        label_column=args.label_column,
        subject_column=args.subject_column,
        split_column=args.split_column,
    )
