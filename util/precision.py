"""Number formats: what float32 means on a GPU, and mixed precision with few casts.

Under autocast, torch casts every weight and bias by a kernel of its own in the forward pass and each gradient
by another in the backward pass: for ViT-B that is a quarter of all kernels of a step, each of them so
small that a GPU waits for its launch. `run_cast_once` casts all of a module's matrices in one go.
"""

from __future__ import annotations

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
