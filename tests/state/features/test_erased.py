"""What an erasure names: users up to a place, in batches, in histories, and in the mask that every part asks."""

from __future__ import annotations

import numpy as np

from state.features.erased import EVERYTHING, Erased, MaskedUsers
from state.features.mask import ClickColumns, Mask
from state.features.spec import EVENT, FeatureSpec
from state.positions import Range, Source
from tests.vectors import vectorise

OLD, NOW = Source("0000002a" + "0" * 24, 3), Source("0000002b" + "0" * 24, 0)
RANGES = (Range(NOW, 90, 110, absent=20), Range(OLD, 0, 9, absent=9))
GONE = Erased.NOBODY.and_also(
    MaskedUsers.of([7, 9]), [(NOW.topic, 0, 100), (OLD.topic, 3, EVERYTHING)], generation=4, at_ms=5
)


def rows(erased: Erased, users: list[int], source: list[int], offsets: list[int]) -> list[bool]:
    places = np.array(source, np.uint16), np.array(offsets, np.int64)
    found: list[bool] = erased.rows(np.array(users, np.uint64), *places, RANGES).tolist()
    none, now = np.zeros(len(users), np.uint64), np.zeros(len(users), np.int64)
    as_mask = Mask(erased=erased).rows(ClickColumns(np.array(users, np.uint64), none, none, now, *places), RANGES)
    assert as_mask.tolist() == found
    return found


def test_rows_of_an_erased_user_are_gone_up_to_the_place_and_nobody_elses() -> None:
    assert rows(GONE, [7, 7, 9, 8, 7], [0, 0, 0, 0, 1], [99, 100, 98, 98, 5]) == [True, False, True, False, True]


def test_a_user_who_is_erased_again_is_gone_up_to_the_later_place() -> None:
    again = GONE.and_also(MaskedUsers.of([7]), [(NOW.topic, 0, 105)], generation=6, at_ms=7)
    assert rows(again, [7, 9, 7], [0, 0, 0], [104, 104, 105]) == [True, False, False]
    assert [again.hides(7, 1), again.hides(9, 1), again.hides(7, 2)] == [True, False, False]
    assert (again.after(1).last, again.up_to(1)) == (2, GONE)


def test_a_topic_made_anew_has_nothing_that_is_gone() -> None:
    later = (Range(Source("0000002c" + "0" * 24, 0), 0, 9, absent=9),)
    found = GONE.rows(np.array([7], np.uint64), np.zeros(1, np.uint16), np.array([3], np.int64), later)
    assert not found.any()


def test_windows_are_those_of_a_history_without_what_is_gone() -> None:
    history = np.zeros(6, EVENT)
    history["at_ms"], history["category"] = 1000 * np.arange(6), np.arange(6) + 1
    history["topic"], history["offset"] = NOW.topic, 97 + np.arange(6)
    spec = FeatureSpec()
    told = vectorise(history, 9_000, None, Mask(erased=GONE), spec, user=7)
    fresh = vectorise(history[3:], 9_000, None, Mask.NONE, spec, user=7)
    others = vectorise(history, 9_000, None, Mask(erased=GONE), spec, user=8)
    pairs: zip[tuple[np.ndarray, np.ndarray]] = zip(told, fresh, strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    assert not np.array_equal(told.recent_categories, others.recent_categories)
    assert Mask(erased=GONE).events(history, 7).tolist() == [True] * 3 + [False] * 3


def test_a_mask_with_erasures_is_read_as_it_was_written_and_prints_no_pseudonym() -> None:
    mask = Mask(9, times=((1, 2),), users=MaskedUsers.of([3]), erased=GONE.and_also(MaskedUsers.of([1]), [], 8, 9))
    assert Mask.from_bytes(mask.to_bytes()) == mask
    assert Mask.from_bytes(Mask(1, users=MaskedUsers.of([3])).to_bytes()).users == MaskedUsers.of([3])
    assert "7" not in repr(Erased(GONE.entries))
