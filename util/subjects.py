"""Which names mean the same person, so that nobody stands on both sides of a split under two spellings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable

MIMIC = "mimic"  # the study whose subjects every processed tree has
UNNAMED = "unnamed"  # the mark of all subjects of a study that has no name

_NUMBER = re.compile(r"0*(\d+)(?:\.0*)?")  # 7, 007 and the 7.0 that spreadsheets make of it
_MIMIC = re.compile(r"p(?=\d{5,})")  # MIMIC's folders are called p10000032 where its tables say 10000032


def subject_key(name: str) -> str:
    """What all spellings of a subject have in common.

    Names that differ only in blanks around them, letter case, leading zeros, ".0" behind a number or MIMIC's "p" before
    one are one subject. Joining two subjects costs nothing; splitting one puts a patient in two parts.
    """
    bare = _MIMIC.sub("", name.strip().casefold())
    number = _NUMBER.fullmatch(bare)
    return number[1] if number else bare


def subject_marks(subjects: Iterable[str], study: str) -> list[str]:
    """A short digest of each subject of a study, once, in order: enough to tell later that a model has seen a subject,
    without the file naming anybody. If the study has no name ("") one mark stands for all."""
    return sorted({subject_mark(name, study) for name in subjects}) if study else [UNNAMED]


def overlap_note(name: str, seen: Collection[str], subjects: Iterable[str], study: str) -> str:
    """What to know of the results of the model `name`, trained on the subjects with the marks `seen`, on test subjects of
    a study; "" if they share none."""
    subjects = set(subjects)
    known = len(set(seen) & set(subject_marks(subjects, study))) if study else 0
    if known:
        return (
            f"warning: {known} of {len(subjects)} test subjects were in the training or pretraining of {name}, so its "
            "results are too good; judge it on others"
        )
    if seen and (not study or UNNAMED in seen):
        return (
            f"warning: whether test subjects were in the training or pretraining of {name} is not known; name the study "
            "that a csv's subjects are of by --study, in training too"
        )
    return ""


def subject_mark(name: str, study: str) -> str:
    """The digest of one subject, the same for all its spellings."""
    return hashlib.sha256(f"{study} {subject_key(name)}".encode()).hexdigest()[:16]
