"""How DICOM's 12 or more bits become 8: the choices, without the packages that read DICOM."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

MIMIC_CXR_JPG = "mimic-cxr-jpg"  # what the paper's pictures have
MEANINGS = {
    MIMIC_CXR_JPG: "as MIMIC-CXR-JPG was made, histogram equalised (the paper's)",
    "window": "the file's own VOI LUT or window",
    "minmax": "its smallest and largest value",
}
CONTRASTS = tuple(MEANINGS)  # what `util.dicom.read_dicom` takes


def add_dicom_contrast(
    parser: argparse._ActionsContainer, *, default: str | None = MIMIC_CXR_JPG, further: Mapping[str, str] | None = None
) -> None:
    """The option of every program that reads DICOM; `further` values of one of them, with what they do. None as
    `default` tells that the option is not given; its first value is meant."""
    choices = {**(further or {}), **MEANINGS}
    told = "; ".join(f"{name}: {text}" for name, text in choices.items())
    meant = default or next(iter(choices))
    helped = f"gray of DICOM files, while JPG and PNG are as they are; {told} (default: {meant})"
    # fmt: off
    parser.add_argument("--dicom_contrast", choices=tuple(choices), default=default, help=helped)
    # fmt: on
