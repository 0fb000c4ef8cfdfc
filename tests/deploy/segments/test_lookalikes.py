"""Lookalikes: similarities and the precision curve are what their definitions say, and members are left out."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.segments.lookalikes import HELD_BACK, UserVectors, nearest, precision_curve, similarities


def made(seed: int, users: int, width: int = 4) -> tuple[UserVectors, Any]:
    """Users whose vectors are drawn, of whom some are members."""
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.choice(10_000, users, replace=False)).astype(np.uint64)
    vectors = rng.normal(0, 1, (users, width)).astype(np.float32)
    members = rng.random(users) < 0.5
    members[0] = True
    return UserVectors(ids, vectors, rng.integers(0, 9, users), 7), members


def cosine(one: Any, other: Any) -> float:
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 30))
def test_a_similarity_is_the_mean_cosine_with_the_members(seed: int, users: int) -> None:
    found, members = made(seed, users)
    vectors = found.vectors.astype(np.float64)
    centred = vectors - vectors.mean(axis=0)
    wanted = [np.mean([cosine(one, other) for other in centred[members]]) for one in centred]
    assert np.allclose(similarities(found.vectors, members), wanted, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 60), most=st.integers(1, 80))
def test_the_nearest_are_no_members_and_in_order(seed: int, users: int, most: int) -> None:
    found, members = made(seed, users)
    near = nearest(found, members, most)
    assert len(near) == min(most, int((~members).sum()))
    assert not {user for user, _ in near} & {*found.users[members].tolist()}
    scores = [score for _, score in near]
    assert scores == sorted(scores, reverse=True)
    others = similarities(found.vectors, members)[~members]
    assert np.allclose(scores, np.sort(others)[::-1][: len(near)])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_precision_curve_counts_members_that_are_held_back(seed: int) -> None:
    found, members = made(seed, 200)
    curve = precision_curve(found, members, (1, 5, 20, 1000))
    held = {user for user, within in zip(found.users.tolist(), members, strict=True) if within and not user % HELD_BACK}
    if len(held) < 10:
        assert curve == []
        return
    given_members = members & ~np.isin(found.users, [*held])
    scores = similarities(found.vectors, given_members)
    order = [place for place in np.argsort(-scores, kind="stable").tolist() if not given_members[place]]
    assert [one.k for one in curve] == [1, 5, 20]
    for one in curve:
        assert one.lookalikes == sum(int(found.users[place]) in held for place in order[: one.k]) / one.k
        assert one.chance == len(held) / len(order)
