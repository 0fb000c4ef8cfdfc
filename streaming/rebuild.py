"""Rebuilds a stream's lost histories from Kafka: `springtide rebuild-history [--from COPY] [--if-lost]`.

1. Takes the directory's lock and fences the stream's writer, so that the micro-batch log has an end. If an earlier
   release had shards, their writers are fenced too. A transaction that a power cut left open at that end is repaired.
2. Reads the micro-batch log to its end, along the branch that control names. It starts at a copy's positions, at the
   newest usable snapshot of serving's histories, or at the beginning. The log's rows are the events of the lost store,
   and its ranges are the positions. Impressions that it opens and does not close wait again.
3. Reads positions that the log no longer covers from the clicks themselves. Positions that are gone there too are
   counted.
4. Builds the store in another directory and swaps it in at the end; the old one is kept.

The result equals the lost store, event by event and offset by offset, if that had committed everything it wrote.
Otherwise it is what the store would have been.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import MicroBatchError, SaltMismatch, SettingsError, SpecMismatch, UnknownTopic, UnusablePlace
from state.events.identity import Salt, load_salt
from state.features.erased import Flags
from state.features.spec import FeatureSpec
from state.history.appends import Appends, events_of, renumbered
from state.history.branch_records import branch_records
from state.history.rewinding import branch_of
from state.history.snapshots import SHARED_EXTRAS, HistorySnapshot, Wanted, load_newest, location_of
from state.history.store import HistoryStore
from state.history.waiting import Changes, Extra, WaitingRows, keys_of, place_of
from state.layout import GAPS, HISTORIES
from state.log import Log, PartitionBatch, Reader, Topics, Writer, accepted_gaps
from state.log.accepted_gaps import Journal
from state.log.follow import read_to
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.batch import Kind, MicroBatch, erased_rows, happened, new_ranges, trim
from state.microbatch.codec import decode, encode
from state.positions import Range, Source
from state.process import killpoints
from state.process.commands import parser_of
from state.process.environment import wall_ms
from state.process.log_lines import ProgressLine, bar
from state.process.part import Work, run_process
from state.registry.controls import ControlPoll
from state.registry.log_line import WHOLE, counts
from state.registry.specs import SpecActions
from state.storage import STREAM, map_bytes
from streaming import histories
from streaming.context import open_job
from streaming.control import ControlWatch, Desired, roll_back_histories
from streaming.event_clock import EventClock
from streaming.histories import check_identity, former_shards, replacing_shards
from streaming.rows import merge_all, merge_appends
from streaming.writer import note_first_release, open_writer

BAR = 30
LINE_EVERY_S = 5.0
CLICKS_AT_ONCE, RECORDS_AT_ONCE = 20_000, 64
ENDED_S = 3.0
POLL_S = 0.1
CLOCK_RECORDS = 2048
"""Records before a snapshot's end from which the event clocks are computed again."""
TAIL = 64
"""Last positions that are searched for hidden records; a transaction has two or three."""

logger = logging.getLogger(__name__)


@dataclass
class Rebuilt:
    """The result of a rebuild.

    Attributes:
        records: Records of the micro-batch log.
        rows: Events taken from them.
        clicks: Positions taken from the clicks instead.
        unreadable: Damaged records of the log; their positions were taken from the clicks.
        lost: Positions that neither topic contains any more.
        incomplete: Users whose history may lack its oldest events: those with fewer than N events, if positions are
            lost.
        snapshot: The snapshot from which the histories began; 0 for none.
        aside: Current path of the old store.
    """

    records: int = 0
    rows: int = 0
    clicks: int = 0
    unreadable: int = 0
    lost: int = 0
    users: int = 0
    incomplete: int = 0
    snapshot: int = 0
    aside: Path | None = None

    def in_words(self, path: Path) -> str:
        """Formats the result in one line, with the path of the new store.

        >>> Rebuilt(records=10, rows=500, users=17).in_words(Path("histories"))
        'histories: 17 users, 500 rows of 10 records of the log; complete'
        >>> Rebuilt(records=10, rows=500, clicks=40, lost=60, users=17, incomplete=3).in_words(Path("h"))
        'h: 17 users, 500 rows of 10 records of the log and 40 positions of the clicks; 60 positions are gone from both: 3 users may lack their oldest events'
        """
        sources = f"snapshot {self.snapshot} and " if self.snapshot else ""
        sources += f"{self.rows:,} rows of {self.records:,} records of the log"
        sources += f" and {self.clicks:,} positions of the clicks" if self.clicks else ""
        sources += f" ({self.unreadable:,} records unreadable)" if self.unreadable else ""
        loss = "complete"
        if self.lost:
            loss = f"{self.lost:,} positions are gone from both: {self.incomplete:,} users may lack their oldest events"
        aside = f"; the old store is {self.aside}, remove it when you like" if self.aside else ""
        return f"{path}: {self.users:,} users, {sources}; {loss}{aside}"


def progress_line(passed: int, total: int, rows: int, seconds: float) -> str:
    """Formats the progress through the log in one line."""
    rate = rows / max(seconds, 1e-9)
    return f"{bar(passed, total, BAR)}  {passed:,} of {total:,} positions of the log  {rows:,} rows  {rate:,.0f} rows/s"


class Waits:
    """Gathers from micro-batches which rows start or stop waiting, until they are committed. Not thread-safe."""

    def __init__(self, store: HistoryStore) -> None:
        self._store = store
        self._rows: WaitingRows | None = None
        self._changes: Changes = {}
        self._extra: Extra = {}
        self._erased: set[bytes] = set()

    def follow(self, batch: MicroBatch, erased: Flags, ranges: Sequence[Range]) -> list[Range]:
        """Takes a micro-batch's rows that the store lacks; returns its ranges without closings of unknown rows.

        If the log holds a label but no longer its impression, the row never waited in this store, and the account
        counts neither. Impressions of erased users (`erased`, `[n]` bool) do not wait, and count as opened.
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
        values = zip(keys, rows.values(keys, self._changes), strict=True)
        known = np.array([value is not None or key in self._erased for key, value in values], np.bool_)
        self._changes.update(dict.fromkeys(keys))
        self._erased.difference_update(keys)
        lost = np.zeros(len(batch), np.bool_)
        lost[closing[~known]] = True
        return [_without(part, batch.take(lost)) for part in ranges] if lost.any() else list(ranges)

    def to_commit(self) -> tuple[Changes, Extra]:
        """Returns the rows to commit and forgets them; later lookups read the store again."""
        changes, extra, self._changes, self._extra, self._rows = self._changes, self._extra, {}, {}, None
        return changes, extra

    def dropped(self, marks: Mapping[Source, int]) -> list[Range]:
        """Unclosed impressions of erased users, counted as dropped at the marks of their sources."""
        counted = Counter(place_of(key)[0] for key in self._erased)
        return [Range(source, marks[source], marks[source], dropped=count) for source, count in counted.items()]


def _without(part: Range, lost: MicroBatch) -> Range:
    sources = [entry.source for entry in lost.header.ranges]
    own: NDArray[np.bool_] = np.array([sources[number] == part.source for number in lost.source.tolist()], np.bool_)
    own &= (lost.offset >= part.first) & (lost.offset < part.next)
    joined, expired = (int((lost.kind[own] == kind).sum()) for kind in (Kind.JOINED, Kind.EXPIRED))
    return replace(part, joined=part.joined - joined, expired=part.expired - expired)


class Rebuild:
    """Fills an empty or copied store from Kafka. Not thread-safe.

    1. The micro-batch log is read to its end, record by record.
    2. Positions before a record that no earlier record covers are read from the clicks, in the order of their source.
    3. Positions of partitions that the group names and the log does not are also read from the clicks.

    `store` is built in another directory; reading continues at its positions. `desired` determines the records that
    count, and the clicks that are left out.
    """

    def __init__(
        self,
        settings: Settings,
        store: HistoryStore,
        actions: SpecActions,
        salt: Salt,
        progress: ProgressLine,
        desired: Desired,
    ) -> None:
        self._settings, self._store, self._actions, self._salt = settings, store, actions, salt
        self._progress, self._desired = progress, desired
        self._accepted = Journal(settings.registry_dir / GAPS).accepted()
        self._marks = store.positions()
        self._waits, self._clock = Waits(store), EventClock(store.extra)
        # By source the first position that the clicks still have, and the next one of the group.
        self._kept: Mapping[Source, int] = {}
        self._group: Mapping[Source, int] = {}
        self._clocks: dict[str, bytes] = {}
        self._appends: list[Appends] = []
        self._ranges: list[Range] = []
        self._result = Rebuilt()

    def run(self, snapshot: HistorySnapshot | None = None) -> Rebuilt:
        """Reads everything available; the store holds it when this returns. Events of a loaded `snapshot` are not read.

        Raises:
            SaltMismatch: The log's pseudonyms were computed with another salt.
            SpecMismatch: A record has feature settings that the registry does not know.
            CorruptStore: The store lacks a waiting impression.
            StoreFull: The store or its disk is full.
            LogError: Kafka is not reachable, or stops answering.
        """
        kafka, result = self._settings.kafka, self._result
        begin = end = 0
        with Topics(kafka) as topics:
            try:
                topic_id, ends = topics.describe(kafka.clicks_topic).topic_id, topics.ends(kafka.clicks_topic)
                group = topics.committed(kafka.group, kafka.clicks_topic)
                self._kept = {Source(topic_id, partition): first for partition, (first, _) in ends.items()}
                self._group = {Source(topic_id, partition): after for partition, after in sorted(group.items())}
            except UnknownTopic as error:
                logger.warning("%s; only the events in the micro-batch log are rebuilt", error)
            try:
                begin, end = topics.ends(kafka.microbatches_topic)[0]
            except UnknownTopic as error:
                logger.warning("%s; the positions of the stream are those of the consumer group", error)
        # 1. and 2.
        if snapshot is not None:
            result.snapshot = snapshot.number
            self._read_waiting(begin, next_after := dict(snapshot.next).get(0, begin))
            begin = next_after
        if end > begin:
            self._read(begin, end)
            self._ranges = self._waits.dropped(self._marks)
            self._commit()
        # 3.
        for source, after in self._group.items():
            if source not in self._marks:
                self._fill(source, None, after)
        result.users = self._store.users()
        result.incomplete = self._store.users_below(self._settings.features.history) if result.lost else 0
        return result

    def _read(self, begin: int, end: int) -> None:
        kafka = self._settings.kafka
        with Reader(kafka, kafka.microbatches_topic, [0], {0: begin}) as reader:
            for batches in read_to(reader, {0: end}, RECORDS_AT_ONCE):
                for batch in batches:
                    self._take(batch)
                self._show(min(reader.position(0), end) - begin, end - begin)
        self._show(end - begin, end - begin, last=True)

    def _read_waiting(self, begin: int, end: int) -> None:
        """Finds what a snapshot that ends at `end` lacks: the rows that still wait, and the event clock of each source.

        The counts of the snapshot give the number of waiting rows. The log is searched backward until all are found,
        and then read forward from there.
        """
        waiting = Counter(
            {
                source: counts.get("opened", 0) - sum(counts.get(name, 0) for name in ("joined", "expired", "dropped"))
                for source, counts in self._store.counts().items()
            }
        )
        first, size, closed = end, CLOCK_RECORDS, set[bytes]()
        while first > begin and (size == CLOCK_RECORDS or any(count > 0 for count in waiting.values())):
            block, first, size = first, max(begin, first - size), 2 * size
            opened_keys = set[bytes]()
            for batch in self._between(first, block):
                sources = [part.source for part in batch.header.ranges]
                is_closed, opened = np.flatnonzero(~happened(batch.kind)), batch.kind == Kind.OPENED
                closed.update(keys_of(sources, batch.source[is_closed], batch.opened[is_closed]))
                opened_keys.update(keys_of(sources, batch.source[opened], batch.offset[opened]))
            waiting.subtract(place_of(key)[0] for key in opened_keys - closed)
        marks: dict[Source, int] = {}
        for batch in self._between(first, end):
            keep, marks = trim(batch, marks)
            new = batch.take(keep)
            erased = erased_rows(new, self._desired.mask.erased)
            self._waits.follow(new, erased, ())
            learned = new.take(~erased & happened(new.kind))
            self._clocks |= self._clock.follow(learned, learned.header.ranges, learned.header.created_ms).state
        self._commit()

    def _between(self, first: int, end: int) -> Iterator[MicroBatch]:
        """The micro-batches of our branch at the positions `[first, end)`."""
        kafka = self._settings.kafka
        with Reader(kafka, kafka.microbatches_topic, [TRAINING_PARTITION], {TRAINING_PARTITION: first}) as reader:
            for offset, batch in branch_records(reader, first, end, self._desired.branch):
                yield self._checked(batch, offset)

    def _show(self, passed: int, total: int, last: bool = False) -> None:
        self._progress.show(lambda: progress_line(passed, total, self._result.rows, self._progress.took_s), last)

    def _take(self, batch: PartitionBatch) -> None:
        for first, after, reason in batch.corrupt:
            self._result.unreadable += 1
            logger.error("the micro-batch log's positions [%d, %d) are corrupt: %s", first, after, reason)
        log = Source(batch.topic_id, batch.partition)
        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            self._result.records += 1
            # Records that the trainer skips permanently do not count here either.
            if accepted_gaps.left_out(self._accepted, log, offset):
                self._result.unreadable += 1
                continue
            record_batch = self._decode(value, offset)
            if record_batch is None:
                continue
            # 2.
            for part in record_batch.header.ranges:
                self._fill_before(part)
            # 1.
            keep, after_marks = trim(record_batch, self._marks)
            erased = erased_rows(record_batch, self._desired.mask.erased)
            parts, missing = new_ranges(record_batch, self._marks)
            self._result.lost += missing
            parts = self._waits.follow(record_batch.take(keep), erased[keep], parts)
            fresh = record_batch.take(keep & ~erased & happened(record_batch.kind))
            self._clocks |= self._clock.follow(fresh, fresh.header.ranges, fresh.header.created_ms).state
            self._appends.append(Appends.of(fresh.user, events_of(fresh, fresh.header.ranges)))
            self._ranges += parts
            self._marks = after_marks
            self._result.rows += len(fresh)
        self._commit()
        killpoints.reach("rebuild.committed")

    def _fill_before(self, part: Range) -> None:
        source, mark = part.source, self._marks.get(part.source)
        if mark is not None and mark >= part.first:
            return
        if source in self._kept and (self._kept[source] < part.first or mark is None):
            self._commit()
            self._fill(source, mark, part.first)
        elif mark is None:
            self._result.lost += part.first

    def _fill(self, source: Source, mark: int | None, after: int) -> None:
        """Reads the clicks of `source` from `mark` up to `after` into the store; counts those that are gone.

        Impressions among them may still wait, with the windows of that time.
        """
        at = mark or 0
        first = min(max(at, self._kept[source]), after)
        self._result.lost += first - at
        self._result.clicks += after - first
        self._marks[source] = after
        if mark is not None and first > at:
            self._store.commit(Appends.none(), [Range(source, at, first, absent=first - at)])
        if first == after:
            return
        logger.info("the log does not hold positions %d to %d of %s: reading the clicks", first, after, source)
        job = open_job(self._settings, self._store, self._salt, source.topic_id, self._desired.mask)
        job = replace(job, clock=self._clock)
        kafka, partition = self._settings.kafka, source.partition
        with Reader(kafka, kafka.clicks_topic, [partition], {partition: first}) as reader:
            for batches in read_to(reader, {partition: after}, CLICKS_AT_ONCE):
                events = job.parse([batch.between(batch.first, min(after, batch.next)) for batch in batches])
                job.commit(job.make_rows(events, wall_ms()))

    def _commit(self) -> None:
        waiting, extra = self._waits.to_commit()
        extra |= self._clocks
        self._store.commit(merge_appends(self._appends), merge_all(self._ranges), extra, waiting)
        self._appends, self._ranges, self._clocks = [], [], {}

    def _decode(self, value: bytes | None, offset: int) -> MicroBatch | None:
        try:
            decoded = decode(value or b"")
        except MicroBatchError as error:
            self._result.unreadable += 1
            logger.error("offset %d of the training log is skipped, its clicks are read again: %s", offset, error)
            return None
        if not counts(self._desired.branch, decoded.header.log_epoch, offset):
            return None
        return self._checked(decoded, offset)

    def _checked(self, batch: MicroBatch, offset: int) -> MicroBatch:
        """A micro-batch with the actions of the settings; raises if its salt or its feature spec is unknown."""
        where, header = f"{self._settings.kafka.microbatches_topic}:0 offset {offset}", batch.header
        if header.salt != self._salt.fingerprint:
            raise SaltMismatch.between(where, header.salt, self._salt.fingerprint)
        # Histories do not keep computed features: only an action's number depends on the feature spec.
        named = self._actions.of(header.spec)
        if named is None:
            raise SpecMismatch(
                f"{where} has feature spec {header.spec[:12]}, which the registry does not know",
                "put [features] and events.actions back, or restore specs/ of the registry",
            )
        return renumbered(batch, named, self._settings.events.actions)


class KeptRecord(NamedTuple):
    """A record of the training log."""

    timestamp_ms: int
    value: bytes


def end_open_transaction(settings: Settings, writer: Writer) -> None:
    """Repairs the end of the training log after a power cut.

    Afterwards acknowledged records are visible, and no reader waits behind them. The newest transaction may have lost
    its marker but not its records. Kafka's coordinator keeps its state of the transaction in another log, so there are
    two cases:

    1. The coordinator considers the transaction ended, but no reader gets past it. The next transaction of the same
       writer ends it too, because its marker closes everything open before it. So a micro-batch without rows is
       written in a transaction.
    2. The coordinator considers a transaction open, perhaps the following one, and aborts it when the writer starts.
       The abort marker also closes everything open before it, and hides records that others may have learned and
       served from. These records are written again; readers that have them skip them by position.

    The stream's own writer does both, after it has fenced any other writer.

    Raises:
        LogError: Kafka is not reachable, or refuses.
    """
    kafka = settings.kafka
    topic = kafka.microbatches_topic
    deadline_s = time.monotonic() + ENDED_S
    with Topics(kafka) as topics:
        while True:
            (begin, end), (_, stable) = (topics.ends(topic, committed_only=only)[0] for only in (False, True))
            if stable >= end or time.monotonic() >= deadline_s:
                break
            time.sleep(POLL_S)
    # 1.
    if stable < end:
        record = next(iter(read(kafka, stable, end, committed_only=False).values()), None)
        if record is None:
            return
        batch = decode(record.value)
        header, nothing = replace(batch.header, ranges=(), clocks=()), batch.take(np.zeros(len(batch), np.bool_))
        with writer.transaction():
            writer.send(topic, 0, None, encode(header, nothing.columns))
        logger.warning(
            "positions %d to %d of %s belonged to a transaction that was left open, as after a power cut; it is committed",
            *(stable, end - 1, topic),
        )
        return
    # 2.
    if hidden := _hidden_at_the_end(kafka, begin, end):
        with writer.transaction():
            for record in hidden.values():
                writer.send(topic, 0, None, record.value, [], record.timestamp_ms)
        logger.warning(
            "positions %d to %d of %s belonged to an aborted transaction, as after a power cut; they are written again",
            *(min(hidden), max(hidden), topic),
        )


def _hidden_at_the_end(kafka: Kafka, begin: int, end: int) -> dict[int, KeptRecord]:
    """By position the micro-batches after the last one that readers see; no transaction is open."""
    first = max(begin, end - TAIL)
    last_offset = max(read(kafka, first, end, committed_only=True), default=first - 1)
    return {at: record for at, record in read(kafka, first, end, committed_only=False).items() if at > last_offset}


def read(kafka: Kafka, first: int, end: int, committed_only: bool) -> Mapping[int, KeptRecord]:
    """By position the micro-batches at the positions `[first, end)`; other records are left out."""
    records: dict[int, KeptRecord] = {}
    with Reader(kafka, kafka.microbatches_topic, [0], {0: first}, committed_only=committed_only) as reader:
        for batches in read_to(reader, {0: end}, stalled_s=kafka.request_timeout_s):
            for batch in batches:
                times = batch.timestamps_ms.tolist()
                for at, time_ms, value in zip(batch.offsets.tolist(), times, batch.values, strict=True):
                    with suppress(MicroBatchError):
                        decode(value or b"")
                        records |= {at: KeptRecord(time_ms, value or b"")} if at < end else {}
    return records


def rebuild(settings: Settings, copy: Path | None, out: TextIO) -> Rebuilt:
    """Rebuilds the stream's histories and puts them in place; `out` shows the progress.

    Raises:
        LockHeld: The stream, a shard of it, or another rebuild, holds the directory.
        CorruptStore: The copy was not closed cleanly either.
        SpringtideError: See `Rebuild.run`.
    """
    folder, spec = settings.stream_dir, FeatureSpec.from_settings(settings)
    log = Log(settings.kafka)
    # 1.
    with DirectoryLock(folder), replacing_shards(settings, log):
        salt = load_salt(settings.salt_path, create=False)
        if (aside := histories.finish(folder)) is not None:
            logger.info("an earlier rebuild was complete and is in use now; its old store is %s", aside)
        note_first_release(folder)
        try:
            with open_writer(settings) as writer:
                end_open_transaction(settings, writer)
        except UnknownTopic as error:
            logger.warning("no writer is fenced: %s", error)
        path = histories.begin(folder)
        most = map_bytes(settings, STREAM, HISTORIES, copy or path)
        if copy is not None:
            HistoryStore.copied(copy, path, spec.history)
        store = HistoryStore(path, spec.history, most)
        snapshot = None if copy is not None else load_snapshot(settings, store, salt, log)
        try:
            actions = SpecActions(settings.registry_dir, spec)
            check_identity(store, spec, salt.fingerprint, actions)
            desired = ControlWatch(settings.registry_dir, branch_of(store)).desired
            roll_back_histories(log, settings, spec, store, desired)
            # 2. and 3.
            progress = ProgressLine(out, LINE_EVERY_S, at_once=True)
            result = Rebuild(settings, store, actions, salt, progress, desired).run(snapshot)
        finally:
            store.close()
        # 4.
        histories.promise(folder)
        result.aside = histories.finish(folder)
    return result


def load_snapshot(settings: Settings, store: HistoryStore, salt: Salt, log: Log) -> HistorySnapshot | None:
    """Loads the newest usable snapshot of serving's histories into an empty store; None if there is none.

    Raises:
        StoreFull: The store is too small for the snapshot.
    """
    control = ControlPoll(settings.registry_dir).read()
    topic = settings.kafka.microbatches_topic
    try:
        with log.topics() as topics:
            topic_id, ends = topics.describe(topic).topic_id, topics.ends(topic)
        branch = WHOLE if control is None else control.log
        wanted = Wanted(store.history, salt.fingerprint, branch, topic_id, ends)
        return load_newest(location_of(settings), wanted, store, keep=lambda name: name in SHARED_EXTRAS)
    except (UnknownTopic, UnusablePlace) as error:
        logger.warning("no snapshot of histories is used: %s", error)
        return None


def are_lost(settings: Settings) -> bool:
    """Whether the histories were open when the machine or its container went down; False if there are none yet.

    Raises:
        LockHeld: The stream has the histories open.
    """
    with DirectoryLock(settings.stream_dir):
        histories.finish(settings.stream_dir)
        return histories.is_lost(settings.stream_dir) or bool(former_shards(settings.state_dir))


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuilds once; returns the exit code."""

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        parser = parser_of("rebuild-history")
        parser.description, parser.formatter_class = __doc__, argparse.RawDescriptionHelpFormatter
        options, flags = parser.parse_known_args(words)
        settings = load(flags, os.environ)

        def work() -> None:
            if options.copy is not None and not options.copy.is_dir():
                raise SettingsError(f"--from {options.copy} is no directory", "name the directory of a history store")
            if options.if_lost and not are_lost(settings):
                print(f"the histories in {settings.stream_dir} are not lost: nothing is rebuilt")
                return
            result = rebuild(settings, options.copy, sys.stderr)
            print(result.in_words(settings.stream_dir / HISTORIES))

        return settings, work

    return run_process("rebuild", start, argv, logger)


if __name__ == "__main__":
    sys.exit(main())
