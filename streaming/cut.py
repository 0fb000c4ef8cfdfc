"""Decides when a micro-batch is cut, and what it contains: pure rules without Kafka, LMDB or Beam."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.config.sections import Stream
from state.history.appends import Appends
from state.log.topic_plan import RECORD_BYTES
from state.microbatch.batch import Header
from state.microbatch.codec import split
from state.positions import Range, Source, merge_ranges
from streaming.rows import Rows


@dataclass(frozen=True, slots=True)
class Cut:
    """The batches that are written together, in log order, and when they were cut: wall clock, ms."""

    pieces: tuple[Rows, ...]
    created_ms: int


EARLY_MS = 25
"""How much before `cut_ms` a cut may come: half of the time between two polls, so that the nearest poll decides."""


class Cutter:
    """Collects batches until there are enough rows, or the first one has waited long enough.

    The first batch has waited since the call before it, because its clicks may have arrived right after that poll.

    Args:
        cut_rows: Target number of rows of a cut; a single larger batch is a separate cut.
        cut_ms: The maximum wait of the first collected position, ms.
    """

    def __init__(self, cut_rows: int, cut_ms: int) -> None:
        self._cut_rows = cut_rows
        self._due_ms = cut_ms - min(EARLY_MS, cut_ms / 4)
        self._pieces: list[Rows] = []
        self._rows = 0
        self._since_ms = 0
        self._added_ms: int | None = None

    def add(self, rows: Rows, now_ms: int) -> list[Cut]:
        """Adds a batch, which may be empty, and returns the cuts that are due at `now_ms`, oldest first.

        A batch without rows that still covers positions (dead, filtered, absent) is collected too. One without
        positions only advances the time.
        """
        due = []
        count = len(rows)
        if self._rows and self._rows + count > self._cut_rows:
            due.extend(self.flush(now_ms))
        if rows.batch.ranges:
            if not self._pieces:
                self._since_ms = now_ms if self._added_ms is None else self._added_ms
            self._pieces.append(rows)
            self._rows += count
        self._added_ms = now_ms
        # Otherwise a wall clock that was set back would hold the rows until it catches up.
        waited = not 0 <= now_ms - self._since_ms < self._due_ms
        if self._pieces and (self._rows >= self._cut_rows or waited):
            due.extend(self.flush(now_ms))
        return due

    def flush(self, now_ms: int) -> list[Cut]:
        """Returns everything collected as one cut; an empty list if there is nothing."""
        if not self._pieces:
            return []
        cut = Cut(tuple(self._pieces), now_ms)
        self._pieces, self._rows = [], 0
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
