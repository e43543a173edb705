"""A GPU that is not there: tensors on it have shapes, types and a device, but no values.

Whole steps of training run on it as they are, so that a machine without a GPU finds what would fail or wait on one: an
operation on tensors of two devices, a value that is read back, a copy that is waited for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.distributed import Ranks

CUDA = torch.device("cuda", 0)
needs_fake_gpu = pytest.mark.skipif(
    torch.__version__ < (2, 8) and not torch.cuda.is_available(),
    reason="torch 2.7 asks for a driver even where tensors are fake",
)


class _NoWaits(TorchDispatchMode):
    """Refuses what takes tensors of both devices, such as a copy or an index, unless it says that it need not be waited
    for. (That a value is read back, fake tensors refuse.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves([args, result]) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        unwaited = any(value is True for value in (kwargs.get("non_blocking"), *args[2:]))
        if len({tensor.device for tensor in tensors}) > 1 and not unwaited:
            raise AssertionError(f"{function} makes the host wait for the GPU")
        return result


@contextlib.contextmanager
def fake_gpu(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """Inside it, `module` is on `cuda`, and an operation that would fail or wait there is an error.

    torch's own backward pass needs a driver, so gradients appear without one. Yields the place of a single process.
    """

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == CUDA and loss.ndim == 0 and loss.requires_grad
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    with FakeTensorMode(), _NoWaits():
        _move(module)
        yield Ranks(rank=0, world_size=1, device=CUDA, control=None)


def _move(module: nn.Module) -> None:
    """As `module.to(CUDA)`: its parameters and buffers are there afterwards, and nothing else."""
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
            is_trained = isinstance(tensor, nn.Parameter)
            setattr(part, name, nn.Parameter(moved, tensor.requires_grad) if is_trained else moved)
