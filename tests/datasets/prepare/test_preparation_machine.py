"""A tree is exactly its sources and options, or an error: random histories of a small study.

Sources are added, removed, changed and damaged, options changed, files of the tree lost, runs killed at any write,
repeated, started beside another one. After each run that succeeds the tree is compared, byte for byte, with one made
afresh from the same sources and options; each run that fails must have the reason that the history gives it.
"""

import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from PIL import Image
from trees import add_metadata_and_heatmaps, contents

from datasets.phantom.gaze_study import make_study
from datasets.prepare.mimic import prepare_mimic
from datasets.prepare.readings import prepare
from datasets.prepare.store import TreeMaking, read_line
from util.errors import UserError

OPTIONS = {
    "reflacx": {"size": [0, 24], "readings": ["one", "each", "merge"], "split": ["all", "train"]},
    "mimic": {"size": [0, 24], "views": [("AP", "PA"), ("all",)]},
}
INDEX = {"reflacx": "reflacx.json", "mimic": "mimic-cxr-jpg-cleanv4.json"}
RARELY = st.sampled_from([False, False, False, True])
WRITES = ("replace", "rename", "unlink", "rmdir", "mkdir", "truncate", "fsync")


class Killed(BaseException):
    pass


@contextlib.contextmanager
def killed_at(number: int, after: bool):
    """From its `number`-th change of the disk on, before or after it, the process changes nothing any more."""
    count = 0

    def hook(real, *args, **kwargs):
        nonlocal count
        count += 1
        if count > number or (count == number and not after):
            raise Killed
        result = real(*args, **kwargs)
        if count == number:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(os, name, functools.partial(hook, getattr(os, name)))
        yield


@functools.cache
def base() -> Path:
    """Three images of 32 x 40 px, one read twice, with heatmaps and metadata: copied for each history."""
    root = Path(tempfile.mkdtemp(prefix="machine-base-"))
    study = make_study(root, 3, size=(32, 40), shared_images=1, readers=3, normal_fraction=1)
    add_metadata_and_heatmaps(root, study, ["PA", "AP", "LATERAL"])
    return root


def pictures(tree: dict[str, bytes]) -> set[str]:
    return {name for name in tree if "/" in name and not name.startswith(".making/")}


class Preparation(RuleBasedStateMachine):
    @initialize(kind=st.sampled_from(list(OPTIONS)))
    def begin(self, kind):
        self.kind = kind
        self.root = Path(tempfile.mkdtemp(prefix="machine-"))
        self.backup = base()
        for name in ("reflacx", "mimic", "heatmaps"):
            shutil.copytree(self.backup / name, self.root / name)
        self.out, self.fresh = self.root / "out", self.root / "fresh"
        self.options = {name: values[0] for name, values in OPTIONS[kind].items()}
        self.clock = 10**18
        self.finished: set[str] | None = None  # the pictures of the finished tree
        patterns = {
            "reflacx": ["mimic/files/**/*.jpg", "reflacx/main_data/*/fixations.csv"],
            "mimic": ["mimic/files/**/*.jpg", "heatmaps/*.npy"],
        }
        found = sorted(path for pattern in patterns[kind] for path in self.backup.glob(pattern))
        self.sources = [str(path.relative_to(self.backup)) for path in found]

    def teardown(self):
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def source(self, number: int) -> str:
        return self.sources[number % len(self.sources)]

    def touch(self, path: Path) -> None:
        self.clock += 1  # no two versions of a source have the same time
        os.utime(path, ns=(self.clock, self.clock))

    @rule(number=st.integers(0, 9))
    def remove(self, number):
        (self.root / self.source(number)).unlink(missing_ok=True)

    @rule(number=st.integers(0, 9))
    def restore(self, number):
        name = self.source(number)
        shutil.copyfile(self.backup / name, self.root / name)
        self.touch(self.root / name)

    @rule(number=st.integers(0, 9))
    def damage(self, number):
        path = self.root / self.source(number)
        path.write_bytes((self.backup / path.relative_to(self.root)).read_bytes()[:40])
        self.touch(path)

    @rule(number=st.integers(0, 9), seed=st.integers(0, 2))
    def change(self, number, seed):
        path = self.root / self.source(number)
        rng = np.random.default_rng(seed)
        if path.suffix == ".jpg":
            Image.fromarray(rng.integers(0, 255, (32, 40), np.uint8)).save(path)
        elif path.suffix == ".npy":
            np.save(path, rng.random((4, 4)))
        else:
            table = pd.read_csv(self.backup / path.relative_to(self.root))
            table.iloc[seed : seed + 9].to_csv(path, index=False)
        self.touch(path)

    @rule(data=st.data())
    def other_option(self, data):
        name = data.draw(st.sampled_from(sorted(self.options)))
        self.options[name] = data.draw(st.sampled_from(OPTIONS[self.kind][name]))

    @rule(number=st.integers(0, 99), cut=st.booleans())
    def lose_a_file_of_the_tree(self, number, cut):
        if names := sorted(pictures(contents(self.out))):
            path = self.out / names[number % len(names)]
            path.write_bytes(path.read_bytes()[:-9]) if cut else path.unlink()

    def prepare(self, out, **more):
        if self.kind == "reflacx":
            return prepare(self.root / "reflacx", self.root / "mimic", out, **self.options, **more)
        return prepare_mimic(self.root / "mimic", self.root / "heatmaps", out, **self.options, **more)

    def committing(self) -> list[Path]:
        """Of a commit that the next run has to finish first: the tree is the staged one already."""
        return list(self.out.glob(".making/*/commit"))

    def current(self, name: str) -> str | None:
        """A file at the root of the tree as it is, or is about to be."""
        places = [*(commit.parent / "tree" / name for commit in self.committing()), self.out / name]
        return next((path.read_text() for path in places if path.exists()), None)

    def options_there(self):
        record = self.current("prepare.json")
        return record and json.loads(record)["options"]

    def remember(self):
        """After a kill: the finished tree is what it was, or what it is about to be."""
        lines = self.current("prepare.origins")
        self.finished = lines and {name for line in lines.splitlines() for name in read_line(line)[2]}
        assert not lines or self.committing() or (self.out / INDEX[self.kind]).exists()

    @rule(number=st.integers(1, 60), after=st.booleans(), overwrite=st.booleans())
    def kill(self, number, after, overwrite):
        with contextlib.suppress(Killed, UserError), killed_at(number, after):
            self.prepare(self.out, overwrite=overwrite)
            self.finished = pictures(contents(self.out))
        self.remember()

    @rule()
    def two_at_once(self):
        if (self.out / "prepare.json").exists():
            before, moved = contents(self.out), self.committing()
            with TreeMaking(self.out, {}, index="x", overwrite=True).running():
                held = contents(self.out)
                with pytest.raises(UserError, match="in use by process"):
                    self.prepare(self.out)
                assert contents(self.out) == held
            assert moved or pictures(held) == pictures(before)

    @rule(number=st.integers(0, 9), seed=st.integers(0, 2))
    def run_change_and_run(self, number, seed):
        self.check_run()
        self.change(number, seed)
        self.check_run()

    @rule(number=st.integers(1, 60), after=st.booleans())
    def kill_and_run(self, number, after):
        self.kill(number, after, False)
        self.check_run()

    @rule(overwrite=RARELY, dry_run=RARELY)
    def check_run(self, overwrite=False, dry_run=False):
        shutil.rmtree(self.fresh, ignore_errors=True)
        try:
            self.prepare(self.fresh)
            fresh, refused = contents(self.fresh), None
        except UserError as error:
            fresh, refused = {}, str(error)
        before, there, committing = contents(self.out), self.options_there(), self.committing()
        asked = fresh and json.loads(fresh["prepare.json"])["options"]
        try:
            report = self.prepare(self.out, overwrite=overwrite, dry_run=dry_run)
        except UserError as error:
            told = str(error)
            if dry_run:
                assert contents(self.out) == before
            if "other options" in told:
                assert not overwrite and there and (not asked or there != asked)
            elif "cut off at its end" in told:
                assert dry_run and committing
            elif "would lose" in told:
                assert not overwrite and self.finished - pictures(fresh)
                assert pictures(contents(self.out)) >= pictures(before)
            else:
                assert refused is not None, told
            self.remember()
            return
        assert refused is None and (overwrite or not there or there == asked)
        if dry_run:
            assert contents(self.out) == before
            return
        assert contents(self.out) == fresh
        if self.finished is not None and not overwrite:
            assert self.finished <= pictures(fresh)
        assert report.counts["entries"] > 0
        self.finished = pictures(fresh)
        stamps = {path: path.stat().st_mtime_ns for path in self.out.rglob("*") if path.name != ".prepare.lock"}
        again = self.prepare(self.out)
        assert again.counts["made by this run"] == len({fault.detail for fault in again.faults}) or again.exclusions
        assert contents(self.out) == fresh
        assert all(stamps[p] == p.stat().st_mtime_ns for p in stamps if p.is_file())


def check(monkeypatch, **options):
    monkeypatch.setattr("util.files.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody cuts the power here
    every = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(Preparation, settings=settings(**every, **options))


def test_twenty_histories(monkeypatch):
    check(monkeypatch, max_examples=20, stateful_step_count=8, derandomize=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_three_hundred_histories(monkeypatch):
    check(monkeypatch, max_examples=300, stateful_step_count=20)
