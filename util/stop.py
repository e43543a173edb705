"""Stopping a run in an orderly way: by signal or time limit, at a step that all ranks agree upon.

Exit statuses of a run: 0 finished; 1 an error; 143 stopped by SIGTERM; 130 by SIGINT; 129 by SIGHUP, a closed
terminal; 75 (EX_TEMPFAIL) by SIGUSR1, SIGUSR2 or --max_minutes: unfinished, run the same command again.
All of them left a checkpoint from which `--auto_resume`, the default, goes on, unless they came before the
first step.

A task runs in `with StopSignals(args.max_minutes) as signals`, what comes before its first step in
`with signals.exit_at_signal()`, and asks `signals.request` after each step.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from util.errors import write_now

# What a rank asks for: the exit status of a run that stops for it. Where ranks differ, the largest wins.
GO_ON, PAUSE = 0, 75
REQUESTS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: PAUSE, signal.SIGUSR2: PAUSE}

# A terminal or a scheduler signals a whole group, and torchrun passes its own copy on: copies that
# arrive this close together are one request.
_SAME_REQUEST_SECONDS = 0.5


class StopSignals:
    """Turns SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 and a time limit into a request to stop.

    The first signal is noted in `request`, for the training loop to see after its step; inside `exit_at_signal`
    it ends the process there. A second one, at least half a second later, ends the process at once, as if
    nothing had been installed. A SIGHUP that was ignored before, as under nohup, stays so. As a context
    manager it puts the earlier handlers back.

    Args:
        max_minutes: since now, after which the run should pause; None for no limit.
    """

    def __init__(self, max_minutes: float | None = None):
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._request = GO_ON
        self._noted_at = 0.0
        self._exits_at_signal = False
        self._earlier = {
            signum: signal.signal(signum, self._note)
            for signum in REQUESTS
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN
        }

    def __enter__(self) -> StopSignals:
        return self

    def __exit__(self, *exception) -> None:
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def exit_at_signal(self) -> Iterator[None]:
        """While there is nothing to save yet: a signal raises SystemExit, with its own status, where it comes.

        What runs inside, the building of a cache for instance, cleans up after itself as after any error.
        """
        self._exits_at_signal = True
        try:
            self._end_if_asked()  # by a signal that came before
            yield
        finally:
            self._exits_at_signal = False
        self._end_if_asked()  # where its SystemExit was swallowed, as one is in a destructor

    @contextlib.contextmanager
    def default_handlers(self) -> Iterator[None]:
        """While processes wait for one another in C++, where no handler of Python's is run: signals end the
        process at once, by the system's own means."""
        for signum in self._earlier:
            signal.signal(signum, signal.SIG_DFL)
        try:
            yield
        finally:
            for signum in self._earlier:
                signal.signal(signum, self._note)

    def _end_if_asked(self) -> None:
        if self._request != GO_ON:
            raise SystemExit(self._request)

    @property
    def request(self) -> int:
        """What was asked for so far: GO_ON or one of `REQUESTS`."""
        if self._request == GO_ON and self._deadline is not None and time.monotonic() >= self._deadline:
            return PAUSE
        return self._request

    def _note(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        name = signal.Signals(signum).name
        if self._request == GO_ON:
            self._request, self._noted_at = REQUESTS[signal.Signals(signum)], now
            if self._exits_at_signal:
                write_now(f"{name}: stopping; there is nothing to save yet\n")
                raise SystemExit(self._request)
            write_now(f"{name}: saving a checkpoint after this step, then stopping; again: at once\n")
        elif now - self._noted_at >= _SAME_REQUEST_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def signal_on_parent_death(signum: signal.Signals) -> None:
    """Have Linux send `signum` to this process when its parent ends, however it ends; no-op elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signum), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), signum)
