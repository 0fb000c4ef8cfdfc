"""The micro-batch: the rows of one training step, and a header with their origin. No side effects.

Each row has a `Kind`. An event whose label is known, or that never gets one, is one row: it updates the histories and
the weights. An impression whose label comes later is two rows. The row at its own offset updates the histories, and the
row where its label became known updates the weights. An outcome, such as a click on an impression, updates only the
histories, because its impression's row carries it as the label. So several rows can share one offset, and a micro-batch
never ends between them.

Log time (`log_times`) is the time of each row for all effects on other users. A row's own time comes from its
producer's clock, and affects only the row's own user. Expiry, sightings, sweeps and serving's event clock use log time:
the row's own time if the header confirms it, else the time that its partition had reached.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.features.erased import Erased
from state.features.mask import ClickColumns, Mask
from state.positions import Range, Source, share_of, split_range

# Order and types define the format; a change needs a new FORMAT and a golden file.
SCALARS: dict[str, np.dtype[Any]] = {
    "user": np.dtype("<u8"),
    "item": np.dtype("<u8"),
    "category": np.dtype("<u8"),
    "action": np.dtype("u1"),
    "at_ms": np.dtype("<i8"),
    "label": np.dtype("<f4"),
    "weight": np.dtype("<f4"),
    "source": np.dtype("<u2"),
    "offset": np.dtype("<i8"),
    "kind": np.dtype("u1"),
    "waited": np.dtype("<i8"),
    "delay_ms": np.dtype("<i8"),
    "request": np.dtype("<u8"),
}
WAITING = ("kind", "waited", "delay_ms", "request")  # all 0 in a row whose label did not wait
LISTS: dict[str, np.dtype[Any]] = {
    "context": np.dtype("<u8"),
    "features": np.dtype("<u2"),
    "recent_categories": np.dtype("<u8"),
    "category_windows": np.dtype("<u2"),
    "user_attributes": np.dtype("<u8"),
    "item_attributes": np.dtype("<u8"),
}
SEQUENCES: dict[str, np.dtype[Any]] = {
    "sequence_items": np.dtype("<u8"),
    "sequence_categories": np.dtype("<u8"),
    "sequence_actions": np.dtype("<u2"),
    "sequence_ages": np.dtype("<u2"),
}  # present only if the feature spec requests them; see `state/features/kernel.py`
NAMES = (*SCALARS, *LISTS)
DTYPES = {**SCALARS, **LISTS, **SEQUENCES}
WRITTEN = {
    "recent_categories": "labels",
    "category_windows": "label_windows",
}  # names in the encoded formats, where they differ
ATTRIBUTES = ("user_attributes", "item_attributes")

Columns = Mapping[str, NDArray[Any]]


def absent_column(name: str, rows: int) -> NDArray[Any]:
    """The content of a column that is missing: zeros, or lists of no numbers."""
    shape = (rows, 0, 0) if name == "category_windows" else (rows, 0)
    return np.zeros(rows, DTYPES[name]) if name in SCALARS else np.empty(shape, DTYPES[name])


class Kind(enum.IntEnum):
    """The kinds, with the values that micro-batches store."""

    ROW = 0  # an event at its own offset, which is learned from
    OPENED = 1  # an impression that waits for its label; a later row is learned from
    DROPPED = 2  # an impression that cannot wait: it came too late, or too many wait
    FEEDBACK = 3  # an outcome
    JOINED = 4  # an earlier impression, labelled by the outcome at this offset
    EXPIRED = 5  # an earlier impression whose wait ended at this offset: negative


KIND_COUNT = len(Kind)


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """Earlier impressions whose label became known in a batch of events.

    Attributes:
        by: `[m]` int64 index into the batch: the last event of the source that is not after the row's offset; -1 if
            there is none.
        source: `[m]` uint16 source of the row's offset, an index into the batch's ranges.
        offset: `[m]` int64 offset at which the label became known.
        opened: `[m]` int64, offset of the impression in the same source.
        kind: `[m]` uint8, JOINED or EXPIRED.
        weight: `[m]` float32 weight of the outcome's action; NaN keeps the impression's weight.
        at_ms: `[m]` int64 event time at which the label became known.
        columns: The rows' columns as in a micro-batch; None until they are loaded.
    """

    by: NDArray[np.int64]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    opened: NDArray[np.int64]
    kind: NDArray[np.uint8]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    at_ms: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]] | None = None

    def __len__(self) -> int:
        return len(self.by)

    def __bool__(self) -> bool:
        """Always True, even without rows."""
        return True


def happened(kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which rows are events at their own offset, for histories."""
    is_event: NDArray[np.bool_] = kind < Kind.JOINED
    return is_event


def trained(kind: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which rows are learned from."""
    is_trained: NDArray[np.bool_] = (kind == Kind.ROW) | (kind >= Kind.JOINED)
    return is_trained


def counts(kind: NDArray[np.uint8]) -> dict[str, int]:
    """Counts rows by the outcomes of a `Range`; a dropped impression counts as opened too."""
    return counts_by_range(kind, np.zeros(len(kind), np.uint16), 1)[0]


def counts_by_range(kind: NDArray[np.uint8], source: NDArray[np.uint16], ranges: int) -> list[dict[str, int]]:
    """Like `counts`, for each range of a batch; `source` is an index of its `ranges` ranges."""
    counts_of_kinds = np.bincount(source.astype(np.int64) * KIND_COUNT + kind, minlength=KIND_COUNT * ranges)
    named = []
    for counts_of_range in counts_of_kinds.reshape(-1, KIND_COUNT)[:ranges].tolist():
        rows, opened, dropped, feedback, joined, expired = counts_of_range
        named.append(
            {
                "rows": rows,
                "opened": opened + dropped,
                "feedback": feedback,
                "joined": joined,
                "expired": expired,
                "dropped": dropped,
            }
        )
    return named


_ABSENT: NDArray[Any] = np.empty(0, np.uint8)


def _absent() -> NDArray[Any]:
    return _ABSENT


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a micro-batch.

    Attributes:
        spec: Digest of the feature spec.
        salt: Fingerprint of the salt of the users' pseudonyms.
        ranges: One contiguous range of positions per source; `source` of a row is an index into it.
        created_ms: When the batch was cut, wall clock.
        mask_generation: The generation of the mask that its windows were computed with; 0 for none.
        names: Id -> name, of categories and measured attributes that the stream had not announced recently.
        attributes: Names of the attributes of users and of items, in the order of their columns.
        log_epoch: The epoch of the log in which it was written, see `state/registry/log_line.py`.
        clocks: For each range the time before its first and after its last event, ms, by the clocks of many users; see
            `log_times`. Empty if the stream did not write it.
    """

    spec: str
    salt: str
    ranges: tuple[Range, ...]
    created_ms: int
    mask_generation: int = 0
    names: Mapping[int, str] = field(default_factory=dict)
    attributes: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    log_epoch: int = 1
    clocks: tuple[tuple[int, int], ...] = ()


class Logged(NamedTuple):
    """Where the rows of a micro-batch are in the training log.

    Attributes:
        value: The encoded record.
        rows: `[m]` bool, which rows of the record they are.
    """

    value: bytes
    rows: NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """The rows of one training step, in the order of the log within each source.

    Attributes:
        user: `[n]` uint64 ids; 0 is none.
        item: `[n]` uint64 ids.
        category: `[n]` uint64 ids.
        action: `[n]` uint8 index into the configured actions.
        at_ms: `[n]` int64 event time, ms.
        label: `[n]` float32; NaN if unknown.
        weight: `[n]` float32 weight of the action.
        source: `[n]` uint16 index into `header.ranges`.
        offset: `[n]` int64 offset of the row within the source.
        context: `[n, K]` uint64 ids.
        features: `[n, D]` uint16.
        recent_categories: `[n, L]` uint64 category ids, newest first; 0 pads.
        category_windows: `[n, L, F]` uint16.
        kind: `[n]` uint8 `Kind`.
        waited: `[n]` int64, the row's offset minus that of its event.
        delay_ms: `[n]` int64, how much later than the row's event its label became known, event time, ms.
        request: `[n]` uint64 id by which an impression and its outcome are paired; 0 is none.
        user_attributes: `[n, Au]` uint64 ids, see `state/attributes/values.py`.
        item_attributes: `[n, Ai]` uint64 ids; never shown to the interest head.
        sequence_items: `[n, T]` uint64 ids of the user's latest events, see `state/features/kernel.py`; T may be 0.
        sequence_categories: `[n, T]` uint64 ids.
        sequence_actions: `[n, T]` uint16, 1 and up; 0 pads.
        sequence_ages: `[n, T]` uint16 recencies.
        logged: `Logged`; None if it was not read from the training log.
    """

    header: Header
    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    action: NDArray[np.uint8]
    at_ms: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    context: NDArray[np.uint64]
    features: NDArray[np.uint16]
    recent_categories: NDArray[np.uint64]
    category_windows: NDArray[np.uint16]
    kind: NDArray[np.uint8] = field(default_factory=_absent)
    waited: NDArray[np.int64] = field(default_factory=_absent)
    delay_ms: NDArray[np.int64] = field(default_factory=_absent)
    request: NDArray[np.uint64] = field(default_factory=_absent)
    user_attributes: NDArray[np.uint64] = field(default_factory=_absent)
    item_attributes: NDArray[np.uint64] = field(default_factory=_absent)
    sequence_items: NDArray[np.uint64] = field(default_factory=_absent)
    sequence_categories: NDArray[np.uint64] = field(default_factory=_absent)
    sequence_actions: NDArray[np.uint16] = field(default_factory=_absent)
    sequence_ages: NDArray[np.uint16] = field(default_factory=_absent)
    logged: Any = None

    def __post_init__(self) -> None:
        """Fills missing columns: rows that did not wait, without attributes and sequences."""
        for name in (*WAITING, *ATTRIBUTES, *SEQUENCES):
            if getattr(self, name) is _ABSENT:
                object.__setattr__(self, name, absent_column(name, len(self.user)))

    def __len__(self) -> int:
        return len(self.user)

    @property
    def opened(self) -> NDArray[np.int64]:
        """The offset of each row's own event, `[n]` int64; unique among the rows that are `trained`."""
        return self.offset - self.waited

    @property
    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns by name, as `encode` takes them."""
        names = (*NAMES, *SEQUENCES) if self.sequence_items.shape[1] else NAMES
        return {name: getattr(self, name) for name in names}

    def rows(self, part: slice) -> MicroBatch:
        """A slice of the rows, as views, with the same header."""
        return MicroBatch(self.header, **{name: column[part] for name, column in self.columns.items()})

    def take(self, keep: NDArray[np.bool_]) -> MicroBatch:
        """The rows selected by `keep` (`[n]` bool), with the same header."""
        if keep.all():
            return self
        return MicroBatch(self.header, **{name: column[keep] for name, column in self.columns.items()})


def trim(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[NDArray[np.bool_], dict[Source, int]]:
    """Finds the rows that are new to a reader that has all positions below `marks`, `[n]` bool, and its new marks.

    After a crash the stream writes rows again; their source positions identify them. A source that `marks` does not
    name is new, and so are all its rows. The exception are rows that came earlier in other buckets, if a partition was
    divided into another number of buckets.
    """
    ranges = batch.header.ranges
    floors = np.array([marks.get(part.source, 0) for part in ranges] or [0], np.int64)
    after = dict(marks)
    for part in ranges:
        after[part.source] = max(part.next, marks.get(part.source, 0))
    fresh: NDArray[np.bool_] = batch.offset >= floors[batch.source]
    if len({source.buckets for source in marks} | {part.source.buckets for part in ranges}) > 1:
        fresh &= ~_known_otherwise(batch, marks)
    return fresh, after


def _known_otherwise(batch: MicroBatch, marks: Mapping[Source, int]) -> NDArray[np.bool_]:
    """Which rows are below the mark of a source that contains their users with another number of buckets."""
    share, is_below = share_of(batch.user), np.zeros(len(batch), np.bool_)
    for number, part in enumerate(batch.header.ranges):
        is_of_range = batch.source == number
        for source, mark in marks.items():
            same = source[:2] == part.source[:2] and source.buckets != part.source.buckets
            if same and mark > part.first:
                is_below |= is_of_range & (share % source.buckets == source.bucket) & (batch.offset < mark)
    return is_below


def gaps(header: Header, marks: Mapping[Source, int]) -> list[tuple[Source, int, int]]:
    """The positions that no micro-batch covered, as (source, the reader's mark, start of the range)."""
    return [
        (part.source, marks[part.source], part.first)
        for part in header.ranges
        if part.source in marks and part.first > marks[part.source]
    ]


def new_ranges(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[list[Range], int]:
    """The ranges of a batch that follow `marks`, and the number of positions that no micro-batch covered.

    A gap becomes a range of absent positions; positions below the mark are left out.
    """
    ranges: list[Range] = []
    missing = 0
    for source, mark, first in gaps(batch.header, marks):
        ranges.append(Range(source, mark, first, absent=first - mark))
        missing += first - mark
    for index, part in enumerate(batch.header.ranges):
        mark = marks.get(part.source, part.first)
        if part.next <= mark:
            continue
        if part.first < mark:
            below = counts(batch.kind[(batch.source == index) & (batch.offset < mark)])
            part = split_range(part, mark, below.pop("rows"), below)[1]
        ranges.append(part)
    return ranges, missing


def masked(batch: MicroBatch, mask: Mask) -> NDArray[np.bool_]:
    """Which rows (`[n]` bool) the mask leaves out: those of a masked event, and those labelled by a masked event."""
    ranges = batch.header.ranges
    clicks = ClickColumns.of(batch)
    out = mask.rows(clicks._replace(offset=batch.opened), ranges)
    # An event that only ended a wait does not affect the row.
    if len(joined := np.flatnonzero(batch.kind == Kind.JOINED)):
        labels = ClickColumns(
            batch.user[joined],
            batch.item[joined],
            batch.category[joined],
            (batch.at_ms + batch.delay_ms)[joined],
            batch.source[joined],
            batch.offset[joined],
        )
        out[joined] |= mask.rows(labels, ranges)
    return out


def erased_rows(batch: MicroBatch, erased: Erased) -> NDArray[np.bool_]:
    """Which rows (`[n]` bool) belong to erased users, by the offset of the row's own event."""
    return erased.rows(batch.user, batch.source, batch.opened, batch.header.ranges)


TOLERANCE_MS = 1_200_000
"""20 minutes: more than the difference of good clocks, less than the error of any wrong time zone."""


def log_times(batch: MicroBatch) -> NDArray[np.int64]:
    """The log time of each row, `[n]` int64 ms; the rows' own times if the header has no clocks.

    A row whose label came later is checked by the time at which the label became known. A waiting impression counts by
    the time at which its wait began. An expired impression may be arbitrarily late, because its wait may have ended
    long before.
    """
    clocks = batch.header.clocks
    if not clocks or not len(batch):
        return batch.at_ms
    reported_ms = batch.at_ms + batch.delay_ms
    begins, ends = (np.array(times, np.int64)[batch.source] for times in zip(*clocks, strict=True))
    believed, punctual = reported_ms <= ends, batch.kind == Kind.EXPIRED
    if (believed & (punctual | (reported_ms >= ends - TOLERANCE_MS)) & (batch.delay_ms >= 0)).all():
        return batch.at_ms
    after_ms = np.maximum(batch.delay_ms, 0)
    log_ms = reported_ms - after_ms
    for number in range(len(clocks)):
        rows = np.flatnonzero(batch.source == number)
        if len(rows):
            reached = np.maximum.accumulate(np.where(believed, np.maximum(reported_ms, begins), begins)[rows])
            off = ~believed[rows] | (~punctual[rows] & (reported_ms[rows] < reached - TOLERANCE_MS))
            log_ms[rows[off]] = reached[off] - after_ms[rows[off]]
    return log_ms


def in_log_time(batch: MicroBatch) -> MicroBatch:
    """The batch with `at_ms` replaced by each row's log time."""
    log_ms = log_times(batch)
    return batch if log_ms is batch.at_ms else replace(batch, at_ms=log_ms)
