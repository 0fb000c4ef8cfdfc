"""Lists as rows: every id and count comes back, and so do the bits of a row, the signs of its zeros among them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.ranking.transitions import FOLLOWERS, SIGN_BYTES, WIDTH, Lists, from_stored, pack, signs_of, unpack

MOST_ID = (1 << 64) - 1
MOST_COUNT = (1 << 24) - 1

followers = st.lists(
    st.tuples(st.integers(1, MOST_ID), st.integers(1, MOST_COUNT)), max_size=FOLLOWERS, unique_by=lambda one: one[0]
)


def held(*lists: list[tuple[int, int]]) -> Lists:
    made = Lists.empty(len(lists))
    for place, one in enumerate(lists):
        for k, (follower, count) in enumerate(one):
            made.ids[place, k], made.counts[place, k] = follower, count
    return made


def plain(*lists: list[tuple[int, int]]) -> np.ndarray:
    return pack(held(*lists), np.zeros((len(lists), SIGN_BYTES), np.uint8))


@settings(deadline=None)
@given(st.lists(followers, max_size=4), st.integers(0, 2**32))
def test_lists_and_the_bits_of_their_rows_come_back(lists: list[list[tuple[int, int]]], seed: int) -> None:
    signs = np.random.default_rng(seed).integers(0, 256, (len(lists), SIGN_BYTES)).astype(np.uint8)
    rows = pack(held(*lists), signs)
    again = unpack(rows)
    np.testing.assert_array_equal(again.counts, held(*lists).counts)
    np.testing.assert_array_equal(again.ids, held(*lists).ids)
    assert pack(again, signs_of(rows)).tobytes() == rows.tobytes()
    # No sign says anything, and none stands before anything but a zero behind the list's end.
    np.testing.assert_array_equal(rows, plain(*lists))
    assert not np.signbit(rows[rows != 0]).any()


def test_a_row_is_what_0_1_0_wrote() -> None:
    row = plain([((5 << 42) + (6 << 21) + 7, 9), (MOST_ID, 1)])[0]
    expected = np.zeros((4, FOLLOWERS))
    expected[:, 0] = 9, 5, 6, 7
    expected[:, 1] = 1, (1 << 22) - 1, (1 << 21) - 1, (1 << 21) - 1
    assert row.dtype == np.float32 and row.tobytes() == expected.astype("<f4").tobytes()


@pytest.mark.parametrize("corner", [MOST_ID, 1, 1 << 63, 1 << 42, (1 << 42) - 1, 1 << 21, (1 << 21) - 1])
def test_the_smallest_and_the_largest_part_of_an_id_come_back(corner: int) -> None:
    assert unpack(plain([(corner, 3)])).ids[0, :2].tolist() == [corner, 0]


def test_a_sign_stands_where_it_stood_and_goes_with_its_zero() -> None:
    rows = plain([(8, 4)], [])
    rows[0, FOLLOWERS - 1] = rows[0, 2 * FOLLOWERS + 1] = rows[1, 0] = -0.0
    signs = signs_of(rows)
    assert pack(unpack(rows), signs).tobytes() == rows.tobytes()
    longer = pack(held([(8, 4), (9, 3)], [(9, 3)]), signs)
    assert np.argwhere(np.signbit(longer)).tolist() == [[0, FOLLOWERS - 1]]


def test_a_stored_row_of_another_width_is_as_none() -> None:
    row = plain([(8, 4)])
    narrow = row[:, : WIDTH - 4].tobytes()
    at, lists = from_stored([narrow, row.tobytes(), None, row.tobytes()])
    assert at.tolist() == [0, 1, 0, 2]
    assert lists.ids[:, 0].tolist() == [0, 8, 8] and not lists.counts[0].any()
    at, lists = from_stored([])
    assert at.size == 0 and not lists.counts.any()
