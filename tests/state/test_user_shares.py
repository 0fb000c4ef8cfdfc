"""Shares of users: what a setting means, and which users belong to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.positions import share_of
from state.user_shares import ALL, SHARES, UserShares


@given(st.sets(st.integers(0, SHARES - 1), min_size=1), st.lists(st.integers(1, (1 << 64) - 1), max_size=20))
def test_the_text_of_shares_reads_back_and_their_users_are_those_of_share_of(
    shares: set[int], users: list[int]
) -> None:
    held = UserShares.of(shares)
    assert UserShares.parse(str(held)) == held and {*held} == shares
    pseudonyms = np.array(users, np.uint64)
    wanted = [share in shares for share in share_of(pseudonyms).tolist()]
    assert held.has(pseudonyms).tolist() == wanted == [user in held for user in users]


@pytest.mark.parametrize("text", ["64", "5-3", "a", "1,,2", "-1", "0-64"])
def test_shares_that_do_not_exist_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="names no shares"):
        UserShares.parse(text)


def test_an_empty_text_is_all_users() -> None:
    assert UserShares.parse("") == UserShares.parse("0-63") == ALL
    assert ALL.covers(UserShares.parse("7")) and not UserShares.parse("0-62").covers(ALL)
