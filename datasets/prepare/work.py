"""Making the units of a tree on several processes, and telling what came of it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from datasets.prepare.layout import Unit
from datasets.prepare.making import TreeMaking
from datasets.raw.readings import Exclusion
from util.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")
IMAGES_PER_WORKER = 32  # fewer are not worth starting a process for
CHUNK = 4  # tasks that a worker gets at once
CHUNKS_AHEAD = 8  # per worker, which bounds what waits in memory
PACKAGES = ("numpy", "pillow", "pydicom", "torch")


@dataclass
class Made:
    """What came of one unit: files written (paths in the tree), the note for its entries, readings left out, the
    significant patches of its maps, seconds by stage."""

    files: list[str] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)
    seconds: Counter = field(default_factory=Counter)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


@dataclass
class PrepareReport:
    """Outcome of a preparation: counts in the order of the table, and what was left out."""

    counts: dict[str, int | float]
    exclusions: list[Exclusion]
    notes: list[str]
    seconds: Counter
    dry_run: bool

    @property
    def faults(self) -> list[Exclusion]:
        return [exclusion for exclusion in self.exclusions if exclusion.is_fault]

    def __str__(self) -> str:
        width = max(map(len, self.counts))
        lines = [f"{name:<{width}}  {value:>8,}" for name, value in self.counts.items()]
        lines += [f"note: {note}" for note in self.notes]
        listed = [exclusion for exclusion in self.exclusions if exclusion.detail]
        if listed:
            lines.append("left out:")
            lines += [f"  {exclusion.id}: {exclusion.reason}: {exclusion.detail}" for exclusion in listed]
        return "\n".join(lines)


def make_units(
    making: TreeMaking,
    units: Sequence[Unit],
    maker: Callable[[], Callable[..., Made]],
    options: Any,
    workers: int,
    exclusions: list[Exclusion],
) -> Counter:
    """Make what the tree does not have yet of the units; returns seconds by stage.

    `maker` gives the function that makes a unit's task: `f(task, out=directory or None, options=options)`. It is
    called only if there is something to make: what it imports takes longer than to see that there is nothing.
    What is left out is added to `exclusions`; a unit of which something was left out is made again by the next run.
    """
    seconds: Counter = Counter()
    todo = making.begin(units, versions())
    if not todo:
        return seconds
    function = partial(maker(), out=None if making.dry_run else making.staging, options=options)
    tasks = [unit.task for unit in todo]
    for unit, made in zip(todo, run_tasks(function, tasks, workers)):
        exclusions += made.exclusions
        seconds += made.seconds
        making.place(unit, made.files, made.note, settled=not made.exclusions)
    return seconds


def finish_tree(
    making: TreeMaking,
    entries: Callable[[], Iterable[Mapping[str, Any]]],
    found: Mapping[str, int],
    exclusions: list[Exclusion],
    counted: Mapping[str, int],
    *,
    notes: Sequence[str],
    record: Mapping[str, Any],
    seconds: Counter,
    tables: Mapping[str, Callable[[], Iterable[str]]] | None = None,
) -> PrepareReport:
    """Count, record and finish a tree. The counts are `found`, each reason for leaving out, `counted`, and the mean
    number of significant patches of all entries' maps where units' notes tell it."""
    exclusions.sort(key=lambda exclusion: (exclusion.id, exclusion.reason))
    reasons = Counter(exclusion.reason for exclusion in exclusions)
    counts: dict[str, int | float] = dict(found)
    counts |= {f"- {reason}": n for reason, n in sorted(reasons.items())}
    counts |= counted
    significant = [n for _, note in making.notes() for n in note.get("significant", ())]
    if significant:
        counts["mean significant patches of 196"] = round(sum(significant) / len(significant), 2)
    left_out = [asdict(exclusion) for exclusion in exclusions]
    told = {**record, "counts": dict(counts), "notes": list(notes), "left_out": left_out}
    try:
        making.finish(entries, told, tables)
    except UserError as error:
        named = [f"{e.id}: {e.reason}{e.detail and f': {e.detail}'}" for e in exclusions[:3]]
        raise UserError(f"{error}{''.join(f'; {text}' for text in named)}") from None
    counts["made by this run"] = making.n_made
    if making.n_anew:
        counts["- of these anew, as they had changed"] = making.n_anew
    return PrepareReport(counts, exclusions, list(notes), seconds, making.dry_run)


def versions() -> dict[str, str]:
    """Of what decides pixels."""
    python = "{}.{}.{}".format(*sys.version_info[:3])
    return {"python": python} | {package: version(package) for package in PACKAGES}


def run_tasks(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, *, name: str = "prepare"
) -> Iterator[Result]:
    """`function` of each task, in order, with a progress bar called `name`."""
    workers = min(workers, len(tasks) // IMAGES_PER_WORKER)
    progress = partial(tqdm, total=len(tasks), desc=name, disable=None)
    if workers <= 1:
        yield from progress(map(function, tasks))
        return
    # A plain fork would copy torch's thread pool in an unusable state. The server that workers are forked from has
    # imported what they need and started no thread, so they share its memory.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, _module_of(function)])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from progress(_in_order(pool, function, tasks, workers * CHUNKS_AHEAD))
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for lack of memory; run again with fewer --workers, "
            "what is done stays"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Sequence[Task], ahead: int
) -> Iterator[Result]:
    waiting: deque = deque()
    for start in range(0, len(tasks), CHUNK):
        waiting.append(pool.submit(_run_chunk, function, tasks[start : start + CHUNK]))
        if len(waiting) >= ahead:
            yield from waiting.popleft().result()
    while waiting:
        yield from waiting.popleft().result()


def _run_chunk(function: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    return [function(task) for task in tasks]


def _module_of(function: Callable) -> str:
    while isinstance(function, partial):
        function = function.func
    return function.__module__


def _start_worker() -> None:
    """Each worker is one of many: neither torch nor NumPy's BLAS may start threads of its own; and it
    ends with the program that started it, however that ends."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Workers hold each other's queue open: without this they wait for ever once the parent was killed.
    multiprocessing.parent_process().join()
    os._exit(1)
