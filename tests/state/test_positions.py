"""Positions: outcomes add up; ranges join and part without losing an offset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.positions import Range, Source, from_json, merge_ranges, split_range, to_json

CLICKS = Source("ab" * 16, 2)
counts = st.integers(0, 50)


@st.composite
def ranges(draw: st.DrawFn, source: Source = CLICKS) -> Range:
    first, rows, dead, filtered, absent = draw(st.tuples(counts, counts, counts, counts, counts))
    return Range(source, first, first + rows + dead + filtered + absent, rows, dead, filtered, absent)


@pytest.mark.parametrize(
    ("next_offset", "rows", "dead"),
    [(3, 1, 1), (1, 1, 1), (1, 2, -1)],
    ids=["an offset without an outcome", "an offset with two", "a negative count hides a difference"],
)
def test_outcomes_that_do_not_add_up_are_refused(next_offset: int, rows: int, dead: int) -> None:
    with pytest.raises(ValueError, match="do not add up"):
        Range(CLICKS, 0, next_offset, rows=rows, dead=dead)


@given(ranges(), ranges())
def test_merging_adjacent_ranges_keeps_each_outcome(earlier: Range, other: Range) -> None:
    later = Range(CLICKS, earlier.next, earlier.next + other.next - other.first, **other.outcomes)
    merged = merge_ranges(earlier, later)
    assert (merged.first, merged.next) == (earlier.first, later.next)
    assert merged.outcomes == {name: earlier.outcomes[name] + later.outcomes[name] for name in merged.outcomes}


@pytest.mark.parametrize(("source", "first"), [(CLICKS, 3), (Source("cd" * 16, 2), 2)], ids=["hole", "recreated topic"])
def test_ranges_that_are_not_adjacent_do_not_merge(source: Source, first: int) -> None:
    with pytest.raises(ValueError, match="not adjacent"):
        merge_ranges(Range(CLICKS, 0, 2, rows=2), Range(source, first, first + 1, rows=1))


@given(ranges(), st.data())
def test_both_parts_of_a_split_range_make_the_whole(whole: Range, data: st.DataObject) -> None:
    at = data.draw(st.integers(whole.first, whole.next))
    others = whole.next - whole.first - whole.rows
    fewest, most = max(0, at - whole.first - others), min(whole.rows, at - whole.first)
    before, after = split_range(whole, at, data.draw(st.integers(fewest, most)))
    assert before.next == after.first == at
    assert merge_ranges(before, after) == whole


@given(ranges())
def test_a_range_survives_json(part: Range) -> None:
    assert from_json(to_json(part)) == part


def test_a_bucket_survives_json_and_text() -> None:
    source = Source("cd" * 16, 7, 3, 16)
    assert from_json(to_json(Range(source, 1, 1))).source == source
    assert Source.parse(str(source)) == source


@pytest.mark.parametrize("change", [{"topic_id": "clicks"}, {"first": "0"}, {"rows": None}, {"next": True}])
def test_a_damaged_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"topic_id|integer"):
        from_json(to_json(Range(CLICKS, 0, 1, rows=1)) | change)
