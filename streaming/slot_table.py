"""Slots by user: a hash table with open addressing that finds whole columns of users in compiled code."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled

I64 = NDArray[np.int64]
ABSENT = -1


class SlotTable:
    """Which slot each user has. One thread.

    Users are pseudonyms, whose bits are random, so that they need no further hashing.

    >>> table = SlotTable()
    >>> table.put(np.array([7, 7 + 2048], np.uint64), np.array([0, 1]))
    >>> table.remove([7])
    >>> table.find(np.array([7, 7 + 2048], np.uint64)).tolist(), len(table)
    ([-1, 1], 1)
    """

    def __init__(self) -> None:
        self._count = 0
        self._table = _empty(1024)

    def __len__(self) -> int:
        return self._count

    def find(self, users: NDArray[np.uint64]) -> I64:
        """`[n]` int64, the slot of each of `[n]` users; `ABSENT` for one that has none."""
        found = np.empty(len(users), np.int64)
        _find(self._table, _keys(users), found)
        return found

    def put(self, users: NDArray[np.uint64], slots: I64) -> None:
        """Gives a slot to each of `[n]` users that have none."""
        self._count += len(users)
        if 2 * self._count > len(self._table):
            former = self._table[self._table[:, 1] != ABSENT]
            self._table = _empty(1 << (4 * self._count - 1).bit_length())
            _put(self._table, former[:, 0].copy(), former[:, 1].copy())
        _put(self._table, _keys(users), np.ascontiguousarray(slots))

    def remove(self, users: Iterable[int]) -> None:
        """Takes the slots of users, who have one each, away."""
        gone = np.fromiter(users, np.uint64)
        self._count -= len(gone)
        _remove(self._table, _keys(gone))


def _empty(size: int) -> I64:
    """`[size, 2]` int64: a user and the slot."""
    table = np.zeros((size, 2), np.int64)
    table[:, 1] = ABSENT
    return table


def _keys(users: NDArray[np.uint64]) -> I64:
    # A copy of what cannot be written: for read-only arrays the kernels would be compiled once more.
    return np.require(users, requirements=("C", "W")).view(np.int64)


@compiled
def _place(table: I64, user: int) -> int:
    """Where a user is, or would be put."""
    mask = np.uint64(len(table) - 1)
    place = np.uint64(user) & mask
    while table[place, 1] != ABSENT and table[place, 0] != user:
        place = (place + np.uint64(1)) & mask
    return np.int64(place)  # type: ignore[return-value]


@compiled("i8[:, ::1], i8[::1], i8[::1]")
def _find(table: I64, users: I64, found: I64) -> None:
    for n in range(len(users)):
        found[n] = table[_place(table, users[n]), 1]


@compiled("i8[:, ::1], i8[::1], i8[::1]")
def _put(table: I64, users: I64, slots: I64) -> None:
    for n in range(len(users)):
        place = _place(table, users[n])
        table[place, 0] = users[n]
        table[place, 1] = slots[n]


@compiled("i8[:, ::1], i8[::1]")
def _remove(table: I64, users: I64) -> None:
    """Closes the gap behind each user, so that no search ends too early."""
    mask = len(table) - 1
    for n in range(len(users)):
        gap = _place(table, users[n])
        place = gap
        while True:
            place = (place + 1) & mask
            if table[place, 1] == ABSENT:
                break
            wanted = np.int64(np.uint64(table[place, 0]) & np.uint64(mask))
            # An entry moves into the gap unless its own place lies between both.
            if (place - wanted) & mask >= (place - gap) & mask:
                table[gap, 0] = table[place, 0]
                table[gap, 1] = table[place, 1]
                gap = place
        table[gap, 1] = ABSENT
