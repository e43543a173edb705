"""Writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from util.errors import UserError

TEMPORARY_PREFIX = ".tmp-"


def check_file_place(path: str | os.PathLike, option: str) -> None:
    """UserError where no file can be written at `path`: to be asked before the work whose result goes there."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{option} {path}: is a directory; name a file to write")
    if not path.resolve().parent.is_dir():
        raise UserError(f"{option} {path}: no such directory to write into")


def check_folder_place(path: str | os.PathLike, option: str) -> None:
    """UserError where no directory can be made at `path`, or no file in the one that is there; nothing is made."""
    path = Path(path).resolve()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{option} {path}: {there} is no directory; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{option} {path}: {there} can't be written; choose another place")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file beside `path`; on success it replaces `path`, whole and durable.

    The data is flushed and fsynced before the rename and the directory after it, so that after a
    crash or a power cut `path` holds either the old content or the new. On an exception the
    temporary file is removed and `path` is left as it was. The file gets the usual permissions
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
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


@contextlib.contextmanager
def replace_together(folder: str | os.PathLike, *, first: str) -> Iterator[Path]:
    """A temporary directory to write files into, which on success replace those of their names in `folder`.

    They are all whole on disk before anything is replaced. Where the file `first` changes, the old others are removed
    before it does: wherever this is cut off, none stands beside a `first` that it was not made with. For one process at
    a time.
    """
    folder = Path(folder)
    fresh = folder / f"{TEMPORARY_PREFIX}together"
    shutil.rmtree(fresh, ignore_errors=True)  # of a killed process
    fresh.mkdir()
    try:
        yield fresh
        others = sorted(path.name for path in fresh.iterdir() if path.name != first)
        if not (folder / first).exists() or not filecmp.cmp(fresh / first, folder / first, shallow=False):
            for name in others:
                (folder / name).unlink(missing_ok=True)
            fsync_directory(folder)
        for name in (first, *others):
            os.replace(fresh / name, folder / name)
        fsync_directory(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def fsync_directory(path: str | os.PathLike) -> None:
    """Make the renames and unlinks done in directory `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
