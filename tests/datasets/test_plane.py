"""datasets/plane.py: whatever becomes of a cache's files is found, and named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from trees import make_reflacx

from datasets import Reflacx, SampleError, build_dataset, check_caches
from util.errors import UserError

BIG = [(400, 320), (300, 420), (260, 260)]  # (height, width)


@pytest.fixture
def tree(tmp_path):
    return make_reflacx(tmp_path / "tree", BIG)


def build(root, **options):
    return build_dataset(root, input_size=64, cache_size=128, num_workers=2, **options)


def gray_plane(root: Path) -> Path:
    return next(path for path in (root / ".cache").rglob("gray-*.npy") if "table" not in path.name)


def flip(path: Path, place: int) -> None:
    """A bit of a byte, in place, as a disk does it."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << abs(place) % 8]), place)


def test_a_damaged_picture_ends_the_run_that_reads_it(tree):
    """Once it is read; the others are read as they are. Without the file the plane is built anew."""
    expected = build(tree)[1]["img"]
    path = gray_plane(tree)
    whole, starts = path.read_bytes(), [128 + start for start in build(tree).cache.by_plane[0][0].table[:, 0].tolist()]
    for place, damaged in [(starts[0], 0), (starts[1] - 1, 0), (starts[1], 1), (len(whole) - 1, 2)]:
        flip(path, place)
        dataset = build(tree)
        for index in range(3):
            if index != damaged:
                dataset[index]
        for _ in range(2):
            with pytest.raises(SampleError, match=f"^{path}: the cache is damaged .*; delete this file.* anew"):
                dataset[damaged]
        flip(path, place)
    path.unlink()
    assert torch.equal(build(tree)[1]["img"], expected) and path.read_bytes() == whole


@pytest.mark.parametrize("which", ["pixels", "table"])
def test_a_damaged_table_or_length_is_refused_at_the_start(tree, which):
    build(tree)
    path = gray_plane(tree)
    target = path if which == "pixels" else path.with_suffix(".table.npy")
    whole = target.read_bytes()
    damages = [whole[:length] for length in (0, 1, 20, 127, 128, len(whole) - 1)]
    damages += [b"text", b"a longer text that is no cache", bytes(len(whole))]
    if which == "table":
        damages += [
            whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(128, len(whole) - 40, 5)
        ]
    for damaged in damages:
        target.write_bytes(damaged)
        with pytest.raises(UserError, match=f"^{path}: the cache is damaged .*; delete this file"):
            build(tree)
    target.unlink()
    build(tree)
    assert target.read_bytes() == whole


def test_checking_reads_the_cache_and_changes_nothing(tree, tmp_path):
    def check(**options):
        return check_caches(tree, **{"cache_size": 128, **options})

    [none] = check()
    assert none.severity == "note" and "no cache of these settings" in none.message
    build(tree)
    assert [(p.severity, p.message) for p in check()] == [("note", "3 cached pictures, all as they were written")] * 2
    assert [p.severity for p in check(preload=True)] == ["note", "note"]  # no plane of foregrounds yet
    assert "no cache" in check(cache_size=99)[0].message and "no cache" in check(cache_dir=tmp_path)[0].message
    path = gray_plane(tree)
    flip(path, path.stat().st_size - 1)
    before = path.read_bytes()
    problem = check()[0]
    assert (problem.severity, problem.file) == ("error", str(path)) and "(picture 2); delete this" in problem.message
    assert path.read_bytes() == before
    Reflacx(tree).files(1).image.unlink()
    [error] = check()
    assert "not checked" in error.message and "image1" in error.message
