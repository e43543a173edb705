"""util/errors.py: what ends a program in one line, and what keeps its traceback."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from util.errors import run_cli


def test_a_full_gpu_is_one_line(capsys):
    def main():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 3 MiB"
        )

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1
    assert line.startswith("error: CUDA out of memory. Tried to allocate 20.00 MiB: lower --batch_size")


@pytest.mark.parametrize("fault", [errno.EACCES, errno.ENAMETOOLONG, errno.ENOSPC])
def test_a_place_that_cannot_be_used_is_one_line(capsys, fault):
    def main():
        raise OSError(fault, os.strerror(fault), "a b/c.pth")

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: a b/c.pth: {os.strerror(fault)}\n"


def test_a_defect_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes don't fit")

    with pytest.raises(RuntimeError, match="shapes"):
        run_cli(main)
