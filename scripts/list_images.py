"""List the images that REFLACX names, a PhysioNet address a line, for wget to fetch those alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.raw.read_reflacx import read_reflacx
from datasets.raw.sources import find_raw
from util.cli import Parser
from util.errors import run_cli
from util.files import atomic_write

SITES = {"jpg": "https://physionet.org/files/mimic-cxr-jpg/2.1.0", "dcm": "https://physionet.org/files/mimic-cxr/2.1.0"}


def get_args_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    # fmt: off
    parser.add_argument("--raw", type=Path, required=True, help="root of REFLACX, with main_data/")
    parser.add_argument("--format", choices=tuple(SITES), default="jpg", help="jpg: MIMIC-CXR-JPG; dcm: MIMIC-CXR")
    parser.add_argument("--out", default="images.txt", help="list to write")
    # fmt: on
    return parser


def main(argv: list[str] | None = None) -> int:
    args = get_args_parser().parse_args(argv)
    # The last four parts are p10/p<subject>/s<study>/<dicom_id>, whatever stands before them.
    places = {PurePosixPath(reading.image_path).parts[-4:] for reading in read_reflacx(find_raw(args.raw)[1]).readings}
    tails = [PurePosixPath(*parts).with_suffix(f".{args.format}") for parts in sorted(places)]
    with atomic_write(args.out, "w") as file:
        file.writelines(f"{SITES[args.format]}/files/{tail}\n" for tail in tails)
    print(
        f"wrote {len(tails)} images to {args.out}; with your PhysioNet name:\n"
        f"wget -x -N -c --user NAME --ask-password -i {args.out}"
    )
    return 0


if __name__ == "__main__":
    run_cli(main)
