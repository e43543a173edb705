"""How every program here ends and prints: bad input is one line on stderr and a non-zero exit status, and an output that
dies, fills up or goes unread costs a run nothing.

Ctrl-C at `run | tee log` ends tee first, a closed terminal takes its output along, a disk under a redirected
log runs full, and a pager or a Ctrl-S stops reading. A print must then not fail, nor block for long: what can't
be shown is lost, and what the run saves is not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import sys
from collections.abc import Callable
from typing import TextIO

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
    may not read or write, that is full or whose name is too long, and for a GPU whose memory is full; with 130 when interrupted. An output that dies or fills up changes none of it (`UnfailingStream`)."""
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


# How long an output that nobody reads is waited for before text is dropped until somebody does.
PATIENCE_SECONDS = 5.0
# A pipe that is ready takes as much without blocking.
CHUNK_BYTES = 4096


class UnfailingStream:
    """A text stream on a descriptor whose `write` and `flush` neither fail nor block for long.

    Whole lines are written at once, other text at `flush`. What the stream's encoding lacks is escaped. All
    other attributes are those of the stream that it stands for.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._descriptor = _own_descriptor(stream.fileno())
        self._text = ""
        self._unread = False  # the last text found no reader
        with contextlib.suppress(OSError, ValueError):
            stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._text += text
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        text, self._text = self._text, ""
        data = text.encode(self._stream.encoding or "utf-8", errors="backslashreplace")
        while data and self._is_ready():
            try:
                data = data[os.write(self._descriptor, data[:CHUNK_BYTES]) :]
            except OSError:
                return

    def write_now(self, text: str) -> None:
        """Write past what is gathered, if that can be done at once: for a signal handler."""
        with contextlib.suppress(OSError, ValueError):
            if is_ready(self._descriptor, 0.0):
                os.write(self._descriptor, text.encode(errors="backslashreplace"))

    def _is_ready(self) -> bool:
        ready = is_ready(self._descriptor, 0.0 if self._unread else PATIENCE_SECONDS)
        self._unread = not ready
        return ready


def _own_descriptor(descriptor: int) -> int:
    """What to write to. A terminal is opened anew, without blocking for this program alone: it counts as ready
    with room for a single byte, and with more to write an ordinary write then waits until somebody reads."""
    with contextlib.suppress(OSError):  # not a terminal, or not this user's: as it is
        return os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return descriptor


def is_ready(descriptor: int, seconds: float) -> bool:
    """Whether a write to the descriptor would not block, after waiting up to so long for that."""
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return bool(poll.poll(1000 * seconds))
    except OSError:
        return True  # the write itself tells what is wrong


def make_output_unfailing() -> None:
    """Let this process's prints, progress bars, warnings and tracebacks survive their output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or not on a descriptor
            if not isinstance(stream, UnfailingStream):
                setattr(sys, name, UnfailingStream(stream))


def write_now(text: str) -> None:
    """Write to standard error from a signal handler, where a print could meet the print that it interrupted."""
    if isinstance(sys.stderr, UnfailingStream):
        sys.stderr.write_now(text)
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        descriptor = sys.__stderr__.fileno()
        if is_ready(descriptor, 0.0):
            os.write(descriptor, text.encode())
