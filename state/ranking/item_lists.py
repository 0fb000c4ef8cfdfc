"""Lists of items with decayed click counts, by key: what is clicked now, what follows an item, what a user clicked.

A list holds at most a fixed number of items. Each item has an age, the time since it was listed. It has one count per
half-life of `HALF_LIVES_S`, decayed to the list's time. The trainer keeps three tables of such lists, and versions
contain them as rows (`trainer/engine/item_ranking.py`):

    clicked    by category, by context value, and in `EVERYTHING` over all clicks: the items clicked
    followed   by item: the items that its users clicked next
    visited    by user: the user's own items, the newest first

A fourth table lists categories instead of items (`trainer/engine/interest_counts.py`):

    next_category    by category, by item, and in `EVERYTHING` over all clicks: the categories clicked next

A version stores a list of E items as a row of float32. Ids are split into three parts of 21 bits, as in transitions.
The time is in seconds, split into two parts:

    bits 42.. of the ids x E | bits 21..41 x E | bits 0..20 x E | counts x E x H | ages x E | totals x H | known x H | time x 2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, inlined, layout, mix, prefetch

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

HALF_LIVES_S = (1_800.0, 14_400.0, 129_600.0)
"""Half-lives of counts in log time: 30 minutes, 4 hours, 36 hours."""

LIVES = len(HALF_LIVES_S)
"""H, the counts of an item in a list."""

CLICKED, FOLLOWED, VISITED, NEXT_CATEGORY = "clicked", "followed", "visited", "next_category"
"""The names of the tables."""

ENTRIES = {CLICKED: 64, FOLLOWED: 16, VISITED: 32, NEXT_CATEGORY: 16}
"""E, the items in a list of each table."""

LISTS_OF_EVERYTHING = 8
EVERYTHING = np.arange(1, 1 + LISTS_OF_EVERYTHING, dtype=np.uint64)
"""The keys of the lists over all clicks. A hash assigns each item to one of them, so that together they hold eight
times as many items as the list of a category."""

_LEAST_BY = 1
"""The half-life whose count decides which entry of a full list is replaced. With the longest half-life, lists of news
kept items that were no longer clicked: of 100 next clicks on news, 65 were among the candidates instead of 81."""

_LEAST = np.float32(1e-20)
"""Counts up to this are 0."""

_LINE_BYTES = 64
"""Of a line of the processor's cache."""

_PART = np.uint64((1 << 21) - 1)
_TIME_PART = 1 << 20
_UNIT = 1.0 / (1 << 53)


@layout("u8[:, ::1], f4[:, :, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], i8[::1]")
class ItemLists(NamedTuple):
    """The content of n lists.

    Attributes:
        ids: `[n, E]` uint64, the items; 0 after the list's end.
        counts: `[n, H, E]` float32, their decayed clicks.
        ages: `[n, E]` float32, seconds from the click that listed the item to the list's time.
        totals: `[n, H]` float32, the decayed clicks of all items, including those that are not listed.
        known: `[n, H]` float32, the decayed clicks of items that the list contained before the click.
        at_s: `[n]` int64, the log time that the counts are decayed to, in seconds.
    """

    ids: U64
    counts: F32
    ages: F32
    totals: F32
    known: F32
    at_s: I64

    @classmethod
    def empty(cls, count: int, entries: int) -> ItemLists:
        """Empty lists."""
        return cls(
            np.zeros((count, entries), np.uint64),
            np.zeros((count, LIVES, entries), np.float32),
            np.zeros((count, entries), np.float32),
            np.zeros((count, LIVES), np.float32),
            np.zeros((count, LIVES), np.float32),
            np.zeros(count, np.int64),
        )

    @property
    def entries(self) -> int:
        """E."""
        return int(self.ids.shape[1])

    def take(self, rows: NDArray[np.integer]) -> ItemLists:
        """Copies the lists at `rows`."""
        return ItemLists(*(part[rows] for part in self))


def width(entries: int) -> int:
    """The width of the row of a list with `entries` entries."""
    return entries * (4 + LIVES) + 2 * LIVES + 2


@inlined
def _kept(value: float) -> np.float32:
    """A value as float32; 0 for one that is too small, because arithmetic with subnormal numbers is slow."""
    return np.float32(value) if value > _LEAST else np.float32(0.0)


@inlined
def decays(elapsed_s: int) -> tuple[np.float32, np.float32, np.float32]:
    """The factors by which counts of `HALF_LIVES_S` decay in a time of 0 seconds or more."""
    # One power of two is enough, because the half-lives are 1, 8 and 72 times the shortest one.
    longest = np.exp2(-elapsed_s / HALF_LIVES_S[2])
    second = longest * longest
    fourth = second * second
    middle = fourth * fourth * longest
    second = middle * middle
    fourth = second * second
    return _kept(fourth * fourth), _kept(middle), _kept(longest)


@inlined
def _decay(row: int, lists: ItemLists, at_s: int) -> None:
    """Decays a list to a time; a time before the list's changes nothing."""
    elapsed_s = at_s - lists.at_s[row]
    if elapsed_s <= 0:
        return
    lists.at_s[row] = at_s
    listed, entries = 0, lists.ids.shape[1]
    if lists.ids[row, entries - 1] != np.uint64(0):
        listed = entries
    while listed < entries and lists.ids[row, listed] != np.uint64(0):
        listed += 1
    short, middle, long = decays(elapsed_s)
    for k in range(listed):
        lists.ages[row, k] += np.float32(elapsed_s)
    for h, kept in enumerate((short, middle, long)):
        for k in range(listed):
            lists.counts[row, h, k] = _kept(lists.counts[row, h, k] * kept)
        lists.totals[row, h] = _kept(lists.totals[row, h] * kept)
        lists.known[row, h] = _kept(lists.known[row, h] * kept)


@inlined
def prefetch_list(row: int, lists: ItemLists) -> None:
    """Prefetches a list that is soon read or counts a click, because lists are accessed at random."""
    for k in range(0, lists.ids.shape[1], _LINE_BYTES // 8):
        prefetch(lists.ids, (row, k))
    for k in range(0, lists.ages.shape[1], _LINE_BYTES // 4):
        prefetch(lists.ages, (row, k))
        for h in range(LIVES):
            prefetch(lists.counts, (row, h, k))
    prefetch(lists.totals, row)
    prefetch(lists.known, row)
    prefetch(lists.at_s, row)


@inlined
def count_click(row: int, item: np.uint64, at_s: int, lists: ItemLists) -> None:
    """Counts a click of an item in a list.

    If the list is full and lacks the item, the entry with the smallest count of the middle half-life is incremented by
    1. The item replaces that entry with probability 1 / new count, which keeps that count unbiased (Ting 2018, Unbiased
    Space Saving). The counts of shorter half-lives are then 1. A hash of the item, the time and the total decides.
    """
    _decay(row, lists, at_s)
    at, entries = -1, lists.ids.shape[1]
    # Without an early end, so that several entries are compared at once.
    for k in range(entries):
        at = k if lists.ids[row, k] == item else at
    if at < 0 and lists.ids[row, entries - 1] == np.uint64(0):
        at = 0
        while lists.ids[row, at] != np.uint64(0):
            at += 1
    for h in range(LIVES):
        lists.totals[row, h] += np.float32(1.0)
    if at >= 0:
        known = np.float32(lists.ids[row, at] == item)
        lists.ids[row, at] = item
        for h in range(LIVES):
            lists.known[row, h] += known
            lists.counts[row, h, at] += np.float32(1.0)
        return
    least, smallest = 0, lists.counts[row, _LEAST_BY, 0]
    for k in range(1, entries):
        if lists.counts[row, _LEAST_BY, k] < smallest:
            least, smallest = k, lists.counts[row, _LEAST_BY, k]
    grown = smallest + np.float32(1.0)
    drawn = mix(item ^ mix(np.uint64(at_s) ^ np.uint64(lists.totals[row, LIVES - 1] * np.float32(256.0))))
    if (drawn >> np.uint64(11)) * _UNIT * grown < 1.0:
        lists.ids[row, least], lists.ages[row, least] = item, np.float32(0.0)
        for h in range(_LEAST_BY):
            lists.counts[row, h, least] = np.float32(1.0)
    for h in range(_LEAST_BY, LIVES):
        lists.counts[row, h, least] += np.float32(1.0)


@inlined
def count_visit(row: int, item: np.uint64, at_s: int, lists: ItemLists) -> None:
    """Counts a click of a user's own item, and moves it to the front; a full list loses its last item."""
    _decay(row, lists, at_s)
    at, found = lists.ids.shape[1] - 1, False
    for k in range(lists.ids.shape[1]):
        if lists.ids[row, k] == item or lists.ids[row, k] == np.uint64(0):
            at, found = k, lists.ids[row, k] == item
            break
    repeated, age = np.float32(found), lists.ages[row, at] if found else np.float32(0.0)
    for h in range(LIVES):
        lists.totals[row, h] += np.float32(1.0)
        lists.known[row, h] += repeated
        visits = lists.counts[row, h, at] * repeated + np.float32(1.0)
        for k in range(at, 0, -1):
            lists.counts[row, h, k] = lists.counts[row, h, k - 1]
        lists.counts[row, h, 0] = visits
    for k in range(at, 0, -1):
        lists.ids[row, k], lists.ages[row, k] = lists.ids[row, k - 1], lists.ages[row, k - 1]
    lists.ids[row, 0], lists.ages[row, 0] = item, age


@compiled("u8[::1], i8[::1], i8, ItemLists")
def count_visits(items: U64, at_s: I64, row: int, lists: ItemLists) -> None:
    """Counts a user's clicks in one list, in order.

    Args:
        items: `[n]` uint64; 0 is ignored.
        at_s: `[n]` int64 log time in seconds.
        row: The list.
        lists: Changed in place.
    """
    for k in range(items.shape[0]):
        if items[k] != np.uint64(0):
            count_visit(row, items[k], at_s[k], lists)


@compiled("ItemLists, f4[:, ::1]")
def _pack(lists: ItemLists, rows: F32) -> None:
    entries = lists.ids.shape[1]
    for i in range(rows.shape[0]):
        for k in range(entries):
            item = lists.ids[i, k]
            rows[i, k] = np.float32(item >> np.uint64(42))
            rows[i, entries + k] = np.float32((item >> np.uint64(21)) & _PART)
            rows[i, 2 * entries + k] = np.float32(item & _PART)
            for h in range(LIVES):
                rows[i, (3 + h) * entries + k] = lists.counts[i, h, k]
            rows[i, (3 + LIVES) * entries + k] = lists.ages[i, k]
        at = (4 + LIVES) * entries
        for h in range(LIVES):
            rows[i, at + h] = lists.totals[i, h]
            rows[i, at + LIVES + h] = lists.known[i, h]
        rows[i, at + 2 * LIVES] = np.float32(lists.at_s[i] // _TIME_PART)
        rows[i, at + 2 * LIVES + 1] = np.float32(lists.at_s[i] % _TIME_PART)


def pack(lists: ItemLists) -> F32:
    """Packs n lists into rows, `[n, width(E)]` float32.

    >>> lists = ItemLists.empty(1, 16)
    >>> count_visits(np.array([7, 9, 7], np.uint64), np.array([5, 5, 1805]), 0, lists)
    >>> lists.ids[0, :3].tolist(), lists.counts[0, 0, :2].tolist(), lists.totals[0, 0].item()
    ([7, 9, 0], [1.5, 0.5], 2.0)
    >>> bool(all((a == b).all() for a, b in zip(unpack(pack(lists)), lists)))
    True
    """
    rows = np.empty((len(lists.ids), width(lists.entries)), np.float32)
    _pack(lists, rows)
    return rows


@compiled("f4[:, ::1], ItemLists, i8")
def _unpack(rows: F32, lists: ItemLists, first: int) -> None:
    entries = lists.ids.shape[1]
    for i in range(rows.shape[0]):
        to = first + i
        for k in range(entries):
            high, middle = np.uint64(rows[i, k]), np.uint64(rows[i, entries + k])
            low = np.uint64(rows[i, 2 * entries + k])
            lists.ids[to, k] = (high << np.uint64(42)) | (middle << np.uint64(21)) | low
            for h in range(LIVES):
                lists.counts[to, h, k] = rows[i, (3 + h) * entries + k]
            lists.ages[to, k] = rows[i, (3 + LIVES) * entries + k]
        at = (4 + LIVES) * entries
        for h in range(LIVES):
            lists.totals[to, h] = rows[i, at + h]
            lists.known[to, h] = rows[i, at + LIVES + h]
        lists.at_s[to] = np.int64(rows[i, at + 2 * LIVES]) * _TIME_PART + np.int64(rows[i, at + 2 * LIVES + 1])


def unpack(rows: F32) -> ItemLists:
    """Unpacks `[n, width(E)]` float32 rows into lists."""
    lists = ItemLists.empty(len(rows), (rows.shape[1] - 2 * LIVES - 2) // (4 + LIVES))
    _unpack(np.ascontiguousarray(rows), lists, 0)
    return lists


def fill(lists: ItemLists, first: int, stored: Sequence[bytes | None]) -> None:
    """Unpacks rows of the row store into lists, from list `first` on.

    A missing row, or one of another width, becomes an empty list.
    """
    size = 4 * width(lists.entries)
    rows = bytearray().join(row if row is not None and len(row) == size else bytes(size) for row in stored)
    _unpack(np.frombuffer(rows, "<f4").reshape(len(stored), -1), lists, first)


def from_stored(stored: Sequence[bytes | None], entries: int) -> ItemLists:
    """Unpacks rows of the row store as `fill` does."""
    lists = ItemLists.empty(len(stored), entries)
    fill(lists, 0, stored)
    return lists
