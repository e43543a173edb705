"""Checkpoints: whole or not there, checked on load, pruned with care, compared with the flags of a resume."""

from __future__ import annotations

import collections
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from util import checkpoint
from util.checkpoint import (
    CheckpointError,
    checkpoint_path,
    is_due,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune,
    remove_leftovers,
    save_checkpoint,
    set_aside_newer,
    verify_checkpoint,
)
from util.errors import UserError

ARGS = {
    "model": "cxrmim_vit_tiny_patch16",
    "input_size": 64,
    "id_list": [1, 3],
    "scale_list": [4.0, 0.5],
    "hog_nbins": 9,
    "decoder_depth": 1,
    "decoder_num_heads": 8,
    "batch_size": 4,
    "accum_iter": 2,
    "seed": 0,
    "epochs": 10,
    "blr": 1e-3,
    "mask_ratio": 0.75,
    "output_dir": "a",
    "num_workers": 2,
}
Usage = collections.namedtuple("Usage", "free")


def make_state(epoch: int = 0, step: int = 0, *, size: int = 40, **args) -> dict:
    generator = torch.Generator().manual_seed(epoch * 1000 + step)
    weights = {"w": torch.randn(size, size, generator=generator), "b": torch.zeros(0), "n": torch.tensor(7)}
    return {
        "model": collections.OrderedDict(weights),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.arange(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "fused": None, "params": [0]}],
        },
        "scaler": {"scale": 65536.0, "growth_interval": 2000},
        "epoch": epoch,
        "step": step,
        "args": {**ARGS, **args},
        "meters": {"loss": 1.5, "half": torch.ones(2, dtype=torch.bfloat16)},
        "world_size": 1,
        "dataset_size": 100,
        "format": 1,
    }


def write(folder: Path, epoch: int, step: int = 0, **kwargs) -> Path:
    path = checkpoint_path(folder, epoch, step)
    save_checkpoint(make_state(epoch, step, **kwargs), path)
    return path


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


def test_names_order_and_rule_of_saving(tmp_path):
    assert checkpoint_path("d", 7, 0) == Path("d/checkpoint-7.pth")
    assert checkpoint_path("d", 7, 30) == Path("d/checkpoint-8-step30.pth")
    assert checkpoint_path("d", -1, 5) == Path("d/checkpoint-0-step5.pth")
    places = [(-1, 5), (0, 0), (8, 0), (8, 7), (8, 12), (9, 0), (10, 0), (99, 0)]
    for epoch, step in random.Random(0).sample(places, len(places)):
        checkpoint_path(tmp_path, epoch, step).touch()
    for name in ("checkpoint-x.pth", "checkpoint-3.pth.bak", "my-checkpoint-3.pth", "checkpoint-9-step.pth"):
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, *place) for place in reversed(places)]
    assert [epoch for epoch in range(12) if is_due(epoch, save_every=5, epochs=12)] == [4, 9, 11]


def test_every_flipped_byte_and_every_truncation_is_found(tmp_path):
    path = write(tmp_path, 0, size=4)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=str(path)):
            verify_checkpoint(path)
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            load_checkpoint(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path)
    path.write_bytes(whole)
    load_checkpoint(path)


class _Malice:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_malicious_pickle_is_refused_unrun(tmp_path, monkeypatch):
    target, path = tmp_path / "owned", tmp_path / "checkpoint-3.pth"
    with monkeypatch.context() as patched:  # with a right digest: the unpickler itself must refuse
        patched.setattr(checkpoint, "_plain", lambda value, where: value)
        save_checkpoint({**make_state(3), "meters": _Malice(target)}, path)
    with pytest.raises(CheckpointError, match=r"checkpoint-3\.pth: refused"):
        load_checkpoint(path)
    torch.save(_Malice(target), path)
    with pytest.raises(CheckpointError, match="no digest inside"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(_Malice(target)))
    with pytest.raises(CheckpointError, match="truncated, or not a checkpoint"):
        load_checkpoint(path)
    assert not target.exists()
    pickle.loads(path.read_bytes())
    assert target.exists()  # the file was able to do harm


def test_foreign_and_missing_files(tmp_path):
    path = tmp_path / "published.pth"
    torch.save({"model": {}, "epoch": 3}, path)
    with pytest.raises(CheckpointError, match="--pretrained instead of --resume"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "absent.pth")
    save_checkpoint({**make_state(), "format": 2}, path)
    with pytest.raises(CheckpointError, match="format 2"):
        load_checkpoint(path)


def test_only_plain_types_go_in(tmp_path):
    with pytest.raises(TypeError, match=r"state\.args\.data_path: PosixPath"):
        write(tmp_path, 0, data_path=Path("x"))
    with pytest.raises(KeyError, match="optimizer"):
        save_checkpoint(
            {key: value for key, value in make_state().items() if key != "optimizer"},
            tmp_path / "checkpoint-0.pth",
        )
    assert list(tmp_path.iterdir()) == []


def test_newest_falls_back_and_names_the_damaged(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "absent") is None
    old, middle, new = write(tmp_path, 8), write(tmp_path, 8, 6), write(tmp_path, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert newest_checkpoint(tmp_path) == new
    new.write_bytes(new.read_bytes()[:-500])
    with pytest.warns(UserWarning, match=r"checkpoint-9\.pth: truncated.*going on from checkpoint-9-step6"):
        assert newest_checkpoint(tmp_path) == middle
    damaged = bytearray(middle.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    middle.write_bytes(damaged)
    with pytest.warns(UserWarning) as caught:
        assert newest_checkpoint(tmp_path) == old
    assert [str(warning.message).split(":")[0] for warning in caught] == [str(new), str(middle)]
    old.write_bytes(b"")
    with pytest.raises(UserError, match="can be used") as error:
        newest_checkpoint(tmp_path)
    assert all(str(path) in str(error.value) for path in (old, middle, new))


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    path = write(tmp_path, 2)
    (tmp_path / ".tmp-checkpoint-3.pth-abc123").write_bytes(path.read_bytes()[:1000])
    (tmp_path / ".tmp-args.json-abc123").touch()
    assert newest_checkpoint(tmp_path) == path
    remove_leftovers(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".tmp-args.json-abc123", "checkpoint-2.pth"]


def names(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def test_prune_keeps_milestones_and_the_last_two(tmp_path):
    for epoch in range(12):
        write(tmp_path, epoch, size=1)
        prune(tmp_path, save_every=5)
        assert checkpoint_path(tmp_path, epoch, 0).exists()
    assert names(tmp_path) == [f"checkpoint-{epoch}.pth" for epoch in (11, 10, 9, 4)]
    write(tmp_path, 11, 4, size=1)
    prune(tmp_path, save_every=5)
    assert names(tmp_path)[:3] == ["checkpoint-12-step4.pth", "checkpoint-11.pth", "checkpoint-9.pth"]
    write(tmp_path, 12, size=1)
    write(tmp_path, 13, size=1)
    deleted = prune(tmp_path, save_every=5)
    assert [path.name for path in deleted] == ["checkpoint-12-step4.pth", "checkpoint-11.pth"]
    prune(tmp_path, save_every=5, keep=3)
    assert names(tmp_path) == ["checkpoint-13.pth", "checkpoint-12.pth", "checkpoint-9.pth"]
    with pytest.raises(UserError, match="--keep 0"):
        prune(tmp_path, save_every=5, keep=0)


def test_prune_never_counts_a_damaged_file_nor_deletes_a_foreign_one(tmp_path):
    for epoch in range(5):
        write(tmp_path, epoch, size=1)
    newest = checkpoint_path(tmp_path, 4, 0)
    damaged = bytearray(newest.read_bytes())
    damaged[100] ^= 1
    newest.write_bytes(damaged)
    torch.save({"model": {}}, tmp_path / "checkpoint-0.pth")
    kept_elsewhere = write(tmp_path, 7, size=1).rename(tmp_path / "elsewhere.pth")
    checkpoint_path(tmp_path, 1, 0).unlink()
    checkpoint_path(tmp_path, 1, 0).symlink_to(kept_elsewhere)
    assert prune(tmp_path, save_every=50, keep=2) == []
    assert [path.name for path in prune(tmp_path, save_every=50, keep=1)] == ["checkpoint-2.pth"]
    assert names(tmp_path) == ["checkpoint-4.pth", "checkpoint-3.pth", "checkpoint-1.pth", "checkpoint-0.pth"]


def test_set_aside_newer(tmp_path):
    for place in ((3, 0), (3, 4), (4, 0)):
        write(tmp_path, *place, size=1)
    moved = set_aside_newer(tmp_path, epoch=3, step=0)
    assert {path.name for path in moved} == {
        f"superseded-checkpoint-4{rest}" for rest in ("-step4.pth", ".pth")
    }
    assert names(tmp_path) == ["checkpoint-3.pth"]
    for path in moved:
        load_checkpoint(path)


def test_full_disk_is_foreseen(tmp_path, monkeypatch):
    path = write(tmp_path, 0)
    before = path.read_bytes()
    needed = checkpoint._bytes_needed(checkpoint._plain(make_state(), "state"))
    assert len(before) <= needed <= 2 * len(before)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage(free=needed - 1))
    with pytest.raises(UserError, match=rf"checkpoint-0\.pth: the disk is full: saving needs {needed} bytes"):
        save_checkpoint(make_state(size=40), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


_FILL = """
import resource, signal, sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
import torch
from test_checkpoint import make_state
from util.checkpoint import checkpoint_path, save_checkpoint
from util.errors import run_cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
run_cli(lambda: save_checkpoint(make_state(1, size=300), checkpoint_path({folder!r}, 1, 0)))
"""


def test_write_error_half_way_leaves_everything_as_it_was(tmp_path):
    """The kernel refuses to let the file grow: the same path as a disk that fills up while writing."""
    path = write(tmp_path, 0)
    before = path.read_bytes()
    root = Path(checkpoint.__file__).parents[1]
    code = _FILL.format(root=str(root), tests=str(Path(__file__).parent), limit=200_000, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "checkpoint-1.pth: can't write the checkpoint, which needs 3" in done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def describe_mismatch(state: dict, args: dict, *, world_size: int, dataset_size: int = 100) -> str:
    return checkpoint.describe_mismatch(state, args, world_size=world_size, dataset_size=dataset_size)


def test_unchanged_flags_say_nothing():
    for change in ({"output_dir": "b", "num_workers": 0}, {"scale_list": (4.0, 0.5), "new_flag": 1}):
        assert describe_mismatch(make_state(3, 4), {**ARGS, **change}, world_size=1) == ""


def test_changed_hyperparameters_make_a_table():
    now = {**ARGS, "blr": 2e-3, "batch_size": 8, "epochs": 20}
    table = describe_mismatch(make_state(3), now, world_size=2)
    assert [line.split() for line in table.splitlines()] == [
        ["changed", "checkpoint", "now"],
        ["--batch_size", "4", "8"],
        ["--epochs", "10", "20"],
        ["--blr", "0.001", "0.002"],
        ["processes", "1", "2"],
        ["effective", "batch", "8", "32"],
    ]
    assert describe_mismatch(make_state(3, 4), {**ARGS, "mask_ratio": 0.5}, world_size=1) != ""


@pytest.mark.parametrize(
    ("flag", "value", "advice"),
    [
        ("model", "cxrmim_vit_base_patch16", "pass --model cxrmim_vit_tiny_patch16"),
        ("input_size", 224, "pass --input_size 64"),
        ("id_list", [1, 5], "pass --id_list 1 3"),
        ("scale_list", [2.0, 1.0], "pass --scale_list 4.0 0.5"),
        ("hog_nbins", 18, "pass --hog_nbins 9"),
    ],
)
def test_another_model_can_not_go_on(flag, value, advice):
    with pytest.raises(UserError, match=advice):
        describe_mismatch(make_state(3), {**ARGS, flag: value}, world_size=1)


def test_inside_an_epoch_the_samples_left_must_be_the_same():
    state = make_state(3, 4)
    assert "processes" in describe_mismatch(state, {**ARGS, "batch_size": 2}, world_size=2)
    with pytest.raises(UserError, match="middle of epoch 4 .*with 2 process.* pass --batch_size 2 --acc"):
        describe_mismatch(state, ARGS, world_size=2)
    with pytest.raises(UserError, match="start 1 processes and pass --batch_size 4"):
        describe_mismatch(state, ARGS, world_size=3)
    for change in ({"seed": 1}, {"accum_iter": 1}, {"batch_size": 8}):
        with pytest.raises(UserError, match="with 1 process.* pass --batch_size 4 --accum_iter 2 --seed 0"):
            describe_mismatch(state, {**ARGS, **change}, world_size=1)
        assert describe_mismatch({**state, "step": 0}, {**ARGS, **change}, world_size=1) != ""
    with pytest.raises(UserError, match="of 100 samples, and --data_path has 101 now"):
        describe_mismatch(state, ARGS, world_size=1, dataset_size=101)
    assert "samples" in describe_mismatch({**state, "step": 0}, ARGS, world_size=1, dataset_size=101)
