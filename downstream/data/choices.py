"""What a user may choose about labelled images: one set of options for every data set."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

from util.cli import finite_float
from util.errors import UserError

AUTO, PUBLISHED, BY_SUBJECT, FOLDS, ALL_TEST = SPLITS = ("auto", "published", "subject", "folds", "test")
ZEROS, ONES, IGNORE = CELL_RULES = ("zeros", "ones", "ignore")


@dataclass(frozen=True)
class Choices:
    """How to read a data set; what does not apply to one is an error there where it would mislead.

    Attributes:
        images: folder of the images where it is not the data set's root or below.
        csv: the table, for `csv`; for others where the table is not below the root.
        labels: the labels to keep, None = those of the data set.
        where: "COLUMN=VALUE": rows to keep; several values of a column are alternatives.
        split: auto = the official or published split, by subject where there is none; published = to the
            row, whatever it shares; subject = 70 / 15 / 15% by subject; folds = no parts; test = all.
        split_seed: of the draws by subject.
        uncertain: what -1 counts as; published = as the CheXpert run had it. None = published for CheXpert,
            else ignore.
        empty: what an empty cell counts as; None = zeros for CheXpert, as published, else ignore.
        skip_missing: go on without images that are not there.
        need_images: False = tables only (--dry_run).
        image_column, label_columns, separator, subject_column, split_column: of a csv.
        study: whose patients the subjects of a csv are, e.g. mimic; subjects of different studies are different people.
        min_certainty: a tree's finding counts as present from this certainty (0 to 5) on.
    """

    images: Path | None = None
    csv: Path | None = None
    labels: tuple[str, ...] | None = None
    where: tuple[str, ...] = ()
    split: str = AUTO
    split_seed: int = 0
    uncertain: str | None = None
    empty: str | None = None
    skip_missing: bool = False
    need_images: bool = True
    image_column: str = "path"
    label_columns: tuple[str, ...] = ("labels",)
    separator: str = "|"
    subject_column: str | None = None
    split_column: str | None = None
    study: str | None = None
    min_certainty: float = 3

    def __post_init__(self) -> None:
        for name in ("labels", "where", "label_columns"):
            if isinstance(value := getattr(self, name), (list, tuple)):
                object.__setattr__(self, name, tuple(value))
        for name in ("images", "csv"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))
        for name, allowed in (
            ("split", SPLITS),
            ("uncertain", (None, PUBLISHED, *CELL_RULES)),
            ("empty", (None, *CELL_RULES)),
        ):
            if (value := getattr(self, name)) not in allowed:
                known = ", ".join(word for word in allowed if word)
                raise UserError(f"--{name} {value}: expected one of {known}")
        if not self.separator:
            raise UserError("--separator '': expected what stands between two names, such as '|'")
        if self.split_seed < 0:
            raise UserError(f"--split_seed {self.split_seed}: expected 0 or more")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options of `Choices`, read back by `choices_from_args`."""
    # fmt: off
    add = parser.add_argument_group("labelled images").add_argument
    add("--images", help="folder of the images, where it is not --data_path or several copies are below it")
    add("--csv", help="the table of labels, where it is not below --data_path under its usual name")
    add("--labels", nargs="+", help="labels to keep (default: those of the data set)")
    add("--where", nargs="+", default=[], metavar="COLUMN=VALUE",
        help="rows of the table to keep; several values of one column are alternatives")
    helped = (
        "auto: the official or published split, or by subject where there is none; published: to the row, "
        "even where subjects stand in two parts; subject: 70/15/15%% by subject; folds: none, for grouped "
        "folds; test: all images are test images"
    )
    add("--split", choices=SPLITS, default=AUTO, help=helped)
    add("--split_seed", type=int, default=0, help="of the draws by subject")
    helped = (
        "what -1 counts as: ignore: neither in the loss nor in the AUC; published: 1 for Atelectasis, Edema and "
        "Pleural Effusion, else 0 (default: published for chexpert, ignore for others)"
    )
    add("--uncertain", choices=(PUBLISHED, *CELL_RULES), help=helped)
    helped = "what an empty cell counts as (default: zeros for chexpert, as published; ignore for others)"
    add("--empty", choices=CELL_RULES, help=helped)
    add("--skip_missing", action="store_true", help="go on without images that are not there, and count them")
    add("--image_column", default="path", help="csv: column of the image's path, file name or id")
    helped = "csv: one column per label, or one column of names joined by --separator"
    add("--label_columns", nargs="+", default=["labels"], help=helped)
    add("--separator", default="|", help="csv: between the names in a joined column")
    add("--subject_column", help="csv: column of the subject (default: subject_id, if there is one)")
    add("--split_column", help="csv: column of train, valid, test (default: split, if there is one)")
    helped = "csv: the study whose patients its subjects are, e.g. mimic or nih: tells if they have trained an encoder"
    add("--study", help=helped)
    helped = "tree: a finding counts as present from this certainty (0-5) on"
    add("--min_certainty", type=finite_float, default=3, help=helped)
    # fmt: on


def choices_from_args(args: argparse.Namespace, *, need_images: bool) -> Choices:
    """The choices that `add_choices`'s options made."""
    names = [field.name for field in fields(Choices) if field.name != "need_images"]
    return Choices(need_images=need_images, **{name: getattr(args, name) for name in names})
