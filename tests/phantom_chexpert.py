"""Made-up images in the layout of CheXpert, with uncertain and empty cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from datasets.phantom.label_study import STREAM
from datasets.phantom.study import PhantomStudy, draw_chests, start_study, write_csv, write_image
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


def make_chexpert(root: str | Path, n_images: int, seed: int = 0, *, size: tuple[int, int]) -> PhantomStudy:
    """Write `root`/chexpert: train.csv, valid.csv and JPGs in train/ and valid/, below patient and study.

    Every fifth image is named a lateral one (and looks like the others). As in the real tables valid.csv has
    neither uncertain nor empty cells.
    """
    folder = Path(root, "chexpert")
    study = start_study(folder, folder, seed, "MADE_UP.txt")
    rows: dict[str, list[dict]] = {"train": [], "valid": []}
    for image, gray, _ in draw_chests(study, n_images, size, STREAM):
        part = "valid" if image.split == "test" else "train"
        second = image.index % 6 == 5
        patient = image.index + 1 - second
        view = "Lateral" if image.index % 5 == 4 else "Frontal"
        place = f"{part}/patient{patient:05d}/study{1 + second}/view1_{view.lower()}.jpg"
        image.path = study.raw / place
        write_image(image, gray)
        rng = np.random.default_rng([seed, image.index, 13])
        present = {label for lesion in image.lesions for label in OF_KIND[lesion.kind]} or {"No Finding"}
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
                "Frontal/Lateral": view,
                "AP/PA": "AP" if view == "Frontal" else None,
                **labels,
            }
        )
    for part, found in rows.items():
        write_csv(pd.DataFrame(found), study.raw / f"{part}.csv")
    return study
