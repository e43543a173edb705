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
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy
import timm
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from util.distributed import Ranks, on_main
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write, check_folder_place, file_lock

REPOSITORY = Path(__file__).resolve().parent.parent
LOCK_FILE = ".lock"
SECONDS_BETWEEN_LINES = 20.0
OWNER_FILE = ".run"  # in a log_dir: the output_dir of the run whose events it holds


@contextlib.contextmanager
def hold_output(output_dir: str | os.PathLike, *, ranks: Ranks) -> Iterator[None]:
    """Make a run's directory, be the only run in it while the block lasts, and clear what a killed one left half-written.
    Every rank enters, rank 0 acts.

    Raises UserError if another run holds it, with its host, process and start, or if it can't be made or written.
    """
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            place, what = Path(output_dir), f"--output_dir {output_dir}"
            check_folder_place(place, "--output_dir")
            place.mkdir(parents=True, exist_ok=True)
            stack.enter_context(
                file_lock(place / LOCK_FILE, what=what, mend="wait for it or stop it, or choose another --output_dir")
            )
            for folder in (place, *place.glob("runs/*")):
                for leftover in folder.glob(f"{TEMPORARY_PREFIX}*"):
                    leftover.unlink()  # of a killed run: the lock is held, so it is not in use

        on_main(ranks, hold)
        yield


class RunLog:
    """Records of one run in `output_dir`, written by rank 0 and silent elsewhere.

    - log.txt: one JSON line per finished epoch. A resumed run drops lines of epochs that it does again, and any that
      are no record.
    - args.json: one entry per start, with arguments, versions and the git commit.
    - TensorBoard events in `log_dir`, x-axis epoch * 1000; what a resumed run does again is purged.

    A place that can't be written is an error at the start. Later, a disk that runs full for instance, it is a
    warning: training matters more. Lines of log.txt then wait for the next epoch; TensorBoard gets no more points.

    Args:
        output_dir: made if missing.
        log_dir: of the TensorBoard events; None for output_dir.
        start_epoch: fractional epoch at which this start goes on.
        enabled: false on all ranks but one.
        start: arguments and world size, for args.json; None: it is not written.

    Raises:
        UserError: a directory or a file in it can't be read or written.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        log_dir: str | os.PathLike | None,
        start_epoch: float,
        enabled: bool = True,
        *,
        start: Mapping[str, Any] | None = None,
    ):
        self.path = Path(output_dir) / "log.txt"
        self.log_dir = Path(log_dir or output_dir)
        self.enabled = enabled
        self.writer: SummaryWriter | None = None
        self._lines: list[str] = []  # of log.txt, which is written anew at each epoch
        if not enabled:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._lines = _lines_before(int(start_epoch), self.path)
            self._write_lines()
            if start is not None:
                _add_start(self.path.with_name("args.json"), start)
            self._claim_log_dir()
            threading.excepthook = _no_traceback_of_tensorboard
            # The points at start_epoch itself were written before the checkpoint and are not done again.
            self.writer = SummaryWriter(self.log_dir, purge_step=epoch_1000x(start_epoch) + 1)
            self.writer.flush()
        except OSError as error:
            raise UserError(f"{error.filename or self.log_dir}: can't be written: {error.strerror or error}") from None

    def _claim_log_dir(self) -> None:
        """Refuse another run's log_dir: TensorBoard would take both for one run and purge points."""
        self.log_dir.mkdir(parents=True, exist_ok=True)
        mark, own = self.log_dir / OWNER_FILE, self.path.parent.resolve()
        if self.log_dir.resolve() != own and mark.exists() and (owner := mark.read_text()) != str(own):
            raise UserError(f"--log_dir {self.log_dir}: holds the events of the run in {owner}; choose another")
        mark.write_text(str(own))

    def _write_lines(self) -> None:
        with atomic_write(self.path, "w") as file:
            file.writelines(self._lines)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Add an epoch's record to log.txt, durably."""
        if self.enabled:
            self._lines.append(json.dumps(record) + "\n")
            self._write_or_warn()

    def _write_or_warn(self) -> None:
        try:
            self._write_lines()
        except OSError as error:
            reason = error.strerror or error
            print(
                f"warning: {self.path}: can't be written: {reason}; training continues, its lines are written later",
                flush=True,
            )

    def _draw(self, draw: Callable[[SummaryWriter], None]) -> None:
        """Give TensorBoard something. Where that fails its writer is given up, after a warning."""
        if self.writer is None:
            return
        try:
            draw(self.writer)
        except Exception as error:  # whatever TensorBoard's own thread met, in its words
            broken, self.writer = self.writer, None
            with contextlib.suppress(Exception):
                broken.close()
            reason = getattr(error, "strerror", None) or error
            print(
                f"warning: {self.log_dir}: can't be written: {reason}; training continues, points are missing in "
                "TensorBoard from here on",
                flush=True,
            )

    def flush(self) -> None:
        """Bring what was recorded so far to disk, so that no checkpoint is ahead of it."""
        if self.enabled:
            self._write_or_warn()
        self._draw(SummaryWriter.flush)

    def scalars(self, values: Mapping[str, float], epoch: float) -> None:
        """Write values to TensorBoard at a fractional epoch."""

        def draw(writer: SummaryWriter) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, epoch_1000x(epoch))

        self._draw(draw)

    def image(self, name: str, rgb: numpy.ndarray, epoch: float) -> None:
        """Write a picture, uint8 [H, W, 3], to TensorBoard."""
        self._draw(lambda writer: writer.add_image(name, rgb, epoch_1000x(epoch), dataformats="HWC"))

    def close(self) -> None:
        """Write what is left."""
        self.flush()
        self._draw(SummaryWriter.close)


def _lines_before(epoch: int, path: Path) -> list[str]:
    """The records of a log.txt of epochs before one."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["epoch"] < epoch:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            print(f"warning: {path}: dropped the unreadable line {line[:60]!r}", flush=True)
    return lines


def _add_start(path: Path, start: Mapping[str, Any]) -> None:
    """Add a start to args.json."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        starts.append({"time": now, "command": sys.argv, **start, "versions": versions(), "git": git_commit()})
        with atomic_write(path, "w") as file:
            json.dump(starts, file, indent=2)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: can't be read as the list of a run's starts ({error}); move it away") from None


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
    """Counts what is done of `total` and prints it now and then with rate and time left. Silent unless `enabled`.

    Args:
        what: what is being done, e.g. "encoding".
        unit: what is counted, e.g. "images".
        done: of an earlier start.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, enabled: bool = True):
        self.what, self.total, self.unit, self.done, self.enabled = what, total, unit, done, enabled
        self._began = self._shown = time.monotonic()
        self._first = done

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        if time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            rate = (self.done - self._first) / (time.monotonic() - self._began)
            self.show(f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f}/s")

    def show(self, text: str) -> None:
        """Print this text now, with the time left."""
        self._shown = time.monotonic()
        seconds = (self._shown - self._began) / max(self.done - self._first, 1)
        left = timedelta(seconds=round((self.total - self.done) * seconds))
        if self.enabled:
            print(f"{text}, left {left}", flush=True)
