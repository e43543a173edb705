"""Joining tables and files by identifier, so that a join that fails never looks like absence."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class IdMatch:
    """What became of identifiers that should be among known ones.

    `found`: each that is, and the known one it stands for. `completed`: those of them that are not
    written as the known one is. `ambiguous`: each that could be several, and these. `unknown`: the rest.
    """

    found: dict[str, str] = field(default_factory=dict)
    completed: dict[str, str] = field(default_factory=dict)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def match_ids(written: Iterable[str], known: Collection[str], *, cut_off: bool = False) -> IdMatch:
    """Which of the `known` identifiers each `written` one is: the same; else the only one that differs
    in letter case alone; else, with `cut_off`, the only one that begins with it, in any case."""
    match = IdMatch()
    known = set(known)
    folded: dict[str, list[str]] = {}
    for name in sorted(known):
        folded.setdefault(name.casefold(), []).append(name)
    keys = sorted(folded)
    for name in dict.fromkeys(written):
        if name in known:
            match.found[name] = name
            continue
        key = name.casefold()
        candidates = folded.get(key, [])
        if not candidates and cut_off and key:
            start = bisect_left(keys, key)
            while start < len(keys) and keys[start].startswith(key):
                candidates = [*candidates, *folded[keys[start]]]
                start += 1
        if len(candidates) == 1:
            match.found[name] = match.completed[name] = candidates[0]
        elif candidates:
            match.ambiguous[name] = candidates
        else:
            match.unknown.append(name)
    return match
