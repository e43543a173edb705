"""What a run leaves to read: log.txt, args.json and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy
import timm
import torch
import torchvision
from torch.utils.tensorboard import SummaryWriter

from util.errors import UserError
from util.files import atomic_write

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
