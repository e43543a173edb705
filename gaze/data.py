"""Images with the gaze maps of their readings, in three parts that share no subject: what the gaze predictor
learns from and is judged on.

One sample is one image with all readings of it. The whole image is resized to a square (a prediction must reach its
borders, so nothing is cropped), and the target is the mean of the readings' densities, each of sum 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
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
        tree: number of its tree.
        entries: places of its readings in the tree's index.
        subject: whose image it is.
        part: "train", "validate" or "test".
    """

    tree: int
    entries: tuple[int, ...]
    subject: str
    part: str


class GazeStudy:
    """The images of one or several processed trees, by part.

    Args:
        data_path: trees, or their index files.
        cache_size: short side of cached images, px.

    Raises:
        UserError: an unreadable tree, an entry without subject, a subject on two sides, a part without images.
    """

    def __init__(self, data_path: Sequence[str | Path], *, cache_size: int = 512):
        self.trees: list[GazeTree] = [
            tree_type(root, cache_size=cache_size) for tree_type, root in detect_trees(data_path)
        ]
        groups: dict[tuple[int, Path], list[int]] = {}
        for number, tree in enumerate(self.trees):
            for index, entry in enumerate(tree.entries):
                if entry.get("gaze") == "predicted":
                    raise UserError(
                        f"{self._where(number, index)}: a predicted heatmap; a predictor learns from, and is judged on, "
                        "real gaze alone"
                    )
                groups.setdefault((number, tree.files(index).image), []).append(index)
        images = [(tree, tuple(entries)) for (tree, _), entries in groups.items()]
        subjects, self.merged = same_subjects([self._subject(*image) for image in images])
        given = self._given_parts(images, subjects)
        drawn = draw_parts(sorted(set(subjects) - set(given)))
        self.n_drawn = len(drawn)
        parts = given | drawn
        self.images = [
            GazeImage(*image, subject, parts[subject]) for image, subject in zip(images, subjects, strict=True)
        ]
        for part in PARTS:
            if not self.part(part):
                where = ", ".join(str(tree.root) for tree in self.trees)
                raise UserError(
                    f"--data_path {where}: no image is in {part}; a gaze predictor needs training, "
                    "validation and test images of different subjects"
                )

    def _entry(self, tree: int, index: int) -> dict[str, Any]:
        return self.trees[tree].entries[index]

    def _where(self, tree: int, index: int) -> str:
        return f"{self.trees[tree].root / self.trees[tree].index_file}: entry {index}"

    def _subject(self, tree: int, entries: Sequence[int]) -> str:
        """Subject of an image, by the index or by MIMIC's folder p<subject>."""
        found = {entry_subject(self._entry(tree, i)): i for i in entries}
        if "" in found:
            raise UserError(
                f"{self._where(tree, found[''])}: no subject_id, and no folder p<subject> in its image_path; without "
                "the subject one could be on both sides of the split"
            )
        if len(found) > 1:
            raise UserError(f"{self._where(tree, entries[0])}: its image is of subjects {sorted(found)}")
        return next(iter(found))

    def _given_parts(self, images: Sequence[tuple], subjects: Sequence[str]) -> dict[str, str]:
        """Part of each subject that has one in some tree's split column."""
        given: dict[str, tuple[str, str]] = {}
        for (tree, entries), subject in zip(images, subjects, strict=True):
            for index in entries:
                part, where = self._entry(tree, index).get("split"), self._where(tree, index)
                if part in (None, ""):
                    continue
                if part not in PARTS:
                    raise UserError(f"{where}: split {part!r}, expected one of {', '.join(PARTS)}")
                earlier, there = given.setdefault(subject, (part, where))
                if earlier != part:
                    raise UserError(
                        f"{where}: subject {subject} is in {part} here and in {earlier} at {there}; a subject "
                        "can't be on both sides"
                    )
        return {subject: part for subject, (part, _) in given.items()}

    def part(self, name: str) -> list[GazeImage]:
        return [image for image in self.images if image.part == name]

    def leave_out(self, seen: Collection[str]) -> str:
        """Leave out the test images of subjects that have trained a model, by their `subject_marks`; returns a line
        about it, "" where there are none.

        Raises:
            UserError: no test image is left.
        """
        left = [i for i in self.images if i.part != TEST or subject_mark(i.subject, MIMIC) not in seen]
        n_out, n_test = len(self.images) - len(left), len(self.part(TEST))
        if not n_out:
            return ""
        told = f"{n_out} of {n_test} test images are of subjects that trained or validated this model"
        if n_out == n_test:
            raise UserError(f"{told}; judge it on images that it has not seen")
        self.images = left
        return f"warning: {told}; they are left out"

    def seen(self) -> list[str]:
        """`subject_marks` of all who train or validate."""
        return subject_marks((i.subject for i in self.images if i.part != TEST), MIMIC)

    def name(self, image: GazeImage) -> str:
        return self.trees[image.tree].sample_name(image.entries[0])

    def reading_id(self, image: GazeImage, place: int) -> str:
        """A reading's id in its tree: reflacx_id, or the image's path where there is none."""
        entry = self._entry(image.tree, image.entries[place])
        return str(entry.get("reflacx_id", entry["image_path"]))

    def add_cache(self, cache_dir: str | None, fallback_dir: str | None) -> None:
        for tree in self.trees:
            add_cache(tree, cache_dir, fallback_dir=fallback_dir)

    def planes(self, image: GazeImage, place: int = 0) -> list[np.ndarray]:
        """Gray and attention of one reading, uint8 [h, w] each. Raises `SampleError` for an unreadable file."""
        tree, index = self.trees[image.tree], image.entries[place]
        try:
            return tree.read_planes(index)[0][:2]
        except UserError as error:
            raise SampleError(f"{error} (sample {tree.sample_name(index)})") from None

    def levels(self, image: GazeImage, size: int) -> Tensor:
        """The readings' stored heatmaps at size x size: uint8 [R, size, size]. Raises `SampleError` where nothing is left
        of one."""
        found = []
        for place, index in enumerate(image.entries):
            found.append(resize_whole(self.planes(image, place)[1], size))
            if not found[-1].any():
                tree = self.trees[image.tree]
                raise SampleError(
                    f"{tree.files(index).attention}: the heatmap is zero everywhere at {size} x {size} px; prepare it "
                    f"again (sample {tree.sample_name(index)})"
                )
        return torch.cat(found)

    @cached_property
    def _fixations(self) -> list[dict[str, np.ndarray]]:
        return [read_fixations(tree.root / FIXATIONS) for tree in self.trees]

    def fixations(self, image: GazeImage, place: int) -> np.ndarray | None:
        """Fixations of a reading, float64 [n, 3]: x, y (fractions of the image), duration (s); None where its tree
        keeps none.

        Raises:
            UserError: a table without a column, or a cell that is no number.
        """
        return self._fixations[image.tree].get(self.reading_id(image, place))

    def readings_without_fixations(self) -> dict[Path, str]:
        """ "3 of 12 test readings" for each tree that lacks fixations of some."""
        known: dict[int, list[bool]] = {}
        for image in self.part(TEST):
            for place in range(len(image.entries)):
                known.setdefault(image.tree, []).append(self.fixations(image, place) is not None)
        return {
            self.trees[tree].root: f"{own.count(False)} of {len(own)} test readings"
            for tree, own in known.items()
            if not all(own)
        }

    def describe(self) -> str:
        """Images, readings and subjects of each part, in columns."""
        parts = [self.part(name) for name in PARTS]
        rows = {
            "": PARTS,
            "images": map(len, parts),
            "readings": (sum(len(i.entries) for i in part) for part in parts),
            "read several times": (sum(len(i.entries) > 1 for i in part) for part in parts),
            "subjects": (len({i.subject for i in part}) for part in parts),
        }
        return "\n".join(f"{name:<20}" + "".join(f"{cell:>10}" for cell in row) for name, row in rows.items())


class GazeSamples(Dataset):
    """Samples of some images of a study: {"img": uint8 [1, S, S], "target": float32 [G, G], of sum 1}.

    `samples[epoch, i]` is `samples[i]`: nothing is augmented.
    """

    def __init__(self, study: GazeStudy, images: Sequence[GazeImage], input_size: int, map_size: int):
        self.study, self.images = study, list(images)
        self.input_size, self.map_size = input_size, map_size

    def __len__(self) -> int:
        return len(self.images)

    def sample_name(self, index: int) -> str:
        return self.study.name(self.images[index])

    def identity(self) -> str:
        """Digest of the samples' readings, their order and their content (`GazeTree.content`)."""
        digest = hashlib.sha256()
        for image in self.images:
            names = [self.study.reading_id(image, place) for place in range(len(image.entries))]
            digest.update(json.dumps(names).encode() + self.study.trees[image.tree].content(image.entries))
        return digest.hexdigest()[:16]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        image = self.images[key[1] if isinstance(key, tuple) else key]
        gray = resize_whole(self.study.planes(image)[0], self.input_size)  # [1, S, S]
        target = density(self.study.levels(image, self.map_size)).mean(0)
        return {"img": gray, "target": target.float()}


def resize_whole(plane: np.ndarray, size: int) -> Tensor:
    """A picture, uint8 [H, W], resized whole to a square, aspect ratio given up: uint8 [1, size, size]."""
    return crop_resize_flip([plane], Box(0, 0, *plane.shape), (size, size))


def draw_parts(subjects: Sequence[str]) -> dict[str, str]:
    """Parts of subjects that have none: a fixed draw by name, the same in every run and on every machine."""
    order = sorted(subjects, key=lambda subject: hashlib.sha256(f"gaze {subject}".encode()).digest())
    n_validate, n_test = (int(np.ceil(SHARES[part] * len(order))) for part in (VALIDATE, TEST))
    bounds = (n_validate, n_validate + n_test)
    return {
        subject: VALIDATE if place < bounds[0] else TEST if place < bounds[1] else TRAIN
        for place, subject in enumerate(order)
    }


def read_fixations(path: Path) -> dict[str, np.ndarray]:
    """Fixations of a tree's readings by id, float64 [n, 3] (see `GazeStudy.fixations`); {} where `path` is not
    there."""
    if not path.exists():
        return {}
    table = read_table(path, FIXATION_COLUMNS, text=("reflacx_id",))
    values = np.stack(list(numeric_columns(table, FIXATION_COLUMNS[1:], path).values()), 1)  # [n, 3]
    outside = np.flatnonzero((values[:, :2] < 0).any(1) | (values[:, :2] > 1).any(1))
    if outside.size:
        raise UserError(f"{path}: line {table.index[outside[0]]}: x and y are fractions of the image, 0 to 1")
    return {name: values[rows] for name, rows in table.groupby("reflacx_id").indices.items()}
