"""What a preparation works on and reports: units, what came of them, and the report."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets.raw.readings import Exclusion, digest_of

Stamp = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Unit:
    """What is made or kept as a whole: an image with all that belongs to it.

    Attributes:
        key: names it; holds no `*`.
        origin: `origin_of` all that decides its files, beside the options of the tree.
        task: what its maker needs.
        sources: files that may not change while it is made.
        stamps: of `sources`, as they were when `origin` was computed.
    """

    key: str
    origin: str
    task: Any = None
    sources: tuple[str, ...] = ()
    stamps: tuple[Stamp, ...] = ()


def stamp(source: str | os.PathLike) -> Stamp:
    """(size, time of change in ns, time of change of the status in ns) of a file; (-1, 0, 0) if it is missing.

    Nobody can set the last one back: it reveals a file that replaced another with its old times kept."""
    try:
        status = os.stat(source)
    except OSError:
        return -1, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def origin_of(*parts: object) -> str:
    """Digest of anything that JSON can hold."""
    return digest_of(json.dumps(parts, sort_keys=True).encode())


@dataclass
class Made:
    """What came of one unit.

    Attributes:
        files: paths in the tree, written below `TreeMaking.staging`; none: the unit has no place in the tree.
        note: JSON: what its entries in the index need, and in "significant" the significant patches of each map.
        exclusions: what was left out of it. Such a unit is made again by the next run, whatever its origin: it may
            have been mended by other means than its sources.
    """

    files: list[str] = field(default_factory=list)
    note: dict[str, Any] = field(default_factory=dict)
    exclusions: list[Exclusion] = field(default_factory=list)


@dataclass
class Report:
    """What a preparation has found, and what came of it.

    Attributes:
        units: of the tree.
        counts: the table of the report, in its order.
        exclusions: what is left out.
        notes: lines below the table.
        record: what the tree's record has beside these: JSON, and paths.
    """

    units: list[Unit]
    counts: dict[str, int | float]
    exclusions: list[Exclusion] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def faults(self) -> list[Exclusion]:
        return [exclusion for exclusion in self.exclusions if exclusion.is_fault]

    def count(self, counted: Mapping[str, int], significant: Iterable[int]) -> None:
        """Add each reason for leaving out, `counted`, and the mean of the maps' significant patches; fill the record."""
        self.exclusions.sort(key=lambda exclusion: (exclusion.id, exclusion.reason))
        reasons = Counter(f"- {exclusion.reason}" for exclusion in self.exclusions)
        self.counts |= dict(sorted(reasons.items())) | dict(counted)
        if numbers := list(significant):
            self.counts["mean significant patches of 196"] = round(sum(numbers) / len(numbers), 2)
        left_out = [asdict(exclusion) for exclusion in self.exclusions]
        self.record |= {"counts": dict(self.counts), "notes": self.notes, "left_out": left_out}

    def __str__(self) -> str:
        width = max(map(len, self.counts))
        lines = [f"{name:<{width}}  {value:>8,}" for name, value in self.counts.items()]
        lines += [f"note: {note}" for note in self.notes]
        if listed := [f"  {exclusion}" for exclusion in self.exclusions if exclusion.detail]:
            lines += ["left out:", *listed]
        return "\n".join(lines)

    def conclude(self, what: str, done: str, *, accept_damaged: bool = False) -> int:
        """Print it; then the number of `what` left out for damage, or `done`. Returns the program's exit status."""
        print(self)
        if self.faults:
            print(f"{len(self.faults)} {what} left out for damaged input, listed above", file=sys.stderr)
            if not accept_damaged:
                return 1
        print(done)
        return 0
