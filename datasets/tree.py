"""What processed trees have in common: an index, up to three planes an entry, one sample schema."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from abc import abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from datasets.plane import Plane
from datasets.transforms import (
    binary_foreground,
    centre_box,
    crop_resize_flip,
    full_scale_foreground,
    grid_size,
    random_crop_box,
    sample_rng,
    scale_box,
)
from util.errors import UserError
from util.images import read_gray, read_map
from util.masking import otsu_foreground

_SUBJECT_FOLDER = re.compile(r"(?:^|/)p(\d{3,})(?=/)")


class SampleError(UserError):
    """A sample that can't be read; from the workers of `util.loading.SampleLoader` it comes as it is."""


class EntryFiles(NamedTuple):
    """The files of one entry. As text from `GazeTree.entry_files`: of 377,000 entries, paths would take 20 s."""

    image: str | Path
    attention: str | Path
    foreground: str | Path


class Problem(NamedTuple):
    """One finding of `check_data`: severity is "error", "warning" or, where all is well, "note"; the message begins
    with the file."""

    severity: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.message}"


@dataclass(eq=False)
class GazeTree(Dataset):
    """Data set over a processed tree; `Reflacx` and `Mimic` say where its files are.

    Samples are `{"img": uint8 [1, S, S] gray, "attention": uint8 [S, S] 0..255, "foreground": uint8
    [S, S] 0/1}`, cut by one crop and flip that are a function of (seed, epoch, index): `dataset[(epoch, i)]`;
    `dataset[i]` is that of epoch 0. `preload` reads the stored foreground; otherwise it is the Otsu foreground of the
    cropped attention. With `augment=False` samples are the resized centre square.

    Making one reads the index only. Samples come from the native files until `datasets.cache` gives
    the planes from memory-mapped files (`datasets.build_dataset` does).

    Attributes:
        image_prefix, map_prefix: "files/" or "", whatever is between the tree's root or a kind's directory and the
            names in the index; all entries have those of the first entry whose files are there.

    Raises:
        UserError: directory or index missing or malformed, an entry without a key, or a path that
            leaves the tree.
        SampleError: on reading a sample whose files are missing, damaged, or differ in size.
    """

    index_file: ClassVar[str]
    required_keys: ClassVar[tuple[str, ...]]
    prefixes: ClassVar[tuple[str, ...]] = ("", "files/")  # in the order in which they are looked for

    root: Path
    input_size: int = 224
    min_crop_ratio: float = 0.2
    seed: int = 0
    _: KW_ONLY
    preload: bool = False
    augment: bool = True
    cache_size: int = 512

    def __post_init__(self):
        self.root = Path(self.root)
        self.first_index = 0  # of this tree among several, see ConcatTrees
        self.cache: list[Plane] | None = None  # of gray, attention and, with `preload`, foreground
        self.entries = read_index(self.root / self.index_file)
        for problem in self.entry_problems(self.entries).values():
            raise UserError(f"{self.root / self.index_file}: {problem}")
        self.image_prefix, self.map_prefix = self._find_prefixes()

    @abstractmethod
    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        """Where the files of an entry are, or should be."""
        raise NotImplementedError(f"{type(self).__name__}.entry_files: a tree type says where its files are")

    @classmethod
    def entry_problems(cls, entries: Sequence[Any]) -> dict[int, str]:
        """What is wrong with the malformed ones among the entries of an index."""
        found = ((i, cls._entry_problem(entry)) for i, entry in enumerate(entries))
        return {i: f"entry {i}: {problem}" for i, problem in found if problem}

    @classmethod
    def _entry_problem(cls, entry: Any) -> str:
        if not isinstance(entry, dict):
            return f"expected an object, got {json.dumps(entry)[:40]}"
        for key in cls.required_keys:
            value = entry.get(key)
            is_path = key == "image_path"
            parts = str(value).split("/")
            # Ids may be numbers in JSON.
            if (
                type(value) not in ((str,) if is_path else (str, int))
                or not parts[0]  # empty, or from the root
                or not set(parts) - {"", "."}
                or ".." in parts
                or "\0" in str(value)
                or (len(parts) > 1 and not is_path)
            ):
                expected = "a path inside the tree" if is_path else "a plain name"
                return f'"{key}" is {json.dumps(value)[:80]}, expected {expected}' if key in entry else f'lacks "{key}"'
        return ""

    def _find_prefixes(self) -> tuple[str, str]:
        both = list(itertools.product(self.prefixes, repeat=2))
        for entry in self.entries:
            for self.image_prefix, self.map_prefix in both:
                if all(map(os.path.exists, self.entry_files(entry)[:2])):
                    return self.image_prefix, self.map_prefix
        return both[0]

    def files(self, index: int) -> EntryFiles:
        """The files of sample `index`, as absolute paths where `data_path` is one."""
        return EntryFiles(*map(Path, self.entry_files(self.entries[index])))

    def sample_name(self, index: int) -> str:
        """ "<image_path> (<reflacx_id>)", for messages."""
        entry = self.entries[index]
        return f"{entry['image_path']} ({entry.get('reflacx_id', entry.get('study_id', index))})"

    def identity(self) -> str:
        """Digest of the samples' names, order and `content`: other data have another. The place of the tree is not
        part of it."""
        digest = hashlib.sha256(f"{self.index_file} {len(self)}\n".encode())
        for index in range(len(self)):
            digest.update(f"{self.sample_name(index)}\n".encode("utf-8", "surrogatepass"))
        digest.update(self.content(range(len(self))))
        return digest.hexdigest()

    def content(self, indices: Sequence[int]) -> bytes:
        """Differs where the pixels of these samples differ: checksums of the cached planes, or without a cache the
        sizes of the files."""
        if self.cache is not None:
            return b"".join(plane.checksums(list(indices)).tobytes() for plane in self.cache)
        sizes = []
        for index in indices:
            for file in self.entry_files(self.entries[index])[: self.n_planes]:
                with contextlib.suppress(OSError):  # reading the sample reports it
                    sizes.append(os.path.getsize(file))
        return json.dumps(sizes).encode()

    @property
    def n_planes(self) -> int:
        """How many of an entry's files a sample is made from, in the order of `EntryFiles`."""
        return 3 if self.preload else 2

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        try:
            planes, native_size = self.read_planes(index)
        except UserError as error:
            raise SampleError(f"{error} (sample {self.sample_name(index)})") from None
        grid = grid_size(*native_size, self.cache_size)
        flip = False
        if self.augment:
            rng = sample_rng(self.seed, epoch, self.first_index + index)
            box = random_crop_box(rng, *grid, self.min_crop_ratio)
            flip = bool(rng.random() < 0.5)
        else:
            box = centre_box(*grid)
        box = scale_box(box, grid, planes[0].shape)
        sample = crop_resize_flip(planes, box, (self.input_size, self.input_size), flip)  # [C, S, S]
        if self.preload:
            foreground = binary_foreground(sample[2])
        else:
            foreground = otsu_foreground(sample[1:2])[0].to(sample.dtype)
        return {"img": sample[:1], "attention": sample[1], "foreground": foreground}

    def read_planes(self, index: int) -> tuple[list[np.ndarray], tuple[int, int]]:
        """Gray, attention and (with `preload`) foreground of a sample, uint8 of one size [H, W], from the
        cache where there is one; and the (height, width) of the native image."""
        if self.cache is not None:
            native_size = self.cache[0].native_size(index).tolist()
            return [plane[index] for plane in self.cache], tuple(native_size)
        files = self.files(index)
        planes = [read_gray(files.image), read_map(files.attention)]
        if self.preload:
            planes.append(full_scale_foreground(read_map(files.foreground)))
        for file, plane in zip(files[1:], planes[1:]):
            check_same_size(file, plane.shape, files.image, planes[0].shape)
        return planes, planes[0].shape


class ConcatTrees(Dataset):
    """Several trees one after the other, with the interface of one."""

    def __init__(self, trees: list[GazeTree]):
        self.trees = trees
        self.entries = []
        for tree in trees:
            tree.first_index = len(self.entries)
            self.entries += tree.entries

    def _locate(self, index: int) -> tuple[GazeTree, int]:
        """The tree that holds sample `index`, and the sample's index in it."""
        tree = self.trees[bisect_right(self.trees, index, key=lambda tree: tree.first_index) - 1]
        return tree, index - tree.first_index

    def sample_name(self, index: int) -> str:
        tree, inner = self._locate(index)
        return tree.sample_name(inner)

    def identity(self) -> str:
        return hashlib.sha256("\n".join(tree.identity() for tree in self.trees).encode()).hexdigest()

    def n_shared_images(self) -> int:
        """Number of images, by subject and file name, that several trees have."""
        names = Counter(
            name
            for tree in self.trees
            for name in {(entry_subject(e), e["image_path"].rpartition("/")[2].partition(".")[0]) for e in tree.entries}
        )
        return sum(count > 1 for count in names.values())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        tree, inner = self._locate(index)
        return tree[(epoch, inner)]


def entry_subject(entry: Mapping[str, Any]) -> str:
    """Whose image an entry is, by its subject_id or MIMIC's folder p<subject>; "" if neither tells."""
    folders = _SUBJECT_FOLDER.findall(entry["image_path"])
    return str(entry.get("subject_id") or "").strip() or (folders[-1] if folders else "")


def read_index(path: Path) -> list[Any]:
    """The entries of an index file: a non-empty JSON list. Raises UserError."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {str(error.strerror).lower()}; scripts/prepare_reflacx.py writes it") from None
    except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path}: not valid JSON ({error}); prepare the data again") from None
    if not entries or not isinstance(entries, list):
        raise UserError(f"{path}: expected a JSON list of entries, got {json.dumps(entries)[:40]}")
    return entries


def check_same_size(file: Path, shape: tuple[int, int], image: Path, image_shape: tuple[int, int]) -> None:
    """Raise UserError unless a plane has its image's (height, width)."""
    if tuple(shape) != tuple(image_shape):
        raise UserError(
            f"{file}: {shape[1]} x {shape[0]} px, but its image {image} has {image_shape[1]} x {image_shape[0]}"
        )
