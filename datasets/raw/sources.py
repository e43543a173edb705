"""The gaze data sets that can be read: which one a directory contains, and its readings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from datasets.raw.mimic_cxr import find_metadata
from datasets.raw.read_egd import DEFAULT_SIGMA, read_egd
from datasets.raw.read_reflacx import read_reflacx
from datasets.raw.readings import SIMULATED_FILE, RawReadings
from util.cli import finite_float
from util.errors import UserError

# For each data set a file below its root that identifies it, and its reader. Add a line for a further data set.
SOURCES: dict[str, tuple[str, Callable[..., RawReadings]]] = {
    "reflacx": ("main_data/metadata_phase_1.csv", read_reflacx),
    "egd": ("master_sheet.csv", read_egd),
}


def add_raw_options(parser: argparse.ArgumentParser) -> None:
    """--raw, --sigma and --metadata: the data set, and how its fixations become heatmaps."""
    # fmt: off
    parser.add_argument("--raw", type=Path, required=True,
        help="root of REFLACX (holds main_data/) or of EGD-CXR (holds master_sheet.csv), or one above")
    parser.add_argument("--sigma", type=finite_float, default=None,
        help="EGD-CXR only: standard deviation of a fixation's Gaussian, px of the original image; "
             f"{DEFAULT_SIGMA:g} if not given")
    parser.add_argument("--metadata", type=Path, default=None,
        help="EGD-CXR only: MIMIC-CXR's table of metadata, for the sizes of the original images, in whose pixels "
             "fixations are (default: the table in --images)")
    # fmt: on


def find_raw(raw: Path) -> tuple[str, Path]:
    """Name and root of the data set in `raw`, or else in a directory right below it. UserError if there are several,
    two versions of one included, or none."""
    for place in ("", "*/"):
        found = [(source, path) for source, (file, _) in SOURCES.items() for path in raw.glob(place + file)]
        if len(found) > 1:
            names = " and ".join(sorted(str(path.relative_to(raw)) for _, path in found))
            raise UserError(f"{raw}: holds {names}; give the root of one of them as --raw")
        for source, path in found:
            return source, path.parents[SOURCES[source][0].count("/")]
    raise UserError(
        f"{raw}: neither REFLACX (main_data/metadata_phase_*.csv) nor EGD-CXR (master_sheet.csv) is here "
        "or one directory below"
    )


def read_raw(
    raw: Path, images: Path | None = None, *, sigma: float | None = None, metadata: Path | None = None
) -> RawReadings:
    """The readings of the data set that `find_raw` finds.

    Args:
        images: root of the MIMIC-CXR images, for their table of metadata.
        sigma, metadata: for EGD-CXR, see `read_egd`; UserError with other data sets.
    """
    source, root = find_raw(raw)
    options = {name: value for name, value in (("sigma", sigma), ("metadata", metadata)) if value is not None}
    if source == "egd":
        options = {"sigma": DEFAULT_SIGMA, "metadata": images and find_metadata(images)} | options
    elif options:
        raise UserError(f"--{' --'.join(options)}: is for EGD-CXR; {source} records the sizes itself")
    found = SOURCES[source][1](root, **options)
    found.source, found.options, found.simulated = source, options, (root / SIMULATED_FILE).is_file()
    return found
