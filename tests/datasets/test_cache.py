"""datasets/cache.py: what comes out is what the files hold, in any number of processes, or an error."""

from __future__ import annotations

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
from trees import make_mimic, make_reflacx, save

import datasets.cache
import datasets.plane
from datasets import Reflacx, build_dataset
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


def cache_files(root) -> dict[str, tuple[int, int]]:
    """{name: (inode, mtime)} of all cached planes below a directory."""
    paths = (path for path in Path(root).rglob("*.npy") if not path.name.endswith(".table.npy"))
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("cache_size", [128, 300])
def test_pictures_are_the_resized_files_never_enlarged(tree, cache_size):
    dataset = build(tree, cache_size, preload=True)
    for i, native in enumerate(BIG):
        planes, size = dataset.read_planes(i)
        assert size == native
        for file, plane in zip(dataset.files(i), planes):
            original = read_gray(file)
            assert plane.shape == grid_size(*native, cache_size)
            assert min(plane.shape) == min(cache_size, *native)
            expected = crop_resize_flip([original], Box(0, 0, *native), plane.shape)[0].numpy()
            np.testing.assert_array_equal(plane, expected)
            assert not plane.flags.writeable
    pixels = sum(h * w for h, w in (grid_size(*native, cache_size) for native in BIG))
    for plane, _ in dataset.cache.by_plane:  # a byte a pixel, and NumPy's header
        assert plane.path.stat().st_size == pixels + 128
    assert sorted(name.split("-")[0] for name in cache_files(tree)) == ["attention", "foreground", "gray"]


def test_samples_with_and_without_cache(tmp_path):
    """Bit-equal where nothing was scaled down; else the same crop, twice resampled."""
    root = make_reflacx(tmp_path, [(1000, 800), (700, 900)])
    for files in (Reflacx(root).files(i) for i in range(2)):  # detail as in a radiograph of this size
        native = read_gray(files.image)
        enlarged = crop_resize_flip([native], Box(0, 0, 125, 125), native.shape)[0].numpy()
        save(files.image, enlarged)
    native = build(root, 512, preload=True, use_cache=False)
    cached = build(root, 512, preload=True)
    unscaled = build(root, 800, preload=True)
    assert equal(unscaled[0], build(root, 800, preload=True, use_cache=False)[0])
    differences = {"img": [], "attention": [], "foreground": []}
    for epoch in range(30):
        for i in range(2):
            a, b = native[(epoch, i)], cached[(epoch, i)]
            for key in a:
                differences[key].append((a[key].float() - b[key].float()).abs().mean().item())
    # Gray levels of 255. One native pixel off would make it 1.
    assert np.mean(differences["img"]) < 0.3 and np.mean(differences["attention"]) < 0.3
    assert np.mean(differences["foreground"]) < 0.002  # pixels that changed sides


def test_second_start_builds_nothing_and_preload_adds_the_foreground_alone(tree):
    build(tree)
    first = cache_files(tree)
    assert {name.split("-")[0] for name in first} == {"gray", "attention"}
    build(tree)
    assert cache_files(tree) == first
    build(tree, preload=True)
    both = cache_files(tree)
    assert len(both) == 3 and first.items() <= both.items()
    build(tree, 100)
    assert len(cache_files(tree)) == 5  # another size stands beside


def test_shared_images_are_held_once(tree):
    entries = json.loads((tree / "reflacx.json").read_text())
    for entry in entries:
        entry["image_path"] = entries[0]["image_path"]
        heatmap = tree / "attention" / str(entry["study_id"]) / f"{entry['reflacx_id']}.png"
        save(heatmap, np.eye(*BIG[0], dtype=np.uint8))
    (tree / "reflacx.json").write_text(json.dumps(entries))
    dataset = build(tree)
    assert [len(plane) for plane, _ in dataset.cache.by_plane] == [1, 3]
    assert np.shares_memory(dataset.read_planes(0)[0][0], dataset.read_planes(2)[0][0])


def test_changed_file_is_read_again_and_the_old_plane_goes(tree):
    dataset = build(tree)
    before = dataset[1]
    old = cache_files(tree)
    file = dataset.files(1).image
    save(file, 255 - read_gray(file))
    os.utime(file, ns=(1, 1))  # whatever the clock's resolution
    again = build(tree)
    assert not torch.equal(again[1]["img"], before["img"]) and torch.equal(again[0]["img"], dataset[0]["img"])
    assert equal(dataset[1], before)  # who has the old one mapped works on
    now = cache_files(tree)
    assert len(now) == 2 and len(old.keys() & now.keys()) == 1  # attention, untouched


@pytest.mark.parametrize("cache_size", [None, 128])
def test_files_replaced_with_their_sizes_and_times(tree, tmp_path, cache_size):
    """As from an archive: the cache is built anew, and the data have another identity. A copy of the tree has not."""

    def identity(root):
        return build(root, cache_size or 512, use_cache=cache_size is not None).identity()

    file = Reflacx(tree).files(1).attention
    levels = read_gray(file)
    Image.fromarray(levels).save(file, compress_level=0)
    os.utime(file, (315532800, 315532800))
    before, size = identity(tree), file.stat().st_size
    assert identity(shutil.copytree(tree, tmp_path / "copy")) == before
    Image.fromarray(np.roll(levels, 99)).save(file, compress_level=0)
    os.utime(file, (315532800, 315532800))
    assert file.stat().st_size == size
    if cache_size is None:  # sizes are all that is read
        save(file, np.roll(levels, 99))
    assert identity(tree) != before


def test_preprocessing_version_is_part_of_the_key(tree, monkeypatch):
    build(tree)
    old = cache_files(tree)
    monkeypatch.setattr(datasets.plane, "PREPROCESSING_VERSION", 999)
    build(tree)
    assert not cache_files(tree).keys() & old.keys()


def test_several_trees_share_a_cache_dir(tree, tmp_path):
    mimic = make_mimic(tmp_path / "mimic")
    other = make_reflacx(tmp_path / "other", BIG)
    both = build([tree, mimic, other], cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3 and not (tree / ".cache").exists()
    assert equal(both[4], build([tree, mimic], use_cache=False, cache_size=128)[4])  # small: not scaled


def test_a_tree_may_lie_below_a_name_that_is_not_utf8(tmp_path):
    tree = make_reflacx(tmp_path / "donn\udce9es", BIG[:1])
    build(tree)
    assert len(cache_files(tree)) == 2


def test_pickled_data_set_holds_no_pixels(tree):
    dataset = build(tree, 256)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 4000 < sum(path.stat().st_size for path in tree.rglob(".cache/*/*.npy"))
    copy = pickle.loads(pickled)
    assert copy.cache.by_plane[0][0]._table is None
    assert equal(copy[2], dataset[2])


# ---- processes -------------------------------------------------------------------------------------


def logging_build(log: Path, delay: float):
    """The real _build, which notes each run and takes its time."""
    real = datasets.plane._build

    def build_slowly(path, *args):
        with open(log, "a") as file:
            file.write(f"{path.name}\n")
        time.sleep(delay)
        real(path, *args)

    return build_slowly


def test_two_processes_at_once_build_once(tree, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets.plane, "_build", logging_build(tmp_path / "log", 0.2))
    barrier = FORK.Barrier(4)
    queue = FORK.Queue()

    def job():
        barrier.wait()
        queue.put([image.tolist() for image in build(tree)[2].values()])

    jobs = [FORK.Process(target=job) for _ in range(4)]
    for process in jobs:
        process.start()
    results = [queue.get(timeout=60) for _ in jobs]
    for process in jobs:
        process.join(60)
        assert process.exitcode == 0
    assert all(result == results[0] for result in results)
    assert len((tmp_path / "log").read_text().splitlines()) == 2  # one per plane
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
    directory = tree / ".cache/reflacx"
    assert len(list(directory.glob(".tmp-*"))) == 1 and not list(directory.glob("*.npy"))
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert len(list(directory.glob(".tmp-*"))) == 1
    dataset = build(tree)
    assert not list(directory.glob(".tmp-*")) and len(cache_files(tree)) == 2
    assert dataset[2]["img"].float().std() > 1


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="needs Linux's smaps_rollup")
def test_second_process_shares_the_pages(tmp_path):
    """All pictures read in a process of its own: its private memory grows by under 10% of the cache."""
    root = make_reflacx(tmp_path, [(1200, 1000)] * 2)
    entries = json.loads((root / "reflacx.json").read_text())
    for i in range(10):  # more readings of the same pictures, as copies of their heatmaps
        copy = dict(entries[0], reflacx_id=f"copy{i}")
        place = root / "attention" / str(copy["study_id"])
        shutil.copy(place / f"{entries[0]['reflacx_id']}.png", place / f"copy{i}.png")
        entries.append(copy)
    (root / "reflacx.json").write_text(json.dumps(entries))
    dataset = build(root, 1000)
    size = sum(path.stat().st_size for path in root.rglob(".cache/*/*.npy"))
    pickled = pickle.dumps(dataset)
    touch(dataset)

    def job(queue):
        copy = pickle.loads(pickled)
        before = private_bytes()
        touch(copy)
        queue.put(private_bytes() - before)

    queue = FORK.Queue()
    process = FORK.Process(target=job, args=(queue,))
    process.start()
    growth = queue.get(timeout=60)
    process.join(60)
    assert size > 15e6 and growth < 0.1 * size


def touch(dataset) -> int:
    return sum(int(plane[::8, ::8].sum()) for i in range(len(dataset)) for plane in dataset.read_planes(i)[0])


def private_bytes() -> int:
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private"))


# ---- bad luck --------------------------------------------------------------------------------------


def refused(root, **options) -> str:
    with pytest.raises(UserError) as caught:
        build(root, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_files_are_named_and_leave_nothing_behind(tree):
    files = Reflacx(tree).files(1)
    whole = files.attention.read_bytes()
    files.attention.write_bytes(whole[:-200])
    message = refused(tree)
    assert message.startswith(str(files.attention)) and "truncated" in message and "--check_data" in message
    assert [name.split("-")[0] for name in cache_files(tree)] == ["gray"]
    assert not list(tree.rglob(".tmp-*"))
    files.attention.unlink()
    assert "no such file" in refused(tree)
    save(files.attention, np.zeros((5, 6), np.uint8))
    message = refused(tree)
    assert all(part in message for part in (str(files.attention), "6 x 5", str(files.image), "420 x 300"))


def test_disk_too_small_is_said_before_writing(tree, monkeypatch):
    usage = shutil.disk_usage(tree)
    monkeypatch.setattr(datasets.plane.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    message = refused(tree)
    assert "GiB are free" in message and "--cache_dir, a smaller --cache_size, or pass --no_cache" in message
    assert cache_files(tree) == {}


def test_disk_full_while_writing(tree, monkeypatch):
    real, written = os.pwrite, []

    def pwrite(descriptor, data, offset):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(real(descriptor, data[:1000], offset))  # short writes are gone on with
        return written[-1]

    monkeypatch.setattr(datasets.plane.os, "pwrite", pwrite)
    assert "GiB are free" in refused(tree)
    assert len(written) == 2 and cache_files(tree) == {} and not list(tree.rglob(".tmp-*"))


def test_short_writes_are_completed(tree, monkeypatch):
    expected = build(tree)[0]
    shutil.rmtree(tree / ".cache")
    real = os.pwrite
    monkeypatch.setattr(datasets.plane.os, "pwrite", lambda fd, data, offset: real(fd, data[:777], offset))
    assert equal(build(tree)[0], expected)


def test_read_only_tree():
    """As a user without rights: the fallback is used, or the error says what to pass; a cache that the
    tree's owner has built is used as it is."""
    # Not below pytest's own directory, which only its owner may enter.
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        base = Path(name)
        base.chmod(0o755)
        root = make_reflacx(base / "tree", BIG)
        (base / "output").mkdir()
        (base / "output").chmod(0o777)
        everything = [base / "tree", *(base / "tree").rglob("*")]
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        is_root = os.geteuid() == 0
        try:
            if is_root:  # whom no permission stops
                os.seteuid(65534)
            message = refused(root)
            assert "--cache_dir" in message and "--no_cache" in message
            dataset = build(root, fallback_dir=base / "output")
            assert len(cache_files(base / "output")) == 2 and cache_files(root) == {}
            expected = dataset[1]
        finally:
            if is_root:
                os.seteuid(0)
            for path in everything:
                path.chmod(0o755 if path.is_dir() else 0o644)
        build(root)
        shutil.rmtree(base / "output")
        try:
            (root / ".cache/reflacx").chmod(0o555)
            if is_root:
                os.seteuid(65534)
            assert equal(build(root)[1], expected)
            if is_root:
                os.seteuid(0)
            (root / ".cache").chmod(0o000)  # of an owner who shares the tree but not the cache
            (base / "output").mkdir()
            (base / "output").chmod(0o777)
            if is_root:
                os.seteuid(65534)
            assert equal(build(root, fallback_dir=base / "output")[1], expected)
            assert "can't write the cache here" in refused(root)
        finally:
            if is_root:
                os.seteuid(0)
            (root / ".cache").chmod(0o755)
            (root / ".cache/reflacx").chmod(0o755)


def test_a_file_where_the_cache_should_be_is_named(tree, tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UserError, match="file.*can't write the cache here.*--cache_dir"):
        build(tree, cache_dir=tmp_path / "file")
