"""datasets/raw/ids.py against a plain search through all known identifiers."""

from hypothesis import given
from hypothesis import strategies as st

from datasets.raw.ids import match_ids

NAMES = st.text("aAbB1-", min_size=0, max_size=4)


@given(st.lists(NAMES), st.lists(NAMES.filter(bool), max_size=12), st.booleans())
def test_equals_a_plain_search(written, known, cut_off):
    match = match_ids(written, known, cut_off=cut_off)
    assert set(match.found) | set(match.ambiguous) | set(match.unknown) == set(written)
    assert len(match.found) + len(match.ambiguous) + len(match.unknown) == len(set(written))
    for name in set(written):
        same = {other for other in known if other == name}
        folded = {other for other in known if other.casefold() == name.casefold()}
        begins = {other for other in known if cut_off and name and other.casefold().startswith(name.casefold())}
        candidates = same or folded or begins
        if len(candidates) == 1:
            assert {match.found[name]} == candidates and (name in match.completed) == (not same)
        elif candidates:
            assert set(match.ambiguous[name]) == candidates
        else:
            assert name in match.unknown
