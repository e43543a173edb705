"""Learning rate: linear warm-up, then a half-cycle cosine; set per iteration (MAE's recipe)."""

from __future__ import annotations

import math

import torch


def learning_rate(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Learning rate at a fractional epoch: from 0 up to `lr` over `warmup_epochs`, then down to `min_lr`."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Groups for AdamW: no weight decay on biases, norms and other 1-D parameters.

    Frozen parameters are left out. The tokens (cls_token, mask_token) are [1, 1, D] and are decayed,
    as published.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if p.ndim <= 1 or name.endswith(".bias")]
    decayed = [p for name, p in trained if not (p.ndim <= 1 or name.endswith(".bias"))]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
