"""The output directory of a run, held by one run at a time, and what the run leaves there to read: log.txt, args.json,
TensorBoard events, and lines of progress."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy
import timm
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from util.distributed import Ranks, on_main
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write, file_lock

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK_FILE = ".lock"
OWNER_FILE = ".run"  # in a log_dir: the output_dir of the run whose events it holds
SECONDS_BETWEEN_LINES = 20.0


@contextlib.contextmanager
def hold_output(
    output_dir: str | os.PathLike, log_dir: str | os.PathLike | None = None, *, ranks: Ranks
) -> Iterator[None]:
    """Make a run's directories, be the only run in them while the block lasts, and clear what a killed
    one left half-written. Every rank enters, rank 0 acts.

    Raises UserError if another run holds one of them, with its host, process and start, if `log_dir` has the
    events of another run, or if a directory can't be made or written.
    """
    log_dir = log_dir or output_dir
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            directories = {"output_dir": Path(output_dir), "log_dir": Path(log_dir)}
            for flag, directory in directories.items():
                try:
                    directory.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"--{flag} {directory}: can't make this directory: {error.strerror}") from None
                if flag == "output_dir" or not directory.samefile(output_dir):
                    mend = f"wait for it or stop it, or choose another --{flag}"
                    lock = file_lock(directory / LOCK_FILE, what=f"--{flag} {directory}", mend=mend)
                    stack.enter_context(lock)
            _claim(*directories.values())
            for pattern in ("checkpoint*.pth-*", "best.pth-*", "runs/*/checkpoint*.pth-*", "runs/*/best.pth-*"):
                folder, _, name = pattern.rpartition("/")
                for leftover in directories["output_dir"].glob(f"{folder or '.'}/{TEMPORARY_PREFIX}{name}"):
                    leftover.unlink()  # of a killed save: the lock is held, so it is not in use

        on_main(ranks, hold)
        yield


def _claim(output_dir: Path, log_dir: Path) -> None:
    """Refuse a directory with another run's events: TensorBoard would take both for one run and purge points."""
    mark = log_dir / OWNER_FILE
    if not log_dir.samefile(output_dir) and mark.exists():
        owner = Path(mark.read_text(encoding="utf-8"))
        if owner.exists() and not owner.samefile(output_dir):
            raise UserError(f"--log_dir {log_dir}: holds the events of the run in {owner}; choose another")
    mark.write_text(str(output_dir.resolve()), encoding="utf-8")


@contextlib.contextmanager
def writing_results(output_dir: str | os.PathLike) -> Iterator[None]:
    """A full or lost disk while results are written is one line: what they are made of is kept elsewhere."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--output_dir {output_dir}: the results can't be written: {reason}; make room and run the same command "
            "again, which trains nothing twice"
        ) from None


class RunLog:
    """Records of one run in `output_dir`, written by rank 0 and silent elsewhere.

    - log.txt: one JSON line per finished epoch. A resumed run drops half a line and the lines of
      epochs that it does again.
    - args.json: one entry per start, with arguments, versions and the git commit.
    - TensorBoard events in `log_dir`, x-axis epoch * 1000; what a resumed run does again is purged.

    A place that can't be written is an error at the start. Later, a disk that runs full for instance, it is a
    warning: training matters more. Lines of log.txt then wait for the next epoch; points are lost.

    Args:
        output_dir: made if missing.
        log_dir: of the TensorBoard events; None for output_dir.
        start_epoch: fractional epoch at which this start goes on.
        enabled: false on all ranks but one.

    Raises:
        UserError: a directory or a file in it can't be read or written.
    """

    def __init__(
        self, output_dir: str | os.PathLike, log_dir: str | os.PathLike | None, start_epoch: float, enabled: bool = True
    ):
        self.path = Path(output_dir) / "log.txt"
        self.log_dir = Path(log_dir or output_dir)
        self.enabled = enabled
        self.writer = None
        self._lines: list[str] = []  # of log.txt, which is written anew at each epoch
        self._unwritten = 0  # of them
        self._failing: set[Path] = set()
        if not enabled:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._read_lines(before=int(start_epoch))
            self._write_lines()
            # The points at start_epoch itself were written before the checkpoint and are not done again.
            self._open_writer(purge_step=epoch_1000x(start_epoch) + 1)
        except OSError as error:
            raise UserError(f"{error.filename or self.log_dir}: can't be written: {error.strerror or error}") from None

    def _read_lines(self, before: int) -> None:
        """The whole lines of epochs before one."""
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["epoch"] < before:
                    self._lines.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                print(f"warning: {self.path}: dropped the unreadable line {line[:60]!r}", flush=True)

    def _write_lines(self) -> None:
        with atomic_write(self.path, "w") as file:
            file.writelines(self._lines)
        self._unwritten = 0

    def _open_writer(self, purge_step: int | None = None) -> None:
        threading.excepthook = _no_traceback_of_tensorboard
        self.writer = SummaryWriter(self.log_dir, purge_step=purge_step)
        self.writer.flush()

    def start(self, args: dict, world_size: int) -> None:
        """Add this start to args.json. Raises UserError if that can't be read or written."""
        if not self.enabled:
            return
        path = self.path.parent / "args.json"
        try:
            starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            starts.append(
                {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "command": sys.argv,
                    "args": args,
                    "world_size": world_size,
                    "versions": versions(),
                    "git": git_commit(),
                }
            )
            with atomic_write(path, "w") as file:
                json.dump(starts, file, indent=2)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: can't be read and written as the list of a run's starts ({error}); move it away"
            ) from None

    def epoch(self, record: dict) -> None:
        """Add an epoch's record to log.txt, durably."""
        if not self.enabled:
            return
        self._lines.append(json.dumps(record) + "\n")
        self._unwritten += 1
        self._attempt(self.path, self._write_lines)
        if self.writer is None:
            self._attempt(self.log_dir, self._open_writer)

    def _attempt(self, path: Path, write: Callable[[], None]) -> None:
        """Write, or print one warning for as long as it fails. A writer of events that fails is given up for a new one
        at the next epoch."""
        try:
            write()
            self._failing.discard(path)
        except Exception as error:  # whatever TensorBoard's own thread met, in its words
            consequence = f"the lines of {self._unwritten} epoch(s) wait"
            if path == self.log_dir:
                broken, self.writer = self.writer, None
                with contextlib.suppress(Exception):
                    broken.close()
                consequence = "points are missing in TensorBoard from here on"
            if path not in self._failing:
                self._failing.add(path)
                reason = getattr(error, "strerror", None) or error
                print(f"warning: {path}: can't be written: {reason}; training goes on, {consequence}", flush=True)

    def flush(self) -> None:
        """Bring what was recorded so far to disk, so that no checkpoint is ahead of it."""
        if self._unwritten:
            self._attempt(self.path, self._write_lines)
        if self.writer:
            self._attempt(self.log_dir, self.writer.flush)

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        """Write values to TensorBoard at a fractional epoch."""

        def write() -> None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch_1000x(epoch))

        if self.writer:
            self._attempt(self.log_dir, write)

    def image(self, name: str, rgb: numpy.ndarray, epoch: float) -> None:
        """Write a picture, uint8 [H, W, 3], to TensorBoard."""
        if self.writer:
            self._attempt(self.log_dir, lambda: self.writer.add_image(name, rgb, epoch_1000x(epoch), dataformats="HWC"))

    def close(self) -> None:
        """Write what is left; says which epochs log.txt will lack."""
        self.flush()
        if self.writer:
            self._attempt(self.log_dir, self.writer.close)
        if self._unwritten:
            epochs = ", ".join(str(json.loads(line)["epoch"]) for line in self._lines[-self._unwritten :])
            print(f"warning: {self.path}: lacks the lines of the epochs {epochs}", flush=True)


def _no_traceback_of_tensorboard(args: threading.ExceptHookArgs) -> None:
    """`threading.excepthook`: the error of TensorBoard's writer comes up again in the main thread."""
    if not type(args.thread).__module__.startswith("tensorboard."):
        threading.__excepthook__(args)


def epoch_1000x(epoch: float) -> int:
    """TensorBoard's x-axis: runs with different epoch lengths line up."""
    return int(epoch * 1000)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on."""
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, torchvision, timm, numpy)},
        "cuda": torch.version.cuda or "none",
    }


def git_commit() -> str | None:
    """Commit of this program, "-dirty" when tracked files are changed; None without git or outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


class Progress:
    """Counts what is done of `total` and prints it now and then with rate and time left; a context manager. Silent unless
    `enabled`.

    Args:
        what: what is being done, e.g. "encoding".
        unit: what is counted, e.g. "images".
        done: of an earlier start.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, enabled: bool = True):
        self.what, self.total, self.unit, self.done, self.enabled = what, total, unit, done, enabled
        self._began = self._shown = time.monotonic()
        self._first = done

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        pass

    def add(self, count: int, note: str = "") -> None:
        """So many more are done."""
        self.done += count
        if time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            rate = (self.done - self._first) / (time.monotonic() - self._began)
            self.show(f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f}/s", note)

    def show(self, text: str, note: str = "") -> None:
        """Print this text now, with the time left."""
        self._shown = time.monotonic()
        seconds = (self._shown - self._began) / max(self.done - self._first, 1)
        left = timedelta(seconds=round((self.total - self.done) * seconds))
        if self.enabled:
            print(f"{text}, left {left}  {note}".rstrip(), flush=True)
