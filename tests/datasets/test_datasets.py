"""datasets: one sample schema from every tree, the same crop whoever asks, bad trees refused in a line."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trees import equal, make_mimic, make_reflacx, save

from datasets.build import build_dataset
from datasets.check import check_data
from datasets.mimic import Mimic
from datasets.reflacx import Reflacx
from datasets.sampler import TrainBatches
from util.errors import UserError
from util.images import read_gray
from util.loading import SampleLoader
from util.masking import otsu_foreground


@pytest.fixture
def tree(tmp_path):
    return make_reflacx(tmp_path / "tree")


def assert_schema(sample, size: int) -> None:
    assert list(sample) == ["img", "attention", "foreground"]
    assert sample["img"].shape == (1, size, size)
    assert sample["attention"].shape == sample["foreground"].shape == (size, size)
    assert all(value.dtype == torch.uint8 for value in sample.values())
    assert set(sample["foreground"].unique().tolist()) == {0, 1}


def test_foregrounds_stored_and_made(tree):
    """Without preload it is Otsu's of the crop; with it that of the file, 0/1 or 0/255, not of the attention."""
    sample = Reflacx(tree, 64)[3, 1]
    assert torch.equal(sample["foreground"].bool(), otsu_foreground(sample["attention"][None])[0])
    stored = Reflacx(tree, 64, preload=True)
    with_255 = [stored[0, i] for i in range(6)]
    for level, as_before in ((0, True), (255, False)):
        for path in (tree / "foreground").rglob("*.png"):
            save(path, (read_gray(path) > level).astype(np.uint8))
        assert all(equal(sample, stored[0, i]) == as_before for i, sample in enumerate(with_255))


def test_planes_are_cut_together_and_half_of_the_samples_flipped(tmp_path):
    """From left to right: on a ramp a flip turns the sign of the slope."""
    ramp = np.tile(np.linspace(0, 255, 80).astype(np.uint8), (100, 1))
    for path in ("a.png", "attention/1/r.png", "foreground/1/r.png"):
        save(tmp_path / path, ramp)
    (tmp_path / "reflacx.json").write_text('[{"image_path": "a.png", "study_id": 1, "reflacx_id": "r"}]')
    dataset = Reflacx(tmp_path, 32, preload=True)
    samples = [dataset[epoch, 0] for epoch in range(400)]
    for sample in samples[:20]:
        assert torch.equal(sample["img"][0], sample["attention"])
        assert torch.equal(sample["foreground"].bool(), sample["attention"] >= 128)
    assert 160 < sum(sample["img"][0, 0, 0] > sample["img"][0, 0, -1] for sample in samples) < 240  # 4 deviations
    centre = Reflacx(tmp_path, 80, augment=False)[0, 0]["img"][0]
    np.testing.assert_array_equal(centre.numpy(), ramp[10:90])


def test_randomness_is_a_function_of_seed_epoch_and_index(tree):
    dataset = Reflacx(tree, 64, seed=5)
    first = dataset[2, 3]
    torch.manual_seed(1)
    np.random.seed(1)
    assert equal(first, Reflacx(tree, 64, seed=5)[2, 3])
    assert not equal(first, dataset[1, 3]) and not equal(first, Reflacx(tree, 64, seed=6)[2, 3])
    fixed = Reflacx(tree, 64, augment=False)
    assert equal(fixed[0, 3], fixed[9, 3])


def test_workers_and_batches_do_not_matter(tree):
    """The engine's way: one iteration over all epochs, 0 and 2 workers, batches of all sizes."""
    dataset = Reflacx(tree, 32, seed=3, preload=True)

    def run(workers: int, batch_size: int):
        batches = TrainBatches(len(dataset), batch_size, seed=3, epochs=2)
        loader = SampleLoader(dataset, batch_sampler=batches, num_workers=workers)
        keys = [key for batch in batches for key in batch]
        return dict(zip(keys, torch.cat([batch["img"] for batch in loader]), strict=True))

    plain, other = run(0, 3), run(2, 2)
    assert len(plain) == 12
    assert plain.keys() == other.keys() and all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("prefix", ["files/", ""])
@pytest.mark.parametrize("mirror_prefix", ["files/", ""])
def test_mimic_with_and_without_files_prefix(tmp_path, prefix, mirror_prefix):
    """Also where the first entry's files are lost."""
    make_mimic(tmp_path, prefix, mirror_prefix)
    Mimic(tmp_path).files(0).attention.unlink()
    for preload in (False, True):
        dataset = Mimic(tmp_path, 32, preload=preload)
        for i in (1, 2):
            assert_schema(dataset[0, i], 32)
    for i in (1, 2):
        assert all(path.is_file() for path in dataset.files(i))
    assert len(check_data(tmp_path, preload=True)) == 1


def test_reflacx_images_below_files(tree):
    index = tree / "reflacx.json"
    index.write_text(index.read_text().replace('"files/', '"'))
    dataset = Reflacx(tree, 32)
    assert_schema(dataset[0, 0], 32)
    assert dataset.sample_name(2) == "p10/p10002/s2/image2.jpg (P300R000002)" and dataset.entries[2]["split"] == "train"


def test_several_trees_are_one_data_set(tree, tmp_path):
    mimic = make_mimic(tmp_path / "mimic")
    both = build_dataset([tree, mimic], input_size=32, use_cache=False)
    first, second = Reflacx(tree, 32), Mimic(mimic, 32)
    assert len(both) == len(both.entries) == 9
    assert equal(both[1, 2], first[1, 2]) and both.sample_name(7) == second.sample_name(1)
    # Two trees with the same content still get crops of their own.
    twice = build_dataset([tree, shutil.copytree(tree, tmp_path / "copy")], input_size=32, use_cache=False)
    assert equal(twice[0, 2], first[0, 2]) and not equal(twice[0, 2 + len(first)], twice[0, 2])
    with pytest.raises(UserError, match="is named twice"):
        build_dataset([tree, tree / "reflacx.json"], use_cache=False)


def test_index_file_itself_may_be_named(tree):
    make_mimic(tree)
    with pytest.raises(UserError, match="more than one index"):
        build_dataset(tree, use_cache=False)
    assert isinstance(build_dataset(tree / "mimic-cxr-jpg-cleanv4.json", use_cache=False), Mimic)
    assert isinstance(build_dataset(tree / "reflacx.json", use_cache=False), Reflacx)


# ---- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, expected", [("nowhere", "nowhere is not a directory"), (".", "has no reflacx.json")])
def test_missing_directory_and_index(tmp_path, place, expected):
    with pytest.raises(UserError, match=f"^--data_path: .*{expected}"):
        build_dataset(tmp_path / place)


ENTRY = '[{"image_path": %s, "study_id": %s, "reflacx_id": %s}]'


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[{", "not valid JSON"),
        ("[]", "expected a JSON list"),
        ("[3]", "entry 0: expected an object"),
        ('[{"image_path": "a.png", "study_id": 1}]', 'entry 0: "reflacx_id" is null'),
        *(
            (ENTRY % (path, 1, '"r"'), f'"image_path" is {path}, expected a path inside the tree')
            for path in ("7", '"../../etc/a.png"', '"/etc/a.png"')
        ),
        *(
            (ENTRY % ('"a.png"', name, '"r"'), f'"study_id" is {name}, expected a plain name')
            for name in ("null", '".."', '"b/r"')
        ),
    ],
)
def test_malformed_index(tmp_path, text, expected):
    (tmp_path / "reflacx.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        Reflacx(tmp_path)
    message = str(caught.value)
    assert expected in message and "reflacx.json" in message and "\n" not in message


def test_every_planted_fault_is_found_and_no_other(tree):
    """By --check_data, and by whoever reads the sample: one kind of bad file in each entry."""
    assert check_data(tree, preload=True) == []
    dataset = Reflacx(tree, 32, preload=True)
    files = [dataset.files(i) for i in range(6)]
    files[0].image.unlink()
    files[1].attention.write_bytes(b"")
    files[2].foreground.write_bytes(files[2].foreground.read_bytes()[:-30])
    files[3].image.write_text("not an image")
    save(files[4].attention, np.eye(41, 50, dtype=np.uint8))
    save(files[5].attention, np.zeros((33, 77), np.uint8))
    planted = [
        f"error: {files[0].image}: no such file",
        f"error: {files[1].attention}: the file is empty",
        f"error: {files[2].foreground}: the PNG is truncated",
        f"error: {files[3].image}: not a PNG or JPG",
        f"error: {files[4].attention}: 50 x 41 px, but its image {files[4].image} has 50 x 40",
        f"warning: {files[5].attention}: all-equal heatmap: no patch is significant",
    ]
    problems = check_data(tree, preload=True)
    for i, (problem, text) in enumerate(zip(problems, planted, strict=True)):
        assert str(problem).startswith(text) and f"(entry {i}, " in problem.message
        if problem.severity == "warning":
            dataset[0, i]
            continue
        with pytest.raises(UserError) as caught:
            dataset[0, i]
        message = str(caught.value)
        assert message.startswith(text.removeprefix("error: ")) and f"(sample {dataset.sample_name(i)})" in message
        assert "\n" not in message
    # Foregrounds are optional without preload, but where a tree has them all are checked.
    assert check_data(tree) == problems
    shutil.rmtree(tree / "foreground")
    assert check_data(tree) == [problem for problem in problems if "foreground/" not in problem.message]


@pytest.mark.parametrize("kind", ["attention", "foreground"])
def test_a_coloured_map_is_refused_by_all_readers(tree, kind):
    """Its luma is no order of its levels."""
    dataset = Reflacx(tree, 32, preload=True)
    file = getattr(dataset.files(0), kind)
    gray = read_gray(file)
    Image.fromarray(np.stack([gray, 255 - gray, gray // 2], -1)).save(file)
    for read in (lambda: dataset[0, 0], lambda: build_dataset(tree, preload=True)):
        with pytest.raises(UserError, match=f"^{file}: is in colour"):
            read()
    [problem] = check_data(tree, preload=True)
    assert str(problem).startswith(f"error: {file}: is in colour")
