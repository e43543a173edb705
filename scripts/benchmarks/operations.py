"""How many kernels a step launches, and how many floating-point operations it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

# Operations that change how memory is looked at, or take some, and launch nothing.
NO_KERNEL = frozenset(
    "_record_function_enter_new _record_function_exit _reshape_alias _unsafe_view alias as_strided chunk "
    "detach empty empty_like empty_strided expand is_same_size lift_fresh narrow new_empty new_empty_strided "
    "permute resize_ select set_ slice split split_with_sizes squeeze t transpose unbind unfold "
    "unsqueeze view".split()
)
CASTS = ("_to_copy", "_foreach_copy_")


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in NO_KERNEL:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def count_operations(step: Callable[[], object]) -> Counter[str]:
    """Torch operations of `step` that launch a kernel on a GPU (some several), by name. On any device; what
    torch.compile makes is not seen."""
    with _Operations() as operations:
        step()
    return operations.counts


def count_kernels(step: Callable[[], object]) -> int:
    """Kernels that `step` runs on the GPU, copies and fills included, as the profiler sees them; 0 where it sees none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return sum(
        # The profiler draws a step of an optimiser, as anything it was told the name of, on the GPU as well.
        event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        for event in profiler.events()
    )


def count_flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attention of `step`."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()
