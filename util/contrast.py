"""How DICOM's 12 or more bits become 8: the choices, without the packages that read DICOM."""

from __future__ import annotations

import argparse

MIMIC_CXR_JPG = "mimic-cxr-jpg"  # what the paper's pictures have
CONTRASTS = (MIMIC_CXR_JPG, "window", "minmax")


def add_dicom_contrast(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dicom_contrast",
        choices=CONTRASTS,
        default=MIMIC_CXR_JPG,
        help="gray of DICOM files: as MIMIC-CXR-JPG was made (the paper's), the file's own window, or its "
        "smallest and largest value; JPG and PNG are as they are",
    )
