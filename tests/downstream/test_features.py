"""Features in files: what is there, and what must not be taken for it."""

from __future__ import annotations

import numpy as np
import pytest

from downstream.features import FeatureFile
from util.errors import UserError


def test_rows_are_kept_and_numbers_that_were_deleted_are_missing(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    FeatureFile(tmp_path / "view", 4, 3).write(np.array([3, 1]), values)
    kept = FeatureFile(tmp_path / "view", 4, 3)
    assert kept.missing(np.arange(4)).tolist() == [0, 2]
    assert np.array_equal(kept.read(np.array([1, 3])), values[::-1])
    kept.write(np.array([], np.int64), values[:0])
    kept.write(np.array([0, 1, 2]), values[[0, 0, 1]])  # neighbours go in one piece, and over what was there
    assert np.array_equal(kept.read(np.array([0, 1, 2, 3])), values[[0, 0, 1, 0]])
    (tmp_path / "view.f32").unlink()  # the large file, to make room
    assert FeatureFile(tmp_path / "view", 4, 3).missing(np.arange(4)).tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="damaged; move it away"):
        FeatureFile(tmp_path / "view", 5, 3)


def test_a_row_that_does_not_fit_its_checksum_is_missing(tmp_path):
    values = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    values[2] = 0  # as what was never written
    FeatureFile(tmp_path / "view", 4, 3).write(np.arange(4), values)
    numbers = bytearray((tmp_path / "view.f32").read_bytes())
    numbers[1 * 3 * 4 + 5] ^= 1
    (tmp_path / "view.f32").write_bytes(numbers)
    file = FeatureFile(tmp_path / "view", 4, 3)
    assert file.missing(np.arange(4)).tolist() == [1] and file.n_damaged == 1
    with pytest.raises(ValueError, match="1 of 2 rows were never written"):
        file.read(np.array([0, 1]))
    file.write(np.array([1]), values[1:2])
    assert np.array_equal(file.read(np.arange(4)), values) and file.n_damaged == 0
