"""Writing files so that a reader, or a crash, never sees half of one; and locks on files, released by the kernel however
the work ends.

The file stays when the lock goes and says, while it is held, who holds it. A second start is refused in one line
(`file_lock`), or waits its turn (`wait=True`). Locks are `flock`'s, which reach over NFS; where a file system
has none, work goes on after one warning.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

from util.errors import UserError

TEMPORARY_PREFIX = ".tmp-"


def check_folder_place(path: str | os.PathLike, option: str) -> None:
    """UserError where no directory can be made at `path`, or no file in the one that is there; nothing is made."""
    path = Path(path).resolve()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{option} {path}: {there} is not a directory; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {there} can't be written; choose another place")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success it replaces `path`, whole and durable.

    The data is flushed and fsynced before the rename and the directory after it, so that after a
    crash or a power cut `path` holds either the old content or the new. On an exception the
    temporary file is removed, `path` is left as it was, and an error of the system names it. The file gets the usual permissions
    (0666 less the umask), not mkstemp's 0600. Where `path` is a symbolic link, what it points to is
    replaced and the link stays.
    """
    path = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent)
    try:
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    fsync_directory(path.parent)


def fsync_directory(path: str | os.PathLike) -> None:
    """Make the renames and unlinks done in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PATIENCE_SECONDS = 3.0  # a killed process holds its lock until it and its children are gone


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, what: str, mend: str = "", wait: bool = False) -> Iterator[int]:
    """Be the only process, on any host that sees the file, that holds `path` while the block runs.

    Forked children share the lock: it is free when the block is left, or when the process and all
    that it forked have ended. So do other programs that inherit the yielded descriptor. Not for two threads of one
    process.

    Args:
        path: a file to lock, made if missing; never removed. Its directory must be there.
        what: what is held, for messages: "output_dir runs/a".
        mend: what the user can do, behind the message: "wait for it, or choose another --output_dir".
        wait: wait for the holder, after a line on stderr, instead of refusing.

    Raises:
        UserError: another process holds it (the message names host, process id and since when), or `path` can't be
            written.
    """
    path = Path(path)
    try:
        descriptor = os.open(path, os.O_RDWR | (0 if path.exists() else os.O_CREAT), 0o666)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None
    try:
        try:
            _acquire(descriptor, what, mend, wait)
        except OSError as error:
            print(
                f"warning: {path}: can't be locked here ({error.strerror}), so nothing keeps a second process "
                f"from {what}: start one at a time",
                file=sys.stderr,
                flush=True,
            )
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        _write_holder(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}")
        try:
            yield descriptor
        finally:
            _write_holder(descriptor, "")
            with contextlib.suppress(OSError):  # no locks here
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: forked children have the file open too
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, what: str, mend: str, wait: bool) -> None:
    give_up = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 4096, 0).decode(errors="replace") or "another process"
        if wait:
            print(f"waiting for another process: {what} is in use by {holder}", file=sys.stderr, flush=True)
            return fcntl.flock(descriptor, fcntl.LOCK_EX)
        if time.monotonic() > give_up:
            raise UserError(f"{what} is in use by {holder}{mend and f'; {mend}'}")
        time.sleep(0.05)


def _write_holder(descriptor: int, holder: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
