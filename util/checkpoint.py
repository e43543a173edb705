"""Checkpoints that survive a kill, a full disk and a flipped bit; how they are named, found and kept.

A checkpoint is a dict of plain types and tensors, so `torch.load(path, weights_only=True)` opens it. The file is a zip
archive, as torch writes it, with a CRC-32 of each record, which torch itself does not check; here it is checked before
anything is unpickled. Files are written whole under another name, fsynced and renamed (`util.files.atomic_write`), so a
crash leaves the old file or the new one.

Keys: "format", those of `util.training.Training.state`, with "epoch", the last finished one (-1 before the first), and
"step", the micro-steps done in epoch + 1 (0 between epochs), and what a task adds.

Names: `checkpoint-{epoch}.pth` at the end of an epoch, `checkpoint-{epoch+1}-step{step}.pth` inside one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from util.distributed import Ranks
from util.errors import UserError
from util.files import atomic_write, fsync_directory

FORMAT = 1

_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")
_MEND = (
    "make room or choose another --output_dir and run the same command again (the checkpoints that are "
    "there are untouched)"
)

# Beside tensors and plain types, what MAE-style programs store under "args" and "epoch".
_scalar = np.float64(0).__reduce__()[0]
SAFE_GLOBALS = [
    argparse.Namespace,
    # NumPy moved this function between versions; files name whichever place it had when they were written.
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(code)) for code in "?bBhHiIlLqQefd"),
]


class CheckpointError(UserError):
    """A checkpoint file that can't be used; the message names it and says why."""


# ---------------------------------------------------------------- one file


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write `state` to `path`, whole and durable.

    Raises UserError, with the bytes needed, when the disk is full or can't be written: `path` and all
    other files are then as they were, and no temporary file is left.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(_plain(state), buffer)
    content = buffer.getbuffer()
    free = shutil.disk_usage(path.parent).free
    if free < len(content):
        raise UserError(f"{path}: the disk is full: saving needs {len(content)} bytes and {free} are free; {_MEND}")
    try:
        with atomic_write(path) as file:
            file.write(content)
    except OSError as error:
        raise UserError(
            f"{path}: can't write the checkpoint, which needs {len(content)} bytes: {error.strerror or error}; {_MEND}"
        ) from error


def _plain(value: Any) -> Any:
    """Copy containers to plain dict, list and tuple; refuse what a safe load would refuse later."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()  # a GPU's tensors would open only on a machine with one
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = map(_plain, value)
        return tuple(items) if isinstance(value, tuple) else list(items)
    raise TypeError(f"{type(value).__name__} in a checkpoint; only plain types and tensors may be")


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises CheckpointError, which names the file, when it is missing, truncated, altered, unsafe or not a checkpoint of
    this program.
    """
    state = read_torch(path)
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this program, or of another version's format, so training can't continue from it; "
            "to start from its weights pass --pretrained instead of --resume"
        )
    return state


def read_torch(path: str | os.PathLike) -> Any:
    """The content of a file of torch.save, on the CPU, without running any code from it.

    Raises CheckpointError: the file is missing, cut short, damaged as far as its checksums show, of another kind, or
    holds Python objects that could run code.
    """
    verify_archive(path, old_kinds=True)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's protocol: the errors below say what comes of it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind: what torch raises depends on where a damaged file ends
        if found := re.search(r"GLOBAL (\S+)", str(error)) or re.search(r"(Trying to [^\n]*)", str(error)):
            raise CheckpointError(
                f"{path}: refused, it holds a Python object that could run code when opened ({found.group(1)}); save its "
                "state dict (tensors only) and pass that"
            ) from None
        raise CheckpointError(
            f"{path}: not a readable weights file, or cut short ({_reason(error)}); download or copy it again"
        ) from None


def verify_archive(path: str | os.PathLike, *, old_kinds: bool = False) -> None:
    """Check the CRC-32 of each record of a file of torch.save.

    Raises CheckpointError: it is missing, damaged, or, unless `old_kinds` are taken too, no zip archive.
    """
    try:
        with open(path, "rb") as file:
            if old_kinds and file.read(2) != b"PK":  # which has no checksums
                return
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.external_attr & 0x10:  # a directory to torch, which would read nothing
                    raise zipfile.BadZipFile(f"{record.filename} has another kind")
                if record.CRC:  # 0: saved without (torch.serialization.set_crc32_options)
                    with archive.open(record) as content:
                        while content.read(1 << 22):
                            pass
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}; check the path") from None
    except Exception as error:  # zipfile's own, zlib's, struct's, whatever the damage leads to
        what = "truncated" if "not a zip file" in str(error) else "damaged"
        raise CheckpointError(f"{path}: {what} ({_reason(error)}); download or copy it again") from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"


@contextlib.contextmanager
def restoring(path: str | os.PathLike) -> Iterator[None]:
    """What is put back from a checkpoint inside fits what it is put into, or else CheckpointError, which names it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise  # of the device or another rank: out of memory, a failed kernel
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CheckpointError(f"{path}: what it holds doesn't fit this program ({what})") from error


# ---------------------------------------------------------------- the files of a run


def checkpoint_path(output_dir: str | os.PathLike, epoch: int, step: int) -> Path:
    """The file's path for a run that finished `epoch` and then `step` micro-steps of the next one."""
    name = f"checkpoint-{epoch + 1}-step{step}.pth" if step else f"checkpoint-{epoch}.pth"
    return Path(output_dir) / name


def _place(path: Path) -> tuple[int, int]:
    """(last finished epoch, micro-steps done in the next) from a checkpoint's name."""
    first, step = _NAME.fullmatch(path.name).groups()
    return (int(first), 0) if step is None else (int(first) - 1, int(step))


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The files in `output_dir` that are named as checkpoints, the furthest in training first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*.pth") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_place, reverse=True)


def find_checkpoint(output_dir: str | os.PathLike, *, resume: str = "", auto_resume: bool = True) -> Path | None:
    """The checkpoint to go on from; None for a fresh start. For rank 0, which holds `output_dir`.

    Args:
        resume: a file to go on from, whatever is in `output_dir`.
        auto_resume: go on from the newest there; without it there must be none.
    """
    if resume:
        return Path(resume)
    if auto_resume:
        return newest_checkpoint(output_dir)
    if older := list_checkpoints(output_dir):
        raise UserError(f"--no_auto_resume: {output_dir} already holds {older[0].name}; choose another --output_dir")
    return None


def newest_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The whole checkpoint that is furthest in training; None if there is no checkpoint at all.

    Warns of each damaged file that would have come first. Raises UserError if there are checkpoints and none is whole:
    starting anew silently could cost days.
    """
    faults = []
    for path in list_checkpoints(output_dir):
        try:
            verify_archive(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault} (continuing from {path.name})", stacklevel=2)
        return path
    if faults:
        raise UserError(
            f"no checkpoint in {output_dir} can be used: {' | '.join(faults)}; move them away to start anew"
        )
    return None


def announce_resume(
    path: Path, state: Mapping[str, Any], output_dir: str | os.PathLike, ranks: Ranks, *, named: bool
) -> None:
    """Print where a run goes on; if --resume named the checkpoint, rename those that are further to `superseded-*`.

    A run that goes back to an earlier point would else be continued from the abandoned later one, or have its own new
    files pruned as the oldest. Nothing is deleted or overwritten.
    """
    ranks.say(f"resumed from {path}: epoch {state['epoch'] + 2}, step {state['step']}")
    for newer in list_checkpoints(output_dir) if ranks.is_main and named else []:
        if _place(newer) > (state["epoch"], state["step"]):
            aside = newer
            while aside.exists():
                aside = aside.with_name(f"superseded-{aside.name}")
            newer.rename(aside)
            ranks.say(f"warning: set aside as {aside}, since it is further than --resume {path}")


def save_and_prune(state: Mapping[str, Any], output_dir: str | os.PathLike, *, keep: int | None) -> None:
    """Save a checkpoint under its name, then delete those that it supersedes (`prune`)."""
    save_checkpoint(state, checkpoint_path(output_dir, state["epoch"], state["step"]))
    prune(output_dir, keep=keep)


def prune(output_dir: str | os.PathLike, *, keep: int | None) -> None:
    """Delete superseded checkpoints, after a new one was saved: all but the last `keep`; None: those from inside of an
    epoch, but for the last 2 checkpoints. Only whole files count: each is read before an older one goes."""
    whole = 0
    for path in list_checkpoints(output_dir):
        if whole < (keep or 2):
            with contextlib.suppress(CheckpointError):
                verify_archive(path)
                whole += 1
        elif keep or _place(path)[1]:
            path.unlink()
    fsync_directory(output_dir)
