"""Transitions: which categories came next after a category, over all users, as features and candidates.

Each category has a list of the FOLLOWERS categories that most often came next, with counts. The category itself may be
in it. The trainer and serving read a list with `succession`. For each category of the user and each popular one, it
returns how often that category came next after the user's newest category. The SUCCESSORS most frequent followers that
are neither become additional candidates. It uses integers only, so the bits are the same on every machine.

In versions and in serving's row store, a list is a row of the table `transition`, float32 like the rows of every table.
All values are whole numbers below 2^24, and an id takes three of them:

    count x FOLLOWERS | bits 42.. of the id x FOLLOWERS | bits 21..41 | bits 0..20

Slots after a list's end hold zeros, which may be negative: a new row holds numbers between -1 and 1 times 0, like an
embedding that is initialised with zero. The signs carry no information. But digests and `verify` compare bits, so the
trainer keeps the signs together with its lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, inlined, layout, mix, read_only

U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
Flags = NDArray[np.bool_]

FOLLOWERS = 64
"""Categories in a list."""

SUCCESSORS = 8
"""Number of candidates that a list adds."""

MOST = 4096
"""When a list has this many transitions, all its counts are halved, so that old transitions count less."""

COLUMNS = ("next_count", "next_share")
"""Features of a category: how often it came next, and that in 1/256 of all transitions of the list."""

_MOST_COUNT = 65_535


@layout("i4[:, ::1], u8[:, ::1]")
class Lists(NamedTuple):
    """Transition lists of n categories.

    Attributes:
        counts: `[n, FOLLOWERS]` int32, how often each follower came next, in descending order; 0 behind the list's end.
        ids: `[n, FOLLOWERS]` uint64, the followers; 0 behind the list's end.
    """

    counts: I32
    ids: U64

    @classmethod
    def empty(cls, count: int) -> Lists:
        """Lists without any counts."""
        return cls(np.zeros((count, FOLLOWERS), np.int32), np.zeros((count, FOLLOWERS), np.uint64))


@layout("u2[:, :, ::1], u2[:, :, ::1], u8[:, ::1], u2[:, :, ::1]")
class Succession(NamedTuple):
    """Transition features and candidates of n rows.

    Attributes:
        recent_categories: `[n, L, 2]` uint16, COLUMNS of the user's categories.
        popular: `[n, P, 2]` uint16, COLUMNS of the popular categories.
        ids: `[n, SUCCESSORS]` uint64, the additional candidates, the most frequent first; 0 for none.
        successors: `[n, SUCCESSORS, 2]` uint16, COLUMNS of these.
    """

    recent_categories: U16
    popular: U16
    ids: U64
    successors: U16


@inlined
def _count(counts: I32, ids: U64, category: np.uint64) -> None:
    """Counts one transition to `category` in one list and keeps the counts in descending order.

    When the list is full and lacks the category, the last count is incremented. The category replaces the last entry
    with probability 1 / new count, which keeps each count unbiased (Ting 2018, Unbiased Space Saving). A hash of
    category and total makes the choice.
    """
    at, total = -1, 0
    for k in range(FOLLOWERS):
        total += counts[k]
        if counts[k] == 0 or ids[k] == category:
            at = k
            break
    drawn = np.uint64(0)
    if at < 0:
        at = FOLLOWERS - 1
        drawn = mix(category ^ np.uint64(total)) % np.uint64(counts[at] + 1)
    if drawn == 0:
        ids[at] = category
    counts[at] += 1
    while at > 0 and counts[at - 1] < counts[at]:
        counts[at - 1], counts[at] = counts[at], counts[at - 1]
        ids[at - 1], ids[at] = ids[at], ids[at - 1]
        at -= 1


@compiled("i4[::1], u8[::1], Lists, bool[::1]")
def _record(at: I32, followers: U64, lists: Lists, halved: Flags) -> None:
    for i in range(at.shape[0]):
        if at[i] == 0 or followers[i] == 0:
            continue
        counts, ids = lists.counts[at[i]], lists.ids[at[i]]
        _count(counts, ids, followers[i])
        total = 0
        for k in range(FOLLOWERS):
            total += counts[k]
        if total >= MOST:
            halved[i] = True
            for k in range(FOLLOWERS):
                counts[k] //= 2
                if counts[k] == 0:
                    ids[k] = 0


def record(at: I32, followers: U64, lists: Lists) -> Flags:
    """Counts transitions, in the order of the rows of a batch.

    Args:
        at: `[n]` int32, the list of each row's newest category before its event; 0 for none.
        followers: `[n]` uint64, the category that came next; 0 for none.
        lists: Updated in place. List 0 is that of no category.

    Returns:
        `[n]` bool, where the counts of the row's list were halved.
    """
    halved = np.zeros(at.size, np.bool_)
    _record(at, np.ascontiguousarray(followers), lists, halved)
    return halved


@inlined
def _say(count: int, total: int, out: U16) -> None:
    out[0] = min(count, _MOST_COUNT)
    out[1] = count * 256 // (1 + total)


@inlined
def _find_all(ids: U64, among: U64, found: I32) -> None:
    """Finds the last index of each of `[n]` ids in `among`, -1 if absent. The inner loop is vectorised."""
    for k in range(ids.shape[0]):
        found[k] = -1
    for j in range(among.shape[0]):
        if among[j] != np.uint64(0):
            for k in range(ids.shape[0]):
                found[k] = j if ids[k] == among[j] else found[k]


@compiled("i4[::1], i4[::1], Lists, const(u8[:, ::1]), u8[::1], Succession")
def _succeed(at: I32, rows: I32, lists: Lists, recent_categories: U64, popular: U64, found: Succession) -> None:
    # For each list: the index of each follower among the popular categories.
    ranks = np.empty((rows.shape[0], FOLLOWERS), np.int32)
    # For one row: the index of each follower among the user's categories.
    owns = np.empty(FOLLOWERS, np.int32)
    known = np.zeros(rows.shape[0], np.uint8)
    for i in range(at.shape[0]):
        if at[i] == 0:
            continue
        counts, ids, total, length = lists.counts[rows[at[i]]], lists.ids[rows[at[i]]], 0, 0
        while length < FOLLOWERS and counts[length] > 0:
            total += counts[length]
            length += 1
        if known[at[i]] == 0:
            known[at[i]] = 1
            _find_all(ids[:length], popular, ranks[at[i]])
        _find_all(ids[:length], recent_categories[i], owns)
        successors = 0
        for k in range(length):
            own, rank = owns[k], ranks[at[i], k]
            if own >= 0:
                _say(int(counts[k]), total, found.recent_categories[i, own])
            elif rank >= 0:
                _say(int(counts[k]), total, found.popular[i, rank])
            elif successors < SUCCESSORS:
                found.ids[i, successors] = ids[k]
                _say(int(counts[k]), total, found.successors[i, successors])
                successors += 1


def succession(at: I32, lists: Lists, recent_categories: U64, popular: U64, rows: I32 | None = None) -> Succession:
    """Reads transition features and candidates from the lists of the users' newest categories.

    Args:
        at: `[n]` int32, the list of each user's newest category; 0 for none.
        lists: The lists. List 0 is that of no category.
        recent_categories: `[n, L]` uint64, the users' categories, padded with 0.
        popular: `[P]` uint64, padded with 0.
        rows: `[u]` int32, the lists that `at` indexes, first that of no category; all lists by default.

    >>> lists = Lists.empty(2)
    >>> _ = record(np.ones(6, np.int32), np.array([7, 8, 7, 9, 9, 9], np.uint64), lists)
    >>> found = succession(np.array([1], np.int32), lists, np.array([[7, 6]], np.uint64), np.array([8], np.uint64))
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
    if rows is None:
        rows = np.arange(len(lists.ids), dtype=np.int32)
    _succeed(at, rows, lists, read_only(recent_categories), popular, found)
    return found


F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

WIDTH = 4 * FOLLOWERS
"""Width of a row."""

SIGN_BYTES = WIDTH // 8
"""Bytes of the signs of a row's zeros, a bit for each value."""

_PART = np.uint64((1 << 21) - 1)


@compiled("Lists, u1[:, ::1], f4[:, ::1]")
def _pack(lists: Lists, signs: U8, rows: F32) -> None:
    for i in range(rows.shape[0]):
        for k in range(FOLLOWERS):
            count, category = lists.counts[i, k], lists.ids[i, k]
            if count == 0:
                for place in range(k, WIDTH, FOLLOWERS):
                    negative = (signs[i, place >> 3] >> (7 - (place & 7))) & 1
                    rows[i, place] = np.float32(-0.0) if negative else np.float32(0.0)
                continue
            rows[i, k] = count
            rows[i, FOLLOWERS + k] = np.float32(category >> np.uint64(42))
            rows[i, 2 * FOLLOWERS + k] = np.float32((category >> np.uint64(21)) & _PART)
            rows[i, 3 * FOLLOWERS + k] = np.float32(category & _PART)


def pack(lists: Lists, signs: U8) -> F32:
    """Packs n lists and their `signs`, `[n, SIGN_BYTES]` uint8 from `signs_of`, into rows, `[n, WIDTH]` float32.

    >>> lists = Lists.empty(1)
    >>> lists.counts[0, 0], lists.ids[0, 0] = 9, (3 << 42) + (2 << 21) + 1
    >>> rows = pack(lists, np.full((1, SIGN_BYTES), 255, np.uint8))
    >>> rows[0, ::FOLLOWERS].tolist(), rows[0, 1::FOLLOWERS].tolist()
    ([9.0, 3.0, 2.0, 1.0], [-0.0, -0.0, -0.0, -0.0])
    """
    rows = np.empty((len(lists.counts), WIDTH), np.float32)
    _pack(lists, signs, rows)
    return rows


def signs_of(rows: F32) -> U8:
    """The signs of the values of `[n, WIDTH]` rows, `[n, SIGN_BYTES]` uint8. Only zeros may be negative."""
    return np.packbits(np.signbit(rows), axis=1)


@compiled("f4[:, ::1], Lists")
def _unpack(rows: F32, lists: Lists) -> None:
    for i in range(rows.shape[0]):
        for k in range(FOLLOWERS):
            high, middle = np.uint64(rows[i, FOLLOWERS + k]), np.uint64(rows[i, 2 * FOLLOWERS + k])
            lists.counts[i, k] = np.int32(rows[i, k])
            lists.ids[i, k] = (
                (high << np.uint64(42)) | (middle << np.uint64(21)) | np.uint64(rows[i, 3 * FOLLOWERS + k])
            )


def unpack(rows: F32) -> Lists:
    """Unpacks `[n, WIDTH]` float32 rows into lists."""
    lists = Lists.empty(len(rows))
    _unpack(np.ascontiguousarray(rows), lists)
    return lists


def from_stored(stored: Sequence[bytes | None]) -> tuple[I32, Lists]:
    """Unpacks the lists of n categories that were read from the row store, the bytes of each row or None.

    Returns the index of each category's list, `[n]` int32, 0 for none, and the lists. List 0 is that of no category. A
    row of another width, from a release with other lists, counts as None.
    """
    at, rows = [], [bytes(4 * WIDTH)]
    for row in stored:
        if row is not None and len(row) == 4 * WIDTH:
            at.append(len(rows))
            rows.append(row)
        else:
            at.append(0)
    return np.array(at, np.int32), unpack(np.frombuffer(bytearray().join(rows), "<f4").reshape(-1, WIDTH))
