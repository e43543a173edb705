"""Made-up checkpoints for the tests of how they are written, kept and gone on from."""

from __future__ import annotations

import collections
from pathlib import Path

import torch

from util.checkpoint import checkpoint_path, save_checkpoint

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
        "format": 1,
    }


def write(folder: Path, epoch: int, step: int = 0, **kwargs) -> Path:
    path = checkpoint_path(folder, epoch, step)
    save_checkpoint(make_state(epoch, step, **kwargs), path)
    return path
