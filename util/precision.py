"""Number formats: what float32 means on a GPU, mixed precision with few casts, and updates left out on the device.

Under autocast, torch casts every weight and bias by a kernel of its own in the forward pass and each gradient
by another in the backward pass: for ViT-B that is a quarter of all kernels of a step, each of them so
small that a GPU waits for its launch. `run_cast_once` casts all of a module's matrices in one go.

A `GradScaler` with a fused optimiser leaves out an update with a non-finite gradient, on the device, so every run has one;
outside float16 its scale is 1. `nan_gradient_unless_finite` makes a non-finite loss of one rank such a gradient on all of
them, through the gradient's mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


def set_tf32(enabled: bool) -> None:
    """Whether CUDA rounds the factors of float32 products and convolutions to TF32 (10 bits of mantissa).

    torch's own default is neither: products in float32, convolutions in TF32.
    """
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.allow_tf32 = enabled


def make_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss of a run that computes in `dtype`, a name of torch's."""
    return torch.amp.GradScaler(device.type, init_scale=65536.0 if dtype == "float16" else 1.0)


def update_scale(scaler: torch.amp.GradScaler, dtype: str) -> None:
    """End a step of the scaler: outside float16 its scale stays 1."""
    scaler.update(None if dtype == "float16" else 1.0)


def nan_gradient_unless_finite(loss: Tensor) -> Tensor:
    """The loss itself if finite, else one whose gradient is NaN everywhere. Scalar in, scalar out.

    An infinite loss can have finite gradients; they must not be applied.
    """
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def update_was_skipped(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> Tensor:
    """Whether the last `scaler.step` left out its update, before `update_scale`: a scalar on the device, 0 or 1."""
    # GradScaler's public way to find this out, a lower get_scale(), waits for the device.
    return torch.stack(list(scaler._found_inf_per_device(optimizer).values())).max()


MATRIX_MODULES = (nn.Linear, nn.modules.conv._ConvNd)


def run_cast_once(module: nn.Module, *args: Any) -> Any:
    """`module(*args)`, with the parameters that autocast would cast one by one cast together before.

    Values and gradients are those of `module(*args)`, to the bit. Without autocast, and where
    torch.compile fuses the casts anyway, it is just that call. One call per transformer block keeps the
    gradients coming block by block, so that DistributedDataParallel can send the first while the others are
    still being computed.
    """
    device_type = next(module.parameters()).device.type
    if not torch.is_autocast_enabled(device_type) or torch.compiler.is_compiling():
        return module(*args)
    names = [
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, MATRIX_MODULES)
        for name, parameter in part.named_parameters(recurse=False)
        if parameter.dtype == torch.float32
    ]
    dtype = torch.get_autocast_dtype(device_type)
    cast = _CastTogether.apply(dtype, *(module.get_parameter(name) for name in names))
    return functional_call(module, dict(zip(names, cast, strict=True)), args)


class _CastTogether(torch.autograd.Function):
    """float32 tensors -> the same in another dtype; their gradients likewise back, each way in one operation."""

    @staticmethod
    def forward(ctx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        return _copies(tensors, dtype)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(gradients, torch.float32)


def _copies(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    # The default memory format keeps strides as they are where they are dense, as `to` does.
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
