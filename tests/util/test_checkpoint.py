"""Checkpoints: whole or not there, checked on load, pruned with care, compared with the flags of a resume."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path

import pytest
import torch
from made_checkpoints import make_state, write

from util import checkpoint
from util.checkpoint import CheckpointError, load_checkpoint, restoring, save_checkpoint
from util.errors import UserError

Usage = collections.namedtuple("Usage", "free")


def assert_same(left, right) -> None:
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    else:
        assert left == right


def test_round_trip_and_copy(tmp_path):
    state = make_state(4)
    path = write(tmp_path, 4)
    state["model"] = dict(state["model"])
    assert_same(load_checkpoint(path), state)
    assert_same(torch.load(path, weights_only=True), state)  # as any other program opens it
    copy = tmp_path / "copy.pth"
    copy.write_bytes(path.read_bytes())
    assert_same(load_checkpoint(copy), state)
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_no_flipped_byte_changes_a_number_and_truncations_are_found(tmp_path):
    path = write(tmp_path, 0, size=4)
    whole, state = path.read_bytes(), load_checkpoint(path)
    found = 0
    for place in {*range(0, len(whole), 7), *range(len(whole) - 120, len(whole))}:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            assert_same(load_checkpoint(path), state)  # a byte that nobody reads
        except CheckpointError as error:
            assert str(error).startswith(f"{path}: ")
            found += 1
    assert found > 200
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated|cut short"):
            load_checkpoint(path)


class _Malice:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_malicious_pickle_is_refused_unrun(tmp_path, monkeypatch):
    target, path = tmp_path / "owned", tmp_path / "checkpoint-3.pth"
    with monkeypatch.context() as patched:  # with right checksums: the unpickler itself must refuse
        patched.setattr(checkpoint, "_plain", lambda value: value)
        save_checkpoint({**make_state(3), "meters": _Malice(target)}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint-3\.pth: refused"):
        load_checkpoint(path)
    torch.save(_Malice(target), path)
    with pytest.raises(CheckpointError, match=r"checkpoint-3\.pth: refused"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(_Malice(target)))
    with pytest.raises(CheckpointError, match=r"checkpoint-3\.pth: (refused|not a readable)"):
        load_checkpoint(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # the file was able to do harm


def test_foreign_and_missing_files(tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"model": {}, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="--pretrained instead of --resume"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="No such file"):
        load_checkpoint(tmp_path / "absent.pth")
    save_checkpoint({**make_state(), "format": 2}, path)
    with pytest.raises(CheckpointError, match="another version's format"):
        load_checkpoint(path)


def test_only_plain_types_go_in(tmp_path):
    with pytest.raises(TypeError, match="PosixPath in a checkpoint"):
        write(tmp_path, 0, data_path=Path("x"))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_foreseen(tmp_path, monkeypatch):
    path = write(tmp_path, 0)
    before = path.read_bytes()
    needed = len(before)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(free=needed - 1))
    with pytest.raises(UserError, match=rf"checkpoint-0\.pth: the disk is full: saving needs {needed} bytes"):
        save_checkpoint(make_state(), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="^a.pth: .*RuntimeError[^\n]*$"), restoring("a.pth"):
        raise RuntimeError("size\n mismatch")
    for kind in (UserError, torch.OutOfMemoryError):
        with pytest.raises(kind, match="^as it is$"), restoring("a.pth"):
            raise kind("as it is")
