"""A user's arm is theirs: nested shares, as large as they say, and nothing to do with other rollouts, blocks of sums or shares of the stream."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from state.events.identity import Salt, user_id
from state.rollouts.assignment import LIVE, TRIAL, arm_of, place_of
from state.statistics.confidence_sequence import BLOCKS

SALT = Salt(b"0123456789abcdef")
USERS = [user_id(SALT, f"user-{n}") for n in range(20_000)]
PLACES = np.array([place_of(SALT, "wider", user) for user in USERS])


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5])
def test_an_arm_is_as_large_as_its_share(share: float) -> None:
    chance = 4 * float(np.sqrt(share * (1 - share) / len(USERS)))
    assert abs(np.less(PLACES, share).mean() - share) < chance


def test_who_is_in_at_five_percent_is_in_at_fifty() -> None:
    arms = [[arm_of(place, share) for place in PLACES] for share in (0.0, 0.01, 0.05, 0.5, 1.0)]
    for fewer, more in itertools.pairwise(arms):
        assert all(then == TRIAL for now, then in zip(fewer, more, strict=True) if now == TRIAL)
    assert {*arms[0]} == {LIVE} and {*arms[-1]} == {TRIAL}


def test_places_of_another_rollout_salt_or_hash_tell_nothing() -> None:
    others = [
        [place_of(SALT, "deeper", user) for user in USERS],
        [place_of(Salt(b"another salt, 16"), "wider", user) for user in USERS],
        [user % BLOCKS for user in USERS],
        [user % 64 for user in USERS],
    ]
    for other in others:
        assert abs(np.corrcoef(PLACES, other)[0, 1]) < 4 / np.sqrt(len(USERS))
