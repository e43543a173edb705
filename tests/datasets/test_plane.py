"""datasets/plane.py: whatever becomes of a cache's file is found, and made anew from the originals."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from trees import make_reflacx

import datasets.cache
import datasets.plane
from datasets import Reflacx, build_dataset, check_caches
from util.errors import UserError

BIG = [(400, 320), (300, 420), (260, 260)]  # (height, width)


@pytest.fixture
def tree(tmp_path):
    return make_reflacx(tmp_path / "tree", BIG)


def build(root, **options):
    return build_dataset(root, input_size=64, cache_size=128, num_workers=2, **options)


def gray_plane(root: Path) -> Path:
    return next((root / ".cache").rglob("gray-*.u8"))


@pytest.fixture
def decoded(monkeypatch):
    """Names of the originals that are decoded, as they are."""
    names = []
    real = datasets.cache.read_gray
    monkeypatch.setattr(datasets.cache, "read_gray", lambda file: (names.append(file.stem), real(file))[1])
    return names


def flip(path: Path, *places: int) -> None:
    """A bit of some bytes, in place, as a disk does it: the time of change stays."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with open(path, "r+b") as file:
        for place in places:
            byte = os.pread(file.fileno(), 1, place)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
    os.utime(path, ns=times)


def warnings_of(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "warning" in line]


def test_damaged_pictures_alone_are_made_anew(tree, capfd, decoded):
    """Wherever the bit is; processes that have the plane open are healed too."""
    reader = build(tree)
    path, expected, size = gray_plane(tree), reader[1]["img"], gray_plane(tree).stat().st_size
    whole, plane = path.read_bytes(), reader.cache.by_plane[0][0]
    starts = plane.table[:, 0].tolist()
    last = size - 1
    cases = [
        ([starts[0]], [0]),
        ([starts[1] - 1], [0]),
        ([starts[1]], [1]),
        ([last], [2]),
        ([starts[1] + 99, starts[1] + 100, starts[2] + 5], [1, 2]),
        ([*starts, last], [0, 1, 2]),
    ]
    for places, damaged in cases:
        flip(path, *places)
        decoded.clear()
        build(tree)
        [warning] = warnings_of(capfd)
        assert sorted(decoded) == [f"image{i}" for i in damaged]
        assert f"{path}: {len(damaged)} of 3 cached pictures are damaged" in warning
        assert all(f"image{i}." in warning for i in damaged) and "made anew from the originals" in warning
        assert path.read_bytes() == whole and torch.equal(reader[1]["img"], expected)
    inode = path.stat().st_ino
    for length in (last, starts[2], starts[1] - 1, starts[0]):  # cut off: what is not there any more
        os.truncate(path, length)
        decoded.clear()
        build(tree)
        assert sorted(decoded) == [f"image{i}" for i in range(3) if (starts + [size])[i + 1] > length]
        assert len(warnings_of(capfd)) == 1 and path.read_bytes() == whole
    with open(path, "ab") as file:  # longer
        file.write(b"x" * 100)
    decoded.clear()
    build(tree)
    assert decoded == [] and "too many" in warnings_of(capfd)[0] and path.read_bytes() == whole
    assert path.stat().st_ino == inode
    build(tree)
    assert warnings_of(capfd) == []


def test_without_a_whole_table_the_plane_is_built_anew(tree, capfd):
    build(tree)
    path = gray_plane(tree)
    whole = path.read_bytes()
    pixels = 24 + 48 * len(BIG)
    damages = [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(0, pixels, 5)]
    damages += [whole[:length] for length in (0, 1, 20, 24, 100, pixels - 1)]
    damages += [b"text", b"a longer text that is no cache", bytes(len(whole))]
    damages.append(whole.replace(b"CXRMIM\0\2", b"CXRMIM\0\1", 1))  # an earlier version's
    for damaged in damages:
        path.write_bytes(damaged)
        build(tree)
        [warning] = warnings_of(capfd)
        assert str(path) in warning and "built anew" in warning and path.read_bytes() == whole


def test_a_disk_that_cannot_give_or_take_the_bytes(tree, capfd, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    build(tree)
    path = gray_plane(tree)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.plane.os, "pread", fails)
        assert "can't be read (Input/output error)" in check_caches(tree, cache_size=128)[0].message
    flip(path, path.stat().st_size - 1)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.plane.os, "pwrite", fails)
        with pytest.raises(UserError, match=f"^{path}: Input/output error.*--cache_dir"):
            build(tree)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=f"^{path}: a directory"):
        build(tree)


def test_mending_that_is_broken_off_is_finished_by_the_next_start(tree, capfd, monkeypatch):
    """An original that is damaged too is an error that names it."""
    build(tree)
    path, original = gray_plane(tree), Reflacx(tree).files(1).image
    whole, content = path.read_bytes(), original.read_bytes()
    flip(path, len(whole) // 2, len(whole) - 1)
    flip(original, len(content) // 2)
    with pytest.raises(UserError, match=f"^{original}: .*damaged"):
        build(tree)
    flip(original, len(content) // 2)
    capfd.readouterr()
    build(tree)
    assert len(warnings_of(capfd)) == 1 and path.read_bytes() == whole


def test_pictures_that_are_made_otherwise_now_have_new_checksums(tree, monkeypatch, capfd):
    """As with another version of a package that scales them."""
    build(tree)
    path = gray_plane(tree)
    flip(path, path.stat().st_size - 1)
    real = datasets.cache.crop_resize_flip
    monkeypatch.setattr(datasets.cache, "crop_resize_flip", lambda *a: real(*a) // 2)
    build(tree)
    assert len(warnings_of(capfd)) == 1
    assert build(tree).read_planes(2)[0][0].max() < 128 and warnings_of(capfd) == []


def test_a_damaged_cache_that_is_anothers_is_replaced_in_the_next_place(tree, tmp_path, capfd, monkeypatch):
    build(tree)
    damaged, whole = gray_plane(tree), gray_plane(tree).read_bytes()
    flip(damaged, len(whole) - 1)
    monkeypatch.setattr(datasets.plane, "_first_writable", lambda places: places[-1].mkdir(parents=True) or places[-1])
    build(tree, fallback_dir=tmp_path / "output")
    [warning] = warnings_of(capfd)
    assert f"{damaged}: 1 of 3" in warning and "output" in warning.rpartition(";")[2]
    assert gray_plane(tmp_path / "output").read_bytes() == whole != damaged.read_bytes()
    build(tree, fallback_dir=tmp_path / "output")
    assert warnings_of(capfd) == []


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
    assert (problem.severity, problem.file) == ("warning", str(path)) and "image2.jpg; the next run" in problem.message
    assert path.read_bytes() == before
    Reflacx(tree).files(1).image.unlink()
    [error] = check()
    assert "not checked" in error.message and "image1" in error.message
