"""Rewinds a store of histories to the branch point of the training log, by reading the log in both directions.

1. Find the branch point of the store's branch and the new branch, and the click positions there.
2. Read forward from the branch point, to find what the store has gained since (`Since`).
3. Read backward from the branch point, to find what the store lacks (`Before`). Stop when everything is found, the log
   has no more records, or older records are beyond every window.
4. Commit in one transaction: histories, positions, waiting rows, and the new branch.

A crash before 4 leaves the store unchanged; after 4 the rewind is complete.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from state.errors import GapError
from state.features.mask import Mask
from state.history.branch_records import branch_records
from state.history.chunks import Counts
from state.history.rewind import Before, Rewind, Since
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, WaitingRows, key_of, place_of
from state.log import Reader
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.codec import decode_events
from state.positions import Source
from state.process import killpoints
from state.registry.log_line import WHOLE, LogLine, from_json, parting, to_json

LINE = "log_line"  # name of the store's extra
BLOCK, LARGEST_BLOCK = 128, 1024
BLOCKS_FOR_ITEMS = 8
logger = logging.getLogger(__name__)

Extras = Callable[[int, Before], Mapping[str, bytes | None]]
"""Returns more extras to commit, from the log offset of the branch point and the `Before` collected there."""

OpenAt = Callable[[int], Reader]
"""Opens the training log at an offset of its partition."""


@dataclass(frozen=True)
class LogToRead:
    """The training log, as a rewind reads it.

    Attributes:
        open_at: Opens it at an offset.
        reach_ms: The age relative to the newest event from which on an event no longer matters.
        end: The offset up to which the store has read it; None for the log's end.
    """

    open_at: OpenAt
    reach_ms: int
    end: int | None = None


@dataclass(frozen=True)
class Rewound:
    """The result of a rewind.

    Attributes:
        positions: Click positions rolled back.
        users: Users who had gained events.
        rebuilt: Users among them whose history had lost events, which are now restored.
        short: Rebuilt users whose oldest events are gone from the log too, or may be, as for an evicted user.
        waiting: Impressions that wait again.
    """

    positions: int = 0
    users: int = 0
    rebuilt: int = 0
    short: int = 0
    waiting: int = 0

    def __str__(self) -> str:
        short = f", {self.short:,} of them without their oldest events" if self.short else ""
        waits = f", {self.waiting:,} impressions wait for their labels again" if self.waiting else ""
        return f"{self.positions:,} positions of {self.users:,} users rolled back, {self.rebuilt:,} histories rebuilt from the log{short}{waits}"


def branch_of(store: HistoryStore) -> LogLine:
    """The branch of the log from which the store's histories were built."""
    stored = store.extra(LINE)
    return WHOLE if stored is None else from_json(json.loads(stored))


def branch_extra(line: LogLine) -> dict[str, bytes]:
    """The store's extra that records its branch."""
    return {LINE: json.dumps(to_json(line)).encode()}


def rewind(
    store: HistoryStore,
    line: LogLine,
    log: LogToRead,
    mask: Mask = Mask.NONE,
    extra: Extras = lambda _, __: {},
    timed: bool = False,
) -> Rewound | None:
    """Rewinds `store` to the branch `line`; returns what was rolled back, None if the store was on that branch already.

    Args:
        store: The store; only its writer may call this.
        line: The branch that control names.
        log: The training log.
        mask: The clicks that will not be replayed, if the owner keeps the categories of items.
        extra: Returns more extras to commit.
        timed: Whether `extra` needs the latest clicks of each source that rewinds.

    Raises:
        GapError: The log no longer reaches back to the branch point.
        LogError: The log cannot be read.
        StoreFull: Nothing was changed.
    """
    # 1.
    branch = branch_of(store)
    branch_point = parting(branch, line)
    if branch_point is None:
        return None
    marks, positions = dict(branch_point.sources), store.positions()
    since = Since(marks, positions, mask)
    if not since.sources:
        store.rewind(Rewind(marks, extra={**extra(branch_point.offset, Before(marks, {})), **branch_extra(line)}))
        return Rewound()
    with log.open_at(branch_point.offset) as reader:
        # 2.
        end = log.end
        if end is None:
            end = reader.position(TRAINING_PARTITION) + reader.lag()[TRAINING_PARTITION]
        for _, batch in branch_records(reader, branch_point.offset, end, branch, decode_events):
            since.take(batch)
        # 3.
        clocks = since.sources if timed else ()
        before = Before(marks, store.lacking(since, marks), since.ended, since.masked_items, clocks)
        needed = len(before.histories())
        read_before(reader, branch_point.offset, branch, before, log.reach_ms)
    # 4.
    stored = store.counts()
    counted = since.counts(stored)
    waiting, formats = _waiting(store, before, counted, marks)
    extras = {**formats, **extra(branch_point.offset, before), **branch_extra(line)}
    killpoints.reach("back.found")
    store.rewind(Rewind(marks, since.gained, before.histories(), counted, extras, waiting))
    killpoints.reach("back.committed")
    rewound_positions = sum(stored[source]["next"] - marks.get(source, stored[source]["first"]) for source in counted)
    return Rewound(rewound_positions, len(since.gained), needed, before.short, len(before.opened))


def read_before(reader: Reader, end: int, line: LogLine, before: Before, reach_ms: int) -> None:
    """Passes the records before `end` to `before`, newest first, until it has everything or no older event matters.

    If only categories of items and clocks of sources are missing, it reads at most `BLOCKS_FOR_ITEMS` blocks. A flood
    may have named new items, and a partition may have had no click, or those of one user, for a long time.
    """
    size, newest_ms, blocks = BLOCK, None, 0
    while end > 0 and (newest_ms is None or not before.done):
        if before.has_rows and blocks >= BLOCKS_FOR_ITEMS:
            return
        blocks += 1
        first = max(0, end - size)
        try:
            time_ms = before.take_block(batch for _, batch in branch_records(reader, first, end, line))
        except GapError as error:
            # Retention has deleted the log up to here.
            first, size = min((gap.next for gap in error.gaps), default=end), end
            time_ms = (
                before.take_block(batch for _, batch in branch_records(reader, first, end, line))
                if first < end
                else None
            )
            first = 0
        newest_ms = newest_ms or time_ms
        if time_ms is not None and newest_ms is not None and time_ms <= newest_ms - reach_ms:
            return
        end, size = first, min(2 * size, LARGEST_BLOCK)


def _waiting(
    store: HistoryStore, before: Before, counted: dict[Source, Counts | None], marks: Mapping[Source, int]
) -> tuple[Changes, Extra]:
    """The waiting rows to restore or remove, and the extras about them. Rows not found again are counted as dropped."""
    changes: Changes = {}
    formats: Extra = {}
    rows = WaitingRows(store)
    for key, _ in store.waiting():
        source, offset = place_of(key)
        if source in counted and offset >= marks.get(source, 0):
            changes[key] = None
    for batch in before.opened:
        source = batch.header.ranges[int(batch.source[0])].source
        (value,) = rows.adopt(batch.columns, changes, formats).pack(batch.columns)
        changes[key_of(source, int(batch.offset[0]))] = value
    for source, _ in before.waited:
        if (counts := counted[source]) is not None:
            counts["dropped"] = counts.get("dropped", 0) + 1
    return changes, formats
