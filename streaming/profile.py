"""Computes the windows of each event from the events before it, in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, inlined
from state.events.parser import EventBatch
from state.features.arrays import WORDS, Rings, Vector, words
from state.features.kernel import update_rows
from state.features.spec import EVENT, Events, FeatureSpec, Mask
from state.history.appends import Appends, events_of
from streaming.rows import Rows

ABSENT = -1
I64 = NDArray[np.int64]


class SlotTable:
    """Maps users to slots: a hash table with open addressing that finds whole columns of users. One thread.

    Users are pseudonyms, whose bits are random, so that they need no further hashing.
    """

    def __init__(self) -> None:
        self._count = 0
        self._table = _empty(1024)

    def __len__(self) -> int:
        return self._count

    def find(self, users: NDArray[np.uint64]) -> I64:
        """`[n]` int64, the slot of each of `[n]` users; `ABSENT` for one that has none."""
        slots = np.empty(len(users), np.int64)
        _find(self._table, _keys(users), slots)
        return slots

    def put(self, users: NDArray[np.uint64], slots: I64) -> None:
        """Gives a slot to each of `[n]` users that have none."""
        self._count += len(users)
        if 2 * self._count > len(self._table):
            former = self._table[self._table[:, 1] != ABSENT]
            self._table = _empty(1 << (4 * self._count - 1).bit_length())
            _put(self._table, former[:, 0].copy(), former[:, 1].copy())
        _put(self._table, _keys(users), np.ascontiguousarray(slots))

    def remove(self, users: Iterable[int]) -> None:
        """Removes users, who have a slot each."""
        removed = np.fromiter(users, np.uint64)
        self._count -= len(removed)
        _remove(self._table, _keys(removed))


def _empty(size: int) -> I64:
    table = np.zeros((size, 2), np.int64)
    table[:, 1] = ABSENT
    return table


def _keys(users: NDArray[np.uint64]) -> I64:
    # Copies read-only arrays, because the kernels would be compiled again for them.
    return np.require(users, requirements=("C", "W")).view(np.int64)


@inlined
def _place(table: I64, user: int) -> int:
    """The position of a user, or the one where the user would be stored."""
    mask = np.uint64(len(table) - 1)
    position = np.uint64(user) & mask
    while table[position, 1] != ABSENT and table[position, 0] != user:
        position = (position + np.uint64(1)) & mask
    return np.int64(position)  # type: ignore[return-value]


@compiled("i8[:, ::1], i8[::1], i8[::1]")
def _find(table: I64, users: I64, slots: I64) -> None:
    for n in range(len(users)):
        slots[n] = table[_place(table, users[n]), 1]


@compiled("i8[:, ::1], i8[::1], i8[::1]")
def _put(table: I64, users: I64, slots: I64) -> None:
    for n in range(len(users)):
        position = _place(table, users[n])
        table[position, 0] = users[n]
        table[position, 1] = slots[n]


@compiled("i8[:, ::1], i8[::1]")
def _remove(table: I64, users: I64) -> None:
    """Closes the gap behind each user, so that no search ends too early."""
    mask = len(table) - 1
    for n in range(len(users)):
        gap = _place(table, users[n])
        position = gap
        while True:
            position = (position + 1) & mask
            if table[position, 1] == ABSENT:
                break
            wanted = np.int64(np.uint64(table[position, 0]) & np.uint64(mask))
            # An entry moves into the gap unless its home position is between the gap and the entry.
            if (position - wanted) & mask >= (position - gap) & mask:
                table[gap, 0] = table[position, 0]
                table[gap, 1] = table[position, 1]
                gap = position
        table[gap, 1] = ABSENT


class Histories(Protocol):
    """A store of committed histories: of the stream, or of a bucket."""

    def read_many(self, users: Sequence[int]) -> list[Events]:
        """The histories of several users, each `[m <= N]` EVENT in append order, as of one moment."""
        ...


class Profiler:
    """Computes each event's row from the events before it, and appends it to its user's history.

    One thread calls `update`; any thread may call `committed` and `forget`. Neither batching nor the set of users in
    memory changes a bit of a row.

    It holds `cache_users` users in memory, and more when more have uncommitted events. No row uses events of `mask`;
    masked events themselves are left out before they reach the profiler.
    """

    def __init__(self, store: Histories, spec: FeatureSpec, cache_users: int, mask: Mask = Mask.NONE) -> None:
        self._store = store
        self._spec = spec
        self._hidden = mask.hidden
        self._slots = SlotTable()
        self._free: list[int] = []
        # The system allocates the pages of an empty array only when they are written.
        none = np.empty(0, np.int64)
        self._rings = Rings(np.empty((0, spec.history, WORDS), np.int64), none, none)
        self._users = self._pending = self._used = none
        self._clock = 0
        self._committed: deque[NDArray[np.uint64]] = deque()
        self._evicted: deque[Sequence[int]] = deque()
        self._stale: set[int] = set()
        self._grow(cache_users)
        # The kernel is compiled, or its machine code loaded, before the first event.
        self._compute(np.empty(0, np.int64), np.empty(0, EVENT))

    @property
    def cached_users(self) -> int:
        """How many users are in memory."""
        return len(self._slots)

    def update(self, batch: EventBatch) -> Rows:
        """Makes the rows of a batch of events in order of arrival. Each event is part of the history of its user's later ones.

        Nothing is durable until the rows' appends are committed.
        """
        self._settle()
        self._clock += 1
        events = events_of(batch, batch.ranges)
        # 1. Group by user.
        order = np.argsort(batch.user, kind="stable")
        ordered = batch.user[order]
        starts = np.flatnonzero(np.concatenate((np.ones(min(1, len(order)), np.bool_), ordered[1:] != ordered[:-1])))
        lengths = np.diff(np.append(starts, len(order)))
        users = ordered[starts]
        # 2. A ring for each user.
        slots = self._places(users)
        self._pending[slots] += 1
        self._used[slots] = self._clock
        by_row = np.empty(len(order), np.int64)
        by_row[order] = np.repeat(slots, lengths)
        # 3. Rows and appends, event by event.
        return Rows(batch, self._compute(by_row, events), Appends(users, starts, lengths, events[order]))

    def set_mask(self, mask: Mask) -> None:
        """Sets the events that no row of the next batches may use; called by the thread that calls `update`."""
        self._hidden = mask.hidden

    def committed(self, rows: Rows) -> None:
        """Must be called once the store has the appends of `rows`; any thread may call it."""
        self._committed.append(rows.appends.users)

    def forget(self, users: Sequence[int]) -> None:
        """Must be called once the store has removed events of users that rows could still see; any thread may call it.

        They are read again from there, those with uncommitted events once these are committed.
        """
        self._evicted.append(users)

    def _compute(self, slots: I64, events: Events) -> Vector:
        rows = self._spec.empty(len(events))
        update_rows(self._rings, slots, words(events), self._spec.tables, self._hidden, rows)
        return rows

    def _settle(self) -> None:
        while self._committed:
            # No user twice: these are the users of one `Rows`.
            self._pending[self._slots.find(self._committed.popleft())] -= 1
        while self._evicted:
            self._stale.update(self._evicted.popleft())
        for user in [*self._stale]:
            slot = int(self._slots.find(np.array([user], np.uint64))[0])
            if slot == ABSENT or self._pending[slot] == 0:
                self._stale.remove(user)
                if slot != ABSENT:
                    self._release([user], [slot])

    def _places(self, users: NDArray[np.uint64]) -> I64:
        """The ring of each of `users` (unique), read from the store if it is not in memory."""
        slots = self._slots.find(users)
        missing = np.flatnonzero(slots == ABSENT)
        if not len(missing):
            return slots
        self._used[slots[slots != ABSENT]] = self._clock
        self._make_room(len(missing))
        absent = users[missing].tolist()
        for number, history in zip(missing.tolist(), self._store.read_many(absent), strict=True):
            slot = self._free.pop()
            count = len(history)
            self._rings.events[slot, :count] = words(history)
            self._rings.counts[slot] = count
            self._rings.ends[slot] = count % self._spec.history
            self._pending[slot] = 0
            slots[number] = slot
        self._users[slots[missing]] = users[missing].view(np.int64)
        self._slots.put(users[missing], slots[missing])
        return slots

    def _make_room(self, needed: int) -> None:
        if len(self._free) >= needed:
            return
        # 1. More than needed are evicted at once, because the search checks all users.
        capacity = len(self._users)
        may_go = np.flatnonzero((self._pending == 0) & (self._used < self._clock) & (self._used > 0))
        leaving = min(len(may_go), max(needed, capacity // 16))
        if leaving:
            oldest = may_go[np.argpartition(self._used[may_go], leaving - 1)[:leaving]]
            self._release(self._users[oldest].view(np.uint64).tolist(), oldest.tolist())
        # 2. The other users have uncommitted events.
        if len(self._free) < needed:
            self._grow(max(needed - len(self._free), capacity // 2))

    def _release(self, users: Sequence[int], slots: Sequence[int]) -> None:
        self._used[slots] = 0
        self._slots.remove(users)
        self._free.extend(slots)

    def _grow(self, more: int) -> None:
        capacity = len(self._users)
        events = np.empty((capacity + more, *self._rings.events.shape[1:]), np.int64)
        events[:capacity] = self._rings.events
        columns = (self._rings.ends, self._rings.counts, self._users, self._pending, self._used)
        ends, counts, self._users, self._pending, self._used = (
            np.concatenate((column, np.zeros(more, np.int64))) for column in columns
        )
        self._rings = Rings(events, ends, counts)
        self._free = [*range(capacity + more - 1, capacity - 1, -1), *self._free]
