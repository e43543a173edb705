"""util/loading.py: an error of a data set reaches the caller as it was raised."""

import multiprocessing

import pytest
import torch
from torch.utils.data import Dataset

from util.errors import UserError
from util.loading import SampleLoader


class Damaged(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise UserError("five.png: cut UserError: short")  # a text that looks like a traceback's end
        return {"img": torch.tensor([index])}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_the_one_that_was_raised(workers):
    batches = iter(SampleLoader(Damaged(), 2, num_workers=workers))
    assert [next(batches)["img"].flatten().tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    try:
        next(batches)
    except UserError as error:
        assert str(error) == "five.png: cut UserError: short"
    else:
        pytest.fail("no error")
    del batches
    assert not multiprocessing.active_children()  # nothing but the loader held them
