"""Splits a micro-batch that is too large for a record, and drops rows that a reader already has. No side effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from state.errors import MicroBatchError
from state.microbatch.batch import Header, MicroBatch
from state.microbatch.codec import encode
from state.microbatch.columns import Columns
from state.microbatch.row_kinds import counts
from state.positions import Range, Source, share_of, split_range


def split(header: Header, columns: Columns, max_record_bytes: int, max_rows: int = 2**31) -> list[bytes]:
    """Encodes the rows, in this order, as micro-batches within both limits.

    Most batches fit at once. A batch that does not fit is halved by rows until its
    parts fit. Each part's ranges end where the next part's begin. Rows with the
    same offset stay together, even if they exceed `max_rows`.

    Raises:
        MicroBatchError: The rows of a single offset exceed the limit, or the columns do not fit the header.
    """
    rows = len(columns["user"])
    if rows <= max_rows:
        value = encode(header, columns)
        if len(value) <= max_record_bytes:
            return [value]
    middle = _middle(columns)
    if not middle:
        value = encode(header, columns)
        if len(value) <= max_record_bytes:
            return [value]
        raise MicroBatchError(
            f"a micro-batch of {rows} rows takes {len(value)} bytes, more than the {max_record_bytes} of a record",
            "raise stream.max_record_bytes, and max.message.bytes of the topic",
        )
    parts = []
    for part_header, part_columns in _halves(header, columns, middle):
        parts.extend(split(part_header, part_columns, max_record_bytes, max_rows))
    return parts


def trim(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[NDArray[np.bool_], dict[Source, int]]:
    """Finds the rows that are new to a reader that has everything below `marks`, and its marks afterwards.

    After a crash the stream writes rows again; their source positions identify
    them. A source that `marks` does not name is new. So all its rows are new,
    except those that came earlier in other buckets, if a partition was divided
    into another number of buckets.

    Returns:
        `[n]` bool, and the next offset of each source.
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
    share, known = share_of(batch.user), np.zeros(len(batch), np.bool_)
    for number, part in enumerate(batch.header.ranges):
        mine = batch.source == number
        for other, mark in marks.items():
            same = other[:2] == part.source[:2] and other.buckets != part.source.buckets
            if same and mark > part.first:
                known |= mine & (share % other.buckets == other.bucket) & (batch.offset < mark)
    return known


def gaps(header: Header, marks: Mapping[Source, int]) -> list[tuple[Source, int, int]]:
    """The positions that no micro-batch covered, as (source, the reader's mark, start of the range)."""
    return [
        (part.source, marks[part.source], part.first)
        for part in header.ranges
        if part.source in marks and part.first > marks[part.source]
    ]


def _middle(columns: Columns) -> int:
    """The index nearest to the middle at which a new offset begins; 0 if all rows share one offset."""
    sources, offsets = columns["source"], columns["offset"]
    begins = np.flatnonzero((sources[1:] != sources[:-1]) | (offsets[1:] != offsets[:-1])) + 1
    return int(begins[np.argmin(np.abs(begins - len(offsets) // 2))]) if len(begins) else 0


def _cut(middle: int) -> tuple[slice, slice]:
    return slice(None, middle), slice(middle, None)


def _halves(header: Header, columns: Columns, middle: int) -> list[tuple[Header, Columns]]:
    """The two halves of a batch cut before row `middle`; each half leaves out its empty ranges."""
    sources, offsets = columns["source"], columns["offset"]
    halves: list[tuple[Header, Columns]] = []
    ranges: tuple[list[Range], list[Range]] = ([], [])
    for index, whole in enumerate(header.ranges):
        of_source = np.flatnonzero(sources == index)
        later = of_source[of_source >= middle]
        at = int(offsets[later[0]]) if len(later) else whole.next
        below = counts(columns["kind"][of_source[: len(of_source) - len(later)]])
        before, after = split_range(whole, at, below.pop("rows"), below)
        ranges[0].append(before)
        ranges[1].append(after)
    # A name goes with its first row; a name without a row goes with the first half.
    first, second = ({*columns["item"][rows].tolist(), *columns["category"][rows].tolist()} for rows in _cut(middle))
    late = {one: text for one, text in header.names.items() if one in second - first}
    early = {one: text for one, text in header.names.items() if one not in late}
    for parts, rows, names in zip(ranges, _cut(middle), (early, late), strict=True):
        kept = [index for index, part in enumerate(parts) if part.next > part.first]
        index_of = np.zeros(max(len(parts), 1), np.uint16)
        index_of[kept] = np.arange(len(kept), dtype=np.uint16)
        half = {name: column[rows] for name, column in columns.items()}
        half["source"] = index_of[half["source"]]
        clocks = tuple(header.clocks[index] for index in kept) if header.clocks else ()
        halves.append((replace(header, ranges=tuple(parts[index] for index in kept), names=names, clocks=clocks), half))
    return halves


def new_ranges(batch: MicroBatch, marks: Mapping[Source, int]) -> tuple[list[Range], int]:
    """The ranges of a batch that follow `marks`, and how many positions no micro-batch covered.

    A gap becomes a range of absent positions; what is below the mark is left out.
    """
    found: list[Range] = []
    missing = 0
    for source, mark, first in gaps(batch.header, marks):
        found.append(Range(source, mark, first, absent=first - mark))
        missing += first - mark
    for index, part in enumerate(batch.header.ranges):
        mark = marks.get(part.source, part.first)
        if part.next <= mark:
            continue
        if part.first < mark:
            below = counts(batch.kind[(batch.source == index) & (batch.offset < mark)])
            part = split_range(part, mark, below.pop("rows"), below)[1]
        found.append(part)
    return found, missing
