"""What processed trees have in common: an index, up to three planes an entry, one sample schema."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

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
from util.cli import available_cpus
from util.errors import UserError
from util.images import read_gray, read_map
from util.masking import otsu_foreground

Item, Result = TypeVar("Item"), TypeVar("Result")
SIZES_IN_IDENTITY = 4096
_SUBJECT_FOLDER = re.compile(r"(?:^|/)p(\d{3,})(?=/)")
ITEMS_AT_ONCE = 4096  # bounds the memory that waiting tasks take


class SampleError(UserError):
    """A sample that can't be read; from the workers of `util.loading.SampleLoader` it comes as it is."""


class EntryFiles(NamedTuple):
    """The files of one entry. As text from `GazeTree.entry_files`: of 377,000 entries, paths would take 20 s."""

    image: str | Path
    attention: str | Path
    foreground: str | Path


@dataclass(frozen=True)
class Problem:
    """One finding of `check_data`: severity is "error", "warning" or, where all is well, "note"."""

    severity: str
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.file}: {self.message}"


class GazeTree(Dataset):
    """Data set over a processed tree; `Reflacx` and `Mimic` say where its files are.

    Samples are `{"img": uint8 [1, S, S] gray, "attention": uint8 [S, S] 0..255, "foreground": uint8
    [S, S] 0/1}`, cut by one crop and flip that are a function of (seed, epoch, index). `dataset[i]`
    takes the epoch of `set_epoch`, `dataset[(epoch, i)]` names it. `preload` reads the stored
    foreground; otherwise it is the Otsu foreground of the cropped attention. With `augment=False`
    samples are the resized centre square.

    Making one reads the index only. Samples come from the native files until `datasets.cache` gives
    the planes from memory-mapped files (`datasets.build_dataset` does).

    Raises:
        UserError: directory or index missing or malformed, an entry without a key, or a path that
            leaves the tree.
        SampleError: on reading a sample whose files are missing, damaged, or differ in size.
    """

    index_file: str
    required_keys: tuple[str, ...]

    def __init__(
        self,
        data_path: str | os.PathLike,
        input_size: int = 224,
        min_crop_ratio: float = 0.2,
        seed: int = 0,
        *,
        preload: bool = False,
        augment: bool = True,
        cache_size: int = 512,
    ):
        if not 0 < min_crop_ratio <= 1:
            raise UserError(f"--min_crop_ratio {min_crop_ratio} is not in (0, 1]")
        if seed < 0:
            raise UserError(f"--seed {seed} is negative")
        self.root = Path(data_path)
        self.input_size = input_size
        self.min_crop_ratio = min_crop_ratio
        self.seed = seed
        self.preload = preload
        self.augment = augment
        self.cache_size = cache_size
        self.epoch = 0
        self.first_index = 0  # of this tree among several, see ConcatTrees
        self.cache = None  # a datasets.cache.TreeCache
        self.entries = read_index(self.root / self.index_file)
        for i, entry in enumerate(self.entries):
            if (problem := self.entry_problem(entry)) is not None:
                raise UserError(f"{self.root / self.index_file}: entry {i}: {problem}")

    @abstractmethod
    def entry_files(self, entry: dict[str, Any]) -> EntryFiles:
        """Where the files of an entry are; for a missing file, where it should be."""
        raise NotImplementedError(f"{type(self).__name__}.entry_files: a tree type says where its files are")

    def entry_problem(self, entry: Any) -> str | None:
        """What is wrong with an entry of the index, if anything."""
        if not isinstance(entry, dict):
            return f"expected an object, got {json.dumps(entry)[:40]}"
        for key in self.required_keys:
            if key not in entry:
                return f'lacks the key "{key}"'
            value = entry[key]
            # Ids may be numbers in JSON; bool is an int to Python.
            allowed = (str,) if key == "image_path" else (str, int)
            if isinstance(value, bool) or not isinstance(value, allowed) or not str(value).strip("\0"):
                return f'"{key}" is {json.dumps(value)[:40]}, expected a name'
            name = str(value)
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.startswith("/") or ".." in parts or "\0" in name or not parts:
                return f'"{key}" is not a path inside the tree: {json.dumps(value)[:80]}'
            if key != "image_path" and len(parts) != 1:
                return f'"{key}" must be a plain name: {json.dumps(value)[:80]}'
        return None

    def files(self, index: int) -> EntryFiles:
        """The files of sample `index`, as absolute paths where `data_path` is one."""
        return EntryFiles(*map(Path, self.entry_files(self.entries[index])))

    def sample_name(self, index: int) -> str:
        """ "<image_path> (<reflacx_id>)", for messages."""
        entry = self.entries[index]
        return f"{entry['image_path']} ({entry.get('reflacx_id', entry.get('study_id', index))})"

    def identity(self) -> str:
        """Digest of the samples' names, order and `content`: other data have another. Without a cache, of at most
        8192 samples' content, evenly spread. The place of the tree is not part of it."""
        digest = hashlib.sha256(f"{self.index_file} {len(self)}\n".encode())
        for index in range(len(self)):
            digest.update(f"{self.sample_name(index)}\n".encode("utf-8", "surrogatepass"))
        # A stat for each of 377,000 files would take long.
        step = 1 if self.cache is not None else max(1, len(self) // SIZES_IN_IDENTITY)
        digest.update(self.content(range(0, len(self), step)))
        return digest.hexdigest()

    def content(self, indices: Sequence[int]) -> bytes:
        """Differs where the pixels of these samples differ: checksums of the cached planes, or without a cache the
        sizes of the files."""
        if self.cache is not None:
            return self.cache.checksums(indices)
        sizes = []
        for index in indices:
            for file in self.files(index)[: 3 if self.preload else 2]:
                with contextlib.suppress(OSError):  # reading the sample reports it
                    sizes.append(file.stat().st_size)
        return json.dumps(sizes).encode()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of `dataset[i]`; no effect on `dataset[(epoch, i)]`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key if isinstance(key, tuple) else (self.epoch, key)
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
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
            return self.cache.planes(index)
        files = self.files(index)
        planes = [read_gray(files.image), read_map(files.attention)]
        if self.preload:
            planes.append(full_scale_foreground(read_map(files.foreground)))
        for file, plane in zip(files[1:], planes[1:]):
            check_same_size(file, plane.shape, files.image, planes[0].shape)
        return planes, planes[0].shape

    @cached_property
    def is_prepared(self) -> bool:
        """Whether our preparation made and finished the tree, in the published layout."""
        return (self.root / "prepare.origins").exists()

    @cached_property
    def _prefix(self) -> str:
        return os.path.join(self.root, "")

    def first_existing(self, *candidates: str) -> str:
        """The first of some paths below the root that exists, or else the first; at once where the tree's record
        vouches for the first."""
        paths = [self._prefix + candidate for candidate in candidates]
        return paths[0] if self.is_prepared else next(filter(os.path.exists, paths), paths[0])


class ConcatTrees(Dataset):
    """Several trees one after the other, with the interface of one."""

    def __init__(self, trees: list[GazeTree]):
        self.trees = trees
        self.starts = [0]
        for tree in trees:
            tree.first_index = self.starts[-1]
            self.starts.append(self.starts[-1] + len(tree))
        self.entries = [entry for tree in trees for entry in tree.entries]

    def locate(self, index: int) -> tuple[GazeTree, int]:
        """The tree that holds sample `index`, and the sample's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.trees[number], index - self.starts[number]

    def files(self, index: int) -> EntryFiles:
        tree, inner = self.locate(index)
        return tree.files(inner)

    def sample_name(self, index: int) -> str:
        tree, inner = self.locate(index)
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

    def set_epoch(self, epoch: int) -> None:
        for tree in self.trees:
            tree.set_epoch(epoch)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor]:
        if isinstance(key, tuple):
            tree, inner = self.locate(key[1])
            return tree[(key[0], inner)]
        tree, inner = self.locate(key)
        return tree[inner]


def entry_subject(entry: Mapping[str, Any]) -> str:
    """Whose image an entry is, by its subject_id or MIMIC's folder p<subject>; "" if neither tells."""
    folders = _SUBJECT_FOLDER.findall(entry["image_path"])
    return str(entry.get("subject_id") or "").strip() or (folders[-1] if folders else "")


def read_index(path: Path) -> list[Any]:
    """The entries of an index file: a non-empty JSON list. Raises UserError."""
    if not path.parent.is_dir():
        raise UserError(f"--data_path: {path.parent} is not a directory")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; scripts/prepare_reflacx.py writes it") from None
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:  # JSON or UTF-8
        raise UserError(f"{path}: not valid JSON ({error}); prepare the data again") from None
    if not isinstance(entries, list):
        raise UserError(f"{path}: expected a JSON list of entries, got {type(entries).__name__}")
    if not entries:
        raise UserError(f"{path}: the list of entries is empty")
    return entries


def check_same_size(file: Path, shape: tuple[int, int], image: Path, image_shape: tuple[int, int]) -> None:
    """Raise UserError unless a plane has its image's (height, width)."""
    if tuple(shape) != tuple(image_shape):
        raise UserError(
            f"{file}: {shape[1]} x {shape[0]} px, but its image {image} has {image_shape[1]} x {image_shape[0]}"
        )


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int | None = None
) -> Iterator[Result]:
    """`map` on several threads (default: one for each CPU), for work that releases Python's lock, as
    decoding and resizing do. The first error ends it; what has not begun then is dropped."""
    with ThreadPoolExecutor(workers or available_cpus()) as pool:
        try:
            for start in range(0, len(items), ITEMS_AT_ONCE):
                yield from pool.map(function, items[start : start + ITEMS_AT_ONCE])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def check_tree(tree_type: type[GazeTree], root: Path, preload: bool) -> list[Problem]:
    """Read everything in a tree and return what is wrong with each entry, in the order of the index.

    A tree may do without a directory of foregrounds unless `preload`; where it has one, it should be whole.
    Raises UserError only where the directory or the index itself can't be read.
    """
    index_path = root / tree_type.index_file
    # A tree without entries: only its rules for entries and places are used.
    tree = tree_type.__new__(tree_type)
    tree.root = root
    entries = read_index(index_path)
    problems: dict[int, list[Problem]] = {i: [] for i in range(len(entries))}
    files: dict[int, EntryFiles] = {}
    for i, entry in enumerate(entries):
        if (problem := tree.entry_problem(entry)) is not None:
            problems[i].append(Problem("error", str(index_path), f"entry {i}: {problem}"))
        else:
            files[i] = tree.entry_files(entry)

    n_planes = 3 if preload or (root / "foreground").is_dir() else 2
    unique = list(dict.fromkeys((file, role) for group in files.values() for role, file in enumerate(group[:n_planes])))
    found = tqdm(in_threads(_look_at, unique), "checking files", total=len(unique), disable=None)
    seen = dict(zip(unique, found))
    for i, group in files.items():
        image = seen[group.image, 0]
        for place, file in enumerate(group[:n_planes]):
            role, look = EntryFiles._fields[place], seen[file, place]
            where = f"(entry {i}, {role} of {entries[i]['image_path']})"
            if isinstance(look, str):
                problems[i].append(Problem("error", str(file), f"{look} {where}"))
                continue
            shape, lowest, highest = look
            if not isinstance(image, str) and shape != image[0]:
                try:
                    check_same_size(file, shape, group.image, image[0])
                except UserError as error:
                    problems[i].append(Problem("error", str(file), f"{_without(file, error)} {where}"))
            if lowest == highest:
                text = {
                    "image": "all pixels are equal",
                    "attention": "all-equal heatmap: no patch is significant",
                    "foreground": "all-equal foreground: every patch is significant, or none",
                }[role]
                problems[i].append(Problem("warning", str(file), f"{text} {where}"))
    return [problem for i in range(len(entries)) for problem in problems[i]]


def _look_at(file_and_place: tuple[Path, int]) -> tuple[tuple[int, int], int, int] | str:
    """(shape, lowest, highest value) of a file and its place in `EntryFiles`, or what is wrong with it."""
    file, place = file_and_place
    try:
        plane = read_map(file) if place else read_gray(file)
    except UserError as error:
        return _without(file, error)
    return plane.shape, int(plane.min()), int(plane.max())


def _without(file: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{file}: ")
