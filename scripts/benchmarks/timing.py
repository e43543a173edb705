"""What is measured with: sizes of a run, turns of two functions, the rows of the table."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from util.errors import UserError
from util.files import atomic_write


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. `quick`: tiny ones, to see that it runs."""

    device: str
    quick: bool
    compile: bool
    batch_size: int
    repeats: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in px."""
        return (640, 560) if self.quick else (3056, 2544)

    @property
    def input_size(self) -> int:
        return 64 if self.quick else 224

    @property
    def model(self) -> str:
        return f"cxrmim_vit_{'tiny' if self.quick else 'base'}_patch16"


@dataclass
class Report:
    """The rows, and how the parts of a run went; written to `path`, where that is given, after each."""

    machine: dict
    settings: dict
    path: str | None = None
    rows: list[dict] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # of the parts that failed
    skipped: list[str] = field(default_factory=list)  # parts that there was no time for
    whole: bool = False  # whether the run came to its end

    def compare(self, name: str, baseline: list[float], ours: list[float], note: str = "") -> None:
        """Add a row of seconds measured in turns: their medians, and the median and quartiles of the turns' ratios."""
        low, ratio, high = np.percentile(np.divide(baseline, ours), (25, 50, 75)).tolist()
        self._add(name, "s", float(np.median(ours)), note, float(np.median(baseline)), ratio, (low, high), len(ours))

    def value(self, name: str, unit: str, ours: float, note: str = "", baseline: float | None = None) -> None:
        """Add a row of one value, with a baseline where there is one."""
        self._add(name, unit, ours, note, baseline, None if baseline is None else baseline / ours)

    def _add(self, name, unit, ours, note, baseline=None, ratio=None, quartiles=None, repeats=1) -> None:
        row = {"name": name, "unit": unit, "baseline": baseline, "ours": ours, "ratio": ratio}
        self.rows.append(row | {"ratio_quartiles": quartiles, "repeats": repeats, "note": note})
        before, ratio = (f"{value:.4g}" if value is not None else "" for value in (baseline, ratio))
        spread = "({:.3g}..{:.3g})".format(*quartiles) if quartiles else ""
        print(f"{name:44} {before:>9} {ours:9.4g} {unit:10} {ratio:>6} {spread:14} {note}".rstrip(), flush=True)

    def run(self, name: str, measure: Callable[[], object]) -> None:
        """Run a part; one that fails costs its own rows alone."""
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self.failures[name] = f"{type(error).__name__}: {error}"
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self.write()

    def write(self) -> None:
        """Raises `UserError`."""
        if self.path is None:
            return
        try:
            with atomic_write(Path(self.path), "w") as file:
                json.dump(asdict(self), file, indent=2)
        except OSError as error:
            raise UserError(f"--json {self.path}: can't be written: {error.strerror}") from None


def alternate(baseline: Callable[[], object], ours: Callable[[], object], repeats: int, device: str = "cpu"):
    """Times of two functions called in turns, after one call each to warm up: two lists of seconds."""
    turns = [[timed(function, device) for function in (baseline, ours)] for _ in range(repeats + 1)]
    return [list(times) for times in zip(*turns[1:], strict=True)]


def timed(function: Callable[[], object], device: str = "cpu") -> float:
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
