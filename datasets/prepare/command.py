"""The command line that both preparations share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets.prepare.units import Report
from util.cli import Parser, available_cpus, check_least
from util.radiograph import add_dicom_contrast


def preparation_parser(description: str, left_out: str) -> argparse.ArgumentParser:
    """The parser with the options that both have; `left_out`: what may be damaged."""
    parser = Parser(
        description=f"{description} Damaged {left_out} are listed at the end and left out; the exit status is 1 then. "
        "An interrupted run continues where it stopped; a second run changes nothing."
    )
    # fmt: off
    add = parser.add_argument
    add("--images", type=Path, required=True,
        help="root of MIMIC-CXR-JPG or of MIMIC-CXR (DICOM), any depth, both kinds may be mixed")
    add("--out", type=Path, required=True, help="where the processed tree goes")
    add("--size", type=int, default=512, help="short side of the stored images, px; 0 = native")
    add_dicom_contrast(parser)
    add("--workers", type=int, default=available_cpus(), help="processes; the result does not depend on it")
    add("--overwrite", action="store_true", help="start afresh; the new tree replaces the old one in --out once it is whole")
    add("--accept_damaged", action="store_true", help="exit status 0, not 1, if damaged files were listed and left out")
    add("--dry_run", action="store_true", help="check and count everything but the pixels; write nothing")
    # fmt: on
    return parser


def run_preparation(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, prepare: Callable[..., Report], what: str
) -> int:
    """Call `prepare` with the options; print its report on so many `what`. Returns the program's exit status."""
    args = parser.parse_args(argv)
    check_least(args, 0, "size")
    options = vars(args)
    accepted = options.pop("accept_damaged")
    report = prepare(**options)
    done = "nothing written (--dry_run)" if args.dry_run else f"{args.out} is ready"
    return report.conclude(what, done, accept_damaged=accepted)
