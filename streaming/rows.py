"""Rows of the stream: a batch of events with their windows, and the events to append to histories; and micro-batches.

The events of several partitions are sorted by the partitions' clocks, so one wrong clock moves no other user's rows.

Pure rules, without Kafka, LMDB or Beam, decide when a micro-batch is cut, and what it contains.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.attributes.values import Joined
from state.config.sections import Stream
from state.events.parser import EventBatch
from state.features.arrays import Vector
from state.features.mask import ClickColumns, Mask
from state.history.appends import Appends
from state.log.topic_plan import RECORD_BYTES
from state.microbatch.batch import LISTS, SCALARS, WAITING, Header, Known, absent_column
from state.microbatch.codec import split
from state.positions import Range, Source, merge_ranges
from streaming.event_clock import BatchClock


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A batch of events with their windows, and the events to append to histories.

    Attributes:
        batch: The events, in order of arrival.
        vectors: Output of the window kernel for each event, `[n, ...]`.
        kind: `[n]` uint8 `Kind`; by default each event is a row.
        known: Earlier impressions whose label became known.
        attributes: Attributes of users and items; None if none are configured.
        clock: The event clock; None if it is not needed.
        delay_ms: `[n]` int64, how far an impression's time is ahead of its partition's clock, at most 0; empty by
            default.
    """

    batch: EventBatch
    vectors: Vector
    appends: Appends
    kind: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))
    known: Known | None = None
    attributes: Joined | None = None
    clock: BatchClock | None = None
    delay_ms: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.batch.offset) + (0 if self.known is None else len(self.known))

    def __bool__(self) -> bool:
        """True even without rows, because an empty batch still advances positions."""
        return True

    @property
    def events(self) -> dict[str, NDArray[Any]]:
        """The columns of the events alone."""
        batch, rows = self.batch, len(self.batch.offset)
        added: dict[str, NDArray[Any]] = {
            "kind": self.kind,
            "request": batch.request,
            "delay_ms": self.delay_ms,
        }
        none = absent_column("user_attributes", rows)
        return {
            **{name: getattr(batch, name) for name in (*SCALARS, "context") if name not in WAITING},
            **{name: absent_column(name, rows) for name in WAITING},
            **{name: column for name, column in added.items() if len(column) == rows},
            # Sequences are columns only if the spec requests them.
            **{name: column for name, column in self.vectors._asdict().items() if column.shape[1] or name in LISTS},
            "user_attributes": none if self.attributes is None else self.attributes.user,
            "item_attributes": none if self.attributes is None else self.attributes.item,
        }

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of a micro-batch by name; `source` is an index of the batch's ranges.

        Each event comes before the impressions that became known after it.
        """
        events = self.events
        if self.known is None or not len(self.known):
            return events
        assert self.known.columns is not None, "looked up before they are written"
        order = np.argsort(np.concatenate([np.arange(len(self.batch.offset)), self.known.by]), kind="stable")
        return {name: np.concatenate([events[name], self.known.columns[name]])[order] for name in events}


COLUMNS = ("user", "item", "category", "action", "at_ms", "label", "weight", "context", "source", "offset", "request")


def leave_out(batch: EventBatch, mask: Mask) -> EventBatch:
    """Returns the batch without the events that `mask` matches."""
    if not mask or not len(batch):
        return batch
    out = mask.rows(ClickColumns.of(batch), batch.ranges)
    if not out.any():
        return batch
    masked = np.bincount(batch.source[out], minlength=len(batch.ranges)).tolist()
    ranges = tuple(
        replace(part, rows=part.rows - count, masked=part.masked + count)
        for part, count in zip(batch.ranges, masked, strict=True)
    )
    columns = {name: getattr(batch, name) for name in COLUMNS}
    remaining = {name: column[~out] for name, column in columns.items() if len(column) == len(out)}
    return replace(batch, ranges=ranges, **remaining)


def in_order(batch: EventBatch, clock: BatchClock) -> tuple[EventBatch, BatchClock]:
    """Returns the batch with its rows in order of time, and their event clock in the same order.

    Before, the rows come partition by partition, each in log order; `clock` is the result of `EventClock.follow` for them.
    """
    if len(batch.ranges) < 2 or not len(batch):
        return batch, clock
    reached_ms = clock.clock_ms.copy()
    for number in range(len(batch.ranges)):
        is_of_range = batch.source == number
        reached_ms[is_of_range] = np.maximum.accumulate(reached_ms[is_of_range])
    order = np.argsort(reached_ms, kind="stable")
    columns = {name: getattr(batch, name) for name in COLUMNS}
    sorted_columns = {name: column[order] for name, column in columns.items() if len(column) == len(order)}
    return replace(batch, **sorted_columns), replace(clock, clock_ms=clock.clock_ms[order])


@dataclass(frozen=True, slots=True)
class Cut:
    """The batches that are written together, in log order, and when they were cut: wall clock, ms."""

    pieces: tuple[Rows, ...]
    created_ms: int


BUSY_TIMES = 5
"""The most times `cut_ms` that a cut waits while an earlier one is written."""
FIRST_SHARE = 0.7
"""The part of `cut_ms` before the first of two polls. Few clicks are left for the second one, so the cut is ready soon."""
FEW_ROWS = 256
"""After a cut of fewer rows than this, the next one takes a single poll: its clicks are processed in a few ms."""
MOST_INTERVAL_MS = 250.0
IDLE_POLL_MS, BUSY_POLL_MS = 500.0, 50.0
"""The most that a poll waits for a click: if no cut is due, and while a due cut waits for an earlier one to be written."""
QUIET_SHARE, LEAST_QUIET_MS = 0.1, 1000.0
"""After this part of `cut_ms` without a click, but at least `LEAST_QUIET_MS`, a cut does not wait for more."""


class Cutter:
    """Collects batches until there are enough rows, or the first one has waited long enough; decides when to poll.

    The first batch has waited since the poll before its own, because its clicks may have arrived right after that poll.
    At the end of a backlog, when no further click comes, the cut does not wait for all of `cut_ms`.

    Args:
        cut_rows: Target number of rows of a cut; a single larger batch is a separate cut.
        cut_ms: The maximum wait of the first collected position, ms; while an earlier cut is written, `BUSY_TIMES` of it.
    """

    def __init__(self, cut_rows: int, cut_ms: int) -> None:
        self._cut_rows, self._cut_ms = cut_rows, cut_ms
        self._pieces: list[Rows] = []
        self._rows = self._last_rows = 0
        self._quiet_ms = max(QUIET_SHARE * cut_ms, LEAST_QUIET_MS)
        self._polled_ms = self._before_ms = self._since_ms = self._came_ms = 0.0

    def poll(self, now_ms: float) -> float:
        """Records the time of a poll, whose clicks are added next; returns how long it may wait for a click, ms.

        `now_ms` is a monotonic clock, as in `wait_ms`.
        """
        may_wait_ms = IDLE_POLL_MS
        if self._pieces:
            due_ms = min(self._since_ms + self._cut_ms, self._came_ms + self._quiet_ms)
            # Due at the last poll, and not cut: an earlier cut is written.
            is_held = due_ms <= self._polled_ms
            may_wait_ms = BUSY_POLL_MS if is_held else min(max(0.0, due_ms - now_ms), IDLE_POLL_MS)
        self._before_ms, self._polled_ms = self._polled_ms, now_ms
        return may_wait_ms

    def wait_ms(self, now_ms: float, returned_ms: float) -> float:
        """How long to wait for more clicks before the next poll, ms, at least 0; the last poll returned at `returned_ms`."""
        next_ms = self._since_ms + self._cut_ms
        if not self._pieces or next_ms <= self._polled_ms:
            next_ms = returned_ms + self._cut_ms * (1 if self._last_rows < FEW_ROWS else FIRST_SHARE)
        return max(0.0, min(next_ms, returned_ms + MOST_INTERVAL_MS) - now_ms)

    def add(self, rows: Rows, now_ms: int, busy: bool = False) -> list[Cut]:
        """Adds the batch of a poll, which may be empty; returns the cuts that are due, oldest first.

        While an earlier cut is written (`busy`), rows wait longer: one large cut costs less than two small ones.
        A batch without rows that still covers positions (dead, filtered, absent) is collected too. `now_ms` is the
        wall clock.
        """
        due = []
        count = len(rows)
        if self._rows and self._rows + count > self._cut_rows:
            due.extend(self.flush(now_ms))
        if rows.batch.ranges:
            if not self._pieces:
                self._since_ms = self._before_ms
            self._came_ms = self._polled_ms
            self._pieces.append(rows)
            self._rows += count
        waited = self._polled_ms - self._since_ms >= self._cut_ms * (BUSY_TIMES if busy else 1)
        waited = waited or (not busy and self._polled_ms - self._came_ms >= self._quiet_ms)
        if self._pieces and (self._rows >= self._cut_rows or waited):
            due.extend(self.flush(now_ms))
        return due

    def flush(self, now_ms: int) -> list[Cut]:
        """Returns everything collected as one cut; an empty list if there is nothing."""
        if not self._pieces:
            return []
        cut = Cut(tuple(self._pieces), now_ms)
        self._pieces, self._rows, self._last_rows = [], 0, self._rows
        return [cut]


def merge_all(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Merges ranges to one range for each source, in order of first appearance.

    Raises:
        ValueError: Two ranges of a source are not adjacent.
    """
    merged: dict[Source, Range] = {}
    for part in ranges:
        earlier = merged.get(part.source)
        merged[part.source] = part if earlier is None else merge_ranges(earlier, part)
    return tuple(merged.values())


def clocks_of(cut: Cut) -> tuple[tuple[int, int], ...]:
    """For each merged range, the time that readers may believe before and after it; empty if a batch has no clock."""
    merged: dict[Source, tuple[int, int]] = {}
    for piece in cut.pieces:
        if piece.clock is None:
            return ()
        for part, (begin, end) in zip(piece.batch.ranges, piece.clock.believed, strict=True):
            merged[part.source] = merged.get(part.source, (begin, end))[0], end
    return tuple(merged.values())


def gather(cut: Cut) -> tuple[tuple[Range, ...], dict[str, NDArray[Any]]]:
    """The ranges of a cut and its columns; the column `source` is an index into those ranges."""
    ranges = merge_all(part for piece in cut.pieces for part in piece.batch.ranges)
    number = {part.source: index for index, part in enumerate(ranges)}
    parts = []
    for piece in cut.pieces:
        columns = piece.columns
        numbers = np.array([number[part.source] for part in piece.batch.ranges] or [0], np.uint16)
        columns["source"] = numbers[columns["source"]]
        parts.append(columns)
    if len(parts) == 1:
        return ranges, parts[0]
    return ranges, {name: np.concatenate([columns[name] for columns in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Encoding:
    """The properties that all records of a cut share.

    Attributes:
        mask_generation: Generation of the mask that the windows were computed with.
        log_epoch: The epoch of the training log that is written.
    """

    spec: str
    salt: str
    max_rows: int
    max_record_bytes: int = RECORD_BYTES
    mask_generation: int = 0
    log_epoch: int = 1

    @classmethod
    def of(cls, stream: Stream, spec: str, salt: str, mask_generation: int = 0, log_epoch: int = 1) -> Encoding:
        """The encoding of a stream with these settings."""
        return cls(spec, salt, stream.cut_rows, mask_generation=mask_generation, log_epoch=log_epoch)


def encode_cut(cut: Cut, encoding: Encoding) -> list[bytes]:
    """Encodes a cut as micro-batch records: one, unless a limit requires more.

    Raises:
        MicroBatchError: One row exceeds the maximum size of a record.
    """
    ranges, columns = gather(cut)
    names = {key: name for piece in cut.pieces for key, name in (piece.batch.item_names | piece.batch.names).items()}
    attributes = [piece.attributes for piece in cut.pieces if piece.attributes is not None]
    for joined in attributes:
        names |= joined.names
    header = Header(
        encoding.spec,
        encoding.salt,
        ranges,
        cut.created_ms,
        encoding.mask_generation,
        names,
        attributes[0].fields if attributes else ((), ()),
        encoding.log_epoch,
        clocks_of(cut),
    )
    return split(header, columns, encoding.max_record_bytes, encoding.max_rows)


def merge_appends(parts: Sequence[Appends]) -> Appends:
    """Merges appends into one set; a user's events keep the order of `parts`."""
    if not parts:
        return Appends.none()
    if len(parts) == 1:
        return parts[0]
    users = np.concatenate([np.repeat(part.users, part.lengths) for part in parts])
    return Appends.of(users, np.concatenate([part.events for part in parts]))
