"""Commands that are run once each, for scripts/reproduce.py and scripts/ablate.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from util.files import atomic_write, file_lock
from util.stop import PAUSE, REQUESTS, StopSignals

ROOT = Path(__file__).resolve().parents[1]


def located(path: str) -> str:
    """A path of whoever called the shell script, as seen from the repository."""
    real = Path(os.environ["CALLED_FROM"], path).resolve()
    return str(real.relative_to(ROOT) if real.is_relative_to(ROOT) else real)


@contextlib.contextmanager
def running(out: str, quiet: bool) -> Iterator[Steps]:
    """Steps in the directory `out`, for one process at a time; a first signal ends them in an orderly way."""
    Path(out, "steps").mkdir(parents=True, exist_ok=True)
    # Steps have the lock too: one that outlives a killed runner is not disturbed.
    with file_lock(Path(out, ".lock"), what=f"OUT={out}", mend="wait for it, or choose another OUT") as lock:
        yield Steps(out, quiet, lock)
        for signum in REQUESTS:  # Python gives up its handlers before it has ended
            signal.signal(signum, signal.SIG_IGN)
    print(f"everything is in {out}")


class Steps:
    """Runs commands once each; steps may be called from several threads.

    OUT/steps/NAME has three lines: the command, what it reads, and "begun" or "done" and when. OUT is not named in it,
    so that it can be moved. `lock` is a descriptor that commands inherit.
    """

    def __init__(self, out: str, quiet: bool, lock: int):
        self.out, self.quiet, self.lock = out, quiet, lock
        self.signals = StopSignals()
        self.made: dict[str, str] = {}  # by step

    def __call__(
        self, name: str, command: str, *, reads: str = "the data", how: str = "", launcher: str = "", place: str = ""
    ) -> None:
        """Run a command unless it is done.

        Args:
            command: program and words, quoted as in a shell.
            reads: the steps that made what it reads, and what else decides what comes out.
            how: flags that say where and how it runs, not what comes out; `launcher` likewise, before the program.
            place: a directory in which the program goes on; it is moved away where something else was begun there.
        """
        self._stop_if_asked(f"before step '{name}'")
        mark, (program, *words) = Path(self.out, "steps", name), shlex.split(command)
        source = " ".join(self.made.get(word, word) for word in reads.split())
        what = shlex.join(word.replace(self.out, "OUT") for word in (program, *words)) + f"\nfrom {source}\n"
        before = mark.read_text() if mark.exists() else ""
        done = before.startswith(f"{what}done")
        print(f"== {name}{': done before' if done else ''}", flush=True)
        if not done:
            if os.path.exists(place) and not before.startswith(what):
                moved = f"{place}-before-{datetime.now():%Y%m%d-%H%M%S.%f}"
                os.rename(place, moved)
                print(f"made from something else before: moved to {moved}", flush=True)
            write(mark, f"{what}begun\n")
            # Flags of the user come behind `how`, and win.
            self._run(name, [os.environ["PYTHON"], *shlex.split(f"{launcher} {program} {how}"), *words])
            before = f"{what}done {time.time()}\n"
            write(mark, before)
        self.made[name] = hashlib.sha256(before.encode()).hexdigest()[:16]

    def _stop_if_asked(self, where: str) -> None:
        request = self.signals.request
        if not request:
            return
        print(f"stopped {where}; the same command continues from here", file=sys.stderr, flush=True)
        job = os.environ.get("SLURM_JOB_ID")
        if request == PAUSE and job and subprocess.run(["scontrol", "requeue", job]).returncode:
            print(f"error: job {job} is not back in the queue; submit it again", file=sys.stderr)
        raise SystemExit(request)

    def _run(self, name: str, command: list[str]) -> None:
        """A signal goes on to the command, once and as TERM (torchrun dies of USR1), and its end is waited for."""
        log, told = Path(self.out, "steps", f"{name}.txt"), False
        print(f"   its output goes into {log}" if self.quiet else shlex.join(command), flush=True)
        with log.open("a") if self.quiet else contextlib.nullcontext() as output:  # None: as this program's
            streams = {"stdout": output, "stderr": output}
            # A session of its own, so that Ctrl-C comes here only.
            child = subprocess.Popen(command, start_new_session=True, pass_fds=[self.lock], **streams)
        while (status := child.poll()) is None:
            if self.signals.request and not told:
                child.terminate()
                told = True
            time.sleep(0.02)
        if status:
            self._stop_if_asked(f"in step '{name}'")
            status = status if status > 0 else 128 - status
            if self.quiet:
                print(log.read_text()[-3000:], file=sys.stderr)
            print(
                f"error: step '{name}' ended with status {status} (see above); the same command continues from here",
                file=sys.stderr,
            )
            raise SystemExit(status)


def write(path: Path, text: str) -> None:
    with atomic_write(path, "w") as file:
        file.write(text)
