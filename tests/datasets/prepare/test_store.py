"""datasets/prepare/store.py alone: units of small text files; what is refused, layers (the rest: test_preparation_machine.py)."""

import os
import resource

import pytest
from trees import contents

from datasets.prepare.store import TreeMaking
from datasets.prepare.units import Made, Report, Unit, origin_of, stamp
from util.errors import UserError


def run(root, out, suffix="!", *, layer="prepare", **options):
    """Copies the files of `root`, with `suffix`, into the tree `out`; files that say "bad" are left out."""
    units = []
    for source in sorted(root.iterdir()):
        origin = origin_of(source.name, source.read_text())
        units.append(Unit(source.name, origin, source, (str(source),), (stamp(source),)))
    folder, index = ("copies", "index.json") if layer == "prepare" else ("above", "above.json")
    making = TreeMaking(out, {"suffix": suffix}, index=index, layer=layer, **options)
    with making.running():
        for unit in making.begin(Report(units, {})):
            text = unit.task.read_text()
            name = f"{folder}/{unit.key}/{text[:1]}.txt"
            (making.staging / name).parent.mkdir(parents=True, exist_ok=True)
            (making.staging / name).write_text(text + suffix)
            making.place(unit, Made([] if "bad" in text else [name], {"length": len(text)}))
        making.finish(({"key": unit.key, **note} for unit, note in making.notes()), {})
    return making.n_made


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("util.files.PATIENCE_SECONDS", 0.0)


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "sources"
    root.mkdir()
    for name in "abcdef":
        (root / name).write_text(name * 3)
    return root


def test_a_directory_that_is_not_ours_is_never_touched(sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not made by this script .*thesis.txt"):
            run(sources, out, overwrite=overwrite)
    assert os.listdir(out) == ["thesis.txt"]


def test_a_source_that_changes_meanwhile_is_an_error(sources, tmp_path):
    unit = Unit("a", "0", None, (str(sources / "a"),), (stamp(sources / "a"),))
    making = TreeMaking(tmp_path / "out", {}, index="index.json")
    with pytest.raises(UserError, match="a: changed while"), making.running():
        making.begin(Report([unit], {}))
        (sources / "a").write_text("longer")
        making.place(unit, Made())


def test_the_layer_above_follows_the_tree_of_images(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out)
    run(sources, out, layer="gaze")
    (sources / "a").write_text("aa new")
    run(sources, out)  # replaces a file that the layer above was made from
    assert not (out / "above.json").exists()
    for layers, options in ((["gaze"], {}), (["prepare"], {"suffix": "?", "overwrite": True})):
        for layer in layers:
            run(sources, out, layer=layer, **options)
        for layer in dict.fromkeys(["prepare", *layers]):
            run(sources, tmp_path / str(layers), layer=layer, **options)
        assert contents(out) == contents(tmp_path / str(layers))


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(sources, tmp_path):
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # the journal grows beyond it
    try:
        with pytest.raises(UserError, match="can't be read or written .File too large"):
            run(sources, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "index.json").exists() and not (out / "copies").exists()
    run(sources, out)
    run(sources, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")
