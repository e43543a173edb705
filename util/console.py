"""Standard output and error that may die, fill up or go unread without costing a run anything.

Ctrl-C at `run | tee log` ends tee first, a closed terminal takes its output along, a disk under a redirected
log runs full, and a pager or a Ctrl-S stops reading. A print must then not fail, nor block for long: what can't
be shown is lost, and what the run saves is not.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import TextIO

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
