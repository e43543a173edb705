"""Progress of long work with rate and time left: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Counts what is done of `total`; a context manager. Silent unless `enabled`.

    Args:
        what: what is being done, e.g. "encoding".
        unit: what is counted, e.g. "images".
        done: of an earlier start.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, enabled: bool = True):
        self.what, self.total, self.unit, self.done, self.enabled = what, total, unit, done, enabled
        self._began = self._shown = time.monotonic()
        self._first = done
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def add(self, count: int, note: str = "") -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            self._bar.set_postfix_str(note, refresh=False)
        elif time.monotonic() - self._shown >= SECONDS_BETWEEN_LINES:
            rate = (self.done - self._first) / (time.monotonic() - self._began)
            self.show(f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f}/s", note)

    def show(self, text: str, note: str = "") -> None:
        """Show this text now, with the time left."""
        self._shown = time.monotonic()
        seconds = (self._shown - self._began) / max(self.done - self._first, 1)
        left = timedelta(seconds=round((self.total - self.done) * seconds))
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=True)
        elif self.enabled:
            print(f"{text}, left {left}  {note}".rstrip(), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
