"""The cache: what comes out is what the files hold, in any number of processes, or one line that names a file."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import equal, make_mimic, make_reflacx, save

import datasets.plane
import datasets.tree
from datasets.build import build_dataset
from datasets.check import check_data
from datasets.reflacx import Reflacx
from datasets.transforms import Box, crop_resize_flip, grid_size
from util.errors import UserError
from util.images import read_gray

FORK = multiprocessing.get_context("fork")
BIG = [(400, 320), (300, 420), (260, 260)]  # (height, width)


@pytest.fixture
def tree(tmp_path):
    return make_reflacx(tmp_path / "tree", BIG)


def build(root, cache_size=128, **options):
    return build_dataset(root, input_size=64, cache_size=cache_size, **options)


def cache_files(root) -> dict[str, int]:
    """{name: inode} of all cached planes below a directory."""
    return {path.name: path.stat().st_ino for path in Path(root).rglob("*.pixels")}


def refused(root, *parts: str, **options) -> None:
    """Building ends in one line with these parts and leaves nothing half-written."""
    with pytest.raises(UserError) as caught:
        build(root, **options)
    message = str(caught.value)
    assert all(part in message for part in parts) and "\n" not in message, message
    assert not list(Path(root).rglob(".tmp-*"))


@pytest.mark.parametrize("cache_size", [128, 300])
def test_pictures_are_the_resized_files_never_enlarged(tree, cache_size):
    dataset = build(tree, cache_size, preload=True)
    for i, native in enumerate(BIG):
        planes, size = dataset.read_planes(i)
        assert size == native
        for file, plane in zip(dataset.files(i), planes, strict=True):
            assert plane.shape == grid_size(*native, cache_size) and min(plane.shape) == min(cache_size, *native)
            expected = crop_resize_flip([read_gray(file)], Box(0, 0, *native), plane.shape)[0].numpy()
            np.testing.assert_array_equal(plane, expected)
            assert not plane.flags.writeable
    pixels = sum(h * w for h, w in (grid_size(*native, cache_size) for native in BIG))
    assert [path.stat().st_size for path in tree.rglob("*.pixels")] == [pixels] * 3


def test_samples_with_and_without_cache(tmp_path):
    """Bit-equal where nothing was scaled down; else the same crop, twice resampled."""
    root = make_reflacx(tmp_path, [(1000, 800), (700, 900)])
    for files in (Reflacx(root).files(i) for i in range(2)):  # detail as in a radiograph of this size
        native = read_gray(files.image)
        save(files.image, crop_resize_flip([native], Box(0, 0, 125, 125), native.shape)[0].numpy())
    native, cached = build(root, 512, preload=True, use_cache=False), build(root, 512, preload=True)
    assert equal(build(root, 800, preload=True)[0, 0], build(root, 800, preload=True, use_cache=False)[0, 0])
    pairs = [(native[epoch, i], cached[epoch, i]) for epoch in range(20) for i in range(2)]
    # Gray levels of 255 (one native pixel off would make it 1), and pixels that changed sides.
    for key, limit in (("img", 0.3), ("attention", 0.3), ("foreground", 0.002)):
        assert np.mean([(a[key].float() - b[key].float()).abs().mean() for a, b in pairs]) < limit


def test_files_that_are_built_and_kept_and_go(tree, monkeypatch):
    dataset = build(tree)
    before, first = dataset[0, 1], cache_files(tree)
    assert {name.split("-")[0] for name in first} == {"gray", "attention"}
    build(tree, preload=True)
    assert len(cache_files(tree)) == 3 and first.items() <= cache_files(tree).items()
    build(tree, 100)
    assert len(cache_files(tree)) == 5  # another size stands beside
    file = dataset.files(1).image
    save(file, 255 - read_gray(file))
    again = build(tree)
    assert not torch.equal(again[0, 1]["img"], before["img"]) and equal(again[0, 0], dataset[0, 0])
    assert equal(dataset[0, 1], before)  # who has the old one mapped works on
    kept = cache_files(tree).keys() & first.keys()
    assert len(cache_files(tree)) == 5 and {name.split("-")[0] for name in kept} == {"attention"}
    monkeypatch.setattr(datasets.plane, "PREPROCESSING_VERSION", 999)
    build(tree)
    assert not cache_files(tree).keys() & kept


@pytest.mark.parametrize("use_cache", [False, True])
def test_files_replaced_with_their_sizes_and_times(tree, tmp_path, use_cache):
    """As from an archive: the cache is built anew, and the data have another identity. A copy of the tree has not."""

    def identity(root):
        return build(root, use_cache=use_cache).identity()

    file = Reflacx(tree).files(1).attention
    levels, sizes = read_gray(file), []
    for shift in (0, 99):
        Image.fromarray(np.roll(levels, shift)).save(file, compress_level=0)
        os.utime(file, (315532800, 315532800))
        sizes.append(file.stat().st_size)
        if not shift:
            before = identity(tree)
            assert identity(shutil.copytree(tree, tmp_path / "copy")) == before
    assert sizes[0] == sizes[1]
    if not use_cache:  # sizes are all that is read
        save(file, np.roll(levels, 99))
    assert identity(tree) != before


def test_places_of_the_cache(tree, tmp_path):
    mimic, other = make_mimic(tmp_path / "mimic"), make_reflacx(tmp_path / "donn\udce9es", BIG)  # not UTF-8
    build([tree, mimic, other], cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3 and not (tree / ".cache").exists()
    (tmp_path / "file").write_text("no directory")
    refused(tree, f"{tmp_path}/file", "can't write the cache here", "--cache_dir", cache_dir=tmp_path / "file")


# ---- processes -------------------------------------------------------------------------------------


def start(job) -> multiprocessing.Process:
    process = FORK.Process(target=job)
    process.start()
    return process


def test_several_starts_at_once_build_once(tree, monkeypatch, capfd):
    barrier, queue, real = FORK.Barrier(3), FORK.Queue(), read_gray
    (decoded := tree / "decoded").mkdir()

    def slow(file):
        tempfile.mkstemp(dir=decoded)
        time.sleep(0.2)
        return real(file)

    def job():
        monkeypatch.setattr(datasets.tree, "read_gray", slow)
        barrier.wait()
        queue.put(build(tree)[0, 2]["img"].tolist())

    jobs = [start(job) for _ in range(3)]
    first, *others = (queue.get(timeout=60) for _ in jobs)
    assert others == [first, first] and len(list(decoded.iterdir())) == 3
    assert "waiting for another process" in capfd.readouterr().err


def test_killed_builder_blocks_nobody(tree, monkeypatch):
    started, real = FORK.Event(), read_gray

    def hang(file):
        if "image2" in str(file):
            started.set()
            time.sleep(1000)
        return real(file)

    def job():
        monkeypatch.setattr(datasets.tree, "read_gray", hang)
        build(tree)

    process = start(job)
    assert started.wait(60)
    process.kill()
    process.join(60)
    assert len(list(tree.rglob(".tmp-*"))) == 1 and not cache_files(tree)
    assert build(tree)[0, 2]["img"].float().std() > 1
    assert not list(tree.rglob(".tmp-*")) and len(cache_files(tree)) == 2


def test_shared_pictures_are_held_once_and_no_process_copies_the_pixels(tree):
    """A worker gets places instead of pixels, and maps the file."""
    entries = json.loads((tree / "reflacx.json").read_text())
    entries += [entries[0]] * 3  # more readings of a picture
    (tree / "reflacx.json").write_text(json.dumps(entries))
    pickled = pickle.dumps(dataset := build(tree, 260))
    assert len(pickled) < 8000 < dataset.cache[0].path.stat().st_size
    copy = pickle.loads(pickled)
    for one, other in zip(dataset.read_planes(0)[0], copy.read_planes(5)[0], strict=True):
        np.testing.assert_array_equal(one, other)
    (first, _), (last, _) = copy.read_planes(0)[0], copy.read_planes(5)[0]
    assert np.shares_memory(first, last)


# ---- bad luck --------------------------------------------------------------------------------------


def test_bad_files_are_named(tree):
    files = Reflacx(tree).files(1)
    files.attention.write_bytes(files.attention.read_bytes()[:-200])
    refused(tree, str(files.attention), "truncated")
    assert [name.split("-")[0] for name in cache_files(tree)] == ["gray"]
    files.attention.unlink()
    refused(tree, str(files.attention), "no such file")
    save(files.attention, np.zeros((5, 6), np.uint8))
    with pytest.raises(UserError, match=f"^{files.attention}: 6 x 5 px, but its image {files.image} has 420 x 300"):
        build(tree)[0, 1]


@pytest.mark.parametrize("function", ["posix_fallocate", "fsync"])
def test_full_disk(tree, monkeypatch, function):
    """Before the first picture is written, and behind the last."""

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.plane.os, function, full)
    refused(tree, "No space left", "needs about 0.00 GiB; give another place with --cache_dir, or pass --no_cache")
    assert cache_files(tree) == {}


@contextlib.contextmanager
def as_nobody():
    """Without root's rights, whom no permission stops."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_read_only_tree():
    """The error says what to pass; a cache that the tree's owner has built is used."""
    # Not below pytest's own directory, which only its owner may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o755)
        root = make_reflacx(Path(name, "tree"), BIG)
        for path in [root, *root.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            with as_nobody():
                refused(root, "can't write the cache here", "--cache_dir", "--no_cache")
            root.chmod(0o755)
            expected = build(root)[0, 1]
            (root / ".cache/reflacx").chmod(0o555)
            with as_nobody():
                assert equal(build(root)[0, 1], expected)
        finally:
            for path in [root, *root.rglob("*")]:
                path.chmod(0o755)


# ---- damage ----------------------------------------------------------------------------------------


def gray_plane(root: Path) -> Path:
    return next(root.rglob("gray-*.pixels"))


def flip(path: Path, place: int) -> None:
    """A bit of a byte, in place, as a disk does it."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)


def test_a_damaged_picture_ends_the_run_that_reads_it(tree):
    """Once it is read; the others are read as they are. Without the file the plane is built anew."""
    expected = build(tree)[0, 1]
    path = gray_plane(tree)
    whole, starts = path.read_bytes(), build(tree).cache[0].table[:, 0].tolist()
    for place, damaged in [(starts[0], 0), (starts[1] - 1, 0), (starts[1], 1), (len(whole) - 1, 2)]:
        flip(path, place)
        dataset = build(tree)
        for index in {0, 1, 2} - {damaged}:
            dataset[0, index]
        for _ in range(2):
            with pytest.raises(UserError, match=f"^{path}: the cache is damaged .*; delete this file.* anew"):
                dataset[0, damaged]
        flip(path, place)
    path.unlink()
    assert equal(build(tree)[0, 1], expected) and path.read_bytes() == whole


@pytest.mark.parametrize("suffix", [".pixels", ".npz"])
def test_a_damaged_table_or_length_is_refused_at_the_start(tree, suffix):
    """Deleting the file that the message names mends it."""
    expected = build(tree).cache[0].table
    path = gray_plane(tree)
    target = path.with_suffix(suffix)
    whole = target.read_bytes()
    for damaged in (b"", whole[:20], whole[:-1], b"a text that is no cache"):
        target.write_bytes(damaged)
        refused(tree, f"{path}: the cache is damaged", "delete this file")
    if suffix == ".npz":  # a bit of the zip file's own may say nothing, such as a date
        for at in range(0, len(whole), 7):
            target.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            try:
                np.testing.assert_array_equal(build(tree).cache[0].table, expected)
            except UserError as error:
                assert "the cache is damaged" in str(error)
    path.unlink()
    np.testing.assert_array_equal(build(tree).cache[0].table, expected)


def test_checking_reads_the_cache_and_changes_nothing(tree):
    def check(**options):
        return [(p.severity, p.message) for p in check_data(tree, use_cache=True, **{"cache_size": 128, **options})]

    assert check() == []
    build(tree)
    path = gray_plane(tree)
    whole = ("note", f"{path}: 3 cached pictures, all as they were written")
    assert check()[0] == whole and len(check(preload=True)) == 2 and check(cache_size=99) == []
    flip(path, path.stat().st_size - 1)
    before = path.read_bytes()
    (severity, message), (other, _) = check()
    assert severity == "error" and message.startswith(f"{path}: the cache is damaged (picture 2); del")
    assert other == "note" and path.read_bytes() == before
    path.write_bytes(before[:-1])
    assert [found[0] for found in check()] == ["error"]
    Reflacx(tree).files(1).image.unlink()
    [(severity, message)] = check()
    assert "image1" in message
