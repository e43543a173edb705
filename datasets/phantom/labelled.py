"""Made-up labelled data sets, whose labels are the kinds of the lesions: the RSNA pneumonia challenge and ChestX-ray14."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path

import pandas as pd
from PIL import Image

from datasets.phantom.study import PhantomStudy, draw_chests, fixed_digits, write_csv, write_image

# The first finding is what is drawn; the second goes with it in every second image that has it, so that all
# 14 labels occur and none is chance.
NIH_FINDINGS = {
    "nodule": ("Nodule", "Fibrosis"),
    "mass": ("Mass", "Hernia"),
    "consolidation": ("Consolidation", "Pneumonia"),
    "effusion": ("Effusion", "Pleural_Thickening"),
    "pneumothorax": ("Pneumothorax", "Emphysema"),
    "cardiomegaly": ("Cardiomegaly", "Edema"),
    "atelectasis": ("Atelectasis", "Infiltration"),
}
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"  # the real table ends in a comma, too
)
STREAM = 11  # of random numbers, see `draw_chests`


def labelled_study(folder: Path, seed: int) -> PhantomStudy:
    """An empty study in a folder, which says that it is made up."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "Made-up chests, drawn by scripts/make_phantom.py: no result on them says anything of medicine.\n"
    (folder / "MADE_UP.txt").write_text(text, encoding="utf-8")
    return PhantomStudy(folder, folder, seed)


def make_rsna(
    root: str | Path,
    n_images: int = 24,
    seed: int = 0,
    size: tuple[int, int] = (512, 420),
    *,
    image_format: str = "dcm",
    **options,
) -> PhantomStudy:
    """Write `root`/rsna: stage_2_train_labels.csv and stage_2_train_images/<patientId>.dcm (or .jpg); arguments as of
    `draw_chests`.

    Consolidations are the pneumonias. One image per patient; a row per box, in px, every fourth of them cut in two.
    """
    study = labelled_study(Path(root, "rsna"), seed)
    rows = []
    for image, gray, _ in draw_chests(study, n_images, size, STREAM, image_format=image_format, **options):
        image.dicom_id = image.subject_id = patient = str(uuid.UUID(fixed_digits(seed, image.index, range(1, 3))))
        image.path = study.raw / "stage_2_train_images" / f"{patient}{image.path.suffix}"
        write_image(image, gray)
        boxes = [box for lesion, box in zip(image.lesions, image.boxes) if lesion.kind == "consolidation"]
        if boxes and image.index % 4 == 0:
            left, top, right, bottom = boxes[0]
            middle = (top + bottom) / 2
            boxes = [(left, top, right, middle), (left, middle, right, bottom)]
        for left, top, right, bottom in boxes:
            rows.append([patient, *(round(value, 1) for value in (left, top, right - left, bottom - top)), 1])
        if not boxes:
            rows.append([patient, *[None] * 4, 0])
    columns = ["patientId", "x", "y", "width", "height", "Target"]
    write_csv(pd.DataFrame(rows, columns=columns), study.raw / "stage_2_train_labels.csv")
    return study


def make_nih(
    root: str | Path, n_images: int = 24, seed: int = 0, size: tuple[int, int] = (512, 420), **options
) -> PhantomStudy:
    """Write `root`/nih: Data_Entry_2017.csv, train_val_list.txt, test_list.txt, and PNGs in images_001/images
    and images_002/images, every seventh of them RGBA; arguments as of `draw_chests`."""
    study = labelled_study(Path(root, "nih"), seed)
    files = {"Data_Entry_2017.csv": [NIH_HEADER], "train_val_list.txt": [], "test_list.txt": []}
    seen = Counter()
    for image, gray, _ in draw_chests(study, n_images, size, STREAM, **options):
        # The subjects of `draw_chests`, counted from 1; a second study follows its first.
        follow_up = int(image.index % 6 == 5)
        patient = image.index + 1 - follow_up
        name = f"{patient:08d}_{follow_up:03d}.png"
        image.subject_id, image.dicom_id = str(patient), Path(name).stem
        image.path = study.raw / f"images_{1 + 2 * image.index // n_images:03d}" / "images" / name
        write_image(image, gray)
        if image.index % 7 == 3:
            Image.open(image.path).convert("RGBA").save(image.path)
        found = []
        for kind in sorted(lesion.kind for lesion in image.lesions):
            found += NIH_FINDINGS[kind][: 1 + seen[kind] % 2]
            seen[kind] += 1
        files["Data_Entry_2017.csv"].append(
            f"{name},{'|'.join(found) or 'No Finding'},{follow_up},{patient},{40 + patient % 40},"
            f"{'FM'[patient % 2]},{'AP' if image.index % 3 == 2 else 'PA'},{size[1]},{size[0]},0.143,0.143,"
        )
        files["test_list.txt" if image.split == "test" else "train_val_list.txt"].append(name)
    for file, lines in files.items():
        (study.raw / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return study
