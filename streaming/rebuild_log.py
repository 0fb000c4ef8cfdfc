"""Reads the micro-batch log and, for what it no longer holds, the clicks, to rebuild a lost store of histories.

The rows of the micro-batch log are what the lost store had; its ranges are the positions (`Rebuild`). Impressions that
a segment of the log opens and does not close wait again (`Waits`). Positions that the log no longer holds come from
the clicks topic, as far as it reaches back (`ClicksLeft`).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from state.config.settings import Settings
from state.errors import MicroBatchError, SaltMismatch, SpecMismatch, UnknownTopic
from state.events.identity import Salt
from state.events.parser import EventBatch, Parser
from state.features.erased import Flags
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.history.actions import renumbered
from state.history.appends import Appends, events_of
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, WaitingRows, keys_of, place_of
from state.layout import GAPS
from state.log import PartitionBatch, Reader, Topics, accepted_gaps
from state.log.accepted_gaps import Journal
from state.log.follow import read_to
from state.microbatch.batch import Kind, MicroBatch, erased_rows, happened, new_ranges, trim
from state.microbatch.codec import decode
from state.positions import Range, Source
from state.process import killpoints
from state.process.progress_line import ProgressLine
from state.process.wall_clock import wall_ms
from state.registry.log_line import counts
from state.registry.specs import SpecActions
from streaming.cut import merge_all, merge_appends
from streaming.desired import NOTHING_DESIRED, Desired
from streaming.event_clock import EventClock
from streaming.labels import Labels, open_labels
from streaming.masking import leave_out
from streaming.profile import Profiler
from streaming.rebuild_report import Rebuilt, progress_line
from streaming.unlogged import commit_at_once

CLICKS_AT_ONCE = 20_000

RECORDS_AT_ONCE = 64
logger = logging.getLogger(__name__)


class ClicksLeft:
    """What the topic of clicks still holds, and what the stream had read of it according to its group's offsets.

    Args:
        settings: Of the stream.
        store: Being rebuilt.
        clock: Of its clicks.
        salt: Of the users' pseudonyms.
        topics: Of the cluster.
        found: Counts positions that are read and that are lost.
        mask: The clicks that are left out.

    Raises:
        LogError: Kafka is not reachable.
    """

    def __init__(
        self,
        settings: Settings,
        store: HistoryStore,
        clock: EventClock,
        salt: Salt,
        topics: Topics,
        found: Rebuilt,
        mask: Mask = Mask.NONE,
    ) -> None:
        self._settings, self._store, self._clock = settings, store, clock
        self._found, self._mask = found, mask
        self._parser = Parser(settings.events, salt)
        self._topic_id: str | None = None
        self._kept: Mapping[int, tuple[int, int]] = {}
        self._group: Mapping[int, int] = {}
        kafka = settings.kafka
        try:
            self._topic_id = topics.describe(kafka.clicks_topic).topic_id
            self._kept = topics.ends(kafka.clicks_topic)
            self._group = topics.committed(kafka.group, kafka.clicks_topic)
        except UnknownTopic as error:
            logger.warning("%s; only what the micro-batch log holds is rebuilt", error)

    def committed(self) -> dict[Source, int]:
        """The next offset of each source as the group has it, in the order of the partitions."""
        if self._topic_id is None:
            return {}
        return {Source(self._topic_id, partition): after for partition, after in sorted(self._group.items())}

    def has(self, source: Source, mark: int | None, after: int) -> bool:
        """Whether the clicks may still hold positions of `source` from `mark` (None: its first) to below `after`."""
        if source.topic_id != self._topic_id or source.partition not in self._kept:
            return False
        return self._kept[source.partition][0] < after or mark is None

    def fill(self, source: Source, mark: int | None, after: int) -> None:
        """Reads the positions of `source` from `mark` up to `after` into the store; counts those that are gone.

        Raises:
            LogError: Kafka is not reachable, or stops answering.
        """
        at = mark or 0
        first = min(max(at, self._kept[source.partition][0]), after)
        self._found.lost += first - at
        if mark is not None and first > at:
            self._store.commit(Appends.none(), [Range(source, at, first, absent=first - at)])
        if first == after:
            return
        logger.info("the log does not hold positions %d to %d of %s: reading the clicks", first, after, source)
        self._found.clicks += after - first
        labels = open_labels(self._settings, self._store, source.topic_id)
        profiler = Profiler(self._store, FeatureSpec.from_settings(self._settings), 1, self._mask) if labels else None
        kafka, partition = self._settings.kafka, source.partition
        with Reader(kafka, kafka.clicks_topic, [partition], {partition: first}) as reader:
            for batches in read_to(reader, {partition: after}, CLICKS_AT_ONCE):
                events = self._parser.parse([one.between(one.first, min(after, one.next)) for one in batches])
                self._take(leave_out(events, self._mask), profiler, labels)

    def _take(self, events: EventBatch, profiler: Profiler | None, labels: Labels | None) -> None:
        """One commit for clicks; impressions among them may still wait, with the windows of that time."""
        now_ms = wall_ms()
        if profiler is None or labels is None:
            told = self._clock.follow(events, events.ranges, now_ms)
            self._store.commit(Appends.of(events.user, events_of(events, events.ranges)), events.ranges, told.state)
        else:
            commit_at_once(self._store, profiler, self._clock, labels, events, now_ms)


class Waits:
    """Gathers from micro-batches which rows begin and end to wait, until they are committed. One thread.

    Args:
        store: Being rebuilt.
    """

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self._rows: WaitingRows | None = None
        self._changes: Changes = {}
        self._extra: Extra = {}
        self._erased: set[bytes] = set()

    def follow(self, batch: MicroBatch, erased: Flags, ranges: Sequence[Range]) -> list[Range]:
        """Takes the new rows of a micro-batch; returns its ranges without closings of rows that were never opened here.

        If the log no longer holds an impression but holds its label, the row never waited in this store; its account
        leaves both out. Impressions of an erased user do not wait, and count as opened.

        Args:
            batch: Rows that the store does not have.
            erased: `[n]` bool, whether each row is of a user who was erased since.
            ranges: The ranges that the rows came from.
        """
        rows = self._rows = self._rows or WaitingRows(self._store)
        closing = np.flatnonzero(~happened(batch.kind))
        opened = batch.kind == Kind.OPENED
        if not (len(closing) or opened.any()):
            return list(ranges)
        sources = [part.source for part in batch.header.ranges]
        now = rows.adopt(batch.columns, self._changes, self._extra)
        if (waits := opened & ~erased).any():
            keys = keys_of(sources, batch.source[waits], batch.offset[waits])
            self._changes.update(zip(keys, now.pack(batch.take(waits).columns), strict=True))
        self._erased.update(keys_of(sources, batch.source[opened & erased], batch.offset[opened & erased]))
        keys = keys_of(sources, batch.source[closing], batch.opened[closing])
        found = zip(keys, rows.values(keys, self._changes), strict=True)
        known = np.array([value is not None or key in self._erased for key, value in found], np.bool_)
        self._changes.update(dict.fromkeys(keys))
        self._erased.difference_update(keys)
        lost = closing[~known]
        return [_without(part, batch.take(_named(lost, len(batch)))) for part in ranges] if len(lost) else list(ranges)

    def to_commit(self) -> tuple[Changes, Extra]:
        """Returns the rows to commit and forgets them; later lookups read the store again."""
        changes, extra, self._changes, self._extra, self._rows = self._changes, self._extra, {}, {}, None
        return changes, extra

    def dropped(self, marks: Mapping[Source, int]) -> list[Range]:
        """Unclosed impressions of erased users, counted as dropped at the marks of their sources."""
        counted = Counter(place_of(key)[0] for key in self._erased)
        return [Range(source, marks[source], marks[source], dropped=count) for source, count in counted.items()]


def _named(rows: np.ndarray[tuple[int], np.dtype[np.int64]], count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    named = np.zeros(count, np.bool_)
    named[rows] = True
    return named


def _without(part: Range, lost: MicroBatch) -> Range:
    """A range without those of its closings that are in `lost`."""
    sources = [one.source for one in lost.header.ranges]
    mine = np.array([sources[number] == part.source for number in lost.source.tolist()], np.bool_)
    mine &= (lost.offset >= part.first) & (lost.offset < part.next)
    joined, expired = (int((lost.kind[mine] == kind).sum()) for kind in (Kind.JOINED, Kind.EXPIRED))
    return replace(part, joined=part.joined - joined, expired=part.expired - expired)


class Rebuild:
    """Fills an empty or copied store from Kafka. One thread.

    1. The micro-batch log is read to its end, record by record.
    2. Positions before a record that no earlier one has come from the clicks, in the order of their source.
    3. So do the positions of partitions that the group names and the log does not.

    Args:
        settings: Of the stream.
        store: Built in another directory; its positions are where reading continues.
        actions: Names the actions of each record by its feature spec.
        salt: Of the users' pseudonyms.
        progress: Shows how far the log is read.
        desired: The records that count, and the clicks that are left out.
    """

    def __init__(
        self,
        settings: Settings,
        store: HistoryStore,
        actions: SpecActions,
        salt: Salt,
        progress: ProgressLine,
        desired: Desired = NOTHING_DESIRED,
    ) -> None:
        self._settings, self._store, self._actions, self._salt = settings, store, actions, salt
        self._progress, self._desired = progress, desired
        self._accepted = Journal(settings.registry_dir / GAPS).accepted()
        self._marks = store.positions()
        self._waits, self._clock = Waits(store), EventClock(store.extra)
        self._clocks: dict[str, bytes] = {}
        self._appends: list[Appends] = []
        self._ranges: list[Range] = []
        self.found = Rebuilt()

    def run(self) -> Rebuilt:
        """Reads everything available; the store holds it when this returns.

        Raises:
            SaltMismatch: The log's pseudonyms are of another salt.
            SpecMismatch: A record is of feature settings that the registry does not know.
            CorruptStore: The store lacks an impression that waits.
            StoreFull: The store or its disk is full.
            LogError: Kafka is not reachable, or stops answering.
        """
        kafka, found = self._settings.kafka, self.found
        with Topics(kafka) as topics:
            clicks = ClicksLeft(self._settings, self._store, self._clock, self._salt, topics, found, self._desired.mask)
            try:
                begin, end = topics.ends(kafka.microbatches_topic)[0]
            except UnknownTopic as error:
                logger.warning("%s; there is only the group's word for what the stream had read", error)
                begin = end = 0
        # 1. and 2.
        if end > begin:
            self._read(begin, end, clicks)
            self._ranges = self._waits.dropped(self._marks)
            self._commit()
        # 3.
        for source, after in clicks.committed().items():
            if source not in self._marks:
                clicks.fill(source, None, after)
                self._marks[source] = after
        found.users = self._store.users()
        found.incomplete = self._store.users_below(self._settings.features.history) if found.lost else 0
        return found

    def _read(self, begin: int, end: int, clicks: ClicksLeft) -> None:
        kafka = self._settings.kafka
        with Reader(kafka, kafka.microbatches_topic, [0]) as reader:
            for batches in read_to(reader, {0: end}, RECORDS_AT_ONCE):
                for batch in batches:
                    self._take(batch, clicks)
                self._show(min(reader.position(0), end) - begin, end - begin)
        self._show(end - begin, end - begin, last=True)

    def _show(self, done: int, total: int, last: bool = False) -> None:
        self._progress.show(lambda: progress_line(done, total, self.found.rows, self._progress.took_s), last)

    def _take(self, batch: PartitionBatch, clicks: ClicksLeft) -> None:
        """One commit for the records of one poll, and one before each segment of clicks."""
        for first, after, reason in batch.corrupt:
            self.found.unreadable += 1
            logger.error("the micro-batch log's positions [%d, %d) are corrupt: %s", first, after, reason)
        log = Source(batch.topic_id, batch.partition)
        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            self.found.records += 1
            # Records that the trainer skips for good do not count here either.
            if accepted_gaps.left_out(self._accepted, log, offset):
                self.found.unreadable += 1
                continue
            mine = self._decode(value, offset)
            if mine is None:
                continue
            # 2.
            for part in mine.header.ranges:
                self._fill_before(part, clicks)
            # 1.
            keep, after_marks = trim(mine, self._marks)
            erased = erased_rows(mine, self._desired.mask.erased)
            parts, missing = new_ranges(mine, self._marks)
            self.found.lost += missing
            parts = self._waits.follow(mine.take(keep), erased[keep], parts)
            kept = mine.take(keep & ~erased & happened(mine.kind))
            self._clocks |= self._clock.follow(kept, kept.header.ranges, kept.header.created_ms).state
            self._appends.append(Appends.of(kept.user, events_of(kept, kept.header.ranges)))
            self._ranges += parts
            self._marks = after_marks
            self.found.rows += len(kept)
        self._commit()
        killpoints.reach("rebuild.committed")

    def _fill_before(self, part: Range, clicks: ClicksLeft) -> None:
        """Reads the positions between the mark of a range's source and the range from the clicks."""
        mark = self._marks.get(part.source)
        if mark is not None and mark >= part.first:
            return
        if clicks.has(part.source, mark, part.first):
            self._commit()
            clicks.fill(part.source, mark, part.first)
            self._marks[part.source] = part.first
        elif mark is None:
            self.found.lost += part.first

    def _commit(self) -> None:
        waiting, extra = self._waits.to_commit()
        extra |= self._clocks
        self._store.commit(merge_appends(self._appends), merge_all(self._ranges), extra, waiting)
        self._appends, self._ranges, self._clocks = [], [], {}

    def _decode(self, value: bytes | None, offset: int) -> MicroBatch | None:
        """The record's micro-batch; None if it does not count or cannot be read."""
        where = f"{self._settings.kafka.microbatches_topic}:0 offset {offset}"
        try:
            whole = decode(value or b"")
        except MicroBatchError as error:
            self.found.unreadable += 1
            logger.error("%s is left out, its clicks are read again: %s", where, error)
            return None
        header = whole.header
        if not counts(self._desired.line, header.log_epoch, offset):
            return None
        if header.salt != self._salt.fingerprint:
            raise SaltMismatch.between(where, header.salt, self._salt.fingerprint)
        # Histories do not keep computed features: only an action's number depends on the feature spec.
        named = self._actions.of(header.spec)
        if named is None:
            raise SpecMismatch(
                f"{where} has feature spec {header.spec[:12]}, which the registry does not know",
                "put [features] and events.actions back, or restore specs/ of the registry",
            )
        return renumbered(whole, named, self._settings.events.actions)


def part_of(whole: MicroBatch, ours: list[bool]) -> MicroBatch | None:
    """The rows of some ranges of a micro-batch, as a micro-batch; None if there are no such ranges.

    Args:
        whole: With all ranges.
        ours: By range whether it is selected.
    """
    if all(ours):
        return whole
    if not any(ours):
        return None
    kept = whole.take(np.array(ours)[whole.source])
    number = np.cumsum(ours, dtype=np.uint16) - np.uint16(1)
    parts = tuple(part for part, mine in zip(whole.header.ranges, ours, strict=True) if mine)
    clocks = tuple(clock for clock, mine in zip(whole.header.clocks, ours, strict=False) if mine)
    header = replace(whole.header, ranges=parts, clocks=clocks)
    return replace(kept, header=header, source=number[kept.source].astype(np.uint16))
