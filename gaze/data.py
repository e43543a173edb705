"""Images with the gaze maps of their readings, in three parts that share no subject: what the gaze predictor
learns from and is judged on.

One sample is one image with all readings of it. The whole image is resized to a square (a prediction must reach its
borders, so nothing is cropped), and the target is the mean of the readings' densities, each of sum 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.build import detect_trees
from datasets.transforms import Box, crop_resize_flip
from datasets.tree import GazeTree, entry_subject
from gaze.metrics import density
from util.errors import UserError
from util.subjects import MIMIC, subject_mark, subject_marks
from util.tables import numeric_columns, read_table, same_subjects

TRAIN, VALIDATE, TEST = PARTS = ("train", "validate", "test")
FIXATIONS = "fixations.csv"
# Of subjects whose tree has no split: a tenth for validation, a fifth for the test, as REFLACX's own split.
SHARES = {VALIDATE: 0.1, TEST: 0.2}


@dataclass(frozen=True)
class GazeImage:
    """One image and its readings.

    Attributes:
        tree: where it is.
        entries: places of its readings in the tree's index.
        subject: whose image it is.
    """

    tree: GazeTree
    entries: tuple[int, ...]
    subject: str

    @property
    def name(self) -> str:
        return self.tree.sample_name(self.entries[0])

    @property
    def readings(self) -> list[str]:
        """Ids of the readings in the tree: reflacx_id, or the image's path if they have none."""
        entries = [self.tree.entries[index] for index in self.entries]
        return [str(entry.get("reflacx_id", entry["image_path"])) for entry in entries]

    def read(self, size: int) -> tuple[np.ndarray, Tensor]:
        """The radiograph, uint8 [h, w], and the readings' stored heatmaps at size x size, uint8 [R, size, size].

        Raises:
            UserError: an unreadable file, or a heatmap that is zero everywhere.
        """
        planes = [self.tree.read_planes(index)[0] for index in self.entries]
        levels = torch.cat([resize_whole(attention, size) for _, attention in planes])
        for index, own in zip(self.entries, levels):
            if not own.any():
                path = self.tree.files(index).attention
                raise UserError(f"{path}: the heatmap is zero everywhere at {size} x {size} px; prepare it again")
        return planes[0][0], levels


class GazeStudy:
    """The images of one or several processed trees, by part.

    Args:
        data_path: trees, or their index files.
        cache_size: short side of cached images, px.

    Attributes:
        trees: in the order of `data_path`.
        parts: images by "train", "validate" and "test", in the order of the indexes.
        notes: what to know about the parts, a line each.

    Raises:
        UserError: an unreadable tree, an entry without a subject, a subject in two parts, a part without images.
    """

    def __init__(self, data_path: Sequence[str | Path], *, cache_size: int = 512):
        self.trees: list[GazeTree] = [kind(root, cache_size=cache_size) for kind, root in detect_trees(data_path)]
        entries = [(tree, index) for tree in self.trees for index in range(len(tree))]
        subjects, merged = same_subjects([_subject(*entry) for entry in entries])
        part_of: dict[str, str] = {}  # of the subjects that have one in some tree
        images: dict[tuple[GazeTree, Path], tuple[str, list[int]]] = {}  # subject and readings
        for (tree, index), subject in zip(entries, subjects, strict=True):
            images.setdefault((tree, tree.files(index).image), (subject, []))[1].append(index)
            if part := tree.entries[index].get("split"):
                if part not in PARTS:
                    raise UserError(f"{_where(tree, index)}: split {part!r}, expected one of {', '.join(PARTS)}")
                if part_of.setdefault(subject, part) != part:
                    raise UserError(
                        f"{_where(tree, index)}: subject {subject} is in {part} here and in {part_of[subject]} at an "
                        "earlier entry; a subject can't be on both sides"
                    )
        drawn = draw_parts(sorted({*subjects} - {*part_of}))
        part_of |= drawn
        self.parts: dict[str, list[GazeImage]] = {part: [] for part in PARTS}
        for (tree, _), (subject, readings) in images.items():
            self.parts[part_of[subject]].append(GazeImage(tree, tuple(readings), subject))
        for part, found in self.parts.items():
            if not found:
                raise UserError(
                    f"--data_path {', '.join(str(tree.root) for tree in self.trees)}: no image is in {part}; a gaze "
                    "predictor needs training, validation and test images of different subjects"
                )
        self.notes: list[str] = []
        if drawn:
            self.notes.append(f"note: {len(drawn)} subjects have no split in their tree; their parts were drawn")
        if merged:
            self.notes.append(f"warning: subjects {merged[0]} are taken for one; {len(merged)} such pairs in all")

    def leave_out(self, seen: Collection[str]) -> str:
        """Leave out the test images of subjects that trained a model, by their `subject_marks`; returns a line about it,
        "" if there are none.

        Raises:
            UserError: no test image is left.
        """
        test = self.parts[TEST]
        self.parts[TEST] = left = [image for image in test if subject_mark(image.subject, MIMIC) not in seen]
        what = (
            f"{len(test) - len(left)} of {len(test)} test images are of subjects that trained or validated this model"
        )
        if not left:
            raise UserError(f"{what}; judge it on images that it has not seen")
        return "" if left == test else f"warning: {what}; they are left out"

    def seen(self) -> list[str]:
        """`subject_marks` of all who train or validate."""
        return subject_marks((image.subject for part in (TRAIN, VALIDATE) for image in self.parts[part]), MIMIC)

    def describe(self) -> str:
        """Images, readings and subjects of each part, and the notes."""
        lines = [
            f"{part}: {len(images)} images, {sum(len(image.entries) for image in images)} readings, "
            f"{len({image.subject for image in images})} subjects"
            for part, images in self.parts.items()
        ]
        return "\n".join([*lines, *self.notes])


def _where(tree: GazeTree, index: int) -> str:
    return f"{tree.root / tree.index_file}: entry {index}"


def _subject(tree: GazeTree, index: int) -> str:
    """Whose reading an entry is, as the index spells it, or by MIMIC's folder p<subject>."""
    entry = tree.entries[index]
    if entry.get("gaze") == "predicted":
        raise UserError(
            f"{_where(tree, index)}: a predicted heatmap; a predictor learns from, and is judged on, real gaze alone"
        )
    if not (subject := entry_subject(entry)):
        raise UserError(
            f"{_where(tree, index)}: no subject_id, and no folder p<subject> in its image_path; without the subject "
            "one could be on both sides of the split"
        )
    return subject


@dataclass(frozen=True)
class GazeSamples(Dataset):
    """Samples of some images: {"img": uint8 [1, S, S], "target": float32 [G, G], of sum 1}.

    `samples[epoch, i]` is `samples[i]`: nothing is augmented.
    """

    images: Sequence[GazeImage]
    input_size: int
    map_size: int

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> str:
        """Digest of the samples' readings, their order and their content (`GazeTree.content`)."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(json.dumps(image.readings).encode() + image.tree.content(image.entries))
        return digest.hexdigest()[:16]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        gray, levels = self.images[key[1] if isinstance(key, tuple) else key].read(self.map_size)
        return {"img": resize_whole(gray, self.input_size), "target": density(levels).mean(0).float()}


def resize_whole(plane: np.ndarray, size: int) -> Tensor:
    """A picture, uint8 [H, W], resized whole to a square, aspect ratio given up: uint8 [1, size, size]."""
    return crop_resize_flip([plane], Box(0, 0, *plane.shape), (size, size))


def draw_parts(subjects: Sequence[str]) -> dict[str, str]:
    """Parts of subjects that have none: a fixed draw by name, the same in every run and on every machine."""
    order = sorted(subjects, key=lambda subject: hashlib.sha256(f"gaze {subject}".encode()).digest())
    n_validate, n_test = (math.ceil(SHARES[part] * len(order)) for part in (VALIDATE, TEST))
    return dict(zip(order, [VALIDATE] * n_validate + [TEST] * n_test + [TRAIN] * len(order)))


def read_fixations(path: Path) -> dict[str, np.ndarray]:
    """Fixations of a tree's readings by id, float64 [n, 2]: x, y (fractions of the image); {} if there is no such file.

    Raises:
        UserError: a column is missing, or a cell is no number or lies outside of the image.
    """
    if not path.exists():
        return {}
    table = read_table(path, ("reflacx_id", "x", "y"))
    places = numeric_columns(table, ("x", "y"), path).to_numpy()  # [n, 2]
    if (outside := ((places < 0) | (places > 1)).any(1)).any():
        raise UserError(f"{path}: line {table.index[outside][0]}: x and y are fractions of the image, 0 to 1")
    return {name: places[rows] for name, rows in table.groupby("reflacx_id").indices.items()}
