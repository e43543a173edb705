"""What made-up studies share, whatever layout they are written in: subjects, images and their files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from datasets.phantom.chest import LESION_KINDS, Frame, Lesion, chest_box, draw_lesion, render_chest
from datasets.raw.readings import SIMULATED_FILE

SUFFIXES = {"jpg": (".jpg",), "dcm": (".dcm",), "mixed": (".jpg", ".dcm"), "png": (".png",)}


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
    boxes: list[tuple[float, float, float, float]]
    chest_box: tuple[float, float, float, float]
    reading_ids: list[str] = field(default_factory=list)


@dataclass
class PhantomStudy:
    """A study on disk. `raw` is the gaze data set's root, `images` the MIMIC-CXR root. `truth` has one
    element per image."""

    root: Path
    raw: Path
    images: Path
    truth: list[PhantomImage]
    seed: int = 0
    dwell_ratio: float = 6.0


def mark_simulated(raw: Path) -> None:
    """Leave the mark by which preparation and pictures know that nobody looked at these images."""
    text = "Simulated gaze: made up by scripts/make_phantom.py, no radiologist looked at these images.\n"
    (raw / SIMULATED_FILE).write_text(text, encoding="utf-8")


def check_options(n_images: int, image_format: str, lesion_kinds: Sequence[str]) -> None:
    if n_images < 1:
        raise ValueError(f"n_images {n_images} is not at least 1")
    if image_format not in SUFFIXES:
        raise ValueError(f"image_format {image_format!r} is not one of {', '.join(SUFFIXES)}")
    if unknown := set(lesion_kinds) - set(LESION_KINDS):
        raise ValueError(f"unknown lesion kinds {sorted(unknown)}: known are {', '.join(LESION_KINDS)}")


def draw_chests(
    study: PhantomStudy,
    n_images: int,
    size: int | tuple[int, int],
    streams: Sequence[Sequence[int]],
    *,
    image_format: str = "jpg",
    lesion_kinds: Sequence[str] = LESION_KINDS,
    lesions_per_image: tuple[int, int] = (1, 2),
    normal_fraction: float = 0.2,
    lesion_size: float = 1.0,
    lesion_contrast: float = 1.0,
) -> Iterator[tuple[PhantomImage, np.ndarray, np.random.Generator]]:
    """Each image of a study with its pixels, uint8 [H, W], and the generator that drew its lesions. It is entered in
    `study.truth`; its file is still to be written.

    Args:
        size: (height, width) in px, or one number for square images.
        streams: two keys of random numbers, beside (seed, index): of the lesions and of the pixels.
        image_format: one of `SUFFIXES`; "mixed" is every second image a DICOM.
        lesion_kinds: what to draw from, each kind at most once; `lesions_per_image` (from, to) in an image with any.
        normal_fraction: share of images without a lesion.
        lesion_size, lesion_contrast: multiply the usual extent and contrast.

    Raises:
        ValueError: an option out of range.
    """
    check_options(n_images, image_format, lesion_kinds)
    size = (size, size) if isinstance(size, int) else tuple(size)
    suffixes = SUFFIXES[image_format]
    for index in range(n_images):
        rng, pixels_rng = (np.random.default_rng([study.seed, index, *stream]) for stream in streams)
        n = 0
        if rng.random() >= normal_fraction:
            n = min(len(lesion_kinds), int(rng.integers(lesions_per_image[0], lesions_per_image[1] + 1)))
        chosen = rng.permutation(len(lesion_kinds))[:n]
        lesions = [draw_lesion(lesion_kinds[i], rng, lesion_size, lesion_contrast) for i in chosen]
        image = new_image(study, index, size, lesions, suffixes[index % len(suffixes)])
        study.truth.append(image)
        yield image, render_chest(size, pixels_rng, tuple(lesions)), rng


def fixed_number(*key: int) -> int:
    """A fixed pseudo-random number for a key."""
    return int(np.random.default_rng([*key, 7]).integers(1 << 62))


def new_image(
    study: PhantomStudy, index: int, size: tuple[int, int], lesions: list[Lesion], suffix: str
) -> PhantomImage:
    # Every sixth image is a second study of the subject before; a subject is in one split only.
    person = index - (index % 6 == 5)
    subject_id = str(10_000_000 + 977 * person + study.seed % 977)
    study_id = str(50_000_000 + 1013 * index + study.seed % 1013)
    digits = "".join(f"{fixed_number(study.seed, index, part):016x}" for part in range(3))
    dicom_id = "-".join(digits[i : i + 8] for i in range(0, 40, 8))
    directory = study.images / "files" / f"p{subject_id[:2]}" / f"p{subject_id}" / f"s{study_id}"
    path = directory / f"{dicom_id}{suffix}"
    frame = Frame(size)
    split = {3: "validate", 6: "test", 9: "test"}.get(person % 10, "train")
    return PhantomImage(
        index,
        dicom_id,
        subject_id,
        study_id,
        split,
        path,
        size,
        lesions,
        [frame.box(lesion.ellipse) for lesion in lesions],
        chest_box(frame),
    )


def write_image(image: PhantomImage, gray: np.ndarray, *, inverted: bool) -> None:
    image.path.parent.mkdir(parents=True, exist_ok=True)
    if image.path.suffix == ".dcm":
        _write_dicom(image, gray, inverted)
    else:
        Image.fromarray(gray).save(image.path, **({"quality": 92} if image.path.suffix == ".jpg" else {}))


def _write_dicom(image: PhantomImage, gray: np.ndarray, inverted: bool) -> None:
    """A 12-bit CR image whose window shows the whole range, so that it reads as `gray` again."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid(entropy_srcs=[image.dicom_id])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.BodyPartExamined, data.ViewPosition = "CR", "CHEST", "PA"
    data.PatientID, data.PatientName, data.StudyID = image.subject_id, "Phantom", image.study_id
    data.ImageComments = "Made-up chest, not a patient"
    data.Rows, data.Columns = gray.shape
    data.SamplesPerPixel, data.PixelRepresentation = 1, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    data.WindowCenter, data.WindowWidth = 2048, 4096
    stored = gray.astype(np.uint32) * 4095 // 255  # 16 bits would overflow
    data.PixelData = (4095 - stored if inverted else stored).astype("<u2").tobytes()
    data.save_as(image.path, enforce_file_format=True)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
