"""Files of every kind become the published views: against OpenCV, plain numpy and themselves."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from read_labelled import make_labelled
from torch.utils.data import DataLoader

from downstream.data.images import (
    CENTRE,
    CROP,
    SQUARE,
    Reading,
    Views,
    area_resize,
    draw_view,
    fitted_size,
    normalisation,
    normalise,
    open_squares,
    options_heeded,
)
from downstream.data.labelled import LabelledImages, files_digest
from util.errors import UserError


def gradient(height: int = 300, width: int = 400) -> np.ndarray:
    return np.add.outer(np.arange(height) % 256 // 2, np.arange(width) % 256 // 2).astype(np.uint8)


def labelled(files: list[Path], strong: bool = False) -> LabelledImages:
    return make_labelled([[0]] * len(files), "train", files=files, strong_augmentation=strong)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate([(300, 200), (120, 90), (256, 256), (400, 700)]):
        paths.append(root / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(paths[-1])
    return paths


@given(st.integers(1, 700), st.integers(1, 700))
@settings(max_examples=40, deadline=None)
def test_area_interpolation_is_opencvs(height, width):
    cv2 = pytest.importorskip("cv2")
    gray = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width), np.uint8)
    size = fitted_size(height, width)
    assert max(size) == SQUARE or min(size) == 1
    if min(height, width) >= max(size):  # OpenCV's INTER_AREA is something else where it enlarges
        expected = cv2.resize(gray, size[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(area_resize(gray, size).astype(int) - expected).max() <= 1
    ones = np.full((height, width), 173, np.uint8)
    assert (area_resize(ones, size) == 173).all()


def test_the_centre_view_is_the_middle_of_the_padded_square(files):
    views = Views(labelled(files))
    assert views.square(0).shape == (SQUARE, SQUARE)
    # 300 x 200 becomes 256 x 170, with 43 black columns on either side.
    assert not views.square(0)[:, :43].any() and not views.square(0)[:, 213:].any()
    assert views.square(0)[:, 43:213].any(0).all()
    gray = np.array(Image.open(files[2]))
    assert np.array_equal(views[2, CENTRE][0], gray[16:240, 16:240])
    assert views[0, CENTRE].dtype == torch.uint8


@pytest.mark.parametrize("strong", [False, True])
def test_views_depend_on_seed_view_and_index_only(files, strong):
    images = labelled(files, strong)
    views = Views(images, seed=3)
    places = [(i, view) for view in (CENTRE, 0, 1) for i in range(len(files))]
    first = [views[place] for place in places]
    for workers in (0, 2):
        loader = DataLoader(views, batch_size=5, sampler=places, num_workers=workers)
        assert torch.equal(torch.cat(list(loader)), torch.stack(first))
    again = Views(images, seed=3)
    assert all(torch.equal(again[place], item) for place, item in zip(reversed(places), reversed(first)))
    assert not torch.equal(views[2, 0], views[2, 1])
    assert not torch.equal(views[2, 0], Views(images, seed=4)[2, 0])
    assert torch.equal(views[2, CENTRE], Views(images, seed=4)[2, CENTRE])


def test_a_weak_view_is_a_crop_and_all_places_occur():
    codes = np.add.outer(np.arange(SQUARE) * SQUARE, np.arange(SQUARE))
    rng = np.random.default_rng(0)
    corners = []
    for _ in range(200):
        crop = draw_view(codes, rng, strong=False)
        corners.append(divmod(crop[0, 0], SQUARE))
        assert np.array_equal(crop, codes[:CROP, :CROP] + crop[0, 0])
    assert np.min(corners, 0).tolist() == [0, 0] and np.max(corners, 0).tolist() == [32, 32]


def test_strong_views_jitter_blur_and_flip_as_often_as_published():
    ramp = np.tile(np.linspace(60, 190, SQUARE), (SQUARE, 1))
    noisy = (ramp + np.random.default_rng(0).integers(-30, 31, ramp.shape)).astype(np.uint8)
    rng = np.random.default_rng(1)
    drawn = np.stack([draw_view(noisy, rng, strong=True).astype(float) for _ in range(400)])
    flipped = drawn[:, :, :50].mean((1, 2)) > drawn[:, :, -50:].mean((1, 2))
    assert flipped.mean() == pytest.approx(0.5, abs=0.1)
    means = drawn.mean((1, 2))
    # Without jitter the mean is that of a crop of the ramp, within a few gray levels.
    assert (np.abs(means - 125) > 12).mean() == pytest.approx(0.8 * 0.75, abs=0.1)
    assert 60 < means.min() < 95 and 155 < means.max() < 185
    roughness = np.abs(np.diff(drawn, axis=1)).mean((1, 2)) / drawn.std((1, 2))
    assert (roughness < 0.25).mean() == pytest.approx(0.5 * 0.8, abs=0.12)


def test_the_cache_gives_the_same_views_and_no_worker_copies_it(files, tmp_path):
    images = labelled(files, strong=True)
    plane = open_squares(images, tmp_path)
    cached, direct = Views(images, seed=1, plane=plane), Views(images, seed=1)
    for place in [(i, view) for i in range(len(files)) for view in (CENTRE, 0)]:
        assert torch.equal(cached[place], direct[place])
    assert len(pickle.dumps(plane)) < 500
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npy")}
    open_squares(images, tmp_path)
    open_squares(images.take([0, 2]), tmp_path)  # another choice does not evict the first
    open_squares(images, tmp_path, reading=Reading(intensity_max=4095))
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time
    Image.fromarray(gradient()).save(files[3])
    assert np.array_equal(open_squares(images, tmp_path)[3], area_resize(gradient(), fitted_size(300, 400)))


def test_16_bits_by_the_files_own_range_or_one_for_all(tmp_path):
    deep = np.linspace(500, 3500, 256 * 256).reshape(256, 256).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png")
    own = Reading().read(tmp_path / "a.png")
    assert (own.min(), own.max()) == (0, 255)
    assert np.array_equal(own, np.rint((deep - 500.0) * 255 / 3000).astype(np.uint8))
    fixed = Reading(intensity_max=2000).read(tmp_path / "a.png")
    assert np.array_equal(fixed, np.rint(np.minimum(deep, 2000.0) * 255 / 2000).astype(np.uint8))
    assert options_heeded([tmp_path / "a.png"]) == ["intensity_max"]
    Image.fromarray(gradient()).save(tmp_path / "b.png")
    assert options_heeded([tmp_path / "b.png"]) == []


def test_dicom_by_maximum_is_the_published_rule():
    for name, inverted in (("CT_small.dcm", False), ("RG1_UNCR.dcm", True)):
        path = Path(get_testdata_file(name, download=False))
        stored = pydicom.dcmread(path).pixel_array.clip(0)
        expected = np.rint(stored * (255 / stored.max())).astype(np.uint8)
        assert np.array_equal(Reading().read(path), 255 - expected if inverted else expected)
        assert not np.array_equal(Reading("minmax").read(path), Reading().read(path))


def test_bad_files_are_one_line_from_the_cache_and_from_workers(files, tmp_path):
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:500])
    images = labelled([files[1], tmp_path / "cut.png"])
    with pytest.raises(UserError, match="cut.png.*truncated"):
        open_squares(images, tmp_path)
    with pytest.raises(UserError, match="cut.png.*truncated"):
        Views(images)[1, 0]


def test_normalisation():
    gray = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    assert torch.equal(normalise(gray, *normalisation("half")), torch.tensor([-1.0, 1.0]).expand(1, 3, 1, 2))
    mean, std = normalisation("imagenet")
    assert normalise(gray, mean, std)[0, :, 0, 0].tolist() == pytest.approx([-m / s for m, s in zip(mean, std)])


def test_files_replaced_with_equal_size_and_time_are_other_files(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(name)
    shutil.copystat(tmp_path / "a", tmp_path / "b")
    images = labelled([tmp_path / "a"])
    before = files_digest(images)
    assert files_digest(images) == before
    (tmp_path / "b").replace(tmp_path / "a")
    assert files_digest(images) != before
