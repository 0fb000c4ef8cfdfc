"""Bounds the size of histories: removes old events, and evicts the users read longest ago if there are too many.

Each step processes some hundred users in the order of their pseudonyms; a pass covers all users. Whenever log time has
advanced by a 64th of the reach, a mark is added and a pass begins. A pass also begins when there are too many users.

1. An event is old if both its own time and its read time are before the reach: the longest window plus the allowed
   lateness of a click. No later row can see it.
2. There are too many users if they exceed the allowed number, or if the pages in use nearly fill the store's map. The
   next pass evicts the excess: those read longest ago, whatever the times of their events.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from state.features.spec import Events
from state.history.appends import Appends
from state.history.chunks import Removed
from state.history.store import HistoryStore
from state.positions import Source

I64 = NDArray[np.int64]
Marks = dict[Source, list[tuple[int, int]]]

_OFFSETS = 1 << 45  # offsets per source; with 16 bits for sources they fit into 63 bits


class ReadTimes:
    """Marks per source: (log time in ms, next offset), both ascending.

    If `mark` creates and drops them, there are at most about 65 per source.
    """

    def __init__(self, marks: Mapping[Source, Sequence[tuple[int, int]]] = {}) -> None:
        self._marks: Marks = {source: list(marks_of_source) for source, marks_of_source in marks.items()}
        self._arrange()

    @property
    def newest_ms(self) -> int | None:
        """Log time of the newest mark; None if there is none."""
        return max((marks[-1][0] for marks in self._marks.values() if marks), default=None)

    def mark(self, positions: Mapping[Source, int], clock_ms: int, keep_ms: int) -> bool:
        """Adds a mark at `clock_ms` with each source's position; returns whether the marks changed.

        Of the marks older than `keep_ms` only the newest stays: it bounds everything read before it. Marks ahead of a
        clock or a position that was set back are dropped.
        """
        before = dict(self._marks)
        for source, position in positions.items():
            marks = [mark for mark in self._marks.get(source, ()) if mark[0] < clock_ms and mark[1] <= position]
            if not marks or marks[-1][1] < position:
                marks.append((clock_ms, position))
            old = sum(at_ms <= clock_ms - keep_ms for at_ms, _ in marks)
            self._marks[source] = marks[max(0, old - 1) :]
        self._arrange()
        return self._marks != before

    def are_old(self, events: Events, horizon_ms: int, clock_ms: int) -> NDArray[np.bool_]:
        """Which of `[m]` events both happened and were read by `horizon_ms`, `[m]` bool."""
        old = events["at_ms"] <= horizon_ms
        return old & (self._bounds(events, clock_ms)[1] <= horizon_ms) if old.any() else old

    def about(self, events: Events, clock_ms: int) -> I64:
        """Estimated read time of each event, `[m]` int64 log time, interpolated between two marks.

        >>> from state.features.spec import EVENT
        >>> source, events = Source("ab" * 16, 0), np.zeros(3, EVENT)
        >>> events["topic"], events["offset"] = source.topic, [4, 5, 9]
        >>> ReadTimes({source: [(1000, 5), (2000, 10)]}).about(events, 2500).tolist()
        [1000, 1000, 1800]
        """
        after, latest, before = self._bounds(events, clock_ms)
        earliest, first = np.where(before < 0, latest, self._times[before]), self._nexts[before]
        steps = np.maximum(self._nexts[after] - first, 1)
        passed = np.clip(events["offset"] - first, 0, steps)
        # As a fraction of a step, so that the product of two large integers does not overflow.
        return np.where(after < 0, latest, earliest + ((latest - earliest) * (passed / steps)).astype(np.int64))

    def _bounds(self, events: Events, clock_ms: int) -> tuple[I64, I64, I64]:
        """Per event: the index of the mark after it, that mark's time, and the index of the mark before it.

        An index is -1 without such a mark; the time is then `clock_ms`.
        """
        keys = (events["topic"].astype(np.int64) << 16) | events["partition"]
        number = np.minimum(np.searchsorted(self._sources, keys), max(0, len(self._sources) - 1))
        has_mark = self._sources[number] == keys if len(self._sources) else np.zeros(len(events), np.bool_)
        slot = np.searchsorted(self._places, number * _OFFSETS + events["offset"], side="right")
        # The last owner is -1, which index -1 also reads before the first one.
        inside = has_mark & (self._owners[slot] == number)
        after = np.where(inside, slot, -1)
        before = np.where(inside & (self._owners[slot - 1] == number), slot - 1, -1)
        return after, np.where(inside, self._times[after], clock_ms), before

    def _arrange(self) -> None:
        """Puts the marks into arrays, ordered by source and offset; the last entry of each array is a sentinel."""
        # Buckets of a partition share a key: use what holds for all of them.
        merged: dict[int, list[tuple[int, int]]] = {}
        for source, marks in self._marks.items():
            key = (source.topic << 16) | source.partition
            if key in merged:
                # The lower offset, at the times at which both have a mark.
                other = dict(merged[key])
                marks = [(at_ms, min(after, other[at_ms])) for at_ms, after in marks if at_ms in other]
            merged[key] = marks
        self._sources = np.array(sorted(merged), np.int64)
        rows = [(number, *mark) for number, key in enumerate(sorted(merged)) for mark in merged[key]]
        columns = np.array([*rows, (-1, 0, 0)], np.int64).T
        self._owners, self._times, self._nexts = columns
        self._places = (self._owners * _OFFSETS + self._nexts)[:-1]

    def to_json(self) -> bytes:
        """Encodes the marks as a store keeps them."""
        return json.dumps({str(source): marks for source, marks in self._marks.items()}).encode()

    @classmethod
    def from_json(cls, value: bytes | None) -> ReadTimes:
        """Decodes the output of `to_json`; None means no marks."""
        stored = json.loads(value or b"{}")
        return cls({Source.parse(name): [(int(a), int(b)) for a, b in marks] for name, marks in stored.items()})


READ_TIMES = "read_times"  # name of the store's extra
USERS_AT_ONCE = 500
MOST_REMOVED = 100  # users removed per step; each costs as much as reading 20
HURRIED_STEPS, MOST_HURRIED = 40, 4
LOOK_S, HASTY_LOOK_S, REST_S = 0.1, 0.02, 1.0
STEPS, BINS = 64, 1024
FULL, EMPTIED, GROWN, BRIM = 0.9, 0.85, 0.02, 0.97  # shares of the map
LEAST_SHARE = 0.25
FOREVER_MS = 1 << 62
SPARE = 50  # one user in `SPARE` is evicted beyond the necessary number


@dataclass
class _Pass:
    """A walk over all users: its position, and when the users passed were last read."""

    from_ms: int
    bin_ms: int
    at: int = 0
    met: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 2, np.int64))


@dataclass
class _Eviction:
    """The users that a pass evicts: those read before `before_ms`, and `more` of those read before `until_ms`."""

    before_ms: int
    until_ms: int
    more: int

    def of(self, read_ms: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these users to evict, `[k]` bool."""
        surely = read_ms < self.before_ms
        near = np.flatnonzero(~surely & (read_ms < self.until_ms))[: self.more]
        surely[near] = True
        self.more -= len(near)
        return surely


class Sweeper:
    """Sweeps a store; called by the thread that commits to it.

    Args:
        reach_ms: The longest window plus the allowed lateness of a click.
        max_users: Maximum number of users; slightly exceeded while a pass runs.
        forget: Called with the evicted users, although later rows could still have seen their events.
    """

    def __init__(
        self,
        store: HistoryStore,
        reach_ms: int,
        max_users: int,
        forget: Callable[[Sequence[int]], None] = lambda _: None,
        elapsed: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._reach_ms, self._max_users = store, reach_ms, max_users
        self._forget, self._elapsed = forget, elapsed
        self._read = ReadTimes.from_json(store.extra(READ_TIMES))
        self._marked_ms = self._read.newest_ms
        self._anew = True
        self._pass: _Pass | None = None
        self._eviction: _Eviction | None = None
        self._full, self._hurried = FULL, False
        self.due_s = 0.0

    def sweep(self, clock_ms: int) -> Removed:
        """Runs one step if it is due: processes some users and removes old events. Takes a few milliseconds at most."""
        now_s = self._elapsed()
        # Does not wait for a clock that was set back.
        if 0 < self.due_s - now_s <= REST_S:
            return Removed()
        if self._marked_ms is None or abs(clock_ms - self._marked_ms) >= self._reach_ms // STEPS:
            self._mark(clock_ms)
        if self._pass is None:
            if self.resting and not self._too_many():
                self.due_s = now_s + REST_S
                return Removed()
            self._anew = False
            self._pass = _Pass(clock_ms - self._reach_ms, max(1, self._reach_ms // BINS))
        self.due_s = now_s + (LOOK_S if self._eviction is None else HASTY_LOOK_S)
        return self._take(self._pass, clock_ms)

    def hurry(self, clock_ms: int) -> None:
        """Runs many steps at once, because the store refused a commit and so has too many users."""
        self._hurried = True
        try:
            for _ in range(HURRIED_STEPS):
                self.due_s = self._elapsed()
                self.sweep(clock_ms)
        finally:
            self._hurried = False

    @property
    def resting(self) -> bool:
        """Whether there is nothing to do until log time advances, or users are added."""
        return self._pass is None and self._eviction is None and not self._anew

    def _mark(self, clock_ms: int) -> None:
        """Marks the positions read by now; the next pass removes what is old by now."""
        self._marked_ms, self._anew = clock_ms, True
        if self._read.mark(self._store.positions(), clock_ms, self._reach_ms):
            self._store.commit(Appends.none(), (), {READ_TIMES: self._read.to_json()})

    def _take(self, walk: _Pass, clock_ms: int) -> Removed:
        """Processes the next users of a pass, up to the most that one step may remove."""
        ends = self._store.ends(walk.at, USERS_AT_ONCE)
        read_ms = self._read.about(ends.newest, clock_ms)
        aged = self._is_old(ends.oldest, clock_ms)
        foreign = ~self._store.shares.has(np.array(ends.users, np.uint64))
        near = aged | foreign if self._eviction is None else aged | foreign | (read_ms < self._eviction.until_ms)
        # A transaction that deletes needs free pages too. If few are free, a small transaction may still succeed.
        most_removed = MOST_HURRIED if self._hurried else MOST_REMOVED
        count = min(len(near), int(np.searchsorted(np.cumsum(near), most_removed)) + 1)
        users, read_ms, aged = np.array(ends.users[:count], np.uint64), read_ms[:count], aged[:count]
        going = np.zeros(count, np.bool_) if self._eviction is None else self._eviction.of(read_ms)
        going |= foreign[:count]
        aged &= ~going
        removed = Removed()
        if going.any() or aged.any():
            evicted = users[going].tolist()
            removed = self._store.sweep(users[aged].tolist(), lambda events: self._is_old(events, clock_ms), evicted)
            if evicted:
                self._forget(evicted)
        bins = np.clip((read_ms[~going] - walk.from_ms) // walk.bin_ms + 1, 0, BINS + 1)
        walk.met += np.bincount(bins, minlength=BINS + 2)
        if count == len(ends.users) and ends.following is None:
            self._end(walk)
        else:
            walk.at = ends.users[count - 1] + 1
        return removed

    def _is_old(self, events: Events, clock_ms: int) -> NDArray[np.bool_]:
        # As of the newest mark, so that the removed events do not depend on the time of the pass.
        assert self._marked_ms is not None
        horizon_ms = min(clock_ms, self._marked_ms) - self._reach_ms
        return self._read.are_old(events, horizon_ms, clock_ms)

    def _end(self, walk: _Pass) -> None:
        if self._eviction is not None:
            self._full = min(BRIM, max(FULL, sum(self._pages()) + GROWN))
        self._pass, self._eviction = None, None
        if not (too_many := self._too_many()):
            return
        until = np.cumsum(walk.met)
        last = min(int(np.searchsorted(until, too_many)), BINS + 1)
        before = int(until[last - 1]) if last else 0
        # Bin 0 holds users last read before the reach; the last bin holds users read just now.
        begin_ms, end_ms = (walk.from_ms + (bin_ - 1) * walk.bin_ms for bin_ in (last, last + 1))
        self._eviction = _Eviction(
            begin_ms if last else -FOREVER_MS, end_ms if last <= BINS else FOREVER_MS, too_many - before
        )

    def _too_many(self) -> int:
        users, most = self._store.users(), self._max_users
        events, other = self._pages()
        if events + other > self._full:
            space = max(LEAST_SHARE, EMPTIED - other)
            most = min(most, int(users * min(1.0, space / events)))
        if self._hurried:
            most = min(most, users - users // SPARE)
        self._full = max(FULL, min(self._full, events + other + GROWN))
        return users - most + most // SPARE if users > most else 0

    def _pages(self) -> tuple[float, float]:
        limit = self._store.bytes_limit()
        events, other = self._store.chunk_bytes()
        return events / limit, other / limit
