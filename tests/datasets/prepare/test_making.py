"""datasets/prepare/making.py alone: units of small text files; what is refused, parts, layers (the rest: test_preparation_machine.py)."""

import os
import resource

import pytest
from trees import contents

from datasets.prepare.layout import Unit, origin_of, stamp
from datasets.prepare.making import TreeMaking
from util.errors import UserError


def run(root, out, suffix="!", *, layer="prepare", part=None, **options):
    """Copies the files of `root`, with `suffix`, into the tree `out`; files that say "bad" are left out."""
    units = []
    for source in sorted(root.iterdir()):
        origin = origin_of(source.name, source.read_text())
        units.append(Unit(source.name, origin, source, (str(source),), (stamp(source),)))
    folder, index = ("copies", "index.json") if layer == "prepare" else ("above", "above.json")
    making = TreeMaking(out, {"suffix": suffix}, index=index, layer=layer, part=part, **options)
    with making:
        for unit in making.begin(units, versions="1"):
            text = unit.task.read_text()
            name = f"{folder}/{unit.key}/{text[:1]}.txt"
            if not making.dry_run:
                (making.staging / name).parent.mkdir(parents=True, exist_ok=True)
                (making.staging / name).write_text(text + suffix)
            making.place(unit, [] if "bad" in text else [name], len(text))
        if part is None:
            entries = lambda: ({"key": unit.key, "length": note} for unit, note in making.notes())  # noqa: E731
            making.finish(entries(), {"n": len(list(entries()))}, {})
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


def check_fresh(sources, out, **options):
    fresh = out.parent / "fresh"
    run(sources, fresh, **options)
    assert contents(out) == contents(fresh)


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
    with pytest.raises(UserError, match="a: changed while"):
        with TreeMaking(tmp_path / "out", {}, index="index.json") as making:
            making.begin([unit])
            (sources / "a").write_text("longer")
            making.place(unit, [])


def test_parts_share_a_tree_but_no_two_runs_a_part(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out)
    assert run(sources, out, layer="gaze", part=(2, 4)) < 6
    assert not (out / "above.json").exists()
    with TreeMaking(out, {"suffix": "!"}, index="above.json", layer="gaze", part=(3, 4)):
        for layer, part in (("prepare", None), ("gaze", None), ("gaze", (3, 4)), ("gaze", (0, 3))):
            with pytest.raises(UserError, match="is in use by process"):
                run(sources, out, layer=layer, part=part)
        assert run(sources, out, layer="gaze", part=(2, 4)) == 0
    with pytest.raises(UserError, match="other options"):
        run(sources, out, "?", layer="gaze", part=(0, 2))


def test_the_layer_above_is_made_from_a_finished_tree_of_images(sources, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="holds no finished tree of images"):
        run(sources, out, layer="gaze")
    run(sources, out)
    run(sources, out, layer="gaze")
    (sources / "a").write_text("aa new")
    run(sources, out)  # replaces a file that the layer above was made from
    assert not (out / "above.json").exists()
    run(sources, out, layer="gaze")
    fresh = tmp_path / "fresh"
    run(sources, fresh)
    run(sources, fresh, layer="gaze")
    assert contents(out) == contents(fresh)
    run(sources, out, "?", overwrite=True)
    check = tmp_path / "check"
    run(sources, check, "?")
    assert contents(out) == contents(check)


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
    check_fresh(sources, out)
