"""Features of images in files that are filled row by row, kept, and read memory-mapped.

A row is written with `pwrite`, and its checksum only after it is on disk, so that a killed run loses the last rows at
most, and a full disk is an error instead of a signal. A row that does not fit its checksum counts as not written.
"""

from __future__ import annotations

import os
import zlib
from itertools import pairwise
from pathlib import Path

import numpy as np

from util.errors import UserError

DTYPE = np.dtype("<f4")
SUM = np.dtype("<u4")
SUFFIXES = ("f32", "sums")


class FeatureFile:
    """Rows of float32, [n_rows, width], each there or not yet.

    Two files: NAME.f32 with the numbers and nothing else, sparse until it is filled, and NAME.sums with the checksum
    (CRC-32) of each row, 0 where the row is not there. Each row is checked once in the life of this object.

    Args:
        path: without suffix; its folder is made.

    Raises:
        UserError: files of other sizes lie there, or the place can't be written to.
    """

    def __init__(self, path: str | os.PathLike, n_rows: int, width: int):
        self.n_rows, self.width = n_rows, width
        self.numbers, self.sums = (Path(f"{path}.{suffix}") for suffix in SUFFIXES)
        self.n_damaged = 0  # rows that were found not to fit their checksums
        self._sound = np.zeros(n_rows, bool)
        try:
            self.numbers.parent.mkdir(parents=True, exist_ok=True)
            for file, size in ((self.numbers, n_rows * width * DTYPE.itemsize), (self.sums, n_rows * SUM.itemsize)):
                if file.exists() and file.stat().st_size == size:
                    continue  # nothing is written where all is there: it may be others' to write
                with open(file, "ab") as opened:
                    found = opened.tell()
                    if found == 0:
                        if file == self.numbers:  # sums of numbers that were deleted would count as damage
                            self.sums.unlink(missing_ok=True)
                        opened.truncate(size)
                    elif found != size:
                        raise UserError(f"{file}: has {found} bytes, not {size}: damaged; move it away")
        except OSError as error:
            raise UserError(f"{self.numbers}: can't write features: {error.strerror}") from None

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that are not there yet, or damaged, in their order."""
        sums = np.fromfile(self.sums, SUM)
        numbers = self._mapped()
        for row in rows[~self._sound[rows] & (sums[rows] != 0)].tolist():
            self._sound[row] = _checksum(numbers[row]) == sums[row]
        self.n_damaged = int((~self._sound[rows] & (sums[rows] != 0)).sum())
        return rows[~self._sound[rows]]

    def write(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Fill in rows, durably: `values` [len(rows), width]. Raises `UserError` on a full disk."""
        values = np.ascontiguousarray(values, DTYPE)
        if values.shape != (len(rows), self.width):
            raise ValueError(f"features {values.shape} for {len(rows)} rows of {self.width}")
        row_bytes = self.width * DTYPE.itemsize
        sums = np.array([_checksum(row) for row in values], SUM)
        starts = np.flatnonzero(np.diff(rows, prepend=rows[:1] - 2) != 1)  # of rows that follow one another
        spans = [slice(*pair) for pair in pairwise([*starts.tolist(), len(rows)])]
        try:
            with open(self.numbers, "r+b", buffering=0) as file:
                for span in spans:
                    _write_at(file.fileno(), values[span].data, int(rows[span.start]) * row_bytes)
                os.fdatasync(file.fileno())
            with open(self.sums, "r+b", buffering=0) as file:
                for span in spans:
                    _write_at(file.fileno(), sums[span].data, int(rows[span.start]) * SUM.itemsize)
        except OSError as error:
            raise UserError(
                f"{self.numbers}: can't write features: {error.strerror}; make room or choose another "
                "--features_dir, and run the same command again: what was encoded is kept"
            ) from None

    def read(self, rows: np.ndarray, width: int | None = None) -> np.ndarray:
        """A copy of the first `width` numbers, or all, of some rows: float32 [len(rows), width]; they must be there."""
        if len(lacking := self.missing(rows)):
            raise ValueError(f"{self.numbers}: {len(lacking)} of {len(rows)} rows were never written")
        return self._mapped()[:, :width][rows]

    def _mapped(self) -> np.ndarray:
        return np.asarray(np.memmap(self.numbers, DTYPE, "r", shape=(self.n_rows, self.width)))


def _checksum(row: np.ndarray) -> int:
    return zlib.crc32(row) or 1  # 0 says that nothing is there


def _write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
