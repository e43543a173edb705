"""The folder of a data set: its tables by name, its images by id or path, wherever they are below."""

from __future__ import annotations

import filecmp
import fnmatch
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from glob import glob
from pathlib import Path, PurePosixPath

from datasets.files_by_id import files_below
from util.errors import UserError

# In the order of preference if an image has several files: an 8-bit picture is read faster.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".dcm", ".dicom")


class Folder:
    """A directory and what is below it, without hidden files. `UserError` if it is none, by the option that names it."""

    def __init__(self, root: Path, option: str = "--data_path"):
        self.root = root
        if not root.is_dir():
            raise UserError(f"{option}: {root} is not a directory")

    @cached_property
    def files(self) -> list[str]:
        """Every file below, as a path from the root, parts separated by "/"."""
        return sorted(files_below(self.root, but="prepare.json"))

    def table(self, *patterns: str, needed: bool = True) -> Path | None:
        """The file whose name fits the first of the patterns that any file fits, letter case and ".gz" aside: one in the root
        itself, or else below.

        Raises:
            UserError: if these are several, or if there is none that is `needed`.
        """
        for pattern in patterns:
            # A table in the root itself is found without a walk through the images.
            if found := _fitting(glob("*", root_dir=self.root), pattern) or _fitting(self.files, pattern):
                break
        if len(found) > 1 or (needed and not found):
            raise UserError(
                f"{self.root}: expected one {' or '.join(patterns)} in it or below, but it has {' and '.join(found) or 'none'}; "
                "keep one of them there, or give the table with --csv"
            )
        return self.root / found[0] if found else None

    def images(self, names: Sequence[str], notes: list[str]) -> list[Path | None]:
        """The file of each name, None if it is missing.

        Names are those of `match`. Of an image with several suffixes the one that is named is taken, else the first of
        `IMAGE_SUFFIXES`, and `notes` say so.

        Raises:
            UserError: two different files could be meant, or images of one directory are in two.
        """
        candidates = match(names, self.files, self.root.resolve().name)
        result, several, homes = [], [], {}
        for name, found in zip(names, candidates, strict=True):
            if PurePosixPath(name).is_absolute() or ".." in name.split("/"):  # as it is written
                found = [name] if (self.root / name).is_file() else []
            chosen = self._choose(name, found) if found else None
            result.append(chosen and self.root / chosen)
            if len(found) > 1:
                several.append(f"e.g. {', '.join(found)}; {chosen} and its like are read")
            if chosen and (home := os.path.dirname(name)):
                first = homes.setdefault(home, chosen)
                if os.path.dirname(first) != os.path.dirname(chosen):
                    raise UserError(
                        f"{self.root}: {home} of the table could be the directory of {first} or of {chosen}; name the folder "
                        "of the images with --images"
                    )
        if several:
            notes.append(f"{len(several)} images are there more than once, {several[0]}")
        return result

    def _choose(self, name: str, files: list[str]) -> str:
        named = os.path.splitext(name)[1].lower()

        def rank(file: str) -> tuple[bool, int]:
            suffix = os.path.splitext(file)[1].lower()
            return suffix != named, (*IMAGE_SUFFIXES, suffix).index(suffix)

        chosen, *others = sorted(files, key=rank)
        for other in others:
            # The same picture copied to two places is no question; a mask of the same name would be.
            if rank(other) == rank(chosen) and not filecmp.cmp(self.root / chosen, self.root / other, shallow=False):
                raise UserError(
                    f"{self.root}: image {name!r} could be {chosen} or {other}; give the folder of the images with --images"
                )
        return chosen

    def missing_message(self, missing: Sequence[str], total: int) -> str:
        pictures = [name for name in self.files if name.lower().endswith(IMAGE_SUFFIXES)]
        there = f"{len(pictures)} image files are below it, e.g. {pictures[0]}" if pictures else "it has no image"
        return (
            f"{self.root}: {len(missing)} of {total} images are missing, e.g. {missing[0]!r} ({there}); "
            "give their folder with --images, or pass --skip_missing to continue without them"
        )


def match(names: Sequence[str], paths: Sequence[str], root: str = "") -> list[list[str]]:
    """Which of `paths`, below a directory called `root`, each name can be: an id or a file name in any directory, a path in
    the one that it names; with or without suffix.

    Of a name's path leading directories may be missing or have another name in `paths` (CheXpert's begin with the root's
    own name), but what is left must be no other name's, and where the two part, neither may have a directory that the other
    side knows: else the image of another directory would be taken. The directory of the image itself is left out only where
    it is the root.
    """
    wanted = [without_suffix(name).replace("\\", "/").removeprefix("./").split("/") for name in names]
    there = [[root, *without_suffix(path).split("/")] for path in paths]
    directories = {part for parts in there for part in parts[:-1]}
    result, pending, cut = [[] for _ in names], list(range(len(names))), 0
    while pending:
        ends = Counter("/".join(own[cut:]) for own in wanted)
        named = {own[cut - 1] for own in wanted if len(own) > cut > 0}
        found = defaultdict(list)
        for length in {len(wanted[i]) - cut for i in pending}:
            for path, parts in zip(paths, there, strict=True):
                end = "/".join(parts[-length:])
                if (
                    end in ends
                    and named.isdisjoint(parts[:-length][-1:])
                    and (length > 1 or not cut or len(parts) == 2)
                ):
                    found[end].append(path)
        for i in pending:
            end = "/".join(wanted[i][cut:])
            if not cut or ends[end] == 1:
                result[i] = found[end]
        pending = [
            i for i in pending if not result[i] and wanted[i][cut] not in directories and len(wanted[i]) > cut + 1
        ]
        cut += 1
    return result


def without_suffix(name: str) -> str:
    """Ids may have dots of their own: only what is an image's suffix is cut off."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def _fitting(names: Iterable[str], pattern: str) -> list[str]:
    ends = ((name, name.rpartition("/")[2].lower().removesuffix(".gz")) for name in names)
    return sorted(name for name, end in ends if fnmatch.fnmatchcase(end, pattern.lower()))
