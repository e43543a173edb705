"""datasets: one sample schema from every tree, the same crop whoever asks, bad trees told in a line."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from trees import make_mimic, make_reflacx, save, smooth

from datasets import Mimic, Reflacx, SampleError, build_dataset, check_data
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
    assert set(sample["foreground"].unique().tolist()) <= {0, 1}


def equal(a, b) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_one_schema(tree, tmp_path, preload, augment):
    make_mimic(tmp_path / "mimic")
    for root, kind in ((tree, Reflacx), (tmp_path / "mimic", Mimic)):
        dataset = build_dataset(root, input_size=64, preload=preload, augment=augment, use_cache=False)
        assert isinstance(dataset, kind)
        for i in range(len(dataset)):
            assert_schema(dataset[i], 64)
            assert dataset[i]["foreground"].any() and not dataset[i]["foreground"].all()


def test_foreground_without_preload_is_otsu_of_the_crop(tree):
    sample = Reflacx(tree, 64)[(3, 1)]
    assert torch.equal(sample["foreground"].bool(), otsu_foreground(sample["attention"][None])[0])


def test_stored_foreground_is_the_crop_of_the_file(tree):
    """0/1 and 0/255 files give the same; what is read is the file, not the attention."""
    with_255 = [Reflacx(tree, 64, preload=True)[i] for i in range(6)]
    for path in (tree / "foreground").rglob("*.png"):
        save(path, read_gray(path) // 255)
    assert all(equal(a, Reflacx(tree, 64, preload=True)[i]) for i, a in enumerate(with_255))
    for path in (tree / "foreground").rglob("*.png"):
        save(path, np.zeros_like(read_gray(path)))
    assert not any(Reflacx(tree, 64, preload=True)[i]["foreground"].any() for i in range(6))


def test_planes_are_cut_together(tmp_path):
    """Image, attention and foreground all hold one picture, so every sample must too."""
    picture = smooth(np.random.default_rng(0), 100, 80)
    save(tmp_path / "a.png", picture)
    save(tmp_path / "attention/1/r.png", picture)
    save(tmp_path / "foreground/1/r.png", picture)
    (tmp_path / "reflacx.json").write_text('[{"image_path": "a.png", "study_id": 1, "reflacx_id": "r"}]')
    dataset = Reflacx(tmp_path, 32, preload=True)
    for epoch in range(20):
        sample = dataset[(epoch, 0)]
        assert torch.equal(sample["img"][0], sample["attention"])
        assert torch.equal(sample["foreground"].bool(), sample["attention"] >= 128)
    centre = Reflacx(tmp_path, 80, augment=False)[0]["img"][0]
    np.testing.assert_array_equal(centre.numpy(), picture[10:90])


def test_randomness_is_a_function_of_seed_epoch_and_index(tree):
    dataset = Reflacx(tree, 64, seed=5)
    assert equal(dataset[(2, 3)], dataset[(2, 3)])
    assert equal(dataset[(2, 3)], Reflacx(tree, 64, seed=5)[(2, 3)])
    assert not equal(dataset[(2, 3)], dataset[(1, 3)])
    assert not equal(dataset[(2, 3)], Reflacx(tree, 64, seed=6)[(2, 3)])
    dataset.set_epoch(2)
    assert equal(dataset[3], dataset[(2, 3)])
    torch.manual_seed(1)
    np.random.seed(1)
    assert equal(dataset[3], Reflacx(tree, 64, seed=5)[(2, 3)])
    fixed = Reflacx(tree, 64, augment=False)
    assert equal(fixed[(0, 3)], fixed[(9, 3)])


def test_workers_and_batches_do_not_matter(tree):
    """The engine's way: one iteration over all epochs, 0 and 2 workers, batches of all sizes."""
    dataset = Reflacx(tree, 32, seed=3, preload=True)

    def run(workers: int, batch_size: int):
        batches = TrainBatches(len(dataset), batch_size, seed=3, epochs=2)
        loader = SampleLoader(dataset, batch_sampler=batches, num_workers=workers)
        keys = [key for batch in batches for key in batch]
        images = torch.cat([batch["img"] for batch in loader])
        return dict(zip(keys, images))

    plain = run(0, 3)
    assert len(plain) == 12
    for other in (run(2, 3), run(2, 2)):
        assert plain.keys() == other.keys() and all(torch.equal(plain[key], other[key]) for key in plain)


def test_flips_half_of_the_samples(tmp_path):
    """On a left-to-right ramp a flip turns the sign of the mean slope."""
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (60, 1))
    for path in ("a.png", "attention/1/r.png"):
        save(tmp_path / path, ramp)
    (tmp_path / "reflacx.json").write_text('[{"image_path": "a.png", "study_id": 1, "reflacx_id": "r"}]')
    dataset = Reflacx(tmp_path, 32)
    rows = [dataset[(epoch, 0)]["img"][0, 0].int() for epoch in range(400)]
    flips = sum(bool(row[0] > row[-1]) for row in rows)
    assert 160 < flips < 240  # 4 standard deviations


def test_extra_keys_are_kept_and_names_are_told(tree):
    dataset = Reflacx(tree)
    assert dataset.entries[2]["split"] == "train"
    assert dataset.sample_name(2) == "files/p10/p10002/s2/image2.jpg (P300R000002)"
    assert dataset.files(2).attention == tree / "attention/50002/P300R000002.png"


@pytest.mark.parametrize("prefix", ["files/", ""])
@pytest.mark.parametrize("mirror_prefix", ["files/", ""])
def test_mimic_with_and_without_files_prefix(tmp_path, prefix, mirror_prefix):
    make_mimic(tmp_path, prefix, mirror_prefix)
    dataset = Mimic(tmp_path, 32, preload=True)
    for i in range(3):
        assert_schema(dataset[i], 32)
        assert all(path.is_file() for path in dataset.files(i))
    assert check_data(tmp_path, preload=True) == []


def test_reflacx_images_below_files(tree):
    entries = json.loads((tree / "reflacx.json").read_text())
    for entry in entries:
        entry["image_path"] = entry["image_path"].removeprefix("files/")
    (tree / "reflacx.json").write_text(json.dumps(entries))
    assert_schema(Reflacx(tree, 32)[0], 32)


def test_several_trees_are_one_data_set(tree, tmp_path):
    mimic = make_mimic(tmp_path / "mimic")
    both = build_dataset([tree, mimic], input_size=32, use_cache=False)
    first, second = Reflacx(tree, 32), Mimic(mimic, 32)
    assert len(both) == len(both.entries) == 9
    assert equal(both[(1, 2)], first[(1, 2)])
    assert both.sample_name(7) == second.sample_name(1) and both.files(7) == second.files(1)
    # Two trees with the same content still get crops of their own.
    twice = build_dataset([tree, tree], input_size=32, use_cache=False)
    assert equal(twice[2], first[2]) and not equal(twice[2 + len(first)], twice[2])
    both.set_epoch(4)
    assert equal(both[8], both[(4, 8)])
    for bad in (9, -1):
        with pytest.raises(IndexError):
            both[bad]
        with pytest.raises(IndexError):
            first[bad]


def test_index_file_itself_may_be_named(tree):
    make_mimic(tree)
    with pytest.raises(UserError, match="more than one index"):
        build_dataset(tree, use_cache=False)
    assert isinstance(build_dataset(tree / "mimic-cxr-jpg-cleanv4.json", use_cache=False), Mimic)
    assert isinstance(build_dataset(tree / "reflacx.json", use_cache=False), Reflacx)


# ---- bad input -------------------------------------------------------------------------------------


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_directory_and_index(tmp_path):
    with pytest.raises(UserError, match="nowhere is not a directory") as caught:
        build_dataset(tmp_path / "nowhere")
    one_line(caught)
    with pytest.raises(UserError, match="reflacx.json") as caught:
        build_dataset(tmp_path)
    one_line(caught)
    with pytest.raises(UserError, match="no directory given"):
        build_dataset([])
    with pytest.raises(UserError, match="no such file"):
        Mimic(tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", "not valid JSON"),
        ("[{", "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
        ("{}", "expected a JSON list"),
        ("[]", "empty"),
        ("[3]", "entry 0: expected an object"),
        ('[{"image_path": "a.png", "study_id": 1}]', 'entry 0: lacks the key "reflacx_id"'),
        ('[{"image_path": "a.png", "study_id": null, "reflacx_id": "r"}]', '"study_id" is null'),
        ('[{"image_path": 7, "study_id": 1, "reflacx_id": "r"}]', '"image_path" is 7'),
        ('[{"image_path": "", "study_id": 1, "reflacx_id": "r"}]', '"image_path" is ""'),
        ('[{"image_path": ".", "study_id": 1, "reflacx_id": "r"}]', "not a path inside"),
        ('[{"image_path": "../../etc/a.png", "study_id": 1, "reflacx_id": "r"}]', "not a path inside"),
        ('[{"image_path": "/etc/a.png", "study_id": 1, "reflacx_id": "r"}]', "not a path inside"),
        ('[{"image_path": "a.png", "study_id": "..", "reflacx_id": "r"}]', "not a path inside"),
        ('[{"image_path": "a.png", "study_id": 1, "reflacx_id": "b/../../r"}]', "not a path inside"),
        ('[{"image_path": "a.png", "study_id": 1, "reflacx_id": "b/r"}]', "plain name"),
        ('[{"image_path": "a\\u0000.png", "study_id": 1, "reflacx_id": "r"}]', "not a path inside"),
    ],
)
def test_malformed_index(tmp_path, text, expected):
    (tmp_path / "reflacx.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        Reflacx(tmp_path)
    assert expected in one_line(caught) and "reflacx.json" in str(caught.value)


def test_bad_options():
    with pytest.raises(UserError, match="min_crop_ratio"):
        Reflacx(".", 224, 0.0)
    with pytest.raises(UserError, match="seed"):
        Reflacx(".", 224, 0.2, -1)


def plant_faults(root) -> dict[str, tuple[str, str]]:
    """Six kinds of bad file, one in each entry: {file: (severity, part of the message)}."""
    files = [Reflacx(root, preload=True).files(i) for i in range(6)]
    files[0].image.unlink()
    files[1].attention.write_bytes(b"")
    files[2].foreground.write_bytes(files[2].foreground.read_bytes()[:-30])
    files[3].image.write_text("not an image")
    save(files[4].attention, np.eye(41, 50, dtype=np.uint8))
    save(files[5].attention, np.zeros((33, 77), np.uint8))
    return {
        str(files[0].image): ("error", "no such file"),
        str(files[1].attention): ("error", "empty"),
        str(files[2].foreground): ("error", "truncated"),
        str(files[3].image): ("error", "not a PNG or JPG"),
        str(files[4].attention): ("error", "50 x 41 px, but its image"),
        str(files[5].attention): ("warning", "no patch is significant"),
    }


def test_check_data_finds_every_planted_fault_and_no_other(tree):
    assert check_data(tree, preload=True) == []
    planted = plant_faults(tree)
    problems = check_data(tree, preload=True)
    assert [problem.file for problem in problems] == list(planted)
    for i, problem in enumerate(problems):
        severity, text = planted[problem.file]
        assert problem.severity == severity
        assert text in problem.message and f"entry {i}" in problem.message
        assert str(problem).startswith(f"{severity}: {problem.file}: ")
    # Foregrounds are optional without preload, but where a tree has them all are checked.
    assert check_data(tree) == problems
    shutil.rmtree(tree / "foreground")
    others = [file for file in planted if "foreground" not in file]
    assert [problem.file for problem in check_data(tree)] == others


def test_check_data_lists_bad_entries_of_the_index(tree):
    entries = json.loads((tree / "reflacx.json").read_text())
    del entries[1]["study_id"]
    entries[4] = "nonsense"
    (tree / "reflacx.json").write_text(json.dumps(entries))
    problems = check_data(tree, preload=True)
    assert len(problems) == 2 and "entry 1" in problems[0].message and "entry 4" in problems[1].message
    assert all(problem.file.endswith("reflacx.json") for problem in problems)


def test_samples_with_bad_files_raise_one_line(tree):
    planted = list(plant_faults(tree).items())
    dataset = Reflacx(tree, 32, preload=True)
    for i, (file, (severity, text)) in enumerate(planted):
        if severity == "error":
            with pytest.raises(SampleError) as caught:
                dataset[i]
            message = one_line(caught)
            assert message.startswith(file) and text in message and dataset.sample_name(i) in message
        else:
            assert_schema(dataset[i], 32)


@pytest.mark.parametrize("kind", ["attention", "foreground"])
def test_a_coloured_map_is_refused_by_all_readers(tree, kind):
    """Its luma is no order of its levels."""
    dataset = Reflacx(tree, 32, preload=True)
    file = getattr(dataset.files(0), kind)
    gray = read_gray(file)
    Image.fromarray(np.stack([gray, 255 - gray, gray // 2], -1)).save(file)
    with pytest.raises(SampleError, match=f"^{file}: is in colour"):
        dataset[0]
    with pytest.raises(UserError, match=f"^{file}: is in colour"):
        build_dataset(tree, preload=True)
    [problem] = check_data(tree, preload=True)
    assert (problem.severity, problem.file) == ("error", str(file)) and "is in colour" in problem.message


def test_size_error_names_both_sizes(tree):
    files = Reflacx(tree).files(0)
    save(files.attention, np.zeros((10, 20), np.uint8))
    with pytest.raises(UserError) as caught:
        Reflacx(tree, 32)[0]
    for part in (str(files.attention), "20 x 10", str(files.image), "100 x 130"):
        assert part in one_line(caught)


def test_error_of_a_worker_is_one_line(tree):
    file = Reflacx(tree).files(3).image
    file.write_bytes(file.read_bytes()[:100])
    loader = SampleLoader(Reflacx(tree, 32), batch_size=2, num_workers=2)
    batches = iter(loader)
    message = ""
    try:
        list(batches)
    except SampleError as error:
        message = str(error)
        # It holds the workers, which take 10 s to end when they are left to the garbage collector.
        error.__traceback__ = None
    assert message.startswith(str(file)) and "\n" not in message
