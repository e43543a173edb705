"""One person under several spellings."""

from __future__ import annotations

from util.subjects import same_subjects, subject_marks


def test_spellings_of_one_subject():
    names = ["P3", "p3 ", "7", "007", "7.0", "70", "p10000032", "10000032", "p7", "x.0", "x", "0", "00"]
    spelt, merged = same_subjects(names)
    assert spelt == ["P3", "P3", "7", "7", "7", "70", "p10000032", "p10000032", "p7", "x.0", "x", "0", "0"]
    assert merged == ["'P3' and 'p3 '", "'7' and '007'", "'7' and '7.0'", "'p10000032' and '10000032'", "'0' and '00'"]


def test_marks_tell_subjects_and_studies_apart():
    assert len(subject_marks(["a", "b", "a"], "nih")) == 2
    assert not set(subject_marks(["a"], "nih")) & set(subject_marks(["a"], "rsna"))
