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
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from util.errors import UserError
from util.files import atomic_write

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
