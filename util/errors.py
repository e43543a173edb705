"""How every program here ends and prints: bad input is one line on stderr and a non-zero exit status, and an output that
dies or fills up costs a run nothing.

Ctrl-C at `run | tee log` ends tee first, a closed terminal takes its output along, and a disk under a redirected log runs
full. A print must then not fail: what can't be shown is lost, and what the run saves is not.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input that the user can mend.

    The message is one line that names the file, column or flag, says what is wrong with it and
    what to do. `run_cli` prints it without a traceback; anything else keeps its traceback, since
    it is a defect of this program.
    """


def run_cli(main: Callable[[], int | None]) -> None:
    """Run `main` as a command and exit with its status; for an error that the user can mend, print one line and exit with
    1 (`_one_line`); when interrupted, exit with 130. An output that dies or fills up changes none of it."""
    for name in ("stdout", "stderr"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not on a descriptor
            setattr(sys, name, _unfailing(getattr(sys, name)))
    try:
        status = main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except Exception as error:
        if (line := _one_line(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        status = 1
    sys.exit(status)


def _one_line(error: Exception) -> str | None:
    """What to print of an error that the user can mend: bad input, a place that can't be read or written, a GPU whose
    memory is full. None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's; to print an error needs no torch
        reason = ". ".join(str(error).split(". ")[:2])
        return (
            f"{reason}: lower --batch_size (for frozen encoders --encode_batch), or free the GPU of what else runs there "
            "(nvidia-smi)"
        )
    return None


class _UnfailingFile(io.FileIO):
    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:  # None: a full pipe that doesn't block
                return written
        return len(data)  # lost


def _unfailing(stream: io.TextIOBase) -> io.TextIOWrapper:
    """The same stream, of which each line is written at once, and no write fails."""
    stream.flush()
    file = io.BufferedWriter(_UnfailingFile(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, errors="backslashreplace", line_buffering=True)


def write_now(text: str) -> None:
    """Write to standard error from a signal handler, where a print could meet the print that it interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
