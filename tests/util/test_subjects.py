"""One person under several spellings."""

from __future__ import annotations

import pytest

from util.subjects import overlap_note, subject_marks
from util.tables import same_subjects


def test_spellings_of_one_subject():
    names = ["P3", "p3 ", "7", "007", "7.0", "70", "p10000032", "10000032", "p7", "x.0", "x", "0", "00"]
    spelt, merged = same_subjects(names)
    assert spelt == ["P3", "P3", "7", "7", "7", "70", "p10000032", "p10000032", "p7", "x.0", "x", "0", "0"]
    assert merged == ["'P3' and 'p3 '", "'7' and '007'", "'7' and '7.0'", "'p10000032' and '10000032'", "'0' and '00'"]


def test_marks_tell_subjects_and_studies_apart():
    assert len(subject_marks(["a", "b", "a"], "nih")) == 2
    assert not set(subject_marks(["a"], "nih")) & set(subject_marks(["a"], "rsna"))


@pytest.mark.parametrize(
    ("trained_on", "study", "note"),
    [
        ("nih", "nih", "2 of 3 test subjects were in the training or pretraining of ours"),
        ("nih", "hospital", ""),
        ("nih", "", "is not known"),  # a csv whose study nobody named
        ("", "nih", "is not known"),
        (None, "", ""),  # weights that no subject is known of
    ],
)
def test_test_subjects_that_trained_a_model_are_counted(trained_on, study, note):
    seen = [] if trained_on is None else subject_marks(["1", "02", "9"], trained_on)
    found = overlap_note("ours", seen, ["1", "2", "3", "3"], study)
    assert note in found and bool(note) == bool(found)
