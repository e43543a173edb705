"""One at a time: a lock on a file, held for a piece of work and released by the kernel however it ends.

The file stays when the lock goes and tells, while it is held, who holds it. A second start is refused in one line
(`file_lock`), or waits its turn (`wait=True`). Locks are `flock`'s, which reach over NFS; where a file system
has none, work goes on after one warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from util.errors import UserError

NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
# A killed process holds its lock until it is gone, and so do its children, which end by themselves.
DYING_SECONDS = 1.0
ORPHANS_DYING_SECONDS = 10.0

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
        UserError: another process holds it (host, process id and since when are told), or `path` can't be
            written.
    """
    path = Path(path)
    with _open(path) as file:
        locked = _lock(file.fileno(), path, what, mend, wait)
        if locked:
            _sign(file.fileno())
        try:
            yield
        finally:
            if locked:
                with contextlib.suppress(OSError):
                    os.ftruncate(file.fileno(), 0)
                # Not left to close: forked children have the file open too.
                fcntl.flock(file, fcntl.LOCK_UN)


def _open(path: Path):
    try:
        return open(path, "r+b" if path.exists() else "a+b")
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}") from None


def _lock(descriptor: int, path: Path, what: str, mend: str, wait: bool) -> bool:
    """Take the lock; False where the file system has none."""
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            holder = _holder(descriptor)
        except OSError as error:
            return _go_on_without(error, path, what)
        if wait:
            told = f"waiting for another process: {what} is in use by {_describe(holder)}"
            print(told, file=sys.stderr, flush=True)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                return _go_on_without(error, path, what)
            return True
        # Signed by a process that is gone: its children are dying, or its successor has not signed yet.
        patience = ORPHANS_DYING_SECONDS if _is_gone(holder) else DYING_SECONDS
        if time.monotonic() - began > patience:
            raise UserError(f"{what} is in use by {_describe(holder)}{mend and f'; {mend}'}")
        time.sleep(0.05)


def _go_on_without(error: OSError, path: Path, what: str) -> bool:
    if error.errno not in NO_LOCKS:
        raise UserError(f"{path}: can't be locked: {error.strerror}") from None
    if path.parent not in _warned:
        _warned.add(path.parent)
        print(
            f"warning: {path}: this file system has no locks ({error.strerror}), so nothing keeps a second "
            f"process from {what}: start one at a time",
            file=sys.stderr,
            flush=True,
        )
    return False


def _sign(descriptor: int) -> None:
    """Write who holds the lock into the file."""
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(timezone.utc).astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> dict:
    """What the holder wrote into the file; empty where it has not yet, or could not."""
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(os.pread(descriptor, 4096, 0))
        if isinstance(holder, dict) and {"host", "pid", "since"} <= holder.keys():
            return holder
    return {}


def _is_gone(holder: dict) -> bool:
    """Whether the process that signed is known to have ended, or none has signed."""
    if not holder:
        return True
    if holder["host"] != socket.gethostname():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, OverflowError):
        return False
    return False


def _describe(holder: dict) -> str:
    if not holder:
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
