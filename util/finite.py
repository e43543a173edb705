"""Finding non-finite losses and gradients without making the GPU wait.

A `GradScaler` (`make_scaler`; outside fp16 of scale 1) with a fused optimiser leaves out an update with a
non-finite gradient, on the device. `nan_gradient_unless_finite` makes a non-finite loss of one rank such a gradient on all of
them, through the gradient's mean. `FiniteWatch` reads later what happened, and stops the run.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from util.distributed import Agreement
from util.errors import UserError
from util.stop import GO_ON, StopSignals

# What became of a step; where ranks differ, the largest counts.
_UNKNOWN, _FINE, _OVERFLOW, _BROKEN = range(4)
OVERFLOWS_IN_A_ROW = 50
REMEDY = "lower --lr, set --clip_grad, use --dtype float32, or pass --skip_nonfinite N to leave out N such steps"


class NonFiniteError(UserError):
    """A loss or a gradient became infinite or NaN; no update was made with it."""


class UnitScaler(torch.amp.GradScaler):
    """A scaler whose scale is 1 and stays 1: there only to leave out, on the device, an update with a gradient
    that is not finite. After a checkpoint of any age too: an older program's may hold another scale."""

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0, growth_interval=2**31 - 1)

    def update(self, new_scale: None = None) -> None:
        super().update(1.0)

    def load_state_dict(self, state_dict: dict) -> None:
        pass


def make_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """What scales the loss of a run that computes in `dtype`, a name of torch's: the usual GradScaler for
    "float16", `UnitScaler` otherwise."""
    return torch.amp.GradScaler(device.type) if dtype == "float16" else UnitScaler(device.type)


def nan_gradient_unless_finite(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself if finite, else one whose gradient is NaN everywhere. Scalar in, scalar out.

    An infinite loss can have finite gradients; they must not be applied.
    """
    return loss * torch.where(torch.isfinite(loss), 1.0, math.nan)


def update_was_skipped(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """Whether the last `scaler.step` left out its update: a scalar on the device, 0 or 1.

    To be asked before `scaler.update`, which forgets it.
    """
    # GradScaler tells this publicly only by waiting for the device (a lower get_scale()).
    found = list(scaler._found_inf_per_device(optimizer).values())
    return torch.stack(found).max()


@dataclass
class _Step:
    epoch: int
    steps: range
    lr: float
    numbers: torch.Tensor  # [scales + 1]: per-scale losses, whether the update was left out
    copied: torch.cuda.Event | None
    fault: int = _UNKNOWN


class FiniteWatch:
    """What to do after each optimiser step: go on, stop as asked, or fail on a non-finite number.

    The numbers of a step are copied to the host in the background and read two steps later on a GPU, at
    once on the CPU; ranks then agree on them through `agreement`, a step later still. All ranks reach
    the same verdict at the same step. `settle` waits for everything under way and belongs
    before every save, so that nothing is saved that a later reading would condemn.

    A non-finite loss is an error, as is a non-finite gradient, but for fp16: there the GradScaler overcomes
    an overflow, and only 50 in a row are an error.

    Args:
        device: where the losses are.
        signals: requests to stop.
        group: gloo group of all ranks; None in a single process.
        half: training in fp16.
        skip_nonfinite: tolerate so many steps without update before failing, with a warning each.
        sample_names: maps (epoch, micro-step) to the names of this rank's samples.
        remedy: what the error advises, by the program's own flags.
    """

    def __init__(
        self,
        device: torch.device,
        signals: StopSignals,
        *,
        group: dist.ProcessGroup | None = None,
        half: bool = False,
        skip_nonfinite: int = 0,
        sample_names: Callable[[int, int], Sequence[str]],
        remedy: str = REMEDY,
    ):
        self._lag = 2 if device.type == "cuda" else 0
        self._signals = signals
        self._agreement = Agreement(group, size=2)
        self._half = half
        self._tolerate = skip_nonfinite
        self._sample_names = sample_names
        self._remedy = remedy
        self._unread: deque[_Step] = deque()
        self._unjudged: deque[_Step] = deque()
        self._overflows = 0
        self.skipped = 0  # non-finite steps tolerated so far

    def state_dict(self) -> dict[str, int]:
        """What a run that goes on from here must know."""
        return {"skipped": self.skipped, "overflows": self._overflows}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Put it back; empty for a checkpoint of a program that didn't save it."""
        self.skipped, self._overflows = state.get("skipped", 0), state.get("overflows", 0)

    def step(self, epoch: int, steps: range, *, lr: float, losses: torch.Tensor, skipped: torch.Tensor) -> int:
        """Note an optimiser step; returns the request to stop that all ranks agreed on (`util.stop`).

        Args:
            epoch, steps: its micro-steps.
            lr: its learning rate.
            losses: per-scale losses [scales], non-finite if any micro-step's was (a mean of them is).
            skipped: scalar, non-zero if the gradient was non-finite and the update left out.

        Raises:
            NonFiniteError: on all ranks alike, for an earlier or this step.
        """
        numbers = torch.cat([losses.detach().float().reshape(-1), skipped.detach().float().reshape(1)])
        copied = None
        if numbers.is_cuda:
            on_host = torch.empty(numbers.shape, pin_memory=True)
            numbers = on_host.copy_(numbers, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._unread.append(_Step(epoch, steps, lr, numbers, copied))
        fault = self._read() if len(self._unread) > self._lag else _UNKNOWN
        request, fault = self._agreement.exchange((self._signals.request, fault))
        self._judge(fault)
        return request

    def settle(self) -> int:
        """Wait for all that is under way; returns the agreed request to stop, as `step` does.

        Raises:
            NonFiniteError: if any step so far had a non-finite number.
        """
        _, fault = self._agreement.collect()
        self._judge(fault)
        while self._unread:
            _, fault = self._agreement.settle((GO_ON, self._read()))
            self._judge(fault)
        request, _ = self._agreement.settle((self._signals.request, _UNKNOWN))
        return request

    def _read(self) -> int:
        step = self._unread.popleft()
        if step.copied is not None:
            step.copied.synchronize()
        loss_is_finite = bool(torch.isfinite(step.numbers[:-1]).all())
        skipped = bool(step.numbers[-1] != 0)
        if not loss_is_finite or (skipped and not self._half):
            step.fault = _BROKEN
        else:
            step.fault = _OVERFLOW if skipped else _FINE
        self._unjudged.append(step)
        return step.fault

    def _judge(self, fault: int) -> None:
        """Act on the fault that all ranks agreed on for the oldest step that has been read."""
        if fault == _UNKNOWN:
            return
        step = self._unjudged.popleft()
        self._overflows = self._overflows + 1 if fault == _OVERFLOW else 0
        if self._overflows >= OVERFLOWS_IN_A_ROW:
            self._fail(
                f"{OVERFLOWS_IN_A_ROW} fp16 overflows in a row; use --dtype bfloat16 or float32; last: "
                f"{self._report(step)}"
            )
        if fault == _BROKEN:
            report = self._report(step)
            self.skipped += 1
            if self.skipped > self._tolerate:
                self._fail(f"{report}; no update was made with it and nothing was saved since: {self._remedy}")
            if self._is_main:
                left_out = f"left out {self.skipped} of at most {self._tolerate} steps (--skip_nonfinite)"
                print(f"warning: {left_out}: {report}", flush=True)

    @property
    def _is_main(self) -> bool:
        return self._agreement.group is None or dist.get_rank() == 0

    def _report(self, step: _Step) -> str:
        """What is known of a step, from the ranks where the loss was non-finite, or all where none was."""
        losses = ", ".join(f"{loss:.4g}" for loss in step.numbers[:-1].tolist())
        samples = [name for micro_step in step.steps for name in self._sample_names(step.epoch, micro_step)]
        own = (
            not bool(torch.isfinite(step.numbers[:-1]).all()),
            f"losses per scale [{losses}], samples {'; '.join(samples)}",
        )
        ranks = [own]
        if self._agreement.group is not None:
            ranks = [None] * dist.get_world_size()
            dist.all_gather_object(ranks, own, group=self._agreement.group)
        any_loss = any(broken for broken, _ in ranks)
        what = "loss" if any_loss else "gradient"
        told = [f"rank {rank}: {text}" for rank, (broken, text) in enumerate(ranks) if broken or not any_loss]
        return "; ".join([f"non-finite {what} at epoch {step.epoch} step {step.steps[-1]}, lr {step.lr:.3g}", *told])

    def _fail(self, message: str) -> None:
        # The message tells of all ranks: one is enough to print it.
        if self._is_main:
            raise NonFiniteError(message)
        raise SystemExit(1)
