"""What made-up data sets share, whatever layout they are written in: subjects, images and their files.

Everything follows from (seed, index): the same arguments write the same bytes, and image i is the same however many
there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from datasets.phantom.chest import LESION_KINDS, Lesion, draw_lesion, pixel_box, render_chest
from datasets.raw.readings import SIMULATED_FILE

# What the file of each name says in the folder of a study.
MARKS = {
    SIMULATED_FILE: "Simulated gaze: made up by scripts/make_phantom.py, no radiologist looked at these images.\n",
    "MADE_UP.txt": "Made-up chests, drawn by scripts/make_phantom.py: no result on them says anything of medicine.\n",
}
SUFFIXES = {"jpg": (".jpg",), "dcm": (".dcm",), "mixed": (".jpg", ".dcm")}


@dataclass
class PhantomImage:
    """What is true of one image. Boxes are (xmin, ymin, xmax, ymax), px of the image."""

    index: int
    dicom_id: str
    subject_id: str
    study_id: str
    split: str
    path: Path
    size: tuple[int, int]
    lesions: list[Lesion]
    reading_ids: list[str] = field(default_factory=list)

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Of the lesions."""
        return [pixel_box(self.size, lesion.ellipse) for lesion in self.lesions]


@dataclass
class PhantomStudy:
    """A study on disk. `raw` is the root of the gaze or labels, `images` that of the images. `truth` has one element per
    image."""

    raw: Path
    images: Path
    seed: int
    truth: list[PhantomImage] = field(default_factory=list)


def start_study(raw: Path, images: Path, seed: int, mark: str = SIMULATED_FILE) -> PhantomStudy:
    """An empty study, with the file by which preparation, pictures and people know that it is made up."""
    raw.mkdir(parents=True, exist_ok=True)
    (raw / mark).write_text(MARKS[mark], encoding="utf-8")
    return PhantomStudy(raw, images, seed)


def draw_chests(
    study: PhantomStudy,
    n_images: int,
    size: tuple[int, int],
    stream: int,
    *,
    image_format: str = "jpg",
    lesion_kinds: Sequence[str] = LESION_KINDS,
    normal_fraction: float = 0.2,
    lesion_size: float = 1.0,
    lesion_contrast: float = 1.0,
) -> Iterator[tuple[PhantomImage, np.ndarray, np.random.Generator]]:
    """Each image of a study with its pixels, uint8 [H, W], and the generator that drew its lesions. It is entered in
    `study.truth`; its file is still to be written.

    Args:
        size: (height, width) in px.
        stream: random numbers of the lesions, beside (seed, index); the pixels take the next stream.
        image_format: one of `SUFFIXES`; "mixed" is every second image a DICOM.
        lesion_kinds: what to draw from; 1 or 2 of them in an image with any.
        normal_fraction: share of images without a lesion.
        lesion_size, lesion_contrast: multiply the usual extent and contrast.
    """
    for index in range(n_images):
        rng, pixels_rng = (np.random.default_rng([study.seed, index, key]) for key in (stream, stream + 1))
        n = int(rng.integers(1, 3)) if rng.random() >= normal_fraction else 0
        kinds = rng.permutation(lesion_kinds)[:n].tolist()
        lesions = [draw_lesion(kind, rng, lesion_size, lesion_contrast) for kind in kinds]
        # Every sixth image is a second study of the subject before; a subject is in one split only.
        person = index - (index % 6 == 5)
        subject_id = str(10_000_000 + 977 * person + study.seed % 977)
        study_id = str(50_000_000 + 1013 * index + study.seed % 1013)
        split = {3: "validate", 6: "test", 9: "test"}.get(person % 10, "train")
        digits = fixed_digits(study.seed, index, range(3))
        dicom_id = "-".join(digits[i : i + 8] for i in range(0, 40, 8))
        suffixes = SUFFIXES[image_format]
        name = f"{dicom_id}{suffixes[index % len(suffixes)]}"
        path = study.images / "files" / f"p{subject_id[:2]}" / f"p{subject_id}" / f"s{study_id}" / name
        study.truth.append(PhantomImage(index, dicom_id, subject_id, study_id, split, path, size, lesions))
        yield study.truth[-1], render_chest(size, pixels_rng, tuple(lesions)), rng


def fixed_number(*key: int) -> int:
    """A fixed pseudo-random number for a key."""
    return int(np.random.default_rng([*key, 7]).integers(1 << 62))


def fixed_digits(seed: int, index: int, parts: range) -> str:
    """Sixteen hexadecimal digits for each part of an image's name."""
    return "".join(f"{fixed_number(seed, index, part):016x}" for part in parts)


def write_image(image: PhantomImage, gray: np.ndarray, *, inverted: bool = False) -> None:
    """A file by the suffix of `image.path`; a DICOM is MONOCHROME1 where `inverted`."""
    image.path.parent.mkdir(parents=True, exist_ok=True)
    if image.path.suffix == ".dcm":
        _write_dicom(image, gray, inverted)
    else:
        Image.fromarray(gray).save(image.path, quality=92)


def _write_dicom(image: PhantomImage, gray: np.ndarray, inverted: bool) -> None:
    """A 12-bit CR image whose window shows the whole range, so that it reads as `gray` again."""
    import pydicom
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = ComputedRadiographyImageStorage
    data.SOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[image.dicom_id])
    data.Modality, data.BodyPartExamined, data.ViewPosition = "CR", "CHEST", "PA"
    data.PatientID, data.PatientName, data.StudyID = image.subject_id, "Phantom", image.study_id
    data.ImageComments = "Made-up chest, not a patient"
    data.WindowCenter, data.WindowWidth = 2048, 4096
    stored = (gray.astype(np.uint32) * 4095 // 255).astype(np.uint16)  # 16 bits would overflow
    kind, pixels = ("MONOCHROME1", 4095 - stored) if inverted else ("MONOCHROME2", stored)
    data.set_pixel_data(pixels, kind, 12, generate_instance_uid=False)
    data.save_as(image.path, enforce_file_format=True)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
