"""What is measured with: sizes of a run, turns of two functions, the rows of the table."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from util.errors import UserError
from util.files import atomic_write


@dataclass
class Row:
    """One line of the table. Times are seconds, `ratio` is baseline / ours unless the name says otherwise."""

    name: str
    unit: str
    baseline: float | None
    ours: float
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    repeats: int = 1
    bar: str | None = None
    met: bool | None = None
    note: str = ""


@dataclass
class Settings:
    """Sizes of a run; `--quick` shrinks them all."""

    image_size: tuple[int, int] = (3056, 2544)  # height, width
    n_images: int = 8
    model: str = "cxrmim_vit_base_patch16"
    batch_size: int = 8
    repeats: int = 5
    sample_repeats: int = 12
    cache_size: int = 512
    epochs: int = 8
    loader_batches: int = 60
    workers: tuple[int, ...] = (0, 1, 2, 4)
    training_workers: tuple[int, ...] = (2,)
    copies: int = 2  # how often each image is in what is trained on
    prediction_batch: int = 8
    device: str = "cpu"
    compile: bool = False
    quick: bool = False
    input_size: int = 224
    # Images, epochs, batch and encoder's width of the linear evaluation.
    downstream: tuple[int, int, int, int] = (900, 50, 16, 64)


@dataclass
class Report:
    machine: dict
    settings: dict
    rows: list[Row] = field(default_factory=list)
    equality: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # that the parts took
    failures: dict[str, str] = field(default_factory=dict)  # of the parts that failed
    skipped: list[str] = field(default_factory=list)  # parts that there was no time for
    whole: bool = False  # whether the run came to its end

    def compare(
        self, name: str, baseline: list[float], ours: list[float], *, at_least: float | None = None, note: str = ""
    ) -> None:
        """Add a row of paired times in seconds."""
        ratios = np.array(baseline) / np.array(ours)
        median = float(np.median(ratios))
        self.add(
            Row(
                name,
                "s",
                float(np.median(baseline)),
                float(np.median(ours)),
                median,
                (float(np.percentile(ratios, 25)), float(np.percentile(ratios, 75))),
                len(ratios),
                None if at_least is None else f">= {at_least:g}",
                None if at_least is None else median >= at_least,
                note,
            )
        )

    def value(
        self,
        name: str,
        unit: str,
        ours: float,
        *,
        below: float | None = None,
        baseline: float | None = None,
        note: str = "",
    ) -> None:
        """Add a row of one value, with a baseline where there is one."""
        self.add(
            Row(
                name,
                unit,
                baseline,
                ours,
                ratio=baseline / ours if baseline is not None and ours > 0 else None,
                bar=None if below is None else f"< {below:g}",
                met=None if below is None else ours < below,
                note=note,
            )
        )

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(format_row(row), flush=True)


class TimeIsUp(BaseException):
    """The time limit has passed. Not an `Exception`, which a library that tries things out might swallow."""


class Parts:
    """The parts of a run, one after the other: a part that fails or lasts too long costs its own rows alone.

    Args:
        path: where the report is written to after every part; None: nowhere.
        minutes: of all parts together.
    """

    def __init__(self, report: Report, path: Path | None, minutes: float):
        self.report, self.path, self.minutes = report, path, minutes
        self.deadline = time.monotonic() + 60 * minutes

    def run(self, name: str, measure: Callable[[], object], *, needs: float = 0.0) -> None:
        """Run a part, if `needs` seconds are left; what it raises is told and kept in the report."""
        began = time.monotonic()
        left = self.deadline - began
        if left <= needs:
            self._skip(name, "not begun")
        else:
            try:
                with _time_limit(left):
                    measure()
            except TimeIsUp:
                self._skip(name, "broken off")
            except Exception as error:
                traceback.print_exc()
                self.report.failures[name] = f"{type(error).__name__}: {error}"
                print(f"{name}: FAILED, see above: {type(error).__name__}", flush=True)
            self.report.seconds[name] = round(time.monotonic() - began, 1)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        """Write the report as it is by now. Raises `UserError`."""
        if self.path is None:
            return
        try:
            with atomic_write(self.path, "w") as file:
                json.dump(asdict(self.report), file, indent=2)
        except OSError as error:
            raise UserError(f"--json {self.path}: can't be written: {error.strerror}") from None

    def _skip(self, name: str, what: str) -> None:
        self.report.skipped.append(name)
        print(f"{name}: {what}, {self.minutes:g} minutes are over (--minutes)", flush=True)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` inside, in the main thread, after so long; and again, where that was lost."""
    if math.isinf(seconds):
        yield
        return

    def stop(signum, frame) -> None:
        raise TimeIsUp

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As a loader's worker has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def format_row(row: Row) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

    spread = f" ({row.ratio_quartiles[0]:.3g}..{row.ratio_quartiles[1]:.3g})" if row.ratio_quartiles else ""
    ratio = f"{row.ratio:.3g}x{spread}" if row.ratio is not None else ""
    bar = f"{row.bar} {'met' if row.met else 'MISSED'}" if row.bar else ""
    cells = (f"{row.name:44}", f"{number(row.baseline):>9}", f"{number(row.ours):>9}", f"{row.unit:10}")
    return "  ".join((*cells, f"{ratio:24}", f"{bar:14}", row.note)).rstrip()


def alternate(baseline: Callable[[], object], ours: Callable[[], object], repeats: int, device: str = "cpu"):
    """Times of two functions called in turns, after one call each to warm up: two lists of seconds."""
    times = ([], [])
    for turn in range(repeats + 1):
        for function, into in zip((baseline, ours), times):
            seconds = timed(function, device)
            if turn:
                into.append(seconds)
    return times


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def timed_twice(function: Callable[[], object], device: str) -> tuple[float, float]:
    """Seconds by the clock, and of this process on its processors, which other work on the machine disturbs less."""
    began = time.process_time()
    elapsed = timed(function, device)
    return elapsed, time.process_time() - began
