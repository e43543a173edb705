"""What processed trees have in common: an index, up to three planes an entry, one sample schema."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
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


class EntryFiles(NamedTuple):
    """The files of one entry. As text from `GazeTree.entry_files`: of 377,000 entries, paths would take 20 s."""

    image: str | Path
    attention: str | Path
    foreground: str | Path


@dataclass(eq=False)
class GazeTree(Dataset):
    """Data set over a processed tree; `Reflacx` and `Mimic` say where its files are.

    `dataset[epoch, i]` is `{"img": uint8 [1, S, S] gray, "attention": uint8 [S, S] 0..255, "foreground": uint8
    [S, S] 0/1}`, cut by one crop and flip that are a function of (seed, epoch, i). `preload` reads the stored foreground;
    otherwise it is the Otsu foreground of the cropped attention. With `augment=False` samples are the resized centre
    square.

    Making one reads the index only. Samples come from the native files until `datasets.cache` gives
    the planes from memory-mapped files (`datasets.build.build_dataset` does).

    Attributes:
        image_prefix, map_prefix: "files/" or "", whatever is between the tree's root or a kind's directory and the
            names in the index; all entries have those of the first entry whose files are there.

    Raises:
        UserError: directory or index missing or malformed, an entry without a key, or a path that
            leaves the tree; on reading a sample, files that are missing, damaged, or differ in size.
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
        self.roles = EntryFiles._fields[: 3 if self.preload else 2]  # the files of an entry that samples are made of
        self.first_index = 0  # of this tree among several, see ConcatTrees
        self.cache: list[Plane] | None = None  # of gray, attention and, with `preload`, foreground
        self.entries = read_index(self.root / self.index_file)
        for problem in self.entry_problems(self.entries):
            raise UserError(f"{self.root / self.index_file}: {problem}")
        places = itertools.product(self.prefixes, repeat=2)
        for entry, prefixes in itertools.product(self.entries, places):
            self.image_prefix, self.map_prefix = prefixes
            if all(map(os.path.exists, self.entry_files(entry)[:2])):
                break
        else:  # no sample is whole
            self.image_prefix = self.map_prefix = self.prefixes[0]

    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        """Where the files of an entry are, or should be."""
        raise NotImplementedError

    @classmethod
    def entry_problems(cls, entries: Sequence[Any]) -> Iterator[str]:
        """What is wrong with the malformed ones among the entries of an index."""
        for i, entry in enumerate(entries):
            if not isinstance(entry, dict):
                yield f"entry {i}: expected an object, got {json.dumps(entry)[:40]}"
                continue
            for key in cls.required_keys:
                value = entry.get(key)
                is_path = key == "image_path"
                inner = os.path.normpath(str(value))
                if (
                    not isinstance(value, str if is_path else (str, int))  # ids may be numbers in JSON
                    or inner == "."
                    or inner.startswith(("/", ".."))
                    or "\0" in inner
                    or ("/" in inner and not is_path)
                ):
                    expected = "a path inside the tree" if is_path else "a plain name"
                    yield f'entry {i}: "{key}" is {json.dumps(value)[:80]}, expected {expected}'
                    break

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
            return b"".join(plane.checksums[list(indices)].tobytes() for plane in self.cache)
        sizes = []
        for index in indices:
            for file in self.entry_files(self.entries[index])[: len(self.roles)]:
                with contextlib.suppress(OSError):  # reading the sample reports it
                    sizes.append(os.path.getsize(file))
        return json.dumps(sizes).encode()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        try:
            planes, native_size = self.read_planes(index)
        except UserError as error:
            raise UserError(f"{error} (sample {self.sample_name(index)})") from None
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
        files = self.entry_files(self.entries[index])
        if self.cache is not None:
            planes = [plane[index] for plane in self.cache]
            sizes = [tuple(plane.native_size[index].tolist()) for plane in self.cache]
        else:
            planes = [*map(read_plane, self.roles, files)]
            sizes = [plane.shape for plane in planes]
        for file, size in zip(files, sizes):
            check_same_size(file, size, files.image, sizes[0])
        return planes, sizes[0]


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

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        tree, inner = self._locate(key[1])
        return tree[key[0], inner]


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


def read_plane(role: str, file: str | Path) -> np.ndarray:
    """The file of an entry that `EntryFiles` calls `role`, uint8 [H, W]; a foreground of 0/1 becomes one of 0/255."""
    plane = read_gray(file) if role == "image" else read_map(file)
    return full_scale_foreground(plane) if role == "foreground" else plane


def check_same_size(file: str | Path, shape: tuple[int, int], image: str | Path, image_shape: tuple[int, int]) -> None:
    """Raise UserError unless a plane has its image's (height, width)."""
    if shape != image_shape:
        raise UserError(
            f"{file}: {shape[1]} x {shape[0]} px, but its image {image} has {image_shape[1]} x {image_shape[0]}"
        )
