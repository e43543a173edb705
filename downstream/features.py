"""Features of a frozen encoder: one .npy per view in a folder that is named by what they depend on, filled row by row.

Behind the numbers of each row stands their checksum, 1 for numbers that are all zero: so a row that was never written,
half written or damaged does not fit its checksum, and is encoded again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from downstream.forward import Stopped, forward_all
from util.errors import UserError
from util.files import file_lock
from util.output import Progress
from util.stop import StopSignals


class FeatureFile:
    """Rows of float32 [n_rows, width] in a .npy, each there or not yet.

    A file that is no such array, or of other sizes, is removed and made again before rows are written.
    """

    def __init__(self, path: str | os.PathLike, n_rows: int, width: int):
        self.path, self.shape = Path(path), (n_rows, width + 1)  # the last column holds the checksums
        self.there = np.zeros(n_rows, bool)  # rows that were found to fit their checksums
        self.rows = None

    def missing(self, wanted: np.ndarray) -> np.ndarray:
        """Those of the rows `wanted` that are not there yet, in their order. Writes nothing."""
        self.rows = self.rows if self.rows is not None else self._open("r")
        if self.rows is not None:
            looked_at = wanted[~self.there[wanted]]
            for some in np.array_split(looked_at, len(looked_at) // 4096 + 1):
                rows = np.ascontiguousarray(self.rows[some])
                self.there[some] = _checksums(rows[:, :-1]) == rows[:, -1].view(np.uint32)
        return wanted[~self.there[wanted]]

    def reserve(self) -> None:
        """Make the file if it is not there, with all the space it will take. Raises `UserError` on a full disk."""
        try:
            self.rows = self._open("r+")
            if self.rows is None:
                self.path.unlink(missing_ok=True)
                self.rows = np.lib.format.open_memmap(self.path, "w+", np.float32, self.shape)
            with open(self.path, "r+b") as file:  # on a full disk a write to a memory map would end the process
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(self.path))
        except OSError as error:
            raise UserError(
                f"{self.path}: can't write features: {error.strerror}; make room or choose another --features_dir, and "
                "run the same command again: what was encoded is kept"
            ) from None

    def write(self, places: np.ndarray, values: np.ndarray) -> None:
        """Fill in rows, after `reserve`: `values` float32 [len(places), width]."""
        self.rows[places] = np.column_stack([values, _checksums(values).view(np.float32)])
        self.there[places] = True

    def read(self, places: np.ndarray, width: int | None = None) -> np.ndarray:
        """A copy of the first `width` numbers, or all, of rows that are there: float32 [len(places), width]."""
        return self.rows[:, : width or -1][places]

    def _open(self, mode: str) -> np.ndarray | None:
        """The array; None if the file is missing, no array, or of other sizes."""
        try:
            rows = np.load(self.path, mmap_mode=mode)
        except (FileNotFoundError, NotADirectoryError, ValueError, EOFError):
            return None
        return rows if (rows.shape, rows.dtype) == (self.shape, np.float32) else None


def _checksums(values: np.ndarray) -> np.ndarray:
    """Of each row of float32 [n, D]: uint32 [n]."""
    words = np.ascontiguousarray(values).view(np.uint32)
    return words.sum(1, dtype=np.uint32) + np.uint32(1)


def fill(
    folder: Path,
    files: Mapping[int, FeatureFile],
    wanted: Mapping[int, np.ndarray],
    encoder: Callable[[Tensor], Tensor],
    views: Dataset,
    *,
    device: torch.device,
    batch_size: int,
    num_workers: int,
    signals: StopSignals,
    what: str,
) -> int:
    """Encode what the files in `folder` lack of the images `wanted` in each view; returns the number of images encoded.

    A folder that lacks nothing is only read.

    Args:
        files: of each view.
        encoder: gray uint8 [B, 1, H, W] on `device` -> float [B, at least the file's width].
        views: [image, view] -> gray uint8 [1, H, W].

    Raises:
        Stopped: a stop was requested.
        UserError: an unreadable image, features that are not finite, or a full disk.
    """
    if not any(len(files[view].missing(images)) for view, images in wanted.items()):
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: can't make this directory: {error.strerror}; choose another --features_dir"
        ) from None
    mend = "wait for it, or choose another --features_dir"
    with file_lock(folder / "lock", what=f"features {folder}", mend=mend):
        for view in wanted:
            files[view].reserve()
        keys = [
            (view, image) for view, images in wanted.items() for image in np.sort(files[view].missing(images)).tolist()
        ]
        done = 0
        with Progress(f"{what}: encoding", len(keys), "images") as progress:
            how = dict(device=device, batch_size=batch_size, num_workers=num_workers, signals=signals)
            for features in forward_all(encoder, views, keys, **how):
                values = features.numpy()
                if not np.isfinite(values).all():
                    raise UserError(
                        f"{what}: features are not finite (NaN or infinite); pass --dtype float32, or weights that "
                        "are sound"
                    )
                batch = np.array(keys[done : done + len(values)])
                for view in dict.fromkeys(batch[:, 0].tolist()):
                    own, file = batch[:, 0] == view, files[view]
                    file.write(batch[own, 1], values[own, : file.shape[1] - 1])
                done += len(values)
                progress.add(len(values))
    if signals.request:
        raise Stopped
    return done
