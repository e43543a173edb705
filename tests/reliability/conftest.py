"""Fixtures of the reliability tests: a tiny processed tree and undisturbed runs to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest
from reliability_runs import MODEL, make_tree, run, run_ranks


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="session")
def flags(tree):
    """Flags of a run of 3 epochs of 6 steps (6 x 1 process x 2 images), but for the output directory."""

    def make(output_dir: Path, *more: str) -> list[str]:
        return [
            *MODEL,
            "--data_path",
            str(tree),
            "--output_dir",
            str(output_dir),
            "--batch_size",
            "2",
            "--epochs",
            "3",
            "--num_workers",
            "0",
            *more,
        ]

    return make


@pytest.fixture(scope="session")
def undisturbed(flags, tmp_path_factory):
    """Output directory of an undisturbed run with further flags, of 1 or 2 ranks, made once."""
    made = {}

    def make(*more: str, ranks: int = 1) -> Path:
        if (more, ranks) not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            argv = flags(folder / "out", *more)
            if ranks == 1:
                status, output = run(argv, folder / "log")
                assert status == 0, output
            else:
                statuses, outputs = run_ranks(argv, folder / "log", n=ranks)
                assert statuses == [0] * ranks, "\n".join(outputs)
            made[more, ranks] = folder / "out"
        return made[more, ranks]

    return make
