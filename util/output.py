"""The output directory of a run: held by one run at a time, its checkpoints named, listed, kept and pruned.

Names: `checkpoint-{epoch}.pth` at the end of an epoch, `checkpoint-{epoch+1}-step{step}.pth` inside one.
Nothing here knows what is trained: a task holds its directory with `hold_output`, finds where to go on with
`find_checkpoint`, and calls `save_and_prune` when `is_due`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from util.checkpoint import CheckpointError, is_checkpoint, load_options, save_checkpoint, verify_checkpoint
from util.distributed import Ranks, on_main
from util.errors import UserError
from util.files import TEMPORARY_PREFIX, fsync_directory
from util.locks import file_lock

LOCK_FILE = ".lock"
OWNER_FILE = ".run"  # in a log_dir: the output_dir of the run whose events it holds
_NAME = re.compile(r"checkpoint-(\d+)(?:-step(\d+))?\.pth")


@contextlib.contextmanager
def hold_output(
    output_dir: str | os.PathLike, log_dir: str | os.PathLike | None = None, *, ranks: Ranks
) -> Iterator[None]:
    """Make a run's directories, be the only run in them while the block lasts, and clear what a killed
    one left half-written. Every rank enters, rank 0 acts.

    Raises UserError where another run holds one of them, with its host, process and start, where `log_dir` has the
    events of another run, or where a directory can't be made or written.
    """
    log_dir = log_dir or output_dir
    with contextlib.ExitStack() as stack:

        def hold() -> None:
            for flag, directory in (("output_dir", output_dir), ("log_dir", log_dir)):
                try:
                    Path(directory).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise UserError(f"--{flag} {directory}: can't make this directory: {error.strerror}") from None
                if flag == "output_dir" or not os.path.samefile(log_dir, output_dir):
                    mend = f"wait for it or stop it, or choose another --{flag}"
                    lock = file_lock(Path(directory) / LOCK_FILE, what=f"--{flag} {directory}", mend=mend)
                    stack.enter_context(lock)
            _claim(Path(log_dir), Path(output_dir))
            _remove_leftovers(output_dir)

        on_main(ranks, hold)
        yield


@contextlib.contextmanager
def writing_results(output_dir: str | os.PathLike) -> Iterator[None]:
    """A full or lost disk while results are written is one line: what they are made of is kept elsewhere."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--output_dir {output_dir}: the results can't be written: {reason}; make room and run the same command "
            "again, which trains nothing twice"
        ) from None


def _claim(log_dir: Path, output_dir: Path) -> None:
    """Refuse a directory with another run's events: TensorBoard would take both for one run and purge points."""
    try:
        owner = Path(os.fsdecode((log_dir / OWNER_FILE).read_bytes()))
    except FileNotFoundError:
        owner = log_dir if (log_dir / "args.json").exists() else output_dir
    if owner.exists() and not owner.samefile(output_dir):
        raise UserError(f"--log_dir {log_dir}: holds the events of the run in {owner}; choose another")
    if not log_dir.samefile(output_dir):
        (log_dir / OWNER_FILE).write_bytes(os.fsencode(output_dir.resolve()))


def _remove_leftovers(output_dir: str | os.PathLike) -> None:
    """Delete the temporary files that a killed save left; the lock is held, so none of them is in use."""
    for folder, name in itertools.product(("", "runs/*/"), ("checkpoint*.pth-*", "best.pth-*")):
        for path in Path(output_dir).glob(f"{folder}{TEMPORARY_PREFIX}{name}"):
            with contextlib.suppress(OSError):  # another user's, in a shared directory: it does no harm
                path.unlink()


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
