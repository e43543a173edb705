"""The output directory of a run, held by one run at a time, and what the run leaves there to read: log.txt, args.json,
TensorBoard events, and lines of progress."""

from __future__ import annotations

import contextlib
import itertools
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
from tqdm import tqdm

from util.distributed import Ranks, on_main
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write, file_lock

LOCK_FILE = ".lock"
OWNER_FILE = ".run"  # in a log_dir: the output_dir of the run whose events it holds


@contextlib.contextmanager
def hold_output(
    output_dir: str | os.PathLike, log_dir: str | os.PathLike | None = None, *, ranks: Ranks
) -> Iterator[None]:
    """Make a run's directories, be the only run in them while the block lasts, and clear what a killed
    one left half-written. Every rank enters, rank 0 acts.

    Raises UserError where another run holds one of them, with its host, process and start, where `log_dir` has the
    events of another run, or where a directory can't be made or written.
    """
    log_dir = log_dir or output_dir
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            for flag, directory in (("output_dir", output_dir), ("log_dir", log_dir)):
                try:
                    Path(directory).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"--{flag} {directory}: can't make this directory: {error.strerror}") from None
                if flag == "output_dir" or not os.path.samefile(log_dir, output_dir):
                    mend = f"wait for it or stop it, or choose another --{flag}"
                    lock = file_lock(Path(directory) / LOCK_FILE, what=f"--{flag} {directory}", mend=mend)
                    stack.enter_context(lock)
            _claim(Path(log_dir), Path(output_dir))
            _remove_leftovers(output_dir)

        on_main(ranks, hold)
        yield


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


def _claim(log_dir: Path, output_dir: Path) -> None:
    """Refuse a directory with another run's events: TensorBoard would take both for one run and purge points."""
    try:
        owner = Path(os.fsdecode((log_dir / OWNER_FILE).read_bytes()))
    except FileNotFoundError:
        owner = log_dir if (log_dir / "args.json").exists() else output_dir
    if owner.exists() and not owner.samefile(output_dir):
        raise UserError(f"--log_dir {log_dir}: holds the events of the run in {owner}; choose another")
    if not log_dir.samefile(output_dir):
        (log_dir / OWNER_FILE).write_bytes(os.fsencode(output_dir.resolve()))


def _remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Delete the temporary files that a killed save left; the lock is held, so none of them is in use."""
    for folder, name in itertools.product(("", "runs/*/"), ("checkpoint*.pth-*", "best.pth-*")):
        for path in Path(output_dir).glob(f"{folder}{TEMPORARY_PREFIX}{name}"):
            with contextlib.suppress(OSError):  # another user's, in a shared directory: it does no harm
                path.unlink()


REPOSITORY = Path(__file__).resolve().parent.parent


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
        self._unwritten: list[str] = []  # lines of log.txt
        self._warned: set[Path] = set()  # about what fails now
        if not enabled:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._drop_lines_from(int(start_epoch))
            with open(self.path, "a"):
                pass
            # The points at start_epoch itself were written before the checkpoint and are not done again.
            self._open_writer(purge_step=epoch_1000x(start_epoch) + 1)
        except OSError as error:
            raise UserError(f"{error.filename or self.log_dir}: can't be written: {error.strerror or error}") from None

    def _drop_lines_from(self, epoch: int) -> None:
        """Keep the whole lines of epochs before `epoch`."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["epoch"] < epoch:
                    kept.append(line + "\n")
            except (json.JSONDecodeError, KeyError, TypeError):
                print(f"warning: {self.path}: dropped the unreadable line {line[:60]!r}", flush=True)
        with atomic_write(self.path, "w") as file:
            file.writelines(kept)

    def _open_writer(self, purge_step: int | None = None) -> None:
        threading.excepthook = _no_traceback_of_tensorboard
        self.writer = SummaryWriter(self.log_dir, purge_step=purge_step)
        self.writer.flush()

    def start(self, args: dict, world_size: int) -> None:
        """Add this start to args.json. Raises UserError where that can't be read or written."""
        if not self.enabled:
            return
        path = self.path.parent / "args.json"
        try:
            starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
            if not isinstance(starts, list):
                raise ValueError("not a list")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: can't be read as the list of a run's starts ({error}); move it away") from None
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
        try:
            with atomic_write(path, "w") as file:
                json.dump(starts, file, indent=2)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from None

    def epoch(self, record: dict) -> None:
        """Append an epoch's record to log.txt, durably."""
        if not self.enabled:
            return
        self._unwritten.append(json.dumps(record) + "\n")
        self._write_lines()
        if self.writer is None:
            self._to_tensorboard(self._open_writer)

    def _write_lines(self) -> None:
        size = None
        try:
            with open(self.path, "ab") as file:
                size = file.tell()
                file.write("".join(self._unwritten).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size)  # no half line
            self._warn(self.path, error, f"the lines of {len(self._unwritten)} epoch(s) wait")
        else:
            self._unwritten.clear()
            self._warned.discard(self.path)

    def _to_tensorboard(self, write: Callable[[], None]) -> None:
        """Do what writes events. Where it fails the writer is given up, for a new one at the next epoch."""
        try:
            write()
        except Exception as error:  # whatever TensorBoard's own thread met, in its words
            broken, self.writer = self.writer, None
            with contextlib.suppress(Exception):
                broken.close()
            self._warn(self.log_dir, error, "points are missing in TensorBoard from here on")
        else:
            self._warned.discard(self.log_dir)

    def _warn(self, path: Path, error: Exception, consequence: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            reason = getattr(error, "strerror", None) or error
            print(f"warning: {path}: can't be written: {reason}; training goes on, {consequence}", flush=True)

    def flush(self) -> None:
        """Bring what was recorded so far to disk, so that no checkpoint is ahead of it."""
        if self._unwritten:
            self._write_lines()
        if self.writer:
            self._to_tensorboard(self.writer.flush)

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        """Write values to TensorBoard at a fractional epoch."""

        def write() -> None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch_1000x(epoch))

        if self.writer:
            self._to_tensorboard(write)

    def figure(self, name: str, figure, epoch: float) -> None:
        """Write a matplotlib figure to TensorBoard."""
        if self.writer:
            self._to_tensorboard(lambda: self.writer.add_figure(name, figure, epoch_1000x(epoch)))

    def close(self) -> None:
        """Write what is left; says which epochs log.txt will lack."""
        self.flush()
        if self.writer:
            self._to_tensorboard(self.writer.close)
        if self._unwritten:
            epochs = ", ".join(str(json.loads(line)["epoch"]) for line in self._unwritten)
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


SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Counts what is done of `total`; a context manager. Silent unless `enabled`.

    Args:
        what: what is being done, e.g. "encoding".
        unit: what is counted, e.g. "images".
        done: of an earlier start.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, enabled: bool = True):
        self.what, self.total, self.unit, self.done, self.enabled = what, total, unit, done, enabled
        self._began = self._shown = time.monotonic()
        self._first = done
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, count: int, note: str = "") -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            self._bar.set_postfix_str(note, refresh=False)
        elif time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            rate = (self.done - self._first) / (time.monotonic() - self._began)
            self.show(f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f}/s", note)

    def show(self, text: str, note: str = "") -> None:
        """Show this text now, with the time left."""
        self._shown = time.monotonic()
        seconds = (self._shown - self._began) / max(self.done - self._first, 1)
        left = timedelta(seconds=round((self.total - self.done) * seconds))
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=True)
        elif self.enabled:
            print(f"{text}, left {left}  {note}".rstrip(), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
