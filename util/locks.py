"""One at a time: a lock on a file, held for a piece of work and released by the kernel however it ends.

The file stays when the lock goes and says, while it is held, who holds it. A second start is refused in one line
(`file_lock`), or waits its turn (`wait=True`). Locks are `flock`'s, which reach over NFS; where a file system
has none, work goes on after one warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from util.errors import UserError

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
PATIENCE_SECONDS = 3.0  # a killed process holds its lock until it and its children are gone

_warned: set[Path] = set()


@contextlib.contextmanager
def file_lock(path: str | os.PathLike, *, what: str, mend: str = "", wait: bool = False) -> Iterator[None]:
    """Be the only process, on any host that sees the file, that holds `path` while the block runs.

    Forked children share the lock: it is free when the block is left, or when the process and all
    that it forked have ended. Not for two threads of one process.

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
            if error.errno not in NO_LOCKS:
                raise UserError(f"{path}: can't be locked: {error.strerror}") from None
            _warn_without_locks(path, what, error)
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        _write_holder(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}")
        try:
            yield
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


def _warn_without_locks(path: Path, what: str, error: OSError) -> None:
    if path.parent not in _warned:
        _warned.add(path.parent)
        print(
            f"warning: {path}: this file system has no locks ({error.strerror}), so nothing keeps a second "
            f"process from {what}: start one at a time",
            file=sys.stderr,
            flush=True,
        )
