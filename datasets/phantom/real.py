"""One real, public chest film in a made-up study."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd

from datasets.phantom.chest import Frame, Lesion
from datasets.phantom.reflacx import SIMULATED, write_reading
from datasets.phantom.study import PhantomImage, PhantomStudy, new_image, write_csv
from util.errors import UserError

# Round opacities that anyone sees in RG1_UNCR.dcm, as shares of its width and height: centre x, y and
# semi-axes. Placed by eye by this program's authors, no radiologist.
_REAL_SPOTS = ((0.800, 0.440, 0.049, 0.050), (0.790, 0.600, 0.061, 0.049), (0.262, 0.592, 0.066, 0.054))


def add_real_radiograph(study: PhantomStudy) -> PhantomImage:
    """Add one real chest film to a REFLACX-layout study, with a simulated reading that says so.

    The film is RG1_UNCR.dcm (CR, PA, MONOCHROME1) of the PyPI package pydicom-data, copied from where
    pip installed it; nothing is downloaded. The reading dwells on three round opacities of the film.
    Raises `UserError` if the package is not installed.
    """
    from pydicom.data import get_testdata_file

    source = get_testdata_file("RG1_UNCR.dcm", download=False)
    if source is None:
        raise UserError("RG1_UNCR.dcm is not here: install the package that ships it, `pip install pydicom-data`")
    size = (1955, 1841)
    image = new_image(study, len(study.truth), size, [], ".dcm")
    image.dicom_id, image.subject_id, image.study_id = "RG1_UNCR-pydicom-data", "10999999", "59999999"
    image.split = "train"
    image.path = study.images / "files" / "p10" / "p10999999" / "s59999999" / f"{image.dicom_id}.dcm"
    image.path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, image.path)
    frame = Frame(size)
    for cx, cy, rx, ry in _REAL_SPOTS:
        x, y = (cx - 0.5) * size[1] / frame.unit, (cy - 0.5) * size[0] / frame.unit
        image.lesions.append(Lesion("mass", (x, y, rx * size[1] / frame.unit, ry * size[0] / frame.unit)))
    image.boxes = [frame.box(lesion.ellipse) for lesion in image.lesions]
    reading_id = "P399R999999"
    row = write_reading(study, image, reading_id, 3, np.random.default_rng([study.seed, 1_000_003]))
    row["Other"] = "real radiograph (RG1_UNCR.dcm of pydicom-data) with a simulated reading"
    text = f"{SIMULATED} The film is real (RG1_UNCR.dcm of pydicom-data); gaze and ellipses are made up."
    (study.raw / "main_data" / reading_id / "transcription.txt").write_text(text + "\n", encoding="utf-8")
    path = study.raw / "main_data" / "metadata_phase_3.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table = table[table["id"] != reading_id]
    write_csv(pd.concat([table, pd.DataFrame([row], columns=table.columns)], ignore_index=True), path)
    study.truth.append(image)
    return image
