"""Made-up images in the layout of CheXpert, with uncertain and empty cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.labelled import Chests, kinds_of
from datasets.phantom.study import PhantomStudy, write_csv, write_image
from downstream.data.readers import CHEXPERT_FINDINGS as FINDINGS

PREFIX = "CheXpert-v1.0-small"  # which every Path begins with, whatever the directory is called
OF_KIND = {
    "nodule": ("Lung Lesion",),
    "mass": ("Lung Lesion",),
    "consolidation": ("Consolidation", "Lung Opacity", "Pneumonia"),
    "effusion": ("Pleural Effusion", "Pleural Other"),
    "pneumothorax": ("Pneumothorax", "Support Devices"),
    "cardiomegaly": ("Cardiomegaly", "Enlarged Cardiomediastinum", "Edema"),
    "atelectasis": ("Atelectasis", "Fracture"),
}
UNCERTAIN_SHARE = 0.1  # of the cells of the labels that are there


def make_chexpert(root: str | Path, chests: Chests) -> PhantomStudy:
    """Write `root`/chexpert: train.csv, valid.csv and JPGs in train/ and valid/, below patient and study.

    Every fifth image is named a lateral one (and looks like the others). As in the real tables valid.csv has
    neither uncertain nor empty cells.
    """
    study = chests.study(Path(root), "chexpert")
    rows: dict[str, list[dict]] = {"train": [], "valid": []}
    for image, gray in chests.draw(study, ".jpg"):
        part = "valid" if image.split == "test" else "train"
        patient = image.index + 1 - (image.index % 6 == 5)
        image.subject_id = f"patient{patient:05d}"
        lateral = image.index % 5 == 4
        name = f"view1_{'lateral' if lateral else 'frontal'}.jpg"
        place = f"{part}/{image.subject_id}/study{1 + (image.index % 6 == 5)}/{name}"
        image.path = study.raw / place
        write_image(image, gray, inverted=False)
        rng = np.random.default_rng([chests.seed, image.index, 13])
        present = {label for kind in kinds_of(image) for label in OF_KIND[kind]} or {"No Finding"}
        labels: dict[str, float | None] = {}
        for label in FINDINGS:
            uncertain, mentioned = rng.random(2) < (UNCERTAIN_SHARE, 0.5)
            if label in present:
                labels[label] = -1.0 if uncertain and part == "train" and label != "No Finding" else 1.0
            else:
                labels[label] = 0.0 if mentioned or part == "valid" else None
        rows[part].append(
            {
                "Path": f"{PREFIX}/{place}",
                "Sex": "Female" if patient % 2 else "Male",
                "Age": 40 + patient % 40,
                "Frontal/Lateral": "Lateral" if lateral else "Frontal",
                "AP/PA": None if lateral else "AP",
                **labels,
            }
        )
    for part, found in rows.items():
        if found:
            write_csv(pd.DataFrame(found), study.raw / f"{part}.csv")
    return study
