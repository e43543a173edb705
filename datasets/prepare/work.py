"""Making what a tree lacks, on several processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits
from tqdm import tqdm

from datasets.prepare.store import TreeMaking
from datasets.prepare.units import Report
from util.errors import UserError

Task, Result = TypeVar("Task"), TypeVar("Result")
IMAGES_PER_WORKER = 32  # fewer are not worth starting a process for
CHUNK = 8  # tasks that a worker gets at once


def make_units(making: TreeMaking, report: Report, options: Any, workers: int) -> None:
    """Make the units of `report` that the tree lacks; their tasks are those of `datasets.prepare.pixels.make_image`."""
    if not (todo := making.begin(report)):
        return
    from datasets.prepare.pixels import make_image  # imports torch, longer than it takes to see that all is there

    function = partial(make_image, out=None if making.dry_run else making.staging, options=options)
    for unit, made in zip(todo, run_tasks(function, todo, workers)):
        making.place(unit, made)


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
    context.set_forkserver_preload(["datasets.prepare.pixels", "datasets.prepare.readings"])
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
