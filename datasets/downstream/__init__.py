"""Labelled images to judge an encoder on: `read_dataset` reads each data set from its own files."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets.downstream.choices import Choices, add_choices, choices_from_args
from datasets.downstream.labelled import LabelledImages
from util.errors import UserError

Reader = Callable[[list[Path], Choices], LabelledImages]
DATASETS: dict[str, Reader] = {}


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
    return DATASETS[name]([Path(path) for path in paths], Choices(**choices))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--dataset, --data_path and the options that `read_from_args` reads."""
    parser.add_argument("--dataset", required=True, choices=list(DATASETS), help="which data set")
    helped = "its folder, as its site gives it; tree: one or several processed trees"
    parser.add_argument("--data_path", required=True, nargs="+", help=helped)
    add_choices(parser)


def read_from_args(args: argparse.Namespace, *, need_images: bool = True) -> LabelledImages:
    """The data set that the options name; need_images=False reads tables only (--dry_run)."""
    choices = choices_from_args(args, need_images=need_images)
    return DATASETS[args.dataset]([Path(path) for path in args.data_path], choices)
