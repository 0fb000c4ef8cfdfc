"""The micro-batch log, for a rebuild: its rows are what the lost store had, its ranges are the positions."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from state.config.settings import Settings
from state.errors import MicroBatchError, SaltMismatch, SpecMismatch, UnknownTopic
from state.events.identity import Salt
from state.history.actions import renumbered
from state.history.appends import Appends, events_of
from state.history.followed import new_ranges
from state.history.store import HistoryStore
from state.layout import GAPS
from state.log import PartitionBatch, Reader, Topics, accepted_gaps
from state.log.accepted_gaps import Journal
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.microbatch.cutting import trim
from state.microbatch.masked import erased_rows
from state.microbatch.row_kinds import happened
from state.positions import Range, Source
from state.process import killpoints
from state.process.progress_line import ProgressLine
from state.registry.log_line import counts
from state.registry.spec_actions import SpecActions
from streaming.cut import merge_all, merge_appends
from streaming.desired import NOTHING_DESIRED, Desired
from streaming.event_clock import EventClock
from streaming.rebuild_clicks import ClicksLeft, read_to
from streaming.rebuild_report import Rebuilt, progress_line
from streaming.rebuild_waiting import Waits

RECORDS_AT_ONCE = 64
logger = logging.getLogger(__name__)


class Rebuild:
    """Fills an empty or copied store from Kafka. One thread.

    1. The micro-batch log is read to its end, record by record.
    2. What lies before a record and is in no earlier one comes from the clicks, in the order of its source.
    3. So do the positions of a partition that the log does not name, and the group does.

    Args:
        settings: Of the stream.
        store: Built aside; positions it has are gone on from.
        actions: Names the actions of each record by its feature spec.
        salt: Of the users' pseudonyms.
        progress: Where it is shown how far the log is read.
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
        """Reads what there is; the store holds it when this returns.

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
            for batches in read_to(reader, 0, end, RECORDS_AT_ONCE, f"the micro-batch log {kafka.microbatches_topic}"):
                for batch in batches:
                    self._take(batch, clicks)
                self._show(min(reader.position(0), end) - begin, end - begin)
        self._show(end - begin, end - begin, last=True)

    def _show(self, done: int, total: int, last: bool = False) -> None:
        self._progress.show(lambda: progress_line(done, total, self.found.rows, self._progress.took_s), last)

    def _take(self, batch: PartitionBatch, clicks: ClicksLeft) -> None:
        """One commit for what one poll found, and one before each stretch of clicks."""
        for first, after, reason in batch.corrupt:
            self.found.unreadable += 1
            logger.error("the micro-batch log's positions [%d, %d) are corrupt: %s", first, after, reason)
        log = Source(batch.topic_id, batch.partition)
        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            self.found.records += 1
            # What the trainer leaves out for good is no record here either.
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
        """Takes what lies between the mark of a range's source and the range from the clicks."""
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
        """The record's micro-batch; None where it does not count or cannot be read."""
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
        # What was computed of an event is nothing to histories: only its action's number depends on the features.
        named = self._actions.of(header.spec)
        if named is None:
            raise SpecMismatch(
                f"{where} has feature spec {header.spec[:12]}, which the registry does not know",
                "put [features] and events.actions back, or restore specs/ of the registry",
            )
        return renumbered(whole, named, self._settings.events.actions)


def part_of(whole: MicroBatch, ours: list[bool]) -> MicroBatch | None:
    """The rows of some ranges of a micro-batch, as a micro-batch; None where there are no such ranges.

    Args:
        whole: With all ranges.
        ours: By range whether it is wanted.
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
