"""Checkpoints that survive a kill, a full disk and a flipped bit; how they are named, found and kept.

A checkpoint is a dict of plain types and tensors, so `torch.load(path, weights_only=True)` opens it.
The file is a zip archive, as torch writes it, and its zip comment holds the SHA-256 of all the rest:
one file is enough, a copy stays checkable, any changed or missing byte is found before anything is
unpickled, and other programs read it as ever. Files are written whole under another name, fsynced and
renamed (`util.files.atomic_write`), so a crash leaves the old file or the new one.

Keys: `KEYS`, with "epoch", the last finished one (-1 before the first), and "step", the micro-steps done in epoch + 1 (0 between epochs); "samples", "threads" (`util.resume`), "watch"
(`util.training`), and what a task adds.

Names: `checkpoint-{epoch}.pth` at the end of an epoch, `checkpoint-{epoch+1}-step{step}.pth` inside one.
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
_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")

_MEND = (
    "make room or choose another --output_dir and run the same command again (the checkpoints that are "
    "there are untouched)"
)
_FOREIGN = "so training can't go on from it; to start from its weights pass --pretrained instead of --resume"


class CheckpointError(UserError):
    """A checkpoint file that can't be used; the message names it and says why."""


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write `state` to `path`, whole and durable, with its digest.

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
    verify_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused: it holds Python objects that are not plain data, and loading those could run code"
        ) from error
    with restoring(path):
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


def verify_checkpoint(path: str | os.PathLike) -> None:
    """Check the file's bytes against the digest inside it, without loading it.

    Raises CheckpointError: the file is missing, another program's, cut short or altered.
    """
    try:
        with open(path, "rb") as file:
            if (recorded := _recorded_digest(file)) is None:
                raise CheckpointError(
                    f"{path}: truncated, or not a checkpoint of this program (no digest at its end), {_FOREIGN}"
                )
            if _digest_of_body(file) != recorded:
                raise CheckpointError(f"{path}: damaged: its bytes don't match the SHA-256 inside")
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}; check the path") from error


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether a file has this program's mark, and so was written by it. False for one that can't be read."""
    try:
        with open(path, "rb") as file:
            return _recorded_digest(file) is not None
    except OSError:
        return False


def _recorded_digest(file: IO[bytes]) -> str | None:
    """The digest in the zip comment of an open file; None if it has not this program's mark."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _COMMENT_BYTES - 2, 0))
    length, mark, digest = file.read(2), file.read(len(_MARK)), file.read()
    is_ours = length == _COMMENT_BYTES.to_bytes(2, "little") and mark == _MARK
    return digest.decode("ascii", errors="replace") if is_ours else None


def _digest_of_body(file: IO[bytes]) -> str:
    """SHA-256 of all bytes before the comment, with the comment's length back at 0, as it was hashed."""
    left = file.seek(0, os.SEEK_END) - _COMMENT_BYTES - 2
    file.seek(0)
    sha256 = hashlib.sha256()
    while block := file.read(min(left, 1 << 22)):
        sha256.update(block)
        left -= len(block)
    sha256.update(b"\0\0")
    return sha256.hexdigest()


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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _plain(value: Any, where: str) -> Any:
    """Copy containers to plain dict, list and tuple; refuse what a safe load would refuse later."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()  # a GPU's tensors would open only on a machine with one
    if isinstance(value, Mapping):
        return {_plain(key, f"{where} key"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{where}: {type(value).__name__} in a checkpoint; only plain types and tensors may be")


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

    Warns of each damaged or foreign file that would have come first. Raises UserError if there are checkpoints and
    none is whole: starting anew silently could cost days.
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
    """Print where a run goes on; if --resume named the checkpoint, set aside those that are further."""
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
        if _place(path) > (epoch, step):
            aside, number = path.with_name(f"superseded-{path.name}"), 1
            while os.path.lexists(aside):
                number += 1
                aside = path.with_name(f"superseded-{number}-{path.name}")
            moved.append(path.replace(aside))
    fsync_directory(output_dir)
    return moved


def is_due(epoch: int, *, save_every: int, epochs: int) -> bool:
    """Whether the end of `epoch` is saved: every `save_every` epochs and after the last one."""
    return (epoch + 1) % save_every == 0 or epoch + 1 == epochs


def save_and_prune(
    state: Mapping[str, Any], output_dir: str | os.PathLike, *, save_every: int, keep: int | None
) -> None:
    """Save a checkpoint under its name, then delete those that it supersedes (`prune`)."""
    save_checkpoint(state, checkpoint_path(output_dir, state["epoch"], state["step"]))
    prune(output_dir, save_every=save_every, keep=keep)


def prune(output_dir: str | os.PathLike, *, save_every: int, keep: int | None = None) -> list[Path]:
    """Delete superseded checkpoints, after a new one was saved. Returns what was deleted.

    keep: None keeps the end of every `save_every`-th epoch for good and the last 2 of any kind; N keeps
    the last N and nothing else that was made under it. What was kept for good by the options that it was
    made with stays, whatever these are now. Only whole files count as kept, each is read and checked before
    an older one goes, and only files with this program's mark inside are ever deleted: a foreign file, a
    link or a damaged file stays for its owner to look at.
    """
    whole, superseded = 0, []
    for path in list_checkpoints(output_dir):
        if path.is_symlink() or not is_checkpoint(path):
            continue
        if whole < (keep or 2):
            with contextlib.suppress(CheckpointError):
                verify_checkpoint(path)
                whole += 1
        elif not (keep is None and _is_milestone(path, save_every)) and not _was_kept_for_good(path):
            superseded.append(path)
    for path in superseded:
        try:
            path.unlink()
        except OSError as error:  # another user's, in a shared directory
            print(f"warning: {path}: superseded, but can't be deleted: {error.strerror}", flush=True)
    fsync_directory(output_dir)
    return superseded


def _is_milestone(path: Path, save_every: int) -> bool:
    epoch, step = _place(path)
    return step == 0 and (epoch + 1) % save_every == 0


def _was_kept_for_good(path: Path) -> bool:
    """Whether a checkpoint's own options keep it for good; also for one whose options can't be read."""
    try:
        args = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["args"]
    except Exception:  # damaged: whatever torch meets
        return True
    return args.get("keep") is None and "save_every" in args and _is_milestone(path, args["save_every"])
