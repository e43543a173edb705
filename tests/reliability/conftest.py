"""Fixtures of the reliability tests: a tiny processed tree and undisturbed runs to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from reliability_runs import MODEL, run, run_ranks

from util.images import write_gray

N_SAMPLES = 13


def make_tree(root: Path, n: int = N_SAMPLES) -> Path:
    """A processed REFLACX tree of noise pictures, each with one attended spot."""
    generator = np.random.default_rng(0)
    entries = []
    for i in range(n):
        size = 40 + i % 3
        image = generator.integers(0, 256, (size, size), dtype=np.uint8)
        y, x = np.mgrid[:size, :size] - generator.integers(8, size - 8, (2, 1, 1))
        attention = np.round(255 * np.exp(-(x**2 + y**2) / 100)).astype(np.uint8)
        entry = {"image_path": f"files/{i}.png", "study_id": i, "reflacx_id": f"P300R{i:06d}"}
        for path, array in (
            (entry["image_path"], image),
            (f"attention/{i}/P300R{i:06d}.png", attention),
            (f"foreground/{i}/P300R{i:06d}.png", (attention > 100) * np.uint8(255)),
        ):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            write_gray(root / path, array)
        entries.append(entry)
    (root / "reflacx.json").write_text(json.dumps(entries))
    return root


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
