"""Checkpoints that survive a kill, a full disk and a flipped bit.

A checkpoint is a dict of plain types and tensors, so `torch.load(path, weights_only=True)` opens it.
The file is a zip archive, as torch writes it, and its zip comment holds the SHA-256 of all the rest:
one file is enough, a copy stays checkable, any changed or missing byte is found before anything is
unpickled, and other programs read it as ever. Files are written whole under another name, fsynced and
renamed (`util.files.atomic_write`), so a crash leaves the old file or the new one.

Keys: "model", "optimizer", "scaler", "epoch" (the last finished epoch, -1 before the first),
"step" (micro-steps done in epoch + 1, 0 between epochs), "args", "meters", "world_size", "dataset_size",
"format"; and "model_config", the model's constructor arguments, which older checkpoints lack.
Names: `checkpoint-{epoch}.pth` at the end of an epoch, `checkpoint-{epoch+1}-step{step}.pth` inside one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from util.errors import UserError
from util.files import TEMPORARY_PREFIX, atomic_write, fsync_directory

FORMAT = 1
KEYS = (
    "model",
    "optimizer",
    "scaler",
    "epoch",
    "step",
    "args",
    "meters",
    "world_size",
    "dataset_size",
    "format",
)

_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")
_MARK = b"cxrmim sha256:"
_COMMENT_BYTES = len(_MARK) + 64

_MEND = (
    "make room or choose another --output_dir and run the same command again (the checkpoints that are "
    "there are untouched)"
)
_FOREIGN = "so training can't go on from it; to start from its weights pass --pretrained instead of --resume"

# Flags that shape the weights: with another value the checkpoint does not fit.
_ARCHITECTURE = (
    "model",
    "input_size",
    "id_list",
    "scale_list",
    "hog_nbins",
    "decoder_depth",
    "decoder_num_heads",
)
# Flags that change neither the numbers nor the order of the samples.
_HARMLESS = frozenset(
    {
        "output_dir",
        "log_dir",
        "device",
        "resume",
        "auto_resume",
        "start_epoch",
        "num_workers",
        "pin_mem",
        "print_every",
        "image_every",
        "save_every",
        "keep",
        "max_minutes",
        "skip_nonfinite",
        "check_data",
        "pretrained",
        "world_size",
        "local_rank",
        "dist_url",
        "use_cache",
        "cache_dir",
        "cache_size",
    }
)


class CheckpointError(UserError):
    """A checkpoint file that can't be used; the message names it and says why."""


def checkpoint_path(output_dir: str | os.PathLike, epoch: int, step: int) -> Path:
    """The file's path for a run that finished `epoch` and then `step` micro-steps of the next one."""
    name = f"checkpoint-{epoch + 1}-step{step}.pth" if step else f"checkpoint-{epoch}.pth"
    return Path(output_dir) / name


def is_due(epoch: int, *, save_every: int, epochs: int) -> bool:
    """Whether the end of `epoch` is saved: every `save_every` epochs and after the last one."""
    return (epoch + 1) % save_every == 0 or epoch + 1 == epochs


def save_checkpoint(state: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write `state` (the keys of `KEYS`) to `path`, whole and durable, with its digest.

    Raises UserError, with the bytes needed, when the disk is full or can't be written: `path` and all
    other files are then as they were, and no temporary file is left.
    """
    path = Path(path)
    if absent := [key for key in KEYS if key not in state]:
        raise KeyError(f"checkpoint state lacks {absent}")
    state = _plain(state, "state")
    needed = _bytes_needed(state)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise UserError(f"{path}: the disk is full: saving needs {needed} bytes and {free} are free; {_MEND}")
    try:
        with atomic_write(path) as file:
            _write_with_digest(state, file)
    except OSError as error:
        raise UserError(
            f"{path}: can't write the checkpoint, which needs {needed} bytes: "
            f"{error.strerror or error}; {_MEND}"
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
            f"{path}: refused: it holds Python objects that are not plain data, and "
            "loading those could run code"
        ) from error
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path}: can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or any(key not in state for key in KEYS):
        raise CheckpointError(f"{path}: not a checkpoint of run_pretrain.py, {_FOREIGN}")
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: checkpoint format {state['format']}, this program reads {FORMAT}; "
            "use the version of the program that wrote it"
        )
    return state


def verify_checkpoint(path: str | os.PathLike) -> None:
    """Check the file's bytes against the digest inside it, without loading it.

    Raises CheckpointError, which says whether the file is missing, foreign, truncated or altered.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            recorded = _recorded_digest(file)
            if recorded is None:
                fault = (
                    f"not a checkpoint of run_pretrain.py (no digest inside), {_FOREIGN}"
                    if _is_plain_zip(file)
                    else "truncated, or not a checkpoint at all"
                )
                raise CheckpointError(f"{path}: {fault}")
            if _digest_of_body(file) != recorded:
                raise CheckpointError(f"{path}: damaged: its bytes don't match the SHA-256 inside")
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such checkpoint; check --resume") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error


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


def remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Delete the temporary files that a killed save left; for rank 0 at the start of a run.

    An output directory belongs to one run at a time, so at that moment none of them is in use.
    """
    for path in Path(output_dir).glob(f"{TEMPORARY_PREFIX}checkpoint-*"):
        path.unlink(missing_ok=True)


def set_aside_newer(output_dir: str | os.PathLike, *, epoch: int, step: int) -> list[Path]:
    """Rename checkpoints further than (`epoch`, `step`) to `superseded-*`: for an explicit `--resume`.

    A run that goes back to an earlier point would else be continued from the abandoned later one, or have
    its own new files pruned as the oldest. Nothing is deleted. Returns the new paths.
    """
    moved = []
    for path in list_checkpoints(output_dir):
        if _progress(path) > (epoch, step):
            moved.append(path.replace(path.with_name(f"superseded-{path.name}")))
    if moved:
        fsync_directory(output_dir)
    return moved


def prune(output_dir: str | os.PathLike, *, save_every: int, keep: int | None = None) -> list[Path]:
    """Delete superseded checkpoints, after a new one was saved. Returns what was deleted.

    keep: None keeps the end of every `save_every`-th epoch for good and the last 2 of any kind; N keeps
    the last N and nothing else. Only whole files count as kept, each is read and checked before an older
    one goes, and only files with this program's mark inside are ever deleted: a foreign file, a link or
    a damaged file stays for its owner to look at.
    """
    wanted = 2 if keep is None else keep
    if wanted < 1:
        raise UserError(f"--keep {keep}: at least 1 checkpoint has to stay")
    ours = [path for path in list_checkpoints(output_dir) if not path.is_symlink() and _is_ours(path)]
    milestones = {path for path in ours if keep is None and _is_milestone(path, save_every)}
    if milestones.issuperset(ours[wanted:]):
        return []  # nothing to delete, so no need to read gigabytes
    candidates, kept = [], 0
    for path in ours:
        if kept < wanted:
            with contextlib.suppress(CheckpointError):
                verify_checkpoint(path)
                kept += 1
        elif path not in milestones:
            candidates.append(path)
    for path in candidates:
        path.unlink()
    if candidates:
        fsync_directory(output_dir)
    return candidates


def describe_mismatch(
    checkpoint: Mapping[str, Any], args: Mapping[str, Any], *, world_size: int, dataset_size: int
) -> str:
    """Compare a checkpoint with the flags of the run that would go on from it.

    Returns a table old/new of the changed hyper-parameters, empty where nothing changed: the run may go
    on, no longer as the undisturbed one. Raises UserError, with the flags to use, where it can't go on:
    another architecture; or, inside an epoch, another global batch, accumulation, seed or data, since the
    rest of the epoch would then be other samples. The global batch of a step is the same set of samples for
    any number of ranks (METHOD.md section 6; datasets/sampler.py), so 2 ranks with batch b may go on as
    1 with 2b: each sample is still seen exactly once.
    """
    old, old_world = checkpoint["args"], int(checkpoint["world_size"])
    changed = {
        key: (old[key], args[key])
        for key in old
        if key in args and key not in _HARMLESS and _comparable(old[key]) != _comparable(args[key])
    }
    if misfits := [key for key in _ARCHITECTURE if key in changed]:
        differs = ", ".join(f"--{key} is {_flag_value(changed[key][1])}" for key in misfits)
        flags = " ".join(f"--{key} {_flag_value(changed[key][0])}" for key in misfits)
        raise UserError(
            f"the checkpoint is of another model: {differs}; to go on pass {flags}, or choose "
            "another --output_dir to start anew"
        )
    if checkpoint["step"]:
        _require_same_epoch(checkpoint, args, changed, world_size)
        if checkpoint["dataset_size"] != dataset_size:
            raise UserError(
                f"the checkpoint is in the middle of epoch {checkpoint['epoch'] + 1} of "
                f"{checkpoint['dataset_size']} samples, and --data_path has {dataset_size} now: "
                "bring back those, or --resume a checkpoint from the end of an epoch"
            )
    rows = [(f"--{key}", _flag_value(before), _flag_value(after)) for key, (before, after) in changed.items()]
    if old_world != world_size:
        rows.append(("processes", str(old_world), str(world_size)))
    before, after = _effective_batch(old, old_world), _effective_batch(args, world_size)
    if before != after:
        rows.append(("effective batch", str(before), str(after)))
    if checkpoint["dataset_size"] != dataset_size:
        rows.append(("samples", str(checkpoint["dataset_size"]), str(dataset_size)))
    if not rows:
        return ""
    rows.insert(0, ("changed", "checkpoint", "now"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _require_same_epoch(
    checkpoint: Mapping[str, Any],
    args: Mapping[str, Any],
    changed: Mapping[str, tuple[Any, Any]],
    world_size: int,
) -> None:
    old, old_world = checkpoint["args"], int(checkpoint["world_size"])
    global_batch = old["batch_size"] * old_world
    same = (
        global_batch == args["batch_size"] * world_size
        and old["accum_iter"] == args["accum_iter"]
        and "seed" not in changed
    )
    if same:
        return
    flags = f"--accum_iter {old['accum_iter']} --seed {old['seed']}"
    if global_batch % world_size == 0:
        flags = f"--batch_size {global_batch // world_size} {flags}"
        hint = f"with {world_size} process(es) pass {flags}"
    else:
        hint = f"start {old_world} processes and pass --batch_size {old['batch_size']} {flags}"
    raise UserError(
        f"the checkpoint is in the middle of epoch {checkpoint['epoch'] + 1} of a run with {old_world} "
        f"process(es), {_order_flags(old)}; with {world_size} process(es), {_order_flags(args)} the rest of "
        f"that epoch would be other samples: {hint}, or --resume a checkpoint from the end of an epoch"
    )


def _order_flags(args: Mapping[str, Any]) -> str:
    return " ".join(f"--{key} {args[key]}" for key in ("batch_size", "accum_iter", "seed"))


def _effective_batch(args: Mapping[str, Any], world_size: int) -> int:
    return args["batch_size"] * args["accum_iter"] * world_size


def _comparable(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _flag_value(value: Any) -> str:
    return " ".join(str(item) for item in value) if isinstance(value, (list, tuple)) else str(value)


def _progress(path: Path) -> tuple[int, int]:
    """(last finished epoch, micro-steps done in the next) from a checkpoint's name."""
    first, step = _NAME.fullmatch(path.name).groups()
    return (int(first), 0) if step is None else (int(first) - 1, int(step))


def _is_milestone(path: Path, save_every: int) -> bool:
    epoch, step = _progress(path)
    return step == 0 and (epoch + 1) % save_every == 0


def _plain(value: Any, where: str) -> Any:
    """Copy containers to plain dict, list and tuple; refuse what a safe load would refuse later."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {_plain(key, f"{where} key"): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(f"{where}: {type(value).__name__} in a checkpoint; only plain types and tensors may be")


def _bytes_needed(state: Any) -> int:
    """An upper estimate of the file's size: tensors, their zip records, and the pickle of the rest."""
    if isinstance(state, torch.Tensor):
        return state.untyped_storage().nbytes() + 512
    if isinstance(state, dict):
        return 64 + sum(_bytes_needed(key) + _bytes_needed(value) for key, value in state.items())
    if isinstance(state, (list, tuple)):
        return 64 + sum(_bytes_needed(item) for item in state)
    return 64 + (len(state.encode()) if isinstance(state, str) else 0)


class _HashingWriter:
    """A file for `torch.save` that hashes what passes and remembers why a write failed.

    torch's zip writer turns an exception of `write` into a RuntimeError that does not say why.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        self.file.flush()


def _write_with_digest(state: dict[str, Any], file: IO[bytes]) -> None:
    writer = _HashingWriter(file)
    try:
        torch.save(state, writer)
    except RuntimeError:
        if writer.error is not None:
            raise writer.error from None
        raise
    # A zip file ends with the length of its comment, 0 so far; the comment follows.
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_BYTES.to_bytes(2, "little"))
    file.write(_MARK + writer.sha256.hexdigest().encode())


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


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return _recorded_digest(file) is not None
