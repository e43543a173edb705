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
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.build import detect_trees
from datasets.cache import add_cache
from datasets.transforms import Box, crop_resize_flip
from datasets.tree import GazeTree, SampleError, entry_subject
from gaze.metrics import density
from util.errors import UserError
from util.subjects import MIMIC, same_subjects, subject_mark, subject_marks
from util.tables import numeric_columns, read_table

TRAIN, VALIDATE, TEST = PARTS = ("train", "validate", "test")
FIXATIONS = "fixations.csv"
FIXATION_COLUMNS = ("reflacx_id", "x", "y", "duration")
# Of subjects whose tree has no split: a tenth for validation, a fifth for the test, as REFLACX's own split.
SHARES = {VALIDATE: 0.1, TEST: 0.2}


@dataclass(frozen=True)
class GazeImage:
    """One image and its readings.

    Attributes:
        tree: where it is.
        entries: places of its readings in the tree's index.
        subject: whose image it is.
        part: "train", "validate" or "test".
    """

    tree: GazeTree
    entries: tuple[int, ...]
    subject: str
    part: str

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
            SampleError: an unreadable file, or a heatmap that is zero everywhere.
        """
        found = []
        for index in self.entries:
            try:
                gray, attention = self.tree.read_planes(index)[0][:2]
                found.append(resize_whole(attention, size))
                if not found[-1].any():
                    raise UserError(
                        f"{self.tree.files(index).attention}: the heatmap is zero everywhere at {size} x {size} px; "
                        "prepare it again"
                    )
            except UserError as error:
                raise SampleError(f"{error} (sample {self.tree.sample_name(index)})") from None
        return gray, torch.cat(found)


class GazeStudy:
    """The images of one or several processed trees, by part.

    Args:
        data_path: trees, or their index files.
        cache_size: short side of cached images, px.

    Attributes:
        trees, images: in the order of `data_path` and of the indexes.
        notes: what to know about the parts, a line each.

    Raises:
        UserError: an unreadable tree, an entry without a subject, a subject in two parts, a part without images.
    """

    def __init__(self, data_path: Sequence[str | Path], *, cache_size: int = 512):
        self.trees: list[GazeTree] = [kind(root, cache_size=cache_size) for kind, root in detect_trees(data_path)]
        entries = [(tree, index) for tree in self.trees for index in range(len(tree))]
        subjects, merged = same_subjects([_subject(*entry) for entry in entries])
        parts: dict[str, tuple[str, str]] = {}  # of a subject that has one in some tree: its part, and where
        groups: dict[tuple[GazeTree, Path], list[tuple[int, str]]] = {}
        for (tree, index), subject in zip(entries, subjects, strict=True):
            groups.setdefault((tree, tree.files(index).image), []).append((index, subject))
            part, where = tree.entries[index].get("split"), _where(tree, index)
            if part in (None, ""):
                continue
            if part not in PARTS:
                raise UserError(f"{where}: split {part!r}, expected one of {', '.join(PARTS)}")
            earlier, there = parts.setdefault(subject, (part, where))
            if earlier != part:
                raise UserError(
                    f"{where}: subject {subject} is in {part} here and in {earlier} at {there}; a subject "
                    "can't be on both sides"
                )
        drawn = draw_parts(sorted(set(subjects) - set(parts)))
        part_of = {subject: part for subject, (part, _) in parts.items()} | drawn
        self.images: list[GazeImage] = []
        for (tree, path), readings in groups.items():
            if len(several := {subject for _, subject in readings}) > 1:
                raise UserError(f"{path}: its readings name the subjects {', '.join(sorted(several))}")
            subject = several.pop()
            self.images.append(GazeImage(tree, tuple(index for index, _ in readings), subject, part_of[subject]))
        for part in PARTS:
            if not self.part(part):
                raise UserError(
                    f"--data_path {', '.join(str(tree.root) for tree in self.trees)}: no image is in {part}; a gaze "
                    "predictor needs training, validation and test images of different subjects"
                )
        self.notes: list[str] = []
        if drawn:
            self.notes.append(
                f"note: {len(drawn)} subjects have no split in their tree; their parts were drawn by subject"
            )
        if merged:
            more = f", and {len(merged) - 1} more such" if len(merged) > 1 else ""
            self.notes.append(f"warning: subjects {merged[0]}{more} are taken for one")

    def part(self, name: str) -> list[GazeImage]:
        return [image for image in self.images if image.part == name]

    def leave_out(self, seen: Collection[str]) -> str:
        """Leave out the test images of subjects that trained a model, by their `subject_marks`; returns a line about it,
        "" if there are none.

        Raises:
            UserError: no test image is left.
        """
        left = [i for i in self.images if i.part != TEST or subject_mark(i.subject, MIMIC) not in seen]
        n_out, n_test = len(self.images) - len(left), len(self.part(TEST))
        if not n_out:
            return ""
        what = f"{n_out} of {n_test} test images are of subjects that trained or validated this model"
        if n_out == n_test:
            raise UserError(f"{what}; judge it on images that it has not seen")
        self.images = left
        return f"warning: {what}; they are left out"

    def seen(self) -> list[str]:
        """`subject_marks` of all who train or validate."""
        return subject_marks((i.subject for i in self.images if i.part != TEST), MIMIC)

    def add_cache(self, cache_dir: str | None, fallback_dir: str | None) -> None:
        for tree in self.trees:
            add_cache(tree, cache_dir, fallback_dir=fallback_dir)

    def describe(self) -> str:
        """Images, readings and subjects of each part, in columns, and the notes."""
        parts = {name: self.part(name) for name in PARTS}
        table = pd.DataFrame(
            {
                name: {
                    "images": len(images),
                    "readings": sum(len(i.entries) for i in images),
                    "read several times": sum(len(i.entries) > 1 for i in images),
                    "subjects": len({i.subject for i in images}),
                }
                for name, images in parts.items()
            }
        )
        return "\n".join([table.to_string(), *self.notes])


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


class GazeSamples(Dataset):
    """Samples of some images: {"img": uint8 [1, S, S], "target": float32 [G, G], of sum 1}.

    `samples[epoch, i]` is `samples[i]`: nothing is augmented.
    """

    def __init__(self, images: Sequence[GazeImage], input_size: int, map_size: int):
        self.images, self.input_size, self.map_size = images, input_size, map_size

    def __len__(self) -> int:
        return len(self.images)

    def sample_name(self, index: int) -> str:
        return self.images[index].name

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
    """Fixations of a tree's readings by id, float64 [n, 3]: x, y (fractions of the image), duration (s); {} if there is
    no such file.

    Raises:
        UserError: a column is missing, or a cell is no number or lies outside of the image.
    """
    if not path.exists():
        return {}
    table = read_table(path, FIXATION_COLUMNS)
    values = numeric_columns(table, FIXATION_COLUMNS[1:], path).to_numpy()  # [n, 3]
    outside = np.flatnonzero((values[:, :2] < 0).any(1) | (values[:, :2] > 1).any(1))
    if outside.size:
        raise UserError(f"{path}: line {table.index[outside[0]]}: x and y are fractions of the image, 0 to 1")
    return {name: values[rows] for name, rows in table.groupby("reflacx_id").indices.items()}
