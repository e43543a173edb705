"""The training loop of every task: steps, sums, reports, checkpoints, and stops that all ranks agree upon.

A task makes a `Training` from two functions of its own, the losses of a batch and what follows an epoch, and calls
`restore` (to resume), `start` and `run`. Exact resuming rests on the order in `run`: the epoch's line before its
checkpoint, and everything that is under way on the device before any checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from util import distributed
from util.checkpoint import FORMAT, restoring
from util.errors import UserError
from util.lr_sched import learning_rate
from util.output import Progress, RunLog
from util.precision import make_scaler, nan_gradient_unless_finite, update_scale, update_was_skipped
from util.resume import changes, describe_changes
from util.stop import GO_ON, StopSignals

READ_EVERY = 20  # updates between readings of their losses, for which the host waits
OVERFLOWS_IN_A_ROW = 50


class Sums:
    """Sums over this rank's steps, kept on the device until they are read.

    Attributes:
        totals: float64 [2, V + 1], since the epoch began and since the last report: V values and the number of steps.
    """

    def __init__(self, n_values: int, device: torch.device):
        self.totals = torch.zeros(2, n_values + 1, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Add a step's values [V], unless one is not finite: no update is made with such a step either."""
        values = values.detach().double()
        row = torch.cat([values, torch.ones_like(values[:1])])
        self.totals += torch.where(torch.isfinite(row).all(), row, 0.0)

    def means(self, row: int = 0) -> list[float]:
        """Means [V] since the epoch began (row 0) or since the last report (row 1); NaN if no step was finite."""
        return (self.totals[row, :-1] / self.totals[row, -1]).tolist()


@dataclass(kw_only=True)
class Training:
    """A run of training and its place in it.

    Attributes:
        core: the bare model; `model`, which the task calls, wraps it for several ranks.
        options: dtype, epochs, and, if the task has them, accum_iter, clip_grad, print_every, skip_nonfinite, and those
            of the learning rate. Checkpoints hold them as "args".
        losses: from (training, batch), the losses [L], whose sum is minimised, and the values [V] to average.
        finish_epoch: from (training, means over all ranks [V], seconds), the epoch's record for log.txt. It may save.
        name_means: names of the values in TensorBoard, from their means; the first is shown as the loss.
        save_due: whether to save now, at the end of an epoch.
        write: writes a checkpoint's state; called on rank 0.
        more_state: what the task adds to a checkpoint.
        is_over: whether training ends before `epochs`.
        rate: learning rate at (epoch, step); by default warm-up and cosine by the options.
        sample_name: name of a sample of the data set, by number; `samples` is a digest of all names in order.
        epoch, step: the place, in steps done since the epoch began.
        waited: seconds spent waiting for data.
    """

    core: nn.Module
    optimizer: torch.optim.Optimizer
    ranks: distributed.Ranks
    signals: StopSignals
    options: Mapping[str, Any]
    n_values: int
    losses: Callable[[Training, Any], tuple[Tensor, Tensor]]
    finish_epoch: Callable[[Training, list[float], float], dict[str, Any]] = None
    save_due: Callable[[], bool] = lambda: False
    write: Callable[[dict[str, Any]], None] = lambda state: None
    more_state: Callable[[], dict[str, Any]] = dict
    is_over: Callable[[], bool] = lambda: False
    name_means: Callable[[list[float]], dict[str, float]] = None
    rate: Callable[[int, int], float] | None = None
    sample_name: Callable[[int], str] = str
    samples: str | None = None
    epoch: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        dtype, device = self.options["dtype"], self.ranks.device
        self.scaler = make_scaler(dtype, device)
        self.unread: list[tuple[str, range, Tensor]] = []  # updates: place; steps; losses [L] and whether left out
        self.watch = {"skipped": 0, "overflows": 0}  # updates left out so far; fp16 overflows in a row
        self.sums = Sums(self.n_values, device)
        self.waited = 0.0

    def restore(self, state: Mapping[str, Any], path: str | os.PathLike) -> None:
        """Go on from a checkpoint's place, before `start`. The optimiser's hyper-parameters stay those of this command.

        Raises CheckpointError, which names `path`.
        """
        with restoring(path):
            self.core.load_state_dict(state["model"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
            if state["args"]["dtype"] == self.options["dtype"] == "float16":
                self.scaler.load_state_dict(state["scaler"])
            self.watch = {name: state["watch"][name] for name in self.watch}
            totals = torch.tensor(state["meters"]["sums"], dtype=torch.float64)  # [ranks, ...]
            same = len(totals) == self.ranks.world_size  # another number of ranks goes on from their mean
            self.sums.totals.copy_(totals[self.ranks.rank] if same else totals.mean(0))
            self.epoch, self.step = state["epoch"] + 1, state["step"]

    def warn_of_changes(self, state: Mapping[str, Any], path: str | os.PathLike) -> dict[str, tuple[str, str]]:
        """Print and return which options and data differ from those of a checkpoint (`util.resume.changes`). Raises
        UserError if it can't go on with them."""
        with restoring(path):
            changed = changes(state, self.options, self.setting())
        if table := describe_changes(state, changed):
            self.ranks.say(f"warning: continuing from {path} with other options than it was made with:\n{table}")
        return changed

    def start(self, loader, *, log: RunLog | None = None, progress=None, sync_buffers: bool = False) -> None:
        """Open log and progress, if not given, and begin loading.

        Args:
            loader: this rank's batches from the place on; its `batch_sampler` is a `TrainBatches`.
            progress: counts the steps done.
            sync_buffers: each step starts from rank 0's buffers.
        """
        options, ranks, steps = self.options, self.ranks, loader.batch_sampler.steps_per_epoch
        self.loader, self.log, self.progress, self.steps_per_epoch = loader, log, progress, steps
        if log is None:
            place, start = self.epoch + self.step / steps, {"args": options, "world_size": ranks.world_size}
            self.log = RunLog(options["output_dir"], options["log_dir"], place, enabled=ranks.is_main, start=start)
            done = self.epoch * steps + self.step
            self.progress = Progress("training", options["epochs"] * steps, "steps", done=done, enabled=ranks.is_main)
        self.model = distributed.parallel(self.core, ranks, sync_buffers=sync_buffers)
        self.batches = iter(loader)
        self._reported = time.perf_counter(), self.progress.done, self.waited

    def run(self) -> int:
        """Train to the end or to a request to stop, saving on the way; returns the request, GO_ON if none is open.

        Raises:
            UserError: on rank 0, and SystemExit on the others, when the loss or the gradient of a step was not finite.
        """
        request = GO_ON
        while request == GO_ON and not self._is_done():
            began = time.perf_counter()
            request = self.train_epoch()
            if self.step == self.steps_per_epoch:
                means_of_ranks = self.ranks.gather(self.sums.means())
                means = [sum(values) / len(values) for values in zip(*means_of_ranks, strict=True)]
                record = self.finish_epoch(self, means, time.perf_counter() - began)
                self.log.epoch({"epoch": self.epoch, **record})
                self.sums.totals.zero_()
                self.epoch, self.step = self.epoch + 1, 0
            if request != GO_ON or (self.step == 0 and self.save_due()):
                self.save()
        return GO_ON if self._is_done() else request

    def train_epoch(self) -> int:
        """Train to the end of the epoch, or to an update after which all ranks agree to stop; returns the request.

        A step is one forward and backward pass; every `accum_iter` steps the optimiser steps, with the learning rate of
        the window's first step. Training stops only after an update, so no gradient is ever left behind.
        """
        accum_iter = self.options.get("accum_iter", 1)
        print_every = self.options.get("print_every")
        request = GO_ON
        self.model.train()
        while self.step < self.steps_per_epoch:
            began = time.perf_counter()
            batch = next(self.batches)
            self.waited += time.perf_counter() - began

            if self.step % accum_iter == 0:
                lr = self._set_learning_rate()
                window_losses = 0.0
            updates = (self.step + 1) % accum_iter == 0
            waits = not updates and self.ranks.world_size > 1  # gradients travel between ranks once per update
            with self.model.no_sync() if waits else contextlib.nullcontext():
                losses, values = self.losses(self, batch)
                self.scaler.scale(nan_gradient_unless_finite(losses.sum()) / accum_iter).backward()
            window_losses = window_losses + losses.detach() / accum_iter  # [L]
            self.sums.add(values)
            self.step += 1
            self.progress.add(1)
            if print_every and (self.step % print_every == 0 or self.step == self.steps_per_epoch):
                self._report(lr)

            if updates:
                skipped = self.update()
                place = f"epoch {self.epoch} step {self.step - 1}, lr {lr:.3g}"
                numbers = torch.cat([window_losses.float(), skipped.float().reshape(1)])
                self.unread.append((place, range(self.step - accum_iter, self.step), numbers))
                if (request := self.ranks.largest(self.signals.request)) != GO_ON:
                    break
                if len(self.unread) == READ_EVERY:
                    self.check_finite()
        self.check_finite()
        return request

    def check_finite(self) -> None:
        """Read the losses of the updates since the last time. All ranks call this at the same steps, and before a save.

        A step whose loss or gradient is not finite on any rank changed nothing on all of them (`util.precision`), so it
        may be found late. fp16 overflows are no fault unless they go on: there the scaler lowers its scale.

        Raises:
            UserError: on rank 0, and SystemExit on the others, for more such steps than `skip_nonfinite`.
        """
        unread, self.unread = self.unread, []
        numbers = torch.stack([numbers for _, _, numbers in unread]).tolist() if unread else []
        for (place, steps, _), (*losses, skipped) in zip(unread, numbers, strict=True):
            if skipped:
                distributed.on_main(
                    self.ranks, partial(self._judge, place, self.ranks.gather(self._describe(steps, losses)))
                )
            else:
                self.watch["overflows"] = 0

    def _describe(self, steps: range, losses: list[float]) -> tuple[bool, str]:
        """Of an update of this rank: whether its losses are finite, and its losses and samples."""
        batches = [self.loader.batch_sampler.batch(self.epoch, step) for step in steps]
        names = "; ".join(self.sample_name(index) for batch in batches for index in batch)
        described = f"losses per scale [{', '.join(f'{loss:.4g}' for loss in losses)}], samples {names}"
        return all(map(math.isfinite, losses)), described

    def _judge(self, place: str, found: list[tuple[bool, str]]) -> None:
        """Act on an update that was left out, by what all ranks found of it (`_describe`)."""
        finite = all(is_finite for is_finite, _ in found)
        told = [f"rank {i}: {text}" for i, (is_finite, text) in enumerate(found) if finite or not is_finite]
        report = f"non-finite {'gradient' if finite else 'loss'} at {place}; {'; '.join(told)}"
        if finite and self.options["dtype"] == "float16":
            self.watch["overflows"] += 1
            if self.watch["overflows"] >= OVERFLOWS_IN_A_ROW:
                remedy = "use --dtype bfloat16 or float32"
                raise UserError(f"{OVERFLOWS_IN_A_ROW} fp16 overflows in a row; {remedy}; last: {report}")
            return
        self.watch["overflows"] = 0
        self.watch["skipped"] += 1
        skipped, allowed = self.watch["skipped"], self.options.get("skip_nonfinite", 0)
        if skipped > allowed:
            raise UserError(
                f"{report}; no update was made with it and nothing was saved since: "
                "lower --lr or use --dtype float32 (docs/stopping.md)"
            )
        print(f"warning: left out {skipped} of at most {allowed} steps (--skip_nonfinite): {report}", flush=True)

    def autocast(self) -> torch.autocast:
        """The context of the forward pass."""
        dtype = getattr(torch, self.options["dtype"])
        return torch.autocast(self.ranks.device.type, dtype, enabled=dtype != torch.float32)

    def state(self) -> dict[str, Any]:
        """What a checkpoint (`util.checkpoint`) holds at this place. All ranks call this, each with its own sums."""
        return {
            "model": self.core.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "watch": dict(self.watch),
            "epoch": self.epoch - 1,
            "step": self.step,
            "args": dict(self.options),
            "meters": {"sums": self.ranks.gather(self.sums.totals.tolist())},
            **self.setting(),
            "format": FORMAT,
            **self.more_state(),
        }

    def save(self) -> None:
        """Save a checkpoint of this place. All ranks call this; rank 0 writes."""
        state = self.state()

        def write() -> None:
            self.log.flush()
            self.write(state)

        distributed.on_main(self.ranks, write)

    def setting(self) -> dict[str, Any]:
        """On what the numbers depend beside the options."""
        return {
            "world_size": self.ranks.world_size,
            "samples": self.samples,
            "threads": torch.get_num_threads() if self.ranks.device.type == "cpu" else None,
        }

    def _is_done(self) -> bool:
        return self.epoch >= self.options["epochs"] or self.is_over()

    def _set_learning_rate(self) -> float:
        if self.rate is not None:
            lr = self.rate(self.epoch, self.step)
        else:
            named = {key: self.options[key] for key in ("lr", "min_lr", "warmup_epochs", "epochs")}
            lr = learning_rate(self.epoch + self.step / self.steps_per_epoch, **named)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def update(self) -> Tensor:
        """Step the optimiser; returns a scalar on the device, non-zero if the gradient was not finite and the update was
        left out."""
        if (clip_grad := self.options.get("clip_grad")) is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.core.parameters(), clip_grad)
        self.scaler.step(self.optimizer)
        skipped = update_was_skipped(self.scaler, self.optimizer)
        update_scale(self.scaler, self.options["dtype"])
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def _report(self, lr: float) -> None:
        """Show this rank's means since the last report on the terminal and in TensorBoard."""
        values = self.name_means(self.sums.means(1))  # the only wait for the device
        self.sums.totals[1] = 0
        before, self._reported = self._reported, (time.perf_counter(), self.progress.done, self.waited)
        seconds, steps, waited = (now - was for now, was in zip(self._reported, before, strict=True))
        samples = steps * self.options["batch_size"] * self.ranks.world_size
        rates = {"samples_per_s": samples / seconds, "data_wait": waited / seconds}
        where = f"epoch {self.epoch + 1}/{self.options['epochs']}  step {self.step}/{self.steps_per_epoch}"
        self.progress.show(
            f"{where}  loss {next(iter(values.values())):.4f}  lr {lr:.2e}  {rates['samples_per_s']:.1f} samples/s  "
            f"data wait {rates['data_wait']:.1%}"
        )
        self.log.scalars({**values, "lr": lr, **rates}, self.epoch + self.step / self.steps_per_epoch)
