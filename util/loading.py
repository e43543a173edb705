"""A DataLoader whose errors come out as they went in, and whose workers are forks."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from util.errors import UserError
from util.stop import REQUESTS, signal_on_parent_death


class SampleLoader(DataLoader):
    """torch's DataLoader, but a `UserError` of a data set reaches the caller as it was raised, from a worker too.

    DataLoader itself raises `type(error)(text of the worker's traceback)` instead: not the error, and a page where
    a line was meant. Here workers hand the error over in the place of its batch.

    On Linux workers are forked whatever Python's default is (forkserver from 3.14 on): they share the data set's memory
    with this process, and end with it (`ignore_stop_signals`); those of a fork server end with that.
    """

    def __init__(self, dataset: Dataset, *args: Any, **options: Any):
        if options.get("num_workers") and sys.platform == "linux":
            options["multiprocessing_context"] = "fork"
        super().__init__(_Caught(dataset), *args, collate_fn=_collate, worker_init_fn=ignore_stop_signals, **options)

    def __iter__(self) -> Iterator[Any]:
        return _raising(super().__iter__())


class _Caught(Dataset):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except UserError as error:
            return error.with_traceback(None)


def _collate(samples: list) -> Any:
    return next((sample for sample in samples if isinstance(sample, UserError)), None) or default_collate(samples)


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, UserError):
            try:
                raise batch
            finally:
                del batch  # in a cycle with its traceback it would keep the workers, until another thread collects them
        yield batch


def ignore_stop_signals(worker_id: int) -> None:
    """`worker_init_fn` of a DataLoader: the main process alone decides when its workers end.

    Signals to a process group reach workers too and would end them in the middle of the step after which
    the main process wants to save. SIGTERM from the main process itself, which is how a failing one gets rid
    of its workers, still ends them, and so does its death.
    """
    for signum in REQUESTS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    signal_on_parent_death(signal.SIGKILL)


def _obey_parent(parent: int) -> None:
    """End this process at a SIGTERM of its parent; take no notice of any other."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
