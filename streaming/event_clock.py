"""The event clock of a stream: its value after each batch, the value reported to readers, and users with wrong clocks.

One thread updates it batch by batch. Its state is committed with the positions of the batch, so that it continues from
there after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from state.history.waiting import CLOCKS, decode_clocks
from state.microbatch.batch import TOLERANCE_MS
from state.positions import Range, Source
from streaming.alignment import Reached
from streaming.witnesses import AHEAD, ALL, BEHIND, NEVER_MS, QUORUM, TURNS, Witnesses, believe, crowd, hear

PREFIX = "clock:"  # prefix of the names of the store's extras: one for each source and one for all together


def clock_names(sources: Iterable[Source]) -> list[str]:
    """The names of the store's extras: of the clock of all sources together, and of each of the given sources.

    >>> clock_names([Source("ab" * 16, 3)])
    ['clock:all', 'clock:abababababababababababababababab:3']
    """
    return [PREFIX + "all", *(PREFIX + str(source) for source in sources)]


class TimedRows(Protocol):
    """Events in order of arrival: those of a batch, or rows of a micro-batch."""

    @property
    def user(self) -> NDArray[np.uint64]:
        """`[n]` uint64 pseudonyms."""

    @property
    def at_ms(self) -> NDArray[np.int64]:
        """`[n]` int64, event time."""

    @property
    def source(self) -> NDArray[np.uint16]:
        """`[n]` uint16, an index of the ranges."""

    @property
    def offset(self) -> NDArray[np.int64]:
        """`[n]` int64."""


class OffClock(NamedTuple):
    """Clicks whose time is far from that of the clicks around them.

    Attributes:
        direction: `ahead`; `behind`, which may also be late arrivals; or `refused`, if they were refused for their
            time.
        partition: Of the topic of clicks.
        offset: Offset of the newest of these clicks.
        by_ms: How far that one is off.
        clicks: Number of these clicks.
    """

    direction: str
    partition: int
    offset: int
    by_ms: int
    clicks: int = 1


class Moves(NamedTuple):
    """Where the clocks of partitions move: each entry gives the clock from its offset on.

    Attributes:
        source: `[m]` uint16, an index of the ranges, ascending; the first entry of a range is the clock at its
            beginning.
        offset: `[m]` int64, ascending in a range.
        clock_ms: `[m]` int64.
    """

    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    clock_ms: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """The event clock during a batch of events.

    Attributes:
        clock_ms: `[n]` int64, for each event its partition's clock after it.
        moves: Where that clock moves; also for consumers that have only a part of the events.
        clocks: For each range the time that readers may believe, before its first and after its last event, ms.
        state: Names of the store's extras and their values, to commit with the batch.
        off: The clocks that are wrong.
    """

    clock_ms: NDArray[np.int64]
    moves: Moves
    clocks: tuple[tuple[int, int], ...]
    state: Mapping[str, bytes]
    off: tuple[OffClock, ...]


class _Suspect(NamedTuple):
    """Clicks of one user that were ahead of the believed time, but may only be the first after a quiet period.

    Attributes:
        at_ms: Time of the newest.
        offset: Its offset.
        turn: Number of turns of the partition before the first of them.
        clicks: Number of these clicks.
    """

    at_ms: int
    offset: int
    turn: int
    clicks: int


def moves_of(
    ranges: Sequence[Range], begin_ms: NDArray[np.int64], clicks: TimedRows, clock_ms: NDArray[np.int64]
) -> Moves:
    """Where the clocks of a batch's partitions move; none in the gap at the start of a range, which was never read.

    Args:
        ranges: What `clicks.source` is an index of.
        begin_ms: `[r]` int64, the clock of each range before its first click; `NEVER_MS` if there was no click yet.
        clicks: In order of arrival.
        clock_ms: `[n]` int64, for each click its partition's clock after it.
    """
    firsts = np.array([part.first + part.gap for part in ranges], np.int64)
    source = np.concatenate([np.arange(len(ranges), dtype=np.uint16), clicks.source])
    order = np.argsort(source, kind="stable")
    source, offset = source[order], np.concatenate([firsts, clicks.offset])[order]
    time_ms = np.concatenate([begin_ms, clock_ms])[order]
    moved = time_ms != NEVER_MS
    moved[1:] &= (time_ms[1:] != time_ms[:-1]) | (source[1:] != source[:-1])
    return Moves(source[moved], offset[moved], time_ms[moved])


def clock_of_all(clocks: Mapping[Source, int], reach_ms: int) -> int:
    """The log time that all sources have reached, ms, except those that are further behind than the reach.

    After an outage, one partition may be read to its end before another one is begun.

    >>> zero, one = Source("ab" * 16, 0), Source("ab" * 16, 1)
    >>> clock_of_all({zero: 900, one: 700}, 300), clock_of_all({zero: 900, one: 500}, 300)
    (700, 900)
    """
    newest_ms = max(clocks.values())
    return min(clock for clock in clocks.values() if clock > newest_ms - reach_ms)


class EventClock:
    """The event clock of each partition. Not thread-safe.

    Args:
        extra: Returns an extra of the store by name.
    """

    def __init__(self, extra: Callable[[str], bytes | None]) -> None:
        self._extra = extra
        self._keys: dict[Source, int] = {}
        self._suspects: dict[int, dict[int, _Suspect]] = {}  # by key and user
        self._known = Witnesses.of(8)
        self._load(ALL, "all")
        # Compile the kernels, or load their machine code, before the first event.
        nothing = np.empty(0, np.int64)
        hear(self._known, nothing, nothing.view(np.uint64), nothing, 0)
        believe(self._known, nothing, nothing, nothing, 0)

    def follow(self, clicks: TimedRows, ranges: Sequence[Range], now_ms: int) -> Told:
        """Updates the clocks with a batch of events, and returns them.

        Args:
            clicks: In order of arrival.
            ranges: What `clicks.source` is an index of.
            now_ms: Wall clock.
        """
        keys = np.array([self._key(part.source) for part in ranges], np.int64)
        # Copies: for read-only or non-contiguous arrays the kernels would be compiled again.
        source, at_ms, user = clicks.source.astype(np.int64), clicks.at_ms.copy(), clicks.user.copy()
        begin_ms = self._known.clocks(keys)
        clock_ms = hear(self._known, keys[source] if len(source) else source, user, at_ms, now_ms)
        clocks, off = believe(self._known, keys, source, at_ms, now_ms)
        names = {PREFIX + str(part.source): key for part, key in zip(ranges, keys.tolist(), strict=True)}
        if not len(source):
            names = {}
        state = {name: self._known.pack(key) for name, key in {PREFIX + "all": ALL, **names}.items()}
        reached = tuple((int(begin), int(end)) for begin, end in clocks.tolist())
        moves = moves_of(ranges, begin_ms, clicks, clock_ms)
        return Told(clock_ms, moves, reached, state, self._off(clicks, ranges, keys, clocks, off, now_ms))

    def reached(self, source: Source) -> Reached:
        """The event time of a source so far, as its crowd reports it; no single user decides it."""
        crowd_ms, late = crowd(self._known, self._key(source))
        return Reached(crowd_ms, late >= QUORUM)

    def _key(self, source: Source) -> int:
        key = self._keys.get(source)
        if key is None:
            key = self._keys[source] = len(self._keys) + 1
            self._known = self._known.with_space(key + 1)
            self._load(key, str(source))
            if not self._known.turns(key):
                # Before the watermark quorum existed, the clock of waiting rows was the newest event time.
                self._known.set_clock(key, decode_clocks(self._extra(CLOCKS)).get(source))
        return key

    def _load(self, key: int, name: str) -> None:
        value = self._extra(PREFIX + name)
        if value is not None:
            self._known.unpack(key, value)

    def _off(
        self,
        clicks: TimedRows,
        ranges: Sequence[Range],
        keys: NDArray[np.int64],
        clocks: NDArray[np.int64],
        off: NDArray[np.uint8],
        now_ms: int,
    ) -> tuple[OffClock, ...]:
        """The clocks that are certainly wrong: ahead of the wall clock or, fifteen turns later, ahead of the crowd."""
        found = []
        ends = dict(zip(keys.tolist(), clocks[:, 1].tolist(), strict=True))
        partitions = {key: part.source.partition for part, key in zip(ranges, keys.tolist(), strict=True)}
        for key in sorted(self._suspects.keys() & ends.keys()):
            for user, (suspect_ms, offset, turn, clicks_ahead) in list(self._suspects[key].items()):
                if suspect_ms <= ends[key] + TOLERANCE_MS:
                    del self._suspects[key][user]
                elif self._known.turns(key) >= turn + TURNS:
                    del self._suspects[key][user]
                    found.append(OffClock("ahead", partitions[key], offset, suspect_ms - ends[key], clicks_ahead))
        for row in np.flatnonzero(off).tolist():
            key, at_ms, offset = int(keys[clicks.source[row]]), int(clicks.at_ms[row]), int(clicks.offset[row])
            if off[row] == BEHIND:
                found.append(OffClock("behind", partitions[key], offset, ends[key] - at_ms))
            elif at_ms > max(now_ms, ends[key]) + TOLERANCE_MS:
                found.append(OffClock("ahead", partitions[key], offset, at_ms - ends[key]))
            elif off[row] == AHEAD and at_ms > ends[key] + TOLERANCE_MS:
                suspects, user = self._suspects.setdefault(key, {}), int(clicks.user[row])
                before = suspects.get(user, _Suspect(at_ms, offset, self._known.turns(key), 0))
                suspects[user] = before._replace(at_ms=at_ms, offset=offset, clicks=before.clicks + 1)
        return tuple(found)
