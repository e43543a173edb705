"""How every program here reports bad input: one line on stderr, a non-zero exit status."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from util.console import make_output_unfailing

# What the system says of a place that the user named, whatever was to be done there.
_OF_A_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)


class UserError(Exception):
    """Bad input that the user can mend.

    The message is one line that names the file, column or flag, says what is wrong with it and
    what to do. `run_cli` prints it without a traceback; anything else keeps its traceback, since
    it is a defect of this program.
    """


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` as a command: exit with its status; with 1 and one line for a `UserError`, for a place where this user
    may not read or write, that is full or whose name is too long, and for a GPU whose memory is full; with 130 when interrupted. An output that dies or fills up changes none of it (`util.console`)."""
    make_output_unfailing()
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OF_A_PLACE or error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; to print an error needs no torch
            raise
        told = ". ".join(str(error).split(". ")[:2])
        print(
            f"error: {told}: lower --batch_size (for frozen encoders --encode_batch), or free the GPU of what "
            "else runs there (nvidia-smi)",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
