"""The command line, run for real on small trees: in this process, and through the launchers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from timm.models.vision_transformer import VisionTransformer

import run_pretrain
from util.checkpoint import load_checkpoint
from util.errors import UserError
from util.images import read_gray, write_gray
from util.subjects import subject_marks

REPOSITORY = Path(__file__).resolve().parent.parent
SMALL = "--model cxrmim_vit_tiny_patch16 --input_size 64 --device cpu --batch_size 4 --num_workers 0 --warmup_epochs 1"

pytestmark = pytest.mark.usefixtures("narrow")

PUBLISHED_DEFAULTS = {
    "batch_size": 32,
    "epochs": 400,
    "accum_iter": 1,
    "model": "cxrmim_vit_base_patch16",
    "input_size": 224,
    "mask_ratio": 0.75,
    "clinical_ratio": 0.5,
    "min_crop_ratio": 0.2,
    "id_list": [1, 3, 9, 11],
    "scale_list": [4.0, 2.0, 1.0, 0.5],
    "decoder_depth": 1,
    "decoder_num_heads": 8,
    "hog_nbins": 9,
    "weight_decay": 0.05,
    "lr": None,
    "blr": 1e-3,
    "min_lr": 1e-6,
    "warmup_epochs": 40,
    "data_path": ["../data/reflacx-1.0.0/"],
    "preload": False,
    "gaze_weighted": False,
    "output_dir": "./output_dir",
    "log_dir": None,
    "device": "cuda",
    "seed": 0,
    "resume": "",
    "auto_resume": True,
    "start_epoch": 0,
    "num_workers": 4,
    "pin_mem": True,
    "world_size": 1,
    "local_rank": -1,
    "dist_url": "env://",
}


def train(tree, out, flags=""):
    """Train in this process; returns the records of log.txt."""
    status = run_pretrain.main(f"{SMALL} --data_path {tree} --output_dir {out} --epochs 1 {flags}".split())
    assert status == 0
    return [json.loads(line) for line in (Path(out) / "log.txt").read_text().splitlines()]


def test_defaults_are_the_published_ones():
    args = vars(run_pretrain.get_args_parser().parse_args([]))
    assert {name: args[name] for name in PUBLISHED_DEFAULTS} == PUBLISHED_DEFAULTS


def test_published_command_is_understood():
    args = run_pretrain.get_args_parser().parse_args(
        "--local-rank 0 --batch_size 128 --model cxrmim_vit_base_patch16 --hog_nbins 9 --mask_ratio 0.75 "
        "--clinical_ratio 0.5 --epochs 400 --warmup_epochs 10 --blr 3e-3 --weight_decay 0.05 --num_workers 4 "
        "--preload --gaze_weighted --id_list 1 3 9 11 --scale_list 4.0 2.0 1.0 0.5 --decoder_depth 1 "
        "--decoder_num_heads 8 --data_path ../data/reflacx-1.0.0/ --output_dir ./output_dir/cxrmim/".split()
    )
    assert (args.preload, args.gaze_weighted, args.local_rank, args.blr) == (True, True, 0, 3e-3)


@pytest.mark.parametrize("flags", ["", "--preload --gaze_weighted --masking block"])
def test_trains_with_and_without_preload_and_weighting(tree, tmp_path, flags):
    (record,) = train(tree, tmp_path, flags)
    assert record["epoch"] == 0
    scales = [record[f"train_loss_scale_{scale}"] for scale in (4.0, 2.0, 1.0, 0.5)]
    assert record["train_loss"] == pytest.approx(sum(scales))
    assert record["significant_patches"] > 0
    checkpoint = torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)
    assert {"model", "optimizer", "epoch", "scaler", "args"} <= set(checkpoint)
    assert json.loads((tmp_path / "args.json").read_text())[0]["args"]["seed"] == 0


def test_loss_falls(tree, tmp_path):
    records = train(tree, tmp_path, "--epochs 6 --blr 0.05 --gaze_weighted")
    assert records[-1]["train_loss"] < 0.8 * records[0]["train_loss"]


def test_going_on_with_other_heatmaps(tree, tmp_path, capsys):
    """Refused in the middle of an epoch, printed at its end."""
    tree = shutil.copytree(tree, tmp_path / "tree")
    flags = f"{SMALL} --data_path {tree} --output_dir {tmp_path / 'out'} --epochs 2"
    assert run_pretrain.main(f"{flags} --max_minutes 0".split()) == 75
    changed = next((tree / "attention").rglob("*.png"))
    levels = read_gray(changed)
    write_gray(changed, np.roll(levels, 9))
    for more in ("", "--no_cache"):
        with pytest.raises(UserError, match="in the middle of epoch 1,.* names, order or content of samples"):
            run_pretrain.main(f"{flags} {more}".split())
    write_gray(changed, levels)
    assert run_pretrain.main(flags.split()) == 0
    assert "content of samples" not in capsys.readouterr().out
    write_gray(changed, np.roll(levels, 9))
    assert run_pretrain.main(f"{flags} --epochs 3".split()) == 0
    assert "names, order or content of samples" in capsys.readouterr().out


def test_tensorboard_shows_numbers_and_pictures_on_one_axis(tree, tmp_path):
    train(tree, tmp_path, "--epochs 2 --image_every 2 --print_every 2")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    # 12 images are 3 steps of 4: lines after steps 2 and 3 of each epoch, at 1000 x epochs
    assert [scalar.step for scalar in events.Scalars("train_loss")] == [666, 1000, 1666, 2000]
    assert {"lr", "samples_per_s", "data_wait", "significant_patches", "train_loss_scale_0.5"} <= set(
        events.Tags()["scalars"]
    )
    assert [picture.step for picture in events.Images("reconstruction")] == [2000]


def test_starts_from_timm_weights_and_keeps_who_was_seen(tree, tmp_path, capsys):
    """By the run, its initial weights and what it goes on from. No tree is named twice."""
    earlier = subject_marks(["7"], "nih")
    vit = VisionTransformer(img_size=64, patch_size=16, embed_dim=48, depth=12, num_heads=3)
    metadata = {"num_heads": "3", "seen": json.dumps(earlier)}
    torch.save({"state_dict": vit.state_dict(), "metadata": metadata}, tmp_path / "vit.pth")
    train(tree, tmp_path / "out", f"--pretrained {tmp_path / 'vit.pth'} --lr 1e-12")
    assert "blocks (144)" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "out" / "checkpoint-0.pth")
    for name in ("blocks.3.attn.qkv.weight", "pos_embed"):
        torch.testing.assert_close(state["model"][name], vit.state_dict()[name])
    seen = state["seen"]
    subjects = {entry["subject_id"] for entry in json.loads((tree / "reflacx.json").read_text())}
    assert seen == sorted({*earlier, *subject_marks(subjects, "mimic")})
    copy = shutil.copytree(tree, tmp_path / "copy")
    train(tree, tmp_path / "out", f"--epochs 2 --data_path {tree} {copy}")
    assert load_checkpoint(tmp_path / "out" / "checkpoint-1.pth")["seen"] == seen
    assert "24 of 12 file names" in capsys.readouterr().out
    with pytest.raises(UserError, match="--data_path: .* is named twice"):
        train(tree, tmp_path / "out", f"--data_path {tree} {tree}/reflacx.json")


def test_accumulation_is_the_larger_batch(tree, tmp_path):
    """Unweighted, with one mask count, two steps of 4 and one of 8 differ by rounding and by the masks drawn."""
    whole = train(tree, tmp_path / "whole", "--batch_size 8 --masking random")
    parts = train(tree, tmp_path / "parts", "--batch_size 4 --accum_iter 2 --masking random")
    args = [json.loads((tmp_path / name / "args.json").read_text())[0]["args"] for name in ("whole", "parts")]
    assert args[0]["lr"] == args[1]["lr"]
    assert parts[0]["train_loss"] == pytest.approx(whole[0]["train_loss"], rel=0.05)
    one, other = (
        load_checkpoint(tmp_path / name / "checkpoint-0.pth")["optimizer"]["state"][0] for name in ("whole", "parts")
    )
    assert one["step"] == other["step"] == 1
    assert other["exp_avg"].norm() == pytest.approx(one["exp_avg"].norm(), rel=0.5)  # not doubled


def test_bfloat16_clipping_and_odd_taps_without_git(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train(tree, tmp_path, "--dtype bfloat16 --clip_grad 0.1 --id_list 0 2 2 --scale_list 1 0.5 0.5")
    assert json.loads((tmp_path / "args.json").read_text())[0]["git"] is None


@pytest.mark.parametrize(("before", "after", "scale"), [("float16", "bfloat16", 1.0), ("float32", "float16", 65536.0)])
def test_resuming_takes_the_new_flags(tree, tmp_path, before, after, scale):
    train(tree, tmp_path, f"--dtype {before} --min_lr 1e-9")
    train(tree, tmp_path, f"--epochs 2 --dtype {after} --min_lr 1e-9 --weight_decay 0.3")
    checkpoint = load_checkpoint(tmp_path / "checkpoint-1.pth")
    assert [group["weight_decay"] for group in checkpoint["optimizer"]["param_groups"]] == [0.0, 0.3]
    assert checkpoint["scaler"]["scale"] == scale
    assert checkpoint["optimizer"]["state"][0]["step"] == 6  # the moments went on


def test_warns_loudly_when_no_patch_is_significant(tmp_path, tree, capsys):
    flat = shutil.copytree(tree, tmp_path / "flat")
    for file in (flat / "attention").rglob("*.png"):
        write_gray(file, read_gray(file) * 0)
    train(flat, tmp_path / "out")
    assert "no patch of these images is significant" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data_path /nowhere", "/nowhere"),
        ("--id_list 1 3", "scale_list"),
        ("--batch_size 64", "--batch_size"),
        ("--mask_ratio 1", "mask_ratio"),
        ("--epochs 0", "epochs"),
        ("--decoder_num_heads 7", "decoder_num_heads"),
        ("--pretrained /nowhere.pth", "/nowhere.pth"),
        ("--model cxrmim_vit_base_patch16", "fetch_weights"),
        ("--cache_size 8", "--cache_size 8: below --input_size 64"),
        ("--device tpu", "--device"),
        ("--world_size 2", "torchrun"),
        ("--lr -1", "--lr"),
        ("--clip_grad 0", "--clip_grad 0: must be above 0"),
        ("--output_dir /dev/null/out", "--output_dir /dev/null/out"),
    ],
)
def test_bad_flags_are_named(tree, tmp_path, flags, message, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no preTrain/ is
    with pytest.raises(UserError, match=re.escape(message)) as error:
        train(tree, tmp_path / "out", flags)
    assert "\n" not in str(error.value)


def test_torch_distributed_launch_as_published_with_two_processes(tree, tmp_path):
    """It passes --local-rank (--local_rank in older versions). torchrun: tests/reliability/test_launchers.py."""
    command = [sys.executable, *"-m torch.distributed.launch --nproc_per_node 2 run_pretrain.py".split()]
    command += f"{SMALL} --epochs 1 --batch_size 2 --data_path".split()
    command += [str(tree), "--output_dir", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "effective batch  4 = 2 x 1 accumulated x 2 processes" in result.stdout
    assert result.stdout.count("effective batch") == 1  # rank 0 alone speaks
    checkpoint = load_checkpoint(tmp_path / "checkpoint-0.pth")
    assert checkpoint["world_size"] == 2
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1
