"""The watermark quorum: computes event time from the clicks of many users, so that no single user can move it. Pure.

A witness is a user whose clicks vote on a partition's time. The witnesses of a partition are the users of its last
`TURNS` turns, each with the time of the latest click. Consecutive clicks of one user are one turn, so a thousand of
them weigh no more than one.

1. The crowd's time is the lower median of the witnesses' times: at least half of them report that time or a later one.
2. A time is believed up to `TOLERANCE_MS` after the crowd's. The clock is the newest time that was believed. If all
   users' clocks are right, it is the newest event time.
3. A clock that `QUORUM` witnesses agree on does not go back. A click far behind it is late, and late clicks, even a
   whole file of them, do not affect the clock. Only after `PATIENCE` turns of nothing else does the clock start again.
4. A clock that fewer agree on, such as that of a first click, holds until two others contradict it.

This clock depends on the log of the partition alone, however it is read. The time that a micro-batch reports to its
readers (`believe`) also uses the time when each click was read. A witness's time advances with the wall clock, so that
the first click after a quiet night is believed at once. The wall clock is a witness too. No time beyond it is believed
unless there are `QUORUM` witnesses. If a partition has fewer than `ENOUGH` witnesses, those of all partitions together,
under key 0, replace them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled, layout
from state.microbatch.batch import TOLERANCE_MS

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

TURNS, QUORUM, ENOUGH, PATIENCE = 15, 8, 3, 1000
ALL = 0  # the key of all partitions together
NEVER_MS = np.iinfo(np.int64).min
AHEAD, BEHIND = 1, 2
_USER, _AT, _READ, _TURN = 0, 1, 2, 3
_TURNS, _CLOCK, _BELIEVED, _AGREED, _LATE, _LATE_USER = 0, 1, 2, 3, 4, 5


@layout("i8[:, :, ::1], i8[:, ::1]")
class Witnesses(NamedTuple):
    """The witnesses and the clocks of K keys: all partitions together, then each partition.

    Attributes:
        said: `[K, TURNS, 4]` int64: the user, the time of the latest click, when it was read, and its turn; turn 0
            marks an empty entry.
        marks: `[K, 6]` int64: turns so far, the clock, the newest time that readers were told to believe, 1 once
            `QUORUM` agreed, turns of late clicks since the last one that was not late, and the user of the last late
            one.
    """

    said: I64
    marks: I64

    @classmethod
    def of(cls, keys: int) -> Witnesses:
        """Creates the state before any click."""
        marks = np.zeros((keys, 6), np.int64)
        marks[:, [_CLOCK, _BELIEVED]] = NEVER_MS
        return cls(np.zeros((keys, TURNS, 4), np.int64), marks)

    def with_space(self, keys: int) -> Witnesses:
        """Returns a copy with space for `keys` keys; itself if there is enough."""
        if len(self.marks) >= keys:
            return self
        grown = Witnesses.of(max(keys, 2 * len(self.marks)))
        grown.said[: len(self.said)] = self.said
        grown.marks[: len(self.marks)] = self.marks
        return grown

    def turns(self, key: int) -> int:
        """Number of turns so far."""
        return int(self.marks[key, _TURNS])

    def clocks(self, keys: I64) -> I64:
        """`[r]` int64, the clock of each of `[r]` keys; `NEVER_MS` if there was no click yet."""
        found: I64 = self.marks[keys, _CLOCK]
        return found

    def set_clock(self, key: int, clock_ms: int | None) -> None:
        """Sets a clock whose witnesses are not stored; None leaves it unchanged."""
        if clock_ms is not None:
            self.marks[key, _CLOCK] = clock_ms

    def pack(self, key: int) -> bytes:
        """Encodes the state of one key as int64 little-endian: `marks`, then `said`."""
        return np.concatenate([self.marks[key], self.said[key].ravel()]).astype("<i8").tobytes()

    def unpack(self, key: int, value: bytes) -> None:
        """Restores the result of `pack`; a value of another release is ignored."""
        found = np.frombuffer(value, "<i8")
        if len(found) == 6 + TURNS * 4:
            self.marks[key], self.said[key] = found[:6], found[6:].reshape(TURNS, 4)


def believed_in(packed: bytes | None) -> int | None:
    """The newest time that readers were told to believe, ms, from a result of `Witnesses.pack`; None if there is none.

    >>> known = Witnesses.of(1)
    >>> known.marks[0, _BELIEVED] = 70
    >>> believed_in(known.pack(0)), believed_in(None)
    (70, None)
    """
    told = np.frombuffer(packed or b"", "<i8")
    return int(told[_BELIEVED]) if len(told) > _BELIEVED and told[_BELIEVED] > NEVER_MS else None


def hear(known: Witnesses, key: I64, user: NDArray[np.uint64], at_ms: I64, read_ms: int) -> I64:
    """Adds clicks in order of arrival; returns `[n]` int64, for each click its partition's clock after it.

    Args:
        known: Changed.
        key: `[n]` int64, the key of each click's partition.
        user: `[n]` uint64.
        at_ms: `[n]` int64.
        read_ms: Wall clock.
    """
    clock = np.empty(len(at_ms), np.int64)
    _hear(known, key, user.view(np.int64), at_ms, read_ms, clock)
    return clock


def believe(known: Witnesses, keys: I64, source: I64, at_ms: I64, now_ms: int) -> tuple[I64, U8]:
    """The event time that readers may believe in each partition; call it after `hear` with the same clicks.

    Args:
        known: Changed.
        keys: `[r]` int64, of the partitions.
        source: `[n]` int64, the partition of each click, as an index of `keys`.
        at_ms: `[n]` int64.
        now_ms: Wall clock.

    Returns:
        `[r, 2]` int64, the time before the first click and after the last one; and `[n]` uint8: AHEAD of the believed
        time, far BEHIND it, or 0.
    """
    clocks, off = np.empty((len(keys), 2), np.int64), np.zeros(len(at_ms), np.uint8)
    _believe(known, keys, source, at_ms, now_ms, clocks, off)
    return clocks, off


def crowd(known: Witnesses, key: int) -> tuple[int | None, int]:
    """The lower median of a key's witnesses, ms, None if there are none; and its consecutive turns of late clicks."""
    said = known.said[key]
    heard = np.sort(said[said[:, _TURN] > max(known.turns(key) - TURNS, 0), _AT])
    return (int(heard[(len(heard) - 1) // 2]) if len(heard) else None), int(known.marks[key, _LATE])


@compiled
def _take(known: Witnesses, key: int, user: int, at_ms: int, read_ms: int) -> None:
    """Records a user's click; a user's later click replaces the earlier one."""
    turn = known.marks[key, _TURNS]
    slot = oldest = 0
    same = False
    for one in range(TURNS):
        if known.said[key, one, _TURN] > 0 and known.said[key, one, _USER] == user:
            slot = one
            same = True
            break
        if known.said[key, one, _TURN] < known.said[key, oldest, _TURN]:
            oldest = one
    if not same:
        slot = oldest
    if not same or known.said[key, slot, _TURN] != turn:
        turn += 1
        known.marks[key, _TURNS] = turn
    known.said[key, slot, _USER] = user
    known.said[key, slot, _AT] = at_ms
    known.said[key, slot, _READ] = read_ms
    known.said[key, slot, _TURN] = turn


@compiled
def _sorted(known: Witnesses, key: int, now_ms: int, times: I64) -> int:
    """Writes the witnesses' times, advanced to `now_ms`, to `times` in ascending order; returns their number."""
    count = 0
    since = known.marks[key, _TURNS] - TURNS
    for one in range(TURNS):
        turn = known.said[key, one, _TURN]
        if turn <= max(since, 0):
            continue
        time = known.said[key, one, _AT] + max(0, now_ms - known.said[key, one, _READ])
        place = count
        while place > 0 and times[place - 1] > time:
            times[place] = times[place - 1]
            place -= 1
        times[place] = time
        count += 1
    return count


@compiled
def _is_late(known: Witnesses, key: int, user: int, at_ms: int) -> bool:
    """Whether a late click must not affect the clock; after `PATIENCE` turns of late clicks, the state is reset."""
    mark = known.marks[key]
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
    known.said[key, :, _TURN] = 0
    return False


@compiled
def _settle(known: Witnesses, key: int, times: I64) -> int:
    """Computes the clock from the witnesses' times."""
    # 1.
    count = _sorted(known, key, 0, times)
    latest = times[(count - 1) // 2] + TOLERANCE_MS
    clock = known.marks[key, _CLOCK]
    # 4.
    if clock > latest and known.marks[key, _AGREED] == 0 and (count < 2 or times[count - 2] < clock - TOLERANCE_MS):
        clock = latest - TOLERANCE_MS
    # 2.
    for one in range(count):
        if times[one] <= latest:
            clock = max(clock, times[one])
    # 3.
    if count >= QUORUM and times[count - QUORUM] >= clock - TOLERANCE_MS:
        known.marks[key, _AGREED] = 1
    known.marks[key, _CLOCK] = clock
    return int(clock)


@compiled("Witnesses, i8[::1], i8[::1], i8[::1], i8, i8[::1]")
def _hear(known: Witnesses, key: I64, user: I64, at_ms: I64, read_ms: int, clock_ms: I64) -> None:
    times = np.empty(TURNS, np.int64)
    heard = False
    for n in range(key.shape[0]):
        own = key[n]
        clock_ms[n] = known.marks[own, _CLOCK]
        if not _is_late(known, own, user[n], at_ms[n]):
            _take(known, own, user[n], at_ms[n], read_ms)
            clock_ms[n] = _settle(known, own, times)
        if not _is_late(known, ALL, user[n], at_ms[n]):
            _take(known, ALL, user[n], at_ms[n], read_ms)
            heard = True
    # The clock of all partitions is only for readers, so once a batch is enough.
    if heard:
        _settle(known, ALL, times)


@compiled
def _with_wall_clock(times: I64, count: int, now_ms: int) -> int:
    """The lower median of `count` ascending times and the wall clock."""
    if count == 0:
        return now_ms
    middle = count // 2
    if middle > 0 and now_ms <= times[middle - 1]:
        return int(times[middle - 1])
    return min(now_ms, int(times[middle]))


@compiled
def _limit(crowd: int, count: int, now_ms: int) -> int:
    """The latest time that is believed."""
    if crowd > now_ms:
        return crowd if count >= QUORUM else now_ms
    return min(now_ms, crowd + TOLERANCE_MS)


@compiled("Witnesses, i8[::1], i8[::1], i8[::1], i8, i8[:, ::1], u1[::1]")
def _believe(known: Witnesses, keys: I64, source: I64, at_ms: I64, now_ms: int, clocks: I64, off: U8) -> None:
    times = np.empty(TURNS, np.int64)
    limits, crowds = np.empty(keys.shape[0], np.int64), np.empty(keys.shape[0], np.int64)
    count_of_all = _sorted(known, ALL, now_ms, times)
    crowd_of_all = _with_wall_clock(times, count_of_all, now_ms)
    for r in range(keys.shape[0]):
        count, crowd = _sorted(known, keys[r], now_ms, times), crowd_of_all
        if count >= ENOUGH:
            crowd = _with_wall_clock(times, count, now_ms)
        else:
            count = count_of_all
        limits[r] = _limit(crowd, count, now_ms)
        crowds[r] = min(crowd, limits[r])
        before = known.marks[keys[r], _BELIEVED]
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
        known.marks[keys[r], _BELIEVED] = clocks[r, 1]
