"""Checks of command-line options that several programs share."""

from __future__ import annotations

import torch

from util.errors import UserError


def check_device(device: str) -> str:
    """The device's name if it is there: cpu, or cuda or cuda:N. Raises `UserError`."""
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: expected cpu or cuda") from None
    if kind.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: expected cpu or cuda")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: no such CUDA device here; use cpu")
    return device
