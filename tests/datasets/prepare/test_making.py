"""datasets/prepare/making.py alone: units of small text files; what changed, what was interrupted, what is refused."""

import json
import os
import resource

import pytest

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


def contents(root):
    files = [path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".prepare.lock")]
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def snapshot(root):
    return {name: (data, (root / name).stat().st_mtime_ns) for name, data in contents(root).items()}


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


def test_a_second_run_changes_nothing(sources, tmp_path):
    out = tmp_path / "out"
    assert run(sources, out) == 6
    before = snapshot(out)
    assert run(sources, out) == 0 and snapshot(out) == before
    assert json.loads((out / "index.json").read_text())[1] == {"key": "b", "length": 3}
    assert set(contents(out)) == {"index.json", "prepare.json", "prepare.origins"} | {
        f"copies/{name}/{name}.txt" for name in "abcdef"
    }


def test_changed_added_and_missing_units_are_made(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out)
    kept = snapshot(out)["copies/a/a.txt"]
    (sources / "b").write_text("bcd")
    (sources / "g").write_text("new")
    (out / "copies/c/c.txt").unlink()
    (out / "copies/d/d.txt").write_text("cut")
    assert run(sources, out) == 4
    check_fresh(sources, out)
    assert snapshot(out)["copies/a/a.txt"] == kept


@pytest.mark.parametrize("how", ["gone", "bad", "other name"])
def test_a_finished_tree_loses_nothing_unasked(sources, tmp_path, how):
    out = tmp_path / "out"
    run(sources, out)
    before = snapshot(out)
    (sources / "a").write_text("aa changed")
    (sources / "g").write_text("new")
    (sources / "b").unlink() if how == "gone" else (sources / "b").write_text({"bad": "bad"}.get(how, "xb"))
    with pytest.raises(UserError, match=r"would lose 1 of what it holds.*: (b|copies/b/b\.txt); mend that"):
        run(sources, out)
    assert {name: was for name, was in snapshot(out).items() if name in before} == before
    run(sources, out, overwrite=True)
    check_fresh(sources, out)


def test_an_unfinished_tree_may_lose(sources, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), TreeMaking(out, {"suffix": "!"}, index="index.json") as making:
        (unit,) = making.begin([Unit("z", "0")], versions="1")
        (making.staging / "copies").mkdir()
        (making.staging / "copies/z").write_text("z")
        making.place(unit, ["copies/z"])
        raise ZeroDivisionError
    assert os.listdir(out / ".making/prepare/tree/copies") == ["z"] and not (out / "index.json").exists()
    with pytest.raises(UserError, match=r"other options: suffix ! there, suffix \? asked for"):
        run(sources, out, "?")
    run(sources, out)
    check_fresh(sources, out)


def test_overwrite_keeps_the_old_tree_until_the_new_one_is_whole(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(sources, out)
    before = snapshot(out)
    place = TreeMaking.place

    def killed(making, unit, *arguments, **options):
        if unit.key == "c":
            raise KeyboardInterrupt
        place(making, unit, *arguments, **options)

    for _ in range(2):
        monkeypatch.setattr(TreeMaking, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            run(sources, out, "?", overwrite=True)
        assert {name: was for name, was in snapshot(out).items() if not name.startswith(".making")} == before
        monkeypatch.setattr(TreeMaking, "place", place)
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="nothing to make"):
            run(tmp_path / "empty", out, overwrite=True)
    with pytest.raises(UserError, match=r"suffix ! there, suffix \? asked for"):
        run(sources, out, "?")
    assert run(sources, out, "?", overwrite=True) == 4  # goes on where it was
    check_fresh(sources, out, suffix="?")


def test_the_old_tree_can_be_kept_after_an_interrupted_overwrite(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out)
    before = snapshot(out)
    with pytest.raises(ZeroDivisionError), TreeMaking(out, {"suffix": "?"}, index="x", overwrite=True) as making:
        (unit,) = making.begin([Unit("z", "0")], versions="1")
        (making.staging / "z").write_text("z")
        making.place(unit, ["z"])
        raise ZeroDivisionError
    assert run(sources, out) == 0 and snapshot(out) == before


def test_nothing_to_make_leaves_nothing(sources, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "out", tmp_path / "a" / "b"):
        with pytest.raises(UserError, match="nothing to make a tree of"):
            run(tmp_path / "empty", out)
        assert [*out.glob("*")] in ([], [out / ".prepare.lock"])
    for source in sources.iterdir():
        source.write_text("bad")
    with pytest.raises(UserError, match="not one entry is left"):
        run(sources, tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()


def test_a_directory_that_is_not_ours_is_never_touched(sources, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not made by this script .*thesis.txt"):
            run(sources, out, overwrite=overwrite)
    assert os.listdir(out) == ["thesis.txt"]


def test_two_at_once(sources, tmp_path):
    out = tmp_path / "out"
    with TreeMaking(out, {"suffix": "!"}, index="index.json"):
        for options in ({}, {"suffix": "?"}, {"overwrite": True}):
            with pytest.raises(UserError, match="is in use by process"):
                run(sources, out, **options)
    run(sources, out)


def test_a_source_that_changes_meanwhile_is_an_error(sources, tmp_path):
    unit = Unit("a", "0", None, (str(sources / "a"),), (stamp(sources / "a"),))
    with pytest.raises(UserError, match="a: changed while"):
        with TreeMaking(tmp_path / "out", {}, index="index.json") as making:
            making.begin([unit])
            (sources / "a").write_text("longer")
            making.place(unit, [])


def test_parts_share_a_tree_and_one_run_finishes_it(sources, tmp_path):
    out = tmp_path / "out"
    run(sources, out)
    made = [run(sources, out, layer="gaze", part=(i, 4)) for i in range(3)]
    assert not (out / "above.json").exists()
    with TreeMaking(out, {"suffix": "!"}, index="above.json", layer="gaze", part=(3, 4)):
        for layer, part in (("prepare", None), ("gaze", None), ("gaze", (3, 4)), ("gaze", (0, 3))):
            with pytest.raises(UserError, match="is in use by process"):
                run(sources, out, layer=layer, part=part)
        assert run(sources, out, layer="gaze", part=(2, 4)) == 0
    made.append(run(sources, out, layer="gaze"))
    assert sum(made) == 6 and all(n < 6 for n in made)
    fresh = tmp_path / "fresh"
    run(sources, fresh)
    assert run(sources, fresh, layer="gaze") == 6
    assert contents(out) == contents(fresh)
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
