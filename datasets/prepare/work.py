"""The skeleton of every preparation: find, exclude, units; make them on several processes; finish the tree, report."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import Counter
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
from datasets.raw.readings import Exclusion, first_of
from util.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")
IMAGES_PER_WORKER = 32  # fewer are not worth starting a process for
CHUNK = 8  # tasks that a worker gets at once
PACKAGES = ("numpy", "pillow", "pydicom", "torch")


@dataclass
class Found:
    """What a preparation has found: the units of the tree; `counts` that begin the report; what is left out; notes for
    the report; what the record has beside these."""

    units: list[Unit]
    counts: Mapping[str, int]
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)


@dataclass
class Made:
    """What came of one unit: files written (paths in the tree), the note for its entries, and what was left out.

    `note["significant"]` has the number of significant patches of each map."""

    files: list[str] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)


@dataclass
class PrepareReport:
    """Outcome of a preparation: counts in the order of the table, and what was left out."""

    counts: dict[str, int | float]
    exclusions: list[Exclusion]
    notes: list[str]
    dry_run: bool = False

    @property
    def faults(self) -> list[Exclusion]:
        return [exclusion for exclusion in self.exclusions if exclusion.is_fault]

    def __str__(self) -> str:
        width = max(map(len, self.counts))
        lines = [f"{name:<{width}}  {value:>8,}" for name, value in self.counts.items()]
        lines += [f"note: {note}" for note in self.notes]
        if listed := [f"  {exclusion}" for exclusion in self.exclusions if exclusion.detail]:
            lines += ["left out:", *listed]
        return "\n".join(lines)


def make_units(making: TreeMaking, found: Found, options: Any, workers: int) -> None:
    """Make what the tree does not have yet of the units, whose tasks are those of `datasets.prepare.pixels.make_image`.

    What is left out is added to `found`; a unit of which something was left out is made again by the next run.
    """
    todo = making.begin(found.units, versions())
    if not todo:
        return
    from datasets.prepare.pixels import make_image  # imports torch, longer than it takes to see that all is there

    function = partial(make_image, out=None if making.dry_run else making.staging, options=options)
    for unit, made in zip(todo, run_tasks(function, [unit.task for unit in todo], workers)):
        found.exclusions += made.exclusions
        making.place(unit, made.files, made.note, settled=not made.exclusions)


def finish_tree(
    making: TreeMaking,
    found: Found,
    entries: Callable[[], Iterable[Mapping[str, Any]]],
    counted: Mapping[str, int],
    tables: Mapping[str, Iterable[str]] | None = None,
) -> PrepareReport:
    """Count, record and finish a tree. The counts are those of `found`, each reason for leaving out, `counted`, and the
    mean number of significant patches of all entries' maps."""
    found.exclusions.sort(key=lambda exclusion: (exclusion.id, exclusion.reason))
    reasons = Counter(f"- {exclusion.reason}" for exclusion in found.exclusions)
    counts: dict[str, int | float] = {**found.counts, **dict(sorted(reasons.items())), **counted}
    significant = [n for _, note in making.notes() for n in note.get("significant", ())]
    if significant:
        counts["mean significant patches of 196"] = round(sum(significant) / len(significant), 2)
    left_out = [asdict(exclusion) for exclusion in found.exclusions]
    record = {**found.record, "counts": dict(counts), "notes": found.notes, "left_out": left_out}
    try:
        making.finish(entries(), record, tables or {})
    except UserError as error:
        raise UserError(f"{error}{first_of(found.exclusions)}") from None
    counts["made by this run"] = making.n_made
    if making.n_anew:
        counts["- of these anew, as they had changed"] = making.n_anew
    return PrepareReport(counts, found.exclusions, found.notes, making.dry_run)


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
    context.set_forkserver_preload([__name__, "datasets.prepare.pixels", type(tasks[0]).__module__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from progress(pool.map(function, tasks, chunksize=CHUNK))
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, most likely for lack of memory; run again with fewer --workers, "
            "what is done stays"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Each worker is one of many: neither torch nor NumPy's BLAS may start threads of its own; and it
    ends with the program that started it, however that ends."""
    threadpool_limits(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # Workers hold each other's queue open: without this they wait for ever once the parent was killed.
    multiprocessing.parent_process().join()
    os._exit(1)
