"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a dict of plain types and tensors, so `torch.load(path, weights_only=True)` opens it.
The file is a zip archive, as torch writes it, and its zip comment holds the SHA-256 of all the rest:
one file is enough, a copy stays checkable, any changed or missing byte is found before anything is
unpickled, and other programs read it as ever. Files are written whole under another name, fsynced and
renamed (`util.files.atomic_write`), so a crash leaves the old file or the new one.

Keys: those of `KEYS`, "epoch" being the last finished epoch (-1 before the first) and "step" the micro-steps done in
epoch + 1 (0 between epochs); "samples", "threads" (`util.resume`), "watch" (`util.finite`), and what a task adds.
`util.output` names, lists and keeps the files, `util.resume` goes on from one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from util.distributed import Ranks
from util.errors import UserError
from util.files import atomic_write, fsync_directory

FORMAT = 1
KEYS = ("model", "optimizer", "scaler", "epoch", "step", "args", "meters", "world_size", "dataset_size", "format")

PARAMETERS = ("weight", "bias", "cls_token", "pos_embed")  # ends of the names of what is trained

_MARK = b"cxrmim sha256:"
_COMMENT_BYTES = len(_MARK) + 64

_MEND = (
    "make room or choose another --output_dir and run the same command again (the checkpoints that are "
    "there are untouched)"
)
_FOREIGN = "so training can't go on from it; to start from its weights pass --pretrained instead of --resume"


class CheckpointError(UserError):
    """A checkpoint file that can't be used; the message names it and says why."""


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write `state` (the keys of `KEYS`) to `path`, whole and durable, with its digest.

    Raises UserError, with the bytes needed, when the disk is full or can't be written: `path` and all
    other files are then as they were, and no temporary file is left.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(_plain(state, "state"), buffer)
    mark = _MARK + hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
    buffer.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment, 0 so far; the comment follows
    buffer.write(_COMMENT_BYTES.to_bytes(2, "little") + mark)
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


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking its digest.

    Nothing but plain types and tensors is ever unpickled. Raises CheckpointError, which names the file,
    when it is missing, truncated, altered, unsafe or not a checkpoint of this program.
    """
    path = Path(path)
    verify_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds Python objects that are not plain data, and loading those could run code"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: can't be read: {_first_line(error)}") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise CheckpointError(f"{path}: not a checkpoint of this program, {_FOREIGN}")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state['format']}, this program reads {FORMAT}; "
            "use the version of the program that wrote it"
        )
    return state


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


def load_options(path: str | os.PathLike) -> dict[str, Any]:
    """The options ("args") that a checkpoint was made with, without reading its tensors.

    Raises CheckpointError where they can't be read. The digest is not checked.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return dict(state["args"])
    except (pickle.UnpicklingError, RuntimeError, OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: can't be read: {_first_line(error)}") from error


def verify_checkpoint(path: str | os.PathLike) -> None:
    """Check the file's bytes against the digest inside it, without loading it.

    Raises CheckpointError, which says whether the file is missing, foreign, truncated or altered.
    """
    try:
        with open(path, "rb") as file:
            recorded = _recorded_digest(file)
            if recorded is None and _is_plain_zip(file):
                raise CheckpointError(f"{path}: not a checkpoint of this program (no digest inside), {_FOREIGN}")
            if recorded is None:
                raise CheckpointError(f"{path}: truncated, or not a checkpoint at all")
            if _digest_of_body(file) != recorded:
                raise CheckpointError(f"{path}: damaged: its bytes don't match the SHA-256 inside")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint; check --resume") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


def verify_archive(path: str | os.PathLike) -> None:
    """Check the bytes of any file of torch.save against the checksums that it has, which torch.load does not: the digest
    inside, or else the CRC-32 of each record of its zip archive. Older kinds of file have none.

    Raises CheckpointError.
    """
    if is_checkpoint(path):
        verify_checkpoint(path)
    elif zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.comment.startswith(_MARK):
                    raise CheckpointError(f"{path}: cut short or damaged at its end; copy it again")
                for record in archive.infolist():
                    if record.CRC:  # 0: saved without (torch.serialization.set_crc32_options)
                        with archive.open(record) as content:
                            while content.read(1 << 22):
                                pass
        except CheckpointError:
            raise
        except Exception as error:  # zipfile's own, zlib's, struct's, whatever the damage leads to
            reason = f"{type(error).__name__}: {_first_line(error)}"
            raise CheckpointError(f"{path}: damaged ({reason}); download or copy it again") from None


def check_weights(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Refuse what can be no weights: parameters that are no dense floating-point tensors, or not finite.

    Raises CheckpointError, which names the file and the first such tensor.
    """
    for name, value in state.items():
        if not str(name).endswith(PARAMETERS):
            continue
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor but {type(value).__name__}")
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            kind = "without its numbers" if value.is_meta else f"of type {value.dtype}, {value.layout}"
            raise CheckpointError(f"{path}: {name} is {kind}, which can't be weights; save them as float32")
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {name} has {int((~value.isfinite()).sum())} values that are not finite")


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a file has this program's mark, and so was written by it. False for one that can't be read."""
    try:
        with open(path, "rb") as file:
            return _recorded_digest(file) is not None
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _plain(value: Any, where: str) -> Any:
    """Copy containers to plain dict, list and tuple; refuse what a safe load would refuse later."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()  # a GPU's tensors would open only where there is one
    if isinstance(value, Mapping):
        return {_plain(key, f"{where} key"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{where}: {type(value).__name__} in a checkpoint; only plain types and tensors may be")


def _recorded_digest(file: IO[bytes]) -> str | None:
    """The digest in the zip comment of an open file; None where it has not this program's mark."""
    size = file.seek(0, os.SEEK_END)
    if size < _COMMENT_BYTES + 2:
        return None
    file.seek(-_COMMENT_BYTES - 2, os.SEEK_END)
    tail = file.read()
    if tail[:2] != _COMMENT_BYTES.to_bytes(2, "little") or not tail[2:].startswith(_MARK):
        return None
    return tail[2 + len(_MARK) :].decode("ascii", errors="replace")


def _is_plain_zip(file: IO[bytes]) -> bool:
    """Whether an open file is a whole zip archive without a comment, as any torch.save writes it."""
    file.seek(0)
    if not zipfile.is_zipfile(file):
        return False
    file.seek(-2, os.SEEK_END)
    return file.read() == b"\0\0"


def _digest_of_body(file: IO[bytes]) -> str:
    """SHA-256 of all bytes before the comment, with the comment's length back at 0, as it was hashed."""
    left = file.seek(0, os.SEEK_END) - _COMMENT_BYTES - 2
    file.seek(0)
    sha256 = hashlib.sha256()
    while left:
        block = file.read(min(left, 1 << 22))
        if not block:
            raise OSError("the file shrank while it was read")
        sha256.update(block)
        left -= len(block)
    sha256.update(b"\0\0")
    return sha256.hexdigest()


_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")


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


def save_and_prune(
    state: Mapping[str, Any], output_dir: str | os.PathLike, *, save_every: int, keep: int | None
) -> None:
    """Save a checkpoint under its name, then delete those that it supersedes (`prune`)."""
    save_checkpoint(state, checkpoint_path(output_dir, state["epoch"], state["step"]))
    prune(output_dir, save_every=save_every, keep=keep)


def checkpoint_path(output_dir: str | os.PathLike, epoch: int, step: int) -> Path:
    """The file's path for a run that finished `epoch` and then `step` micro-steps of the next one."""
    name = f"checkpoint-{epoch + 1}-step{step}.pth" if step else f"checkpoint-{epoch}.pth"
    return Path(output_dir) / name


def is_due(epoch: int, *, save_every: int, epochs: int) -> bool:
    """Whether the end of `epoch` is saved: every `save_every` epochs and after the last one."""
    return (epoch + 1) % save_every == 0 or epoch + 1 == epochs


def list_checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """The files in `output_dir` that are named as checkpoints, the furthest in training first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*.pth") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_progress, reverse=True)


def newest_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The whole checkpoint that is furthest in training; None where there is no checkpoint at all.

    Each damaged or foreign file that would have come first is named in a warning. Raises UserError when
    there are checkpoints and none is whole: starting anew silently could cost days.
    """
    faults = []
    for path in list_checkpoints(output_dir):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"{fault} (going on from {path.name})", stacklevel=2)
        return path
    if faults:
        raise UserError(
            f"no checkpoint in {output_dir} can be used: {' | '.join(faults)}; move them away to start anew"
        )
    return None


def announce_resume(
    path: Path, state: Mapping[str, Any], output_dir: str | os.PathLike, ranks: Ranks, *, named: bool
) -> None:
    """Say where a run goes on; where --resume named the checkpoint, set aside those that are further."""
    ranks.say(f"resumed from {path}: epoch {state['epoch'] + 2}, step {state['step']}")
    if ranks.is_main and named:
        for aside in set_aside_newer(output_dir, epoch=state["epoch"], step=state["step"]):
            ranks.say(f"warning: set aside as {aside}, since it is further than --resume {path}")


def set_aside_newer(output_dir: str | os.PathLike, *, epoch: int, step: int) -> list[Path]:
    """Rename checkpoints further than (`epoch`, `step`) to `superseded-*`: for an explicit `--resume`.

    A run that goes back to an earlier point would else be continued from the abandoned later one, or have
    its own new files pruned as the oldest. Nothing is deleted or overwritten. Returns the new paths.
    """
    moved = []
    for path in list_checkpoints(output_dir):
        if _progress(path) > (epoch, step):
            aside, number = path.with_name(f"superseded-{path.name}"), 1
            while os.path.lexists(aside):
                number += 1
                aside = path.with_name(f"superseded-{number}-{path.name}")
            moved.append(path.replace(aside))
    if moved:
        fsync_directory(output_dir)
    return moved


def prune(output_dir: str | os.PathLike, *, save_every: int, keep: int | None = None) -> list[Path]:
    """Delete superseded checkpoints, after a new one was saved. Returns what was deleted.

    keep: None keeps the end of every `save_every`-th epoch for good and the last 2 of any kind; N keeps
    the last N and nothing else that was made under it. What was kept for good by the options that it was
    made with stays, whatever these are now. Only whole files count as kept, each is read and checked before
    an older one goes, and only files with this program's mark inside are ever deleted: a foreign file, a
    link or a damaged file stays for its owner to look at.
    """
    wanted = 2 if keep is None else keep
    if wanted < 1:
        raise UserError(f"--keep {keep}: at least 1 checkpoint has to stay")
    ours = [path for path in list_checkpoints(output_dir) if not path.is_symlink() and is_checkpoint(path)]
    milestones = {path for path in ours if keep is None and _is_milestone(path, save_every)}
    older = [path for path in ours[wanted:] if path not in milestones]
    milestones.update(path for path in older if _was_kept_for_good(path))
    if milestones.issuperset(older):
        return []  # nothing to delete, so no need to read gigabytes
    candidates, kept = [], 0
    for path in ours:
        if kept < wanted:
            with contextlib.suppress(CheckpointError):
                verify_checkpoint(path)
                kept += 1
        elif path not in milestones:
            candidates.append(path)
    deleted = []
    for path in candidates:
        try:
            path.unlink()
        except OSError as error:
            print(f"warning: {path}: superseded, but can't be deleted: {error.strerror}", flush=True)
        else:
            deleted.append(path)
    if deleted:
        fsync_directory(output_dir)
    return deleted


def _was_kept_for_good(path: Path) -> bool:
    """Whether a checkpoint's own options keep it for good; also for one whose options can't be read."""
    try:
        args = load_options(path)
    except CheckpointError:
        return True
    return args.get("keep") is None and "save_every" in args and _is_milestone(path, args["save_every"])


def _progress(path: Path) -> tuple[int, int]:
    """(last finished epoch, micro-steps done in the next) from a checkpoint's name."""
    first, step = _NAME.fullmatch(path.name).groups()
    return (int(first), 0) if step is None else (int(first) - 1, int(step))


def _is_milestone(path: Path, save_every: int) -> bool:
    epoch, step = _progress(path)
    return step == 0 and (epoch + 1) % save_every == 0
