"""Decides how much to read of each partition next, so that a backlog is read in approximate event-time order.

1. A partition waits while its clock is more than the maximum skew ahead of a partition that holds it back.
2. A partition holds others back while it has unread records that arrive. It stops at its end, or after a second of
   polls without records, until it returns records again. Such polls occur if its broker is unreachable, or a
   transaction is open.
3. A partition does not hold others back while it reads clicks that are late by its own clock, such as those of an old
   file. These are read as they arrive, in parallel with the others.
4. A partition never waits for records that were appended after its wait began. So a clock that is permanently ahead or
   behind can disturb the order, but never blocks reading.
5. Partitions that are read advance to one common event time, estimated from the event time per record of their latest
   batches. So their clocks differ by at most the maximum skew plus the records of one poll.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from state.log import PartitionBatch, Reader
from state.microbatch.batch import TOLERANCE_MS

SILENT_S = 1.0
MAX_SKEW_MS = 60_000  # event time by which a partition may be read ahead of those that lag
LEAST_PACE_MS = 1e-3  # minimum event time per record; many records may share one time
PROBE = 16  # records to read of a partition whose pace is unknown
PACE_RECORDS = 64  # a batch of this size has half of the weight in the pace
AT_END_SHARE = 4  # partitions at their end, or silent, share one such part (1/4) of the rows, for new records


class ReadingPlace(NamedTuple):
    """The next position of a partition, and the number of positions before its end, as last reported."""

    position: int
    unread: int


class Reached(NamedTuple):
    """The event time at the read position of a partition.

    Attributes:
        crowd_ms: The median: half of its latest users report at least this time; None before the first click.
        late: Whether its clicks are late by its own clock.
    """

    crowd_ms: int | None
    late: bool


@dataclass
class _Partition:
    """The state of a partition.

    Attributes:
        clock_ms: Its clock; None if nothing was read, or the records gave no time.
        newest_ms: The maximum of its clock so far.
        pace_ms: Event time that a record takes; None until two batches were read.
        silent_s: How long its polls have returned nothing.
        ends: End offsets of the partitions when it began to wait; None while it does not wait.
    """

    clock_ms: int | None = None
    newest_ms: int | None = None
    pace_ms: float | None = None
    late: bool = False
    begun: bool = False
    silent_s: float = 0.0
    ends: Mapping[int, int] | None = None

    @property
    def holds(self) -> bool:
        """Whether it holds others back unless it is at its end, by rules 2 and 3."""
        return self.silent_s < SILENT_S and not self.late and (self.clock_ms is not None or not self.begun)

    @property
    def is_new(self) -> bool:
        return not self.late and self.pace_ms is None and (self.clock_ms is not None or not self.begun)

    def ahead_ms(self, other: _Partition) -> float:
        """How far it is ahead of `other`, which holds others back; infinite if `other` was never read."""
        if self.late or self.clock_ms is None:
            return 0.0
        return float("inf") if other.clock_ms is None else self.clock_ms - other.clock_ms


@dataclass
class Alignment:
    """Decides which partitions to read, and how much of each. Not thread-safe.

    Call `shares` before each poll and `polled` after it. Call `follow` once the rows show a partition's event time.

    Attributes:
        max_skew_ms: How far a partition that is read may be ahead of another one.
        partitions: The state of each partition that an earlier call named.
    """

    max_skew_ms: int
    partitions: dict[int, _Partition] = field(default_factory=dict)

    def follow(self, partition: int, records: int, reached: Reached) -> None:
        """Updates the clock of a partition after `records` more records; 0 where a reader begins."""
        state = self.partitions.setdefault(partition, _Partition())
        state.begun = state.begun or records > 0
        if reached.crowd_ms is None:
            return
        if state.clock_ms is not None and records:
            pace_ms = max(reached.crowd_ms - state.clock_ms, 0) / records
            share = 1.0 if state.pace_ms is None else records / (records + PACE_RECORDS)
            state.pace_ms = (1 - share) * (state.pace_ms or 0.0) + share * pace_ms
        state.clock_ms = reached.crowd_ms
        state.newest_ms = max(state.clock_ms, state.clock_ms if state.newest_ms is None else state.newest_ms)
        state.late = reached.late or state.clock_ms < state.newest_ms - TOLERANCE_MS

    def polled(self, shares: Iterable[int], returned: Iterable[int], took_s: float) -> None:
        """Records which partitions a poll of `took_s` seconds requested, and which of them returned records."""
        returning = set(returned)
        for partition in shares:
            state = self.partitions.setdefault(partition, _Partition())
            state.silent_s = 0.0 if partition in returning else state.silent_s + took_s
            state.ends = None if partition in returning else state.ends

    def shares(self, positions: Mapping[int, ReadingPlace], most: int) -> dict[int, int]:
        """Returns how many records to read of each partition, `most` over all; partitions that wait are absent."""
        states = {number: self.partitions.setdefault(number, _Partition()) for number in positions}
        unread = [number for number, at in positions.items() if at.unread > 0]
        holders = [number for number in unread if states[number].holds]
        reading = [number for number in positions if self._may_read(number, states, holders, positions)]
        behind = [number for number in unread if states[number].silent_s < SILENT_S]
        if not behind:
            return dict.fromkeys(reading, most)
        at_end = {number: max(1, most // (AT_END_SHARE * len(positions))) for number in reading if number not in behind}
        # The parts of waiting partitions are not given to others; otherwise a single one would run far ahead of them.
        parts = _divided(states, behind, max(1, most - sum(at_end.values())))
        return {number: parts[number] for number in behind if number in reading and parts[number] > 0} | at_end

    def _may_read(
        self,
        number: int,
        states: Mapping[int, _Partition],
        holders: Sequence[int],
        positions: Mapping[int, ReadingPlace],
    ) -> bool:
        """Whether no other partition holds this one back; records the end offsets when a wait begins."""
        state = states[number]
        behind = [holder for holder in holders if state.ahead_ms(states[holder]) > self.max_skew_ms]
        if not behind:
            state.ends = None
            return True
        if state.ends is None:
            state.ends = {partition: at.position + at.unread for partition, at in positions.items()}
        # 4.
        return not any(positions[holder].position < state.ends.get(holder, 0) for holder in behind)


def _divided(states: Mapping[int, _Partition], behind: Sequence[int], most: int) -> dict[int, int]:
    """Divides `most` records among `behind`: equal parts if the clock is unknown, the rest by rule 5."""
    timed = [number for number in behind if states[number].pace_ms is not None and not states[number].late]
    equal = max(1, most // len(behind))
    # If the pace is unknown, so is how much event time its records cover.
    parts = {number: min(equal, PROBE) if states[number].is_new else equal for number in behind if number not in timed}
    if timed:
        clocks = [(states[number].clock_ms or 0, max(states[number].pace_ms or 0.0, LEAST_PACE_MS)) for number in timed]
        parts |= dict(zip(timed, to_one_time(clocks, max(1, most - sum(parts.values()))), strict=True))
    return parts


def to_one_time(clocks: Sequence[tuple[int, float]], most: int) -> list[int]:
    """How many records to read of each partition so that the earliest ones reach a common event time.

    `clocks` gives the clock of each, ms, and the event time that a record takes, ms, above 0. All together read at most
    `most` records, perhaps slightly fewer; the earliest gets at least one.
    """
    order = sorted(range(len(clocks)), key=lambda number: clocks[number][0])
    first_ms = clocks[order[0]][0]
    records, rate, until_ms = float(most), 0.0, 0.0
    for rank, number in enumerate(order):
        since_ms, pace_ms = clocks[number][0] - first_ms, clocks[number][1]
        records, rate = records + since_ms / pace_ms, rate + 1 / pace_ms
        until_ms = records / rate
        if rank + 1 < len(order) and until_ms <= clocks[order[rank + 1]][0] - first_ms:
            break
    parts = [max(0, int((until_ms - (at_ms - first_ms)) / pace_ms + 1e-6)) for at_ms, pace_ms in clocks]
    parts[order[0]] = max(1, parts[order[0]])
    return parts


class AlignedReader:
    """Reads batches whose event times are close to each other. Not thread-safe.

    `reached` returns the event time at the position of a partition. It is called once everything read so far is included
    in it.
    """

    def __init__(self, reader: Reader, reached: Callable[[int], Reached]) -> None:
        self._reader, self._reached = reader, reached
        self._alignment = Alignment(MAX_SKEW_MS)
        self._read: dict[int, int] = {}
        self._remaining: dict[int, int] | None = None
        self._most = 0

    def begin(self, most: int) -> None:
        """Plans the next polls, which read at most `most` records over all partitions together."""
        reader, partitions = self._reader, self._reader.partitions
        self._remaining, self._most = None, most
        if len(partitions) < 2:
            return
        for partition in partitions:
            # At first, the time that an earlier process had reached.
            if partition in self._read or partition not in self._alignment.partitions:
                self._alignment.follow(partition, self._read.get(partition, 0), self._reached(partition))
        self._read = {}
        positions = {number: ReadingPlace(reader.position(number), reader.unread(number)) for number in partitions}
        self._remaining = self._alignment.shares(positions, most)

    def poll(self, timeout_s: float) -> list[PartitionBatch]:
        """Returns the next of the planned batches, in order within a partition; none after `timeout_s` without records.

        Raises:
            LogError: See `Reader.poll`.
        """
        if self._remaining is None:
            batches = self._reader.poll(timeout_s, self._most)
            self._most -= sum(map(len, batches))
            return batches
        shares = {number: unread for number, unread in self._remaining.items() if unread > 0}
        begun_s = time.monotonic()
        batches = self._reader.poll(timeout_s, self._most, shares)
        self._alignment.polled(shares, [batch.partition for batch in batches], time.monotonic() - begun_s)
        for batch in batches:
            self._read[batch.partition] = self._read.get(batch.partition, 0) + len(batch)
            self._remaining[batch.partition] -= len(batch)
            self._most -= len(batch)
        return batches

    @property
    def is_done(self) -> bool:
        """Whether everything planned by `begin` was read."""
        return self._most <= 0 or (self._remaining is not None and max(self._remaining.values(), default=0) <= 0)
