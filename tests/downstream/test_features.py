"""Features are written once, and what is damaged, foreign or half written is not taken for them."""

from __future__ import annotations

import resource

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from downstream.features import FeatureFile, fill
from downstream.forward import Stopped
from util.errors import UserError


class Numbers(Dataset):
    """View v of image i is the number 10 v + i; reads are counted, and a stop is requested after `last` of them."""

    def __init__(self, last: int = 1000):
        self.read, self.last = [], last

    def __getitem__(self, key):
        self.read.append(key)
        return torch.full((1, 4, 4), 10 * key[1] + key[0], dtype=torch.uint8)

    @property
    def request(self) -> int:
        return len(self.read) >= self.last


def encoded(folder, wanted: dict[int, list[int]], views: Numbers) -> dict[int, FeatureFile]:
    """Files of 20 images, with those of `wanted`: {view: images}."""
    files = {view: FeatureFile(folder / f"{view}.npy", 20, 2) for view in wanted}
    how = dict(device=torch.device("cpu"), batch_size=3, num_workers=0, signals=views, what="e")
    numbers = lambda gray: gray.float().mean((2, 3)).repeat(1, 3) * torch.tensor([1.0, 0.0, 5.0])  # noqa: E731
    before = len(views.read)
    done = fill(folder, files, {view: np.array(rows) for view, rows in wanted.items()}, numbers, views, **how)
    assert done == len(views.read) - before
    return files


def test_each_image_is_encoded_once_in_each_view(tmp_path):
    views, rows = Numbers(), [7, 1, 2, 5]
    files = encoded(tmp_path, {0: rows, 1: rows}, views)
    assert files[1].read(np.array([7, 1])).tolist() == [[17, 0], [11, 0]]
    assert files[0].read(np.array([5, 1]), 1).tolist() == [[5], [1]]
    files = encoded(tmp_path, {0: range(20), 1: rows}, views)
    assert len(views.read) == len(set(views.read)) == 24
    assert files[0].read(np.arange(20))[:, 0].tolist() == list(range(20))
    assert files[1].missing(np.arange(5)).tolist() == [0, 3, 4]


def test_a_stop_keeps_what_was_encoded(tmp_path):
    views = Numbers(last=6)
    with pytest.raises(Stopped):
        encoded(tmp_path, {0: range(20)}, views)
    assert 6 <= len(views.read) < 20
    views.last = 1000
    encoded(tmp_path, {0: range(20)}, views)
    assert len(views.read) == len(set(views.read)) == 20


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-5 * 12 + 6] ^= 1  # in the 16th of 20 rows of 12 bytes
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (flipped, [15]),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), [19]),
        (lambda path: np.save(path, np.ones((20, 4), np.float32)), range(20)),
        (lambda path: np.save(path, np.ones((20, 3))), range(20)),
        (lambda path: path.write_bytes(b""), range(20)),
        (lambda path: path.unlink(), range(20)),
    ],
    ids=["a bit", "cut off", "another width", "another type", "empty", "removed"],
)
def test_what_is_damaged_or_foreign_is_encoded_again(tmp_path, damage, again):
    encoded(tmp_path, {0: range(20)}, Numbers())
    damage(tmp_path / "0.npy")
    views = Numbers()
    files = encoded(tmp_path, {0: range(20)}, views)
    assert views.read == [(row, 0) for row in again]
    assert files[0].read(np.arange(20))[:, 0].tolist() == list(range(20))


def test_a_full_disk_is_one_line_before_anything_is_encoded(tmp_path):
    """A write to a memory map would end the process."""
    views, limits = Numbers(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(UserError, match=r"0.npy: can't write features: .*; make room or choose"):
            encoded(tmp_path, {0: range(20)}, views)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not views.read
    encoded(tmp_path, {0: range(20)}, views)
