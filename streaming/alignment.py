"""How much to read of each partition next, so that a backlog comes in about the order in which it happened. Pure.

Each partition is as late as the crowd of its users says (`streaming/event_clock.py`): no user's wrong clock holds
anybody up or lets anybody go, and neither does a record's Kafka timestamp.

1. A partition waits while its clock is more than the largest skew ahead of one that holds it up.
2. A partition holds others up as long as it has records that are there and come: not at its end, and not where it was
   asked in vain for a second (its broker is away, or a transaction is open), until it gives something again.
3. It holds nobody up while it reads clicks that are late by its own clock, as those of an old file that was sent to it:
   they come as they are read, beside the others.
4. Nobody waits for what came into the log after the wait began: a partition whose clock runs ahead for good, or is
   behind for good, costs others the order and never the turn.
5. Those that are read come to the same time, by the time that their records took lately; so the partitions are as far
   apart as the largest skew and what one poll brings.

What is kept is some numbers for each partition, and of one that waits where the others ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from state.microbatch.log_time import TOLERANCE_MS

SILENT_S = 1.0
LEAST_PACE_MS = 1e-3  # of a record; many may have one time
PROBE = 16  # records of a partition whose pace is not known
PACE_RECORDS = 64  # a batch of so many is half of the pace
AT_END_SHARE = 4  # of as many parts of the rows those at their ends, or silent, get one together, for what comes


class ReadingPlace(NamedTuple):
    """Where reading a partition is.

    Attributes:
        position: Of the next record.
        unread: How many positions lie before its end, as last heard.
    """

    position: int
    unread: int


class Reached(NamedTuple):
    """What time it is where a partition was read to.

    Attributes:
        crowd_ms: What half of its latest users say at least; None where nobody has said anything.
        late: Whether its clicks are late, by what its own crowd said before.
    """

    crowd_ms: int | None
    late: bool


@dataclass
class _Partition:
    """What is known of a partition.

    Attributes:
        clock_ms: What time it is there; None: nothing was read, or it says nothing.
        newest_ms: The newest that it was.
        pace_ms: Event time that a record takes; None until two batches were read.
        late: Whether it reads late clicks.
        begun: Whether anything was read.
        vain_s: For how long it was asked in vain.
        ends: Where the others ended when it began to wait; None while it does not.
    """

    clock_ms: int | None = None
    newest_ms: int | None = None
    pace_ms: float | None = None
    late: bool = False
    begun: bool = False
    vain_s: float = 0.0
    ends: Mapping[int, int] | None = None


@dataclass
class Alignment:
    """Which partitions to read, and how much of each. One thread.

    Before each poll `shares`, after it `asked`; what the rows say of a partition's time, as soon as it is known, `follow`.

    Attributes:
        max_skew_ms: How far a partition that is read may be ahead of another one.
    """

    max_skew_ms: int
    _known: dict[int, _Partition] = field(default_factory=dict)

    def knows(self, partition: int) -> bool:
        """Whether anything was said of a partition."""
        return partition in self._known

    def follow(self, partition: int, records: int, reached: Reached) -> None:
        """Takes what time it is in a partition after `records` more records; 0 where a reader begins."""
        one = self._known.setdefault(partition, _Partition())
        one.begun = one.begun or records > 0
        if reached.crowd_ms is None:
            return
        if one.clock_ms is not None and records:
            pace_ms = max(reached.crowd_ms - one.clock_ms, 0) / records
            share = 1.0 if one.pace_ms is None else records / (records + PACE_RECORDS)
            one.pace_ms = (1 - share) * (one.pace_ms or 0.0) + share * pace_ms
        one.clock_ms = reached.crowd_ms
        one.newest_ms = max(one.clock_ms, one.clock_ms if one.newest_ms is None else one.newest_ms)
        one.late = reached.late or one.clock_ms < one.newest_ms - TOLERANCE_MS

    def asked(self, shares: Iterable[int], came: Iterable[int], took_s: float) -> None:
        """Takes which partitions a poll of `took_s` seconds was asked for, and which of them gave something."""
        given = set(came)
        for partition in shares:
            one = self._known.setdefault(partition, _Partition())
            one.vain_s = 0.0 if partition in given else one.vain_s + took_s
            one.ends = None if partition in given else one.ends

    def shares(self, places: Mapping[int, ReadingPlace], most: int) -> dict[int, int]:
        """How many records to read of each partition; those that wait are absent.

        >>> two = Alignment(max_skew_ms=60_000)
        >>> for number, crowd_ms in ((0, 1_000_000), (1, 0)): two.follow(number, 0, Reached(crowd_ms, False))
        >>> two.shares({0: ReadingPlace(5, 9), 1: ReadingPlace(7, 9)}, 100), two.shares({0: ReadingPlace(5, 9), 1: ReadingPlace(16, 0)}, 100)
        ({1: 16}, {0: 16, 1: 12})

        Args:
            places: Of all partitions that are read.
            most: How many records over all.
        """
        known = {number: self._known.setdefault(number, _Partition()) for number in places}
        holders = [number for number, place in places.items() if place.unread > 0 and _holds(known[number])]
        going = [number for number in places if self._may_go(number, known, holders, places)]
        behind = [one for one, place in places.items() if place.unread > 0 and known[one].vain_s < SILENT_S]
        if not behind:
            return dict.fromkeys(going, most)
        at_end = {one: max(1, most // (AT_END_SHARE * len(places))) for one in going if one not in behind}
        # Those that wait get nothing of their parts, and nobody else does: else one alone would run far ahead of them.
        found = _divided(known, behind, max(1, most - sum(at_end.values())))
        return {one: found[one] for one in behind if one in going and found[one] > 0} | at_end

    def _may_go(
        self, number: int, known: Mapping[int, _Partition], holders: Sequence[int], places: Mapping[int, ReadingPlace]
    ) -> bool:
        """Whether nobody holds a partition up; notes where the others ended when that began."""
        one = known[number]
        ahead = [other for other in holders if _ahead_ms(one, known[other]) > self.max_skew_ms]
        if not ahead:
            one.ends = None
            return True
        if one.ends is None:
            one.ends = {other: place.position + place.unread for other, place in places.items()}
        # 4.
        return not any(places[other].position < one.ends.get(other, 0) for other in ahead)


def _holds(one: _Partition) -> bool:
    """Whether a partition that is not at its end holds others up: 2. and 3., and one that says nothing does not."""
    return one.vain_s < SILENT_S and not one.late and (one.clock_ms is not None or not one.begun)


def _ahead_ms(one: _Partition, other: _Partition) -> float:
    """How far `one` is ahead of what holds others up; of what was never read nobody knows how old it is."""
    if one.late or one.clock_ms is None:
        return 0.0
    return float("inf") if other.clock_ms is None else one.clock_ms - other.clock_ms


def _divided(known: Mapping[int, _Partition], behind: Sequence[int], most: int) -> dict[int, int]:
    """Of each of `behind` its part of `most` records: equal parts where the time is not known, the rest by 5."""
    timed = [number for number in behind if known[number].pace_ms is not None and not known[number].late]
    equal = max(1, most // len(behind))
    # Of a partition whose pace is not known nobody knows how far its records go.
    found = {one: min(equal, PROBE) if _is_new(known[one]) else equal for one in behind if one not in timed}
    if timed:
        clocks = [(known[one].clock_ms or 0, max(known[one].pace_ms or 0.0, LEAST_PACE_MS)) for one in timed]
        found |= dict(zip(timed, to_one_time(clocks, max(1, most - sum(found.values()))), strict=True))
    return found


def _is_new(one: _Partition) -> bool:
    """Whether a partition has a pace that is not known yet."""
    return not one.late and one.pace_ms is None and (one.clock_ms is not None or not one.begun)


def to_one_time(clocks: Sequence[tuple[int, float]], most: int) -> list[int]:
    """How many records of each partition bring those that are behind to one time.

    Args:
        clocks: Of each partition its time, ms, and the time that a record takes, ms, above 0.
        most: How many records over all; they may be some fewer, and at least one comes from the earliest.

    >>> to_one_time([(0, 10.0), (0, 30.0)], 100), to_one_time([(0, 10.0), (500, 10.0), (9_999, 10.0)], 100)
    ([75, 25], [75, 25, 0])
    """
    order = sorted(range(len(clocks)), key=lambda one: clocks[one][0])
    first_ms = clocks[order[0]][0]
    records, rate, until_ms = float(most), 0.0, 0.0
    for place, one in enumerate(order):
        since_ms, pace_ms = clocks[one][0] - first_ms, clocks[one][1]
        records, rate = records + since_ms / pace_ms, rate + 1 / pace_ms
        until_ms = records / rate
        if place + 1 < len(order) and until_ms <= clocks[order[place + 1]][0] - first_ms:
            break
    found = [max(0, int((until_ms - (at_ms - first_ms)) / pace_ms + 1e-6)) for at_ms, pace_ms in clocks]
    found[order[0]] = max(1, found[order[0]])
    return found
