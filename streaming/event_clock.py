"""The event clock: event time of each partition, from the clicks of many users, so that no single user can move it.

The users whose clicks decide a partition's clock are its watermark quorum: the users of its last `TURNS` turns, each
with the time of the latest click. Consecutive clicks of one user are one turn, so a thousand of them weigh no more than
one.

1. The crowd's time is the lower median of the quorum's times: at least half of them report that time or a later one.
2. A time is believed up to `TOLERANCE_MS` after the crowd's. The clock is the newest time that was believed. If all
   users' clocks are right, it is the newest event time.
3. A clock that `AGREEING` users agree on does not go back. A click far behind it is late, and late clicks, even a
   whole file of them, do not affect the clock. Only after `PATIENCE` turns of nothing else does the clock start again.
4. A clock that fewer agree on, such as that of a first click, holds until two others contradict it.

This clock depends only on the log of the partition, not on how it is read. The time that a micro-batch reports to its
readers (`believe`) also uses the time when each click was read. The quorum's times advance with the wall clock, so that
the first click after a quiet night is believed at once. The wall clock has a vote too. No time beyond it is believed
unless there are `AGREEING` users. If a partition has fewer than `ENOUGH` users, those of all partitions together,
under key 0, replace them.

`EventClock` is updated by one thread, batch by batch. Its state is committed with the positions of the batch, so that
it continues from there after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, inlined, layout
from state.events.parser import EventBatch
from state.history.waiting import CLOCKS, decode_clocks
from state.microbatch.batch import TOLERANCE_MS, MicroBatch
from state.positions import Range, Source
from streaming.alignment import Reached

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

TURNS, AGREEING, ENOUGH, PATIENCE = 15, 8, 3, 1000
ALL = 0  # the key of all partitions together
NEVER_MS = np.iinfo(np.int64).min
AHEAD, BEHIND = 1, 2
_USER, _AT, _READ, _TURN = 0, 1, 2, 3
_TURNS, _CLOCK, _BELIEVED, _AGREED, _LATE, _LATE_USER = 0, 1, 2, 3, 4, 5


@layout("i8[:, :, ::1], i8[:, ::1]")
class Quorum(NamedTuple):
    """The votes and the clocks of K keys: all partitions together, then each partition.

    Attributes:
        votes: `[K, TURNS, 4]` int64: the user, the time of the latest click, when it was read, and its turn (0: empty).
        marks: `[K, 6]` int64: turns so far, the clock, the newest time that readers may believe, 1 once `AGREEING`
            agreed, turns of late clicks since the last one that was not late, and the user of the last late one.
    """

    votes: I64
    marks: I64

    @classmethod
    def of(cls, keys: int) -> Quorum:
        """Creates the state before any click."""
        marks = np.zeros((keys, 6), np.int64)
        marks[:, [_CLOCK, _BELIEVED]] = NEVER_MS
        return cls(np.zeros((keys, TURNS, 4), np.int64), marks)

    def with_space(self, keys: int) -> Quorum:
        """Returns itself, or a copy with space for `keys` keys."""
        if len(self.marks) >= keys:
            return self
        grown = Quorum.of(max(keys, 2 * len(self.marks)))
        grown.votes[: len(self.votes)] = self.votes
        grown.marks[: len(self.marks)] = self.marks
        return grown

    def turns(self, key: int) -> int:
        """Number of turns so far."""
        return int(self.marks[key, _TURNS])

    def pack(self, key: int) -> bytes:
        """Encodes the state of one key as int64 little-endian: `marks`, then `votes`."""
        return np.concatenate([self.marks[key], self.votes[key].ravel()]).astype("<i8").tobytes()

    def unpack(self, key: int, value: bytes) -> None:
        """Restores the result of `pack`; a value of another release is ignored."""
        numbers = np.frombuffer(value, "<i8")
        if len(numbers) == 6 + TURNS * 4:
            self.marks[key], self.votes[key] = numbers[:6], numbers[6:].reshape(TURNS, 4)


def agreed_on(at_ms: int, read_ms: int) -> bytes:
    """The state of a source of which no click is known, but that `AGREEING` users had reached `at_ms` at `read_ms`.

    It has no clock until its next click. Then these users have votes like others. The result is that of `Quorum.pack`.
    """
    state = Quorum.of(1)
    for turn in range(1, AGREEING + 1):
        state.votes[0, turn - 1, [_AT, _READ, _TURN]] = at_ms, read_ms, turn
    state.marks[0, _TURNS] = AGREEING
    return state.pack(0)


def believed_in(packed: bytes | None) -> int | None:
    """The newest time that readers may believe, ms, from a result of `Quorum.pack`; None if there is none."""
    state = np.frombuffer(packed or b"", "<i8")
    return int(state[_BELIEVED]) if len(state) > _BELIEVED and state[_BELIEVED] > NEVER_MS else None


def hear(quorum: Quorum, key: I64, user: NDArray[np.uint64], at_ms: I64, read_ms: int) -> I64:
    """Adds clicks to `quorum` in order of arrival; returns `[n]` int64, for each click its partition's clock after it.

    `key`, `[n]` int64, is the key of each click's partition.
    """
    clock = np.empty(len(at_ms), np.int64)
    _hear(quorum, key, user.view(np.int64), at_ms, read_ms, clock)
    return clock


def believe(quorum: Quorum, keys: I64, source: I64, at_ms: I64, now_ms: int) -> tuple[I64, U8]:
    """The event time that readers may believe in each partition; call it after `hear` with the same clicks.

    `source`, `[n]` int64, is the partition of each click, as an index of `keys`.

    Returns:
        `[r, 2]` int64, the time before the first click and after the last one; and `[n]` uint8: AHEAD of the believed
        time, far BEHIND it, or 0.
    """
    clocks, off = np.empty((len(keys), 2), np.int64), np.zeros(len(at_ms), np.uint8)
    _believe(quorum, keys, source, at_ms, now_ms, clocks, off)
    return clocks, off


def crowd(quorum: Quorum, key: int) -> tuple[int | None, int]:
    """The lower median of a key's votes, ms, None if there are none; and its consecutive turns of late clicks."""
    votes = quorum.votes[key]
    times = np.sort(votes[votes[:, _TURN] > max(quorum.turns(key) - TURNS, 0), _AT])
    return (int(times[(len(times) - 1) // 2]) if len(times) else None), int(quorum.marks[key, _LATE])


@inlined
def _take(quorum: Quorum, key: int, user: int, at_ms: int, read_ms: int) -> None:
    turn = quorum.marks[key, _TURNS]
    slot = oldest = 0
    same = False
    for entry in range(TURNS):
        if quorum.votes[key, entry, _TURN] > 0 and quorum.votes[key, entry, _USER] == user:
            slot = entry
            same = True
            break
        if quorum.votes[key, entry, _TURN] < quorum.votes[key, oldest, _TURN]:
            oldest = entry
    if not same:
        slot = oldest
    if not same or quorum.votes[key, slot, _TURN] != turn:
        turn += 1
        quorum.marks[key, _TURNS] = turn
    quorum.votes[key, slot, _USER] = user
    quorum.votes[key, slot, _AT] = at_ms
    quorum.votes[key, slot, _READ] = read_ms
    quorum.votes[key, slot, _TURN] = turn


@inlined
def _sorted(quorum: Quorum, key: int, now_ms: int, times: I64) -> int:
    """Writes the quorum's times, advanced to `now_ms`, to `times` in ascending order; returns their number."""
    count = 0
    since = quorum.marks[key, _TURNS] - TURNS
    for entry in range(TURNS):
        turn = quorum.votes[key, entry, _TURN]
        if turn <= max(since, 0):
            continue
        time = quorum.votes[key, entry, _AT] + max(0, now_ms - quorum.votes[key, entry, _READ])
        index = count
        while index > 0 and times[index - 1] > time:
            times[index] = times[index - 1]
            index -= 1
        times[index] = time
        count += 1
    return count


@inlined
def _is_late(quorum: Quorum, key: int, user: int, at_ms: int) -> bool:
    """Whether a late click must not affect the clock; after `PATIENCE` turns of late clicks, the state is reset."""
    mark = quorum.marks[key]
    if mark[_AGREED] == 0 or at_ms >= mark[_CLOCK] - TOLERANCE_MS:
        mark[_LATE] = 0
        return False
    if mark[_LATE] == 0 or mark[_LATE_USER] != user:
        mark[_LATE] += 1
        mark[_LATE_USER] = user
    if mark[_LATE] < PATIENCE:
        return True
    mark[_LATE] = mark[_AGREED] = 0
    mark[_CLOCK] = NEVER_MS
    quorum.votes[key, :, _TURN] = 0
    return False


@inlined
def _settle(quorum: Quorum, key: int, times: I64) -> int:
    # 1.
    count = _sorted(quorum, key, 0, times)
    latest = times[(count - 1) // 2] + TOLERANCE_MS
    clock = quorum.marks[key, _CLOCK]
    # 4.
    if clock > latest and quorum.marks[key, _AGREED] == 0 and (count < 2 or times[count - 2] < clock - TOLERANCE_MS):
        clock = latest - TOLERANCE_MS
    # 2.
    for entry in range(count):
        if times[entry] <= latest:
            clock = max(clock, times[entry])
    # 3.
    if count >= AGREEING and times[count - AGREEING] >= clock - TOLERANCE_MS:
        quorum.marks[key, _AGREED] = 1
    quorum.marks[key, _CLOCK] = clock
    return int(clock)


@compiled("Quorum, i8[::1], i8[::1], i8[::1], i8, i8[::1]")
def _hear(quorum: Quorum, key: I64, user: I64, at_ms: I64, read_ms: int, clock_ms: I64) -> None:
    times = np.empty(TURNS, np.int64)
    heard = False
    for n in range(key.shape[0]):
        own = key[n]
        clock_ms[n] = quorum.marks[own, _CLOCK]
        if not _is_late(quorum, own, user[n], at_ms[n]):
            _take(quorum, own, user[n], at_ms[n], read_ms)
            clock_ms[n] = _settle(quorum, own, times)
        if not _is_late(quorum, ALL, user[n], at_ms[n]):
            _take(quorum, ALL, user[n], at_ms[n], read_ms)
            heard = True
    # The clock of all partitions is only for readers, so once a batch is enough.
    if heard:
        _settle(quorum, ALL, times)


@inlined
def _with_wall_clock(times: I64, count: int, now_ms: int) -> int:
    """The lower median of `count` ascending times and the wall clock."""
    if count == 0:
        return now_ms
    middle = count // 2
    if middle > 0 and now_ms <= times[middle - 1]:
        return int(times[middle - 1])
    return min(now_ms, int(times[middle]))


@inlined
def _limit(crowd: int, count: int, now_ms: int) -> int:
    if crowd > now_ms:
        return crowd if count >= AGREEING else now_ms
    return min(now_ms, crowd + TOLERANCE_MS)


@compiled("Quorum, i8[::1], i8[::1], i8[::1], i8, i8[:, ::1], u1[::1]")
def _believe(quorum: Quorum, keys: I64, source: I64, at_ms: I64, now_ms: int, clocks: I64, off: U8) -> None:
    times = np.empty(TURNS, np.int64)
    limits, crowds = np.empty(keys.shape[0], np.int64), np.empty(keys.shape[0], np.int64)
    count_of_all = _sorted(quorum, ALL, now_ms, times)
    crowd_of_all = _with_wall_clock(times, count_of_all, now_ms)
    for r in range(keys.shape[0]):
        count, crowd = _sorted(quorum, keys[r], now_ms, times), crowd_of_all
        if count >= ENOUGH:
            crowd = _with_wall_clock(times, count, now_ms)
        else:
            count = count_of_all
        limits[r] = _limit(crowd, count, now_ms)
        crowds[r] = min(crowd, limits[r])
        before = quorum.marks[keys[r], _BELIEVED]
        # The time believed before, unless it is beyond the limit now.
        clocks[r, 0] = clocks[r, 1] = before if before <= limits[r] else NEVER_MS
    for n in range(at_ms.shape[0]):
        r = source[n]
        if at_ms[n] > limits[r]:
            off[n] = AHEAD
            continue
        if clocks[r, 0] == NEVER_MS:
            clocks[r, 0] = at_ms[n]
        clocks[r, 1] = max(clocks[r, 1], at_ms[n])
        if at_ms[n] < clocks[r, 1] - TOLERANCE_MS:
            off[n] = BEHIND
    for r in range(keys.shape[0]):
        clocks[r, 1] = max(clocks[r, 1], crowds[r])
        if clocks[r, 0] == NEVER_MS:
            clocks[r, 0] = clocks[r, 1]
        quorum.marks[keys[r], _BELIEVED] = clocks[r, 1]


Clicks = EventBatch | MicroBatch

PREFIX = "clock:"
"""Prefix of the names of the store's extras: `clock:<source>`, and `clock:all` for all sources together."""


class OffClock(NamedTuple):
    """Clicks whose time is far from that of the clicks around them.

    Attributes:
        direction: `ahead`; `behind`, which may also be late arrivals; or `refused`, if they were refused for their
            time.
        offset: Offset of the newest of these clicks.
        by_ms: How far that click's time is off.
    """

    direction: str
    partition: int
    offset: int
    by_ms: int
    clicks: int = 1


class Moves(NamedTuple):
    """The offsets at which the clocks of partitions advance: each entry gives the clock from its offset on.

    Attributes:
        source: `[m]` uint16, an index of the ranges, ascending; a range's first entry is the clock at its beginning.
        offset: `[m]` int64, ascending in a range.
        clock_ms: `[m]` int64.
    """

    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    clock_ms: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class BatchClock:
    """The event clock during a batch of events.

    Attributes:
        clock_ms: `[n]` int64, for each event its partition's clock after it.
        moves: The offsets at which that clock advances, for consumers that have only a part of the events.
        believed: For each range the time that readers may believe, before its first and after its last event, ms.
        state: Names of the store's extras and their values, to commit with the batch.
    """

    clock_ms: NDArray[np.int64]
    moves: Moves
    believed: tuple[tuple[int, int], ...]
    state: Mapping[str, bytes]
    off: tuple[OffClock, ...]


class _Suspect(NamedTuple):
    """Clicks of one user that were ahead of the believed time, but may only be the first after a quiet period."""

    at_ms: int
    offset: int
    turn: int
    clicks: int


def moves_of(
    ranges: Sequence[Range], begin_ms: NDArray[np.int64], clicks: Clicks, clock_ms: NDArray[np.int64]
) -> Moves:
    """The offsets at which the clocks of a batch's partitions advance.

    There are none in a gap at the start of a range, because a gap was never read. `begin_ms`, `[r]` int64, is the clock of
    each range before its first click, `NEVER_MS` if there was none; `clock_ms`, `[n]` int64, that after each click.
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
    """
    newest_ms = max(clocks.values())
    return min(clock for clock in clocks.values() if clock > newest_ms - reach_ms)


class EventClock:
    """The event clock of each partition; `extra` returns its stored state by name. Not thread-safe."""

    def __init__(self, extra: Callable[[str], bytes | None]) -> None:
        self._extra = extra
        self._keys: dict[Source, int] = {}
        self._suspects: dict[int, dict[int, _Suspect]] = {}  # by key and user
        self._known = Quorum.of(8)
        self._load(ALL, "all")
        # Compile the kernels, or load their machine code, before the first event.
        nothing = np.empty(0, np.int64)
        hear(self._known, nothing, nothing.view(np.uint64), nothing, 0)
        believe(self._known, nothing, nothing, nothing, 0)

    def follow(self, clicks: Clicks, ranges: Sequence[Range], now_ms: int) -> BatchClock:
        """Updates the clocks with a batch of events, and returns them.

        `clicks` are in order of arrival; `ranges` is what `clicks.source` is an index of; `now_ms` is the wall clock.
        """
        keys = np.array([self._key(part.source) for part in ranges], np.int64)
        # Copies: for read-only or non-contiguous arrays the kernels would be compiled again.
        source, at_ms, user = clicks.source.astype(np.int64), clicks.at_ms.copy(), clicks.user.copy()
        begin_ms = self._known.marks[keys, _CLOCK]
        clock_ms = hear(self._known, keys[source] if len(source) else source, user, at_ms, now_ms)
        clocks, off = believe(self._known, keys, source, at_ms, now_ms)
        names = {PREFIX + str(part.source): key for part, key in zip(ranges, keys.tolist(), strict=True)}
        if not len(source):
            names = {}
        state = {name: self._known.pack(key) for name, key in {PREFIX + "all": ALL, **names}.items()}
        reached = tuple((int(begin), int(end)) for begin, end in clocks.tolist())
        moves = moves_of(ranges, begin_ms, clicks, clock_ms)
        return BatchClock(clock_ms, moves, reached, state, self._off(clicks, ranges, keys, clocks, off, now_ms))

    def reached(self, source: Source) -> Reached:
        """The event time of a source so far, as its crowd reports it; no single user decides it."""
        crowd_ms, late = crowd(self._known, self._key(source))
        return Reached(crowd_ms, late >= AGREEING)

    def _key(self, source: Source) -> int:
        key = self._keys.get(source)
        if key is None:
            key = self._keys[source] = len(self._keys) + 1
            self._known = self._known.with_space(key + 1)
            self._load(key, str(source))
            if not self._known.turns(key):
                # 0.1.0 had no watermark quorum: the clock of waiting rows was the newest event time.
                self._known.marks[key, _CLOCK] = decode_clocks(self._extra(CLOCKS)).get(source, NEVER_MS)
        return key

    def _load(self, key: int, name: str) -> None:
        value = self._extra(PREFIX + name)
        if value is not None:
            self._known.unpack(key, value)

    def _off(
        self,
        clicks: Clicks,
        ranges: Sequence[Range],
        keys: NDArray[np.int64],
        clocks: NDArray[np.int64],
        off: NDArray[np.uint8],
        now_ms: int,
    ) -> tuple[OffClock, ...]:
        """The clocks that are certainly wrong: ahead of the wall clock or, fifteen turns later, ahead of the crowd."""
        off_clocks = []
        ends = dict(zip(keys.tolist(), clocks[:, 1].tolist(), strict=True))
        partitions = {key: part.source.partition for part, key in zip(ranges, keys.tolist(), strict=True)}
        for key in sorted(self._suspects.keys() & ends.keys()):
            for user, (suspect_ms, offset, turn, clicks_ahead) in list(self._suspects[key].items()):
                if suspect_ms <= ends[key] + TOLERANCE_MS:
                    del self._suspects[key][user]
                elif self._known.turns(key) >= turn + TURNS:
                    del self._suspects[key][user]
                    off_clocks.append(OffClock("ahead", partitions[key], offset, suspect_ms - ends[key], clicks_ahead))
        for row in np.flatnonzero(off).tolist():
            key, at_ms, offset = int(keys[clicks.source[row]]), int(clicks.at_ms[row]), int(clicks.offset[row])
            if off[row] == BEHIND:
                off_clocks.append(OffClock("behind", partitions[key], offset, ends[key] - at_ms))
            elif at_ms > max(now_ms, ends[key]) + TOLERANCE_MS:
                off_clocks.append(OffClock("ahead", partitions[key], offset, at_ms - ends[key]))
            elif off[row] == AHEAD and at_ms > ends[key] + TOLERANCE_MS:
                suspects, user = self._suspects.setdefault(key, {}), int(clicks.user[row])
                before = suspects.get(user, _Suspect(at_ms, offset, self._known.turns(key), 0))
                suspects[user] = before._replace(at_ms=at_ms, offset=offset, clicks=before.clicks + 1)
        return tuple(off_clocks)
