"""The cache: what comes out is what the files hold, in any number of processes, or one line that names a file."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import equal, make_mimic, make_reflacx, save

import datasets.cache
import datasets.plane
from datasets import Reflacx, SampleError, build_dataset, check_data
from datasets.transforms import Box, crop_resize_flip, grid_size
from util.errors import UserError
from util.images import read_gray

FORK = multiprocessing.get_context("fork")
BIG = [(400, 320), (300, 420), (260, 260)]  # (height, width)


@pytest.fixture
def tree(tmp_path):
    return make_reflacx(tmp_path / "tree", BIG)


def build(root, cache_size=128, **options):
    return build_dataset(root, input_size=64, cache_size=cache_size, num_workers=2, **options)


def cache_files(root) -> dict[str, int]:
    """{name: inode} of all cached planes below a directory."""
    return {path.name: path.stat().st_ino for path in Path(root).rglob("*.npy")}


def refused(root, **options) -> str:
    with pytest.raises(UserError) as caught:
        build(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    for path in tree.rglob("*.npy"):  # a byte a pixel, and NumPy's header
        assert path.stat().st_size == pixels + 128 == np.load(path).size + 128


def test_samples_with_and_without_cache(tmp_path):
    """Bit-equal where nothing was scaled down; else the same crop, twice resampled."""
    root = make_reflacx(tmp_path, [(1000, 800), (700, 900)])
    for files in (Reflacx(root).files(i) for i in range(2)):  # detail as in a radiograph of this size
        native = read_gray(files.image)
        save(files.image, crop_resize_flip([native], Box(0, 0, 125, 125), native.shape)[0].numpy())
    native, cached = build(root, 512, preload=True, use_cache=False), build(root, 512, preload=True)
    assert equal(build(root, 800, preload=True)[0], build(root, 800, preload=True, use_cache=False)[0])
    pairs = [(native[key], cached[key]) for key in ((epoch, i) for epoch in range(20) for i in range(2))]
    # Gray levels of 255 (one native pixel off would make it 1), and pixels that changed sides.
    for key, limit in (("img", 0.3), ("attention", 0.3), ("foreground", 0.002)):
        assert np.mean([(a[key].float() - b[key].float()).abs().mean() for a, b in pairs]) < limit


def test_files_that_are_built_and_kept_and_go(tree, monkeypatch):
    dataset = build(tree)
    before, first = dataset[1], cache_files(tree)
    assert {name.split("-")[0] for name in first} == {"gray", "attention"}
    build(tree)
    assert cache_files(tree) == first
    build(tree, preload=True)
    assert len(cache_files(tree)) == 3 and first.items() <= cache_files(tree).items()
    build(tree, 100)
    assert len(cache_files(tree)) == 5  # another size stands beside
    file = dataset.files(1).image
    save(file, 255 - read_gray(file))
    again = build(tree)
    assert not torch.equal(again[1]["img"], before["img"]) and torch.equal(again[0]["img"], dataset[0]["img"])
    assert equal(dataset[1], before)  # who has the old one mapped works on
    kept = cache_files(tree).keys() & first.keys()
    assert len(cache_files(tree)) == 5 and {name.split("-")[0] for name in kept} == {"attention"}
    monkeypatch.setattr(datasets.plane, "PREPROCESSING_VERSION", 999)
    build(tree)
    assert not cache_files(tree).keys() & kept


def test_shared_images_are_held_once(tree):
    entries = json.loads((tree / "reflacx.json").read_text())
    for entry in entries:
        entry["image_path"] = entries[0]["image_path"]
        save(tree / f"attention/{entry['study_id']}/{entry['reflacx_id']}.png", np.eye(*BIG[0], dtype=np.uint8))
    (tree / "reflacx.json").write_text(json.dumps(entries))
    dataset = build(tree)
    assert [len(plane.table) for plane in dataset.cache] == [1, 3]
    assert np.shares_memory(dataset.read_planes(0)[0][0], dataset.read_planes(2)[0][0])


@pytest.mark.parametrize("use_cache", [False, True])
def test_files_replaced_with_their_sizes_and_times(tree, tmp_path, use_cache):
    """As from an archive: the cache is built anew, and the data have another identity. A copy of the tree has not."""

    def identity(root):
        return build(root, use_cache=use_cache).identity()

    file = Reflacx(tree).files(1).attention
    levels = read_gray(file)
    Image.fromarray(levels).save(file, compress_level=0)
    os.utime(file, (315532800, 315532800))
    before, size = identity(tree), file.stat().st_size
    assert identity(shutil.copytree(tree, tmp_path / "copy")) == before
    Image.fromarray(np.roll(levels, 99)).save(file, compress_level=0)
    os.utime(file, (315532800, 315532800))
    assert file.stat().st_size == size
    if not use_cache:  # sizes are all that is read
        save(file, np.roll(levels, 99))
    assert identity(tree) != before


def test_places_of_the_cache(tree, tmp_path):
    mimic, other = make_mimic(tmp_path / "mimic"), make_reflacx(tmp_path / "donn\udce9es", BIG)  # not UTF-8
    both = build([tree, mimic, other], cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3 and not (tree / ".cache").exists()
    assert equal(both[4], build([tree, mimic], use_cache=False)[4])  # small: not scaled
    (tmp_path / "file").write_text("no directory")
    message = refused(tree, cache_dir=tmp_path / "file")
    assert f"{tmp_path}/file" in message and "can't write the cache here" in message and "--cache_dir" in message


# ---- processes -------------------------------------------------------------------------------------


def test_several_starts_at_once_build_once(tree, monkeypatch, capfd):
    barrier, decoded, queue = FORK.Barrier(4), FORK.Value("i", 0), FORK.Queue()
    real = datasets.cache.read_gray

    def slow(file):
        with decoded.get_lock():
            decoded.value += 1
        time.sleep(0.2)
        return real(file)

    def job():
        monkeypatch.setattr(datasets.cache, "read_gray", slow)
        barrier.wait()
        queue.put([image.tolist() for image in build(tree)[2].values()])

    jobs = [FORK.Process(target=job) for _ in range(4)]
    for process in jobs:
        process.start()
    results = [queue.get(timeout=60) for _ in jobs]
    assert all(result == results[0] for result in results) and decoded.value == 3
    assert "waiting for another process" in capfd.readouterr().err


def test_killed_builder_blocks_nobody(tree, monkeypatch):
    started = FORK.Event()
    real = datasets.cache.read_gray

    def hang(file):
        if Path(file).stem == "image2":
            started.set()
            time.sleep(1000)
        return real(file)

    def job():
        monkeypatch.setattr(datasets.cache, "read_gray", hang)
        build(tree)

    process = FORK.Process(target=job)
    process.start()
    assert started.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert len(list(tree.rglob(".tmp-*"))) == 1 and not cache_files(tree)
    assert build(tree)[2]["img"].float().std() > 1
    assert not list(tree.rglob(".tmp-*")) and len(cache_files(tree)) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's smaps_rollup")
def test_no_process_holds_a_copy_of_the_pixels(tmp_path):
    """All pictures read by a process from the pickled data set: its private memory grows by under 10% of the cache."""
    root = make_reflacx(tmp_path, [(1200, 1000)] * 2)
    entries = json.loads((root / "reflacx.json").read_text())
    for i in range(10):  # more readings of the same pictures, as copies of their heatmaps
        place = root / "attention" / str(entries[0]["study_id"])
        shutil.copy(place / f"{entries[0]['reflacx_id']}.png", place / f"copy{i}.png")
        entries.append(dict(entries[0], reflacx_id=f"copy{i}"))
    (root / "reflacx.json").write_text(json.dumps(entries))
    dataset = build(root, 1000)
    size = sum(path.stat().st_size for path in root.rglob("*.npy"))
    pickled = pickle.dumps(dataset)

    def touch(dataset) -> int:
        return sum(int(plane[::8, ::8].sum()) for i in range(len(dataset)) for plane in dataset.read_planes(i)[0])

    def private_bytes() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private"))

    def job(queue):
        copy = pickle.loads(pickled)
        before = private_bytes()
        queue.put((touch(copy), private_bytes() - before))

    expected = touch(dataset)  # the pages are this process's too
    queue = FORK.Queue()
    process = FORK.Process(target=job, args=(queue,))
    process.start()
    total, growth = queue.get(timeout=60)
    process.join(60)
    assert total == expected and size > 15e6 and growth < 0.1 * size and len(pickled) < 8000


# ---- bad luck --------------------------------------------------------------------------------------


def test_bad_files_are_named_and_leave_nothing_behind(tree):
    files = Reflacx(tree).files(1)
    files.attention.write_bytes(files.attention.read_bytes()[:-200])
    message = refused(tree)
    assert message.startswith(str(files.attention)) and "truncated" in message and "--check_data" in message
    assert [name.split("-")[0] for name in cache_files(tree)] == ["gray"] and not list(tree.rglob(".tmp-*"))
    files.attention.unlink()
    assert "no such file" in refused(tree)
    save(files.attention, np.zeros((5, 6), np.uint8))
    message = refused(tree)
    assert all(part in message for part in (str(files.attention), "6 x 5", str(files.image), "420 x 300"))


@pytest.mark.parametrize("when", ["before the first picture", "while writing"])
def test_full_disk(tree, monkeypatch, when):
    if when == "while writing":

        def write_header(file, length):
            if length:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(datasets.plane, "_write_header", write_header)
    else:
        usage = shutil.disk_usage(tree)._replace(free=1000)
        monkeypatch.setattr(datasets.plane.shutil, "disk_usage", lambda _: usage)
    message = refused(tree)
    assert "GiB are free; name another place by --cache_dir, or pass --no_cache" in message
    assert cache_files(tree) == {} and not list(tree.rglob(".tmp-*"))


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
    """The fallback is used, or the error says what to pass; a cache that the tree's owner has built is used as it is,
    unless he keeps it to himself."""
    # Not below pytest's own directory, which only its owner may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        base = Path(name)
        root = make_reflacx(base / "tree", BIG)
        (base / "output").mkdir()
        modes = {base: 0o755, base / "output": 0o777, base / "tree": 0o555}
        modes |= {path: 0o555 if path.is_dir() else 0o444 for path in root.rglob("*")}
        for path, mode in modes.items():
            path.chmod(mode)
        try:
            with as_nobody():
                message = refused(root)
                assert "can't write the cache here" in message and "--cache_dir" in message and "--no_cache" in message
                expected = build(root, fallback_dir=base / "output")[1]
            assert len(cache_files(base / "output")) == 2 and cache_files(root) == {}
            root.chmod(0o755)
            build(root)
            (root / ".cache/reflacx").chmod(0o555)
            with as_nobody():
                assert equal(build(root)[1], expected)
            (root / ".cache").chmod(0o000)
            with as_nobody():
                assert equal(build(root, fallback_dir=base / "output")[1], expected)
                assert "can't write the cache here" in refused(root)
        finally:
            for path in [root, root / ".cache", root / ".cache/reflacx", *modes]:
                path.chmod(0o755) if path.is_dir() else None


# ---- damage ----------------------------------------------------------------------------------------


def gray_plane(root: Path) -> Path:
    return next(root.rglob("gray-*.npy"))


def flip(path: Path, place: int) -> None:
    """A bit of a byte, in place, as a disk does it."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, place)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)


def test_a_damaged_picture_ends_the_run_that_reads_it(tree):
    """Once it is read; the others are read as they are. Without the file the plane is built anew."""
    expected = build(tree)[1]["img"]
    path = gray_plane(tree)
    whole, starts = path.read_bytes(), [128 + start for start in build(tree).cache[0].table[:, 0].tolist()]
    for place, damaged in [(starts[0], 0), (starts[1] - 1, 0), (starts[1], 1), (len(whole) - 1, 2)]:
        flip(path, place)
        dataset = build(tree)
        for index in {0, 1, 2} - {damaged}:
            dataset[index]
        for _ in range(2):
            with pytest.raises(SampleError, match=f"^{path}: the cache is damaged .*; delete this file.* anew"):
                dataset[damaged]
        flip(path, place)
    path.unlink()
    assert torch.equal(build(tree)[1]["img"], expected) and path.read_bytes() == whole


@pytest.mark.parametrize("which", ["pixels", "table"])
def test_a_damaged_table_or_length_is_refused_at_the_start(tree, which):
    expected = build(tree)
    path = gray_plane(tree)
    target = path if which == "pixels" else path.with_suffix(".table.npz")
    whole = target.read_bytes()
    lengths = (0, 1, 20, 127, 128, len(whole) - 1)
    for damaged in [*(whole[:length] for length in lengths), b"text", b"a text that is no cache", bytes(len(whole))]:
        target.write_bytes(damaged)
        assert f"{path}: the cache is damaged" in refused(tree) and "delete this file" in refused(tree)
    if which == "table":  # a bit of the zip file's own may say nothing, such as a date
        for at in range(0, len(whole), 7):
            target.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            try:
                assert all(equal(build(tree)[i], expected[i]) for i in range(3))
            except UserError as error:
                assert "the cache is damaged" in str(error)
            else:
                np.testing.assert_array_equal(build(tree).cache[0].table, expected.cache[0].table)
    target.unlink()
    assert np.array_equal(build(tree).cache[0].table, expected.cache[0].table)


@pytest.mark.parametrize("which", ["pixels", "table"])
def test_deleting_the_file_that_is_named_mends_it(tree, which):
    build(tree)
    path = gray_plane(tree)
    (path if which == "pixels" else path.with_suffix(".table.npz")).write_bytes(b"text")
    assert f"{path}: the cache is damaged" in refused(tree)
    path.unlink()
    build(tree)[0]


def test_checking_reads_the_cache_and_changes_nothing(tree, tmp_path):
    def check(**options):
        return check_data(tree, use_cache=True, **{"cache_size": 128, **options})

    [none] = check()
    assert none.severity == "note" and "no cache of these settings" in none.message
    build(tree)
    assert [p.severity for p in check()] == ["note"] * 2 and "3 cached pictures" in check()[1].message
    assert [p.severity for p in check(preload=True)] == ["note", "note"]  # no plane of foregrounds yet
    assert "no cache" in check(cache_size=99)[0].message and "no cache" in check(cache_dir=tmp_path)[0].message
    path = gray_plane(tree)
    flip(path, path.stat().st_size - 1)
    before = path.read_bytes()
    problem = check()[0]
    assert problem.severity == "error" and problem.message.startswith(f"{path}: the cache is damaged (picture 2); del")
    assert path.read_bytes() == before
    Reflacx(tree).files(1).image.unlink()
    error, note = check()
    assert "image1" in error.message and "cache was not checked" in note.message
