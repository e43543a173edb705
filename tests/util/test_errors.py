"""util/errors.py: what ends a program in one line, and what keeps its traceback."""

from __future__ import annotations

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
