"""Made-up images in the layout of ChestX-ray14, with its official lists."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from datasets.phantom.labelled import Chests, kinds_of
from datasets.phantom.study import PhantomStudy, write_image

# The first finding is what is drawn; the second goes with it in every second image that has it, so that all
# 14 labels occur and none is chance.
FINDINGS = {
    "nodule": ("Nodule", "Fibrosis"),
    "mass": ("Mass", "Hernia"),
    "consolidation": ("Consolidation", "Pneumonia"),
    "effusion": ("Effusion", "Pleural_Thickening"),
    "pneumothorax": ("Pneumothorax", "Emphysema"),
    "cardiomegaly": ("Cardiomegaly", "Edema"),
    "atelectasis": ("Atelectasis", "Infiltration"),
}
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"  # the real table ends in a comma, too
)


def make_nih(root: str | Path, chests: Chests) -> PhantomStudy:
    """Write `root`/nih: Data_Entry_2017.csv, train_val_list.txt, test_list.txt, and PNGs in images_001/images
    and images_002/images, every seventh of them RGBA."""
    study = chests.study(Path(root), "nih")
    lines, listed = [HEADER], {"train_val_list.txt": [], "test_list.txt": []}
    follow_ups: dict[str, int] = {}
    seen = dict.fromkeys(FINDINGS, 0)
    for image, gray in chests.draw(study, ".png"):
        # The subjects of `new_image`, counted from 1; a second study follows its first.
        patient = image.index + 1 - (image.index % 6 == 5)
        image.subject_id = str(patient)
        follow_up = follow_ups.get(image.subject_id, -1) + 1
        follow_ups[image.subject_id] = follow_up
        name = f"{patient:08d}_{follow_up:03d}.png"
        image.dicom_id = Path(name).stem
        image.path = study.raw / f"images_{1 + 2 * image.index // chests.n_images:03d}" / "images" / name
        write_image(image, gray, inverted=False)
        if image.index % 7 == 3:
            Image.open(image.path).convert("RGBA").save(image.path)
        found = []
        for kind in sorted(kinds_of(image)):
            found += FINDINGS[kind][: 1 + seen[kind] % 2]
            seen[kind] += 1
        height, width = image.size
        view = "AP" if image.index % 3 == 2 else "PA"
        lines.append(
            f"{name},{'|'.join(found) or 'No Finding'},{follow_up},{patient},{40 + patient % 40},"
            f"{'FM'[patient % 2]},{view},{width},{height},0.143,0.143,"
        )
        listed["test_list.txt" if image.split == "test" else "train_val_list.txt"].append(name)
    texts = {"Data_Entry_2017.csv": lines, **listed}
    for file, text in texts.items():
        (study.raw / file).write_text("\n".join(text) + "\n", encoding="utf-8")
    return study
