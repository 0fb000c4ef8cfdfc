"""Transitions: which categories came next after a category, over all users, and what that says of a user's candidates.

Each category has a list of the FOLLOWERS categories that most often came next, with
counts, itself included. A list is a row of the table `transition`, float32 like
the rows of every table: all values are whole numbers below 2^24, and an id is
three of them.

    count x FOLLOWERS | bits 42.. of the id x FOLLOWERS | bits 21..41 | bits 0..20

The trainer and serving read a list with this one function: of each category of the
user and of each popular one, how often it came next after the user's newest
category; and as candidates of their own the SUCCESSORS categories that came next most
often and are neither. Integers only: the same bits on every machine.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled
from state.compiled.mixing import mix

U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

FOLLOWERS = 64
"""Categories in a list."""

WIDTH = 4 * FOLLOWERS
"""Width of a row of the table."""

SUCCESSORS = 8
"""Candidates that a list gives."""

MOST = 4096
"""Transitions of a list at which all its counts are halved: what came next long ago counts less."""

COLUMNS = ("next_count", "next_share")
"""What is said of a category: how often it came next, and that in 1/256 of all transitions of the list."""

_PART = np.uint64((1 << 21) - 1)
_MOST_COUNT = 65_535


class Succession(NamedTuple):
    """What the lists say of n rows.

    Attributes:
        recent_categories: `[n, L, 2]` uint16, COLUMNS of the user's categories.
        popular: `[n, P, 2]` uint16, of the popular ones.
        ids: `[n, SUCCESSORS]` uint64, the candidates of their own, the most frequent first; 0 where there is none.
        successors: `[n, SUCCESSORS, 2]` uint16, COLUMNS of these.
    """

    recent_categories: U16
    popular: U16
    ids: U64
    successors: U16


@compiled
def identity(row: F32, follower: int) -> np.uint64:
    """The id of one follower in a row, 0 where the list is shorter."""
    high, middle = np.uint64(row[FOLLOWERS + follower]), np.uint64(row[2 * FOLLOWERS + follower])
    return (high << np.uint64(42)) | (middle << np.uint64(21)) | np.uint64(row[3 * FOLLOWERS + follower])


@compiled
def _place(row: F32, follower: int, category: np.uint64, count: int) -> None:
    row[follower] = count
    row[FOLLOWERS + follower] = np.float32(category >> np.uint64(42))
    row[2 * FOLLOWERS + follower] = np.float32((category >> np.uint64(21)) & _PART)
    row[3 * FOLLOWERS + follower] = np.float32(category & _PART)


@compiled
def _swap(row: F32, one: int, other: int) -> None:
    for part in range(4):
        first, second = part * FOLLOWERS + one, part * FOLLOWERS + other
        row[first], row[second] = row[second], row[first]


@compiled
def _count(row: F32, category: np.uint64) -> None:
    """One transition to `category`; the counts stay in descending order.

    In a full list a category that is not in it adds to the last count, and takes
    that place in one of so many cases, so that each count is right on average
    (Ting 2018, Unbiased Space Saving). A hash of category and total chooses.
    """
    at, total = -1, np.float32(0)
    for k in range(FOLLOWERS):
        total += row[k]
        if row[k] == 0 or identity(row, k) == category:
            at = k
            break
    drawn = np.uint64(0)
    if at < 0:
        at = FOLLOWERS - 1
        drawn = mix(category ^ np.uint64(total)) % np.uint64(row[at] + 1)
    if row[at] == 0 or (drawn == 0 and identity(row, at) != category):
        _place(row, at, category, int(row[at]))
    row[at] += 1
    while at > 0 and row[at - 1] < row[at]:
        _swap(row, at - 1, at)
        at -= 1


@compiled
def _record(at: I32, followers: U64, rows: F32) -> None:
    for i in range(at.shape[0]):
        if at[i] == 0 or followers[i] == 0:
            continue
        row = rows[at[i]]
        _count(row, followers[i])
        total = np.float32(0)
        for k in range(FOLLOWERS):
            total += row[k]
        if total >= MOST:
            for k in range(FOLLOWERS):
                row[k] = np.floor(row[k] / 2)
                if row[k] == 0:
                    _place(row, k, np.uint64(0), 0)


def record(at: I32, followers: U64, rows: F32) -> None:
    """Counts transitions, in the order of the rows of a batch.

    Args:
        at: `[n]` int32, the list of each row's newest category before its event; 0 for none.
        followers: `[n]` uint64, the category that came next; 0 for none.
        rows: `[u, WIDTH]` float32 lists, changed. The first is that of no category.

    >>> rows = np.zeros((2, WIDTH), np.float32)
    >>> record(np.array([1, 1, 1], np.int32), np.array([5, 1 << 63, 1 << 63], np.uint64), rows)
    >>> rows[1, :3].tolist(), int(identity(rows[1], 0)) == 1 << 63, int(identity(rows[1], 1))
    ([2.0, 1.0, 0.0], True, 5)
    """
    _record(at, np.ascontiguousarray(followers), rows)


@compiled
def _say(count: np.float32, total: np.float32, out: U16) -> None:
    out[0] = min(int(count), _MOST_COUNT)
    out[1] = int(count) * 256 // (1 + int(total))


@compiled
def _succeed(at: I32, rows: F32, recent_categories: U64, popular: U64, found: Succession) -> None:
    ids = np.zeros(FOLLOWERS, np.uint64)
    # Of each list's followers, which popular category they are.
    ranks = np.empty((rows.shape[0], FOLLOWERS), np.int32)
    known = np.zeros(rows.shape[0], np.uint8)
    for i in range(at.shape[0]):
        if at[i] == 0:
            continue
        row, total, length = rows[at[i]], np.float32(0), 0
        while length < FOLLOWERS and row[length] > 0:
            ids[length] = identity(row, length)
            total += row[length]
            length += 1
        if known[at[i]] == 0:
            known[at[i]] = 1
            for k in range(length):
                ranks[at[i], k] = -1
                for p in range(popular.shape[0]):
                    if popular[p] == ids[k]:
                        ranks[at[i], k] = p
        successors = 0
        for k in range(length):
            own = -1
            for j in range(recent_categories.shape[1]):
                if recent_categories[i, j] == ids[k]:
                    own = j
            rank = ranks[at[i], k]
            if own >= 0:
                _say(row[k], total, found.recent_categories[i, own])
            elif rank >= 0:
                _say(row[k], total, found.popular[i, rank])
            elif successors < SUCCESSORS:
                found.ids[i, successors] = ids[k]
                _say(row[k], total, found.successors[i, successors])
                successors += 1


def succession(at: I32, rows: F32, recent_categories: U64, popular: U64) -> Succession:
    """What the lists of users' newest categories say.

    Args:
        at: `[n]` int32, the list of each user's newest category; 0 for none.
        rows: `[u, WIDTH]` float32 lists. The first is that of no category.
        recent_categories: `[n, L]` uint64, the users' categories, padded with 0.
        popular: `[P]` uint64, padded with 0.

    >>> rows = np.zeros((2, WIDTH), np.float32)
    >>> record(np.ones(6, np.int32), np.array([7, 8, 7, 9, 9, 9], np.uint64), rows)
    >>> found = succession(np.array([1], np.int32), rows, np.array([[7, 6]], np.uint64), np.array([8], np.uint64))
    >>> found.recent_categories.tolist(), found.popular.tolist(), found.ids[0, :2].tolist(), found.successors[0, 0].tolist()
    ([[[2, 73], [0, 0]]], [[[1, 36]]], [9, 0], [3, 109])
    """
    count, slots = recent_categories.shape
    found = Succession(
        np.zeros((count, slots, len(COLUMNS)), np.uint16),
        np.zeros((count, popular.size, len(COLUMNS)), np.uint16),
        np.zeros((count, SUCCESSORS), np.uint64),
        np.zeros((count, SUCCESSORS, len(COLUMNS)), np.uint16),
    )
    _succeed(at, rows, np.ascontiguousarray(recent_categories), popular, found)
    return found
