"""Rebuilds a stream's lost histories from Kafka: `springtide rebuild-history [--shard N] [--from COPY]`.

1. Takes the directory's lock and fences the stream's writer, so that the
   shard's part of the micro-batch log has an end.
2. Reads the micro-batch log to its end, from a copy's positions or from
   nothing. Its rows are what the lost store had; its ranges are the positions.
   Impressions that it opens and does not close wait again.
3. Positions that the log does not cover, because it no longer reaches back to
   them, come from the clicks themselves. What is gone there too is counted.
4. The store is built aside and takes the old one's place at the end; the old
   one is set aside.

The result is the lost store, event by event and offset by offset, if it had
committed all that it wrote; else it is what the store would have been.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np

from state.config.settings import Settings, load
from state.disk.lock import DirectoryLock
from state.errors import (
    MicroBatchError,
    SaltMismatch,
    SettingsError,
    SpecMismatch,
    SpringtideError,
    UnknownTopic,
    of_disk,
)
from state.events.event_batch import EventBatch
from state.events.identity import Salt, load_salt
from state.events.parser import Parser
from state.features.spec import FeatureSpec
from state.history.followed import events_of, new_ranges
from state.history.store import Appends, HistoryStore
from state.log import PartitionBatch, Reader, TopicInfo, Topics, Writer
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.microbatch.cutting import trim
from state.microbatch.row_kinds import happened
from state.positions import Range, Source
from state.process import killpoints
from streaming import takeover
from streaming.cut import Cut, merge_all, merge_appends
from streaming.labels import Labels, open_labels
from streaming.profile import Profiler, to_events
from streaming.rebuild_waiting import Waits
from streaming.shard import check_identity, transactional_id

RECORDS_AT_ONCE = 64
CLICKS_AT_ONCE = 20_000
POLL_S = 0.5
STALLED_S = 60.0
BAR = 30
TERMINAL_EVERY_S = 0.2
LINE_EVERY_S = 5.0
CLEAR = "\r\x1b[K"
logger = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclass
class Rebuilt:
    """What a rebuild found.

    Attributes:
        records: Records of the micro-batch log.
        rows: Events taken from them.
        clicks: Positions taken from the clicks instead.
        unreadable: Records of the log that are damaged; their positions were taken from the clicks.
        lost: Positions that neither has any more.
        users: Users with a history.
        incomplete: Users whose history may lack its oldest events: of those with fewer than N, where positions are lost.
        aside: Where the old store is now.
    """

    records: int = 0
    rows: int = 0
    clicks: int = 0
    unreadable: int = 0
    lost: int = 0
    users: int = 0
    incomplete: int = 0
    aside: Path | None = None


def progress_line(done: int, total: int, rows: int, seconds: float) -> str:
    """How far the log is read, in one line.

    >>> progress_line(500, 1000, 90_000, 3.0)
    '[###############---------------]  50 %  500 of 1,000 positions of the log  90,000 rows  30,000 rows/s'
    """
    filled = BAR * done // max(total, 1)
    share = 100 * done // max(total, 1)
    rate = rows / max(seconds, 1e-9)
    bar = "#" * filled + "-" * (BAR - filled)
    return f"[{bar}] {share:3d} %  {done:,} of {total:,} positions of the log  {rows:,} rows  {rate:,.0f} rows/s"


class Bar:
    """Shows the progress: one line that moves on a terminal, else a line every few seconds.

    Args:
        out: Where to.
        elapsed: Seconds that never go back.
    """

    def __init__(self, out: TextIO, elapsed: Callable[[], float] = time.monotonic) -> None:
        self._out, self._elapsed = out, elapsed
        self._terminal = out.isatty()
        self._begun_s = elapsed()
        self._shown_s = float("-inf") if self._terminal else self._begun_s

    def show(self, done: int, total: int, rows: int, last: bool = False) -> None:
        """Shows the state if it is time to; always with `last`."""
        now_s = self._elapsed()
        if not last and now_s - self._shown_s < (TERMINAL_EVERY_S if self._terminal else LINE_EVERY_S):
            return
        self._shown_s = now_s
        line = progress_line(done, total, rows, now_s - self._begun_s)
        self._out.write(f"{CLEAR}{line}{chr(10) * last}" if self._terminal else f"{line}\n")
        self._out.flush()


def until(batch: PartitionBatch, after: int) -> PartitionBatch:
    """The part of a batch below the offset `after`."""
    if batch.next <= after:
        return batch
    count = int(np.searchsorted(batch.offsets, after))
    return replace(
        batch,
        next=after,
        offsets=batch.offsets[:count],
        timestamps_ms=batch.timestamps_ms[:count],
        keys=batch.keys[:count],
        values=batch.values[:count],
        corrupt=tuple((first, min(last, after), why) for first, last, why in batch.corrupt if first < after),
    )


class Rebuild:
    """Fills an empty or copied store from Kafka. One thread.

    Args:
        settings: Of the stream.
        store: Built aside; positions it has are gone on from.
        spec: Digest of the feature spec.
        salt: Of the users' pseudonyms.
        bar: Where the progress goes.
    """

    def __init__(self, settings: Settings, store: HistoryStore, spec: str, salt: Salt, bar: Bar) -> None:
        self._settings, self._store, self._spec, self._salt, self._bar = settings, store, spec, salt, bar
        self._marks = store.positions()
        self._parser = Parser(settings.events, salt)
        self._waits = Waits(store, always=bool(settings.labels.impressions))
        self._clicks: TopicInfo | None = None
        self._begins: Mapping[int, tuple[int, int]] = {}
        self.found = Rebuilt()

    def run(self) -> Rebuilt:
        """Reads what there is; the store holds it when this returns.

        Raises:
            SaltMismatch: The log's pseudonyms are of another salt.
            SpecMismatch: The log is of other feature settings.
            LogError: Kafka is not reachable, or stops answering.
        """
        kafka = self._settings.kafka
        with Topics(kafka) as topics:
            try:
                self._clicks = topics.describe(kafka.clicks_topic)
                self._begins = topics.ends(kafka.clicks_topic)
                committed = topics.committed(kafka.group, kafka.clicks_topic)
            except UnknownTopic as error:
                logger.warning("%s; only what the micro-batch log holds is rebuilt", error)
                committed = {}
            try:
                begin, end = topics.ends(kafka.microbatches_topic)[0]
            except UnknownTopic as error:
                logger.warning("%s; there is only the group's word for what the stream had read", error)
                begin = end = 0
        # 2.
        if end > begin:
            self._read_log(begin, end)
        # 3. A partition that was read, and of which the log holds nothing any more.
        if self._clicks is not None:
            for partition, after in sorted(committed.items()):
                source = Source(self._clicks.topic_id, partition)
                if self._is_ours(source) and source not in self._marks:
                    self._fill(source, after)
        found = self.found
        found.users = self._store.users()
        found.incomplete = self._store.users_below(self._settings.features.history) if found.lost else 0
        return found

    def _is_ours(self, source: Source) -> bool:
        stream = self._settings.stream
        return source.partition % stream.shards == stream.shard

    def _read_log(self, begin: int, end: int) -> None:
        kafka = self._settings.kafka
        with Reader(kafka, kafka.microbatches_topic, [0]) as reader:
            heard_s = time.monotonic()
            while (at := reader.position(0)) < end:
                for batch in reader.poll(POLL_S, RECORDS_AT_ONCE):
                    self._take(batch)
                    heard_s = time.monotonic()
                if time.monotonic() - heard_s > STALLED_S:
                    raise UnknownTopic(
                        f"the micro-batch log {kafka.microbatches_topic} gave nothing for {STALLED_S:.0f} s at position {at} "
                        f"of {end}: a transaction may still be open; try again"
                    )
                self._bar.show(min(at, end) - begin, end - begin, self.found.rows)
        self._bar.show(end - begin, end - begin, self.found.rows, last=True)

    def _take(self, batch: PartitionBatch) -> None:
        """One commit for what one poll found."""
        for first, after, reason in batch.corrupt:
            self.found.unreadable += 1
            logger.error("the micro-batch log's positions [%d, %d) are corrupt: %s", first, after, reason)
        appends: list[Appends] = []
        ranges: list[Range] = []

        def commit() -> None:
            waiting, extra = self._waits.gained()
            self._store.commit(merge_appends(appends), merge_all(ranges), extra, waiting)
            appends.clear()
            ranges.clear()

        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            self.found.records += 1
            mine = self._decode(value, offset)
            if mine is None:
                continue
            for part in mine.header.ranges:
                # 3. In the order of the source: what lies before comes first.
                if self._marks.get(part.source, -1) < part.first:
                    if self._has(part.source, part.first):
                        commit()
                        self._fill(part.source, part.first)
                    elif part.source not in self._marks:
                        self.found.lost += part.first
            keep, after_marks = trim(mine, self._marks)
            parts, missing = new_ranges(mine, self._marks)
            self.found.lost += missing
            parts = self._waits.follow(mine.take(keep), parts)
            kept = mine.take(keep & happened(mine.kind))
            appends.append(Appends.of(kept.user, events_of(kept)))
            ranges += parts
            self._marks = after_marks
            self.found.rows += len(kept)
        commit()
        killpoints.reach("rebuild.committed")

    def _decode(self, value: bytes | None, offset: int) -> MicroBatch | None:
        """The record's rows of this shard; None where it has none or cannot be read."""
        where = f"{self._settings.kafka.microbatches_topic}:0 offset {offset}"
        try:
            whole = decode(value or b"")
        except MicroBatchError as error:
            self.found.unreadable += 1
            logger.error("%s is left out, its clicks are read again: %s", where, error)
            return None
        header = whole.header
        if header.salt != self._salt.fingerprint:
            raise SaltMismatch.between(where, header.salt, self._salt.fingerprint)
        if header.spec != self._spec:
            raise SpecMismatch(
                f"{where} has feature spec {header.spec[:12]}, the settings make {self._spec[:12]}; "
                "put [features] and events.actions back"
            )
        ours = [self._is_ours(part.source) for part in header.ranges]
        if all(ours):
            return whole
        if not any(ours):
            return None
        kept = whole.take(np.array(ours)[whole.source])
        number = np.cumsum(ours, dtype=np.uint16) - np.uint16(1)
        parts = tuple(part for part, mine in zip(header.ranges, ours, strict=True) if mine)
        return replace(kept, header=replace(header, ranges=parts), source=number[kept.source].astype(np.uint16))

    def _has(self, source: Source, after: int) -> bool:
        """Whether the clicks may still hold positions of `source` below `after`."""
        if self._clicks is None or source.topic_id != self._clicks.topic_id or source.partition not in self._begins:
            return False
        return self._begins[source.partition][0] < after or source not in self._marks

    def _fill(self, source: Source, after: int) -> None:
        """Takes the positions of `source` up to `after` from the clicks; counts those that are gone."""
        kafka, begin = self._settings.kafka, self._begins[source.partition][0]
        at = self._marks.get(source, 0)
        first = min(max(at, begin), after)
        self.found.lost += first - at
        if source in self._marks and first > at:
            self._store.commit(Appends.none(), [Range(source, at, first, absent=first - at)])
        if first < after:
            logger.info("the log does not hold positions %d to %d of %s: reading the clicks", first, after, source)
            self.found.clicks += after - first
            labels = open_labels(self._settings, self._store, source.topic_id)
            profiler = Profiler(self._store, FeatureSpec.from_settings(self._settings), 1) if labels else None
            with Reader(kafka, kafka.clicks_topic, [source.partition], {source.partition: first}) as reader:
                heard_s = time.monotonic()
                while reader.position(source.partition) < after:
                    batches = reader.poll(POLL_S, CLICKS_AT_ONCE)
                    events = self._parser.parse([until(batch, after) for batch in batches])
                    self._take_clicks(events, profiler, labels)
                    heard_s = time.monotonic() if batches else heard_s
                    if time.monotonic() - heard_s > STALLED_S:
                        raise UnknownTopic(f"{kafka.clicks_topic} gave nothing for {STALLED_S:.0f} s; try again")
        self._marks = {**self._marks, source: after}

    def _take_clicks(self, events: EventBatch, profiler: Profiler | None, labels: Labels | None) -> None:
        """One commit for clicks; impressions among them may still wait, with the windows of then."""
        if profiler is None or labels is None:
            self._store.commit(Appends.of(events.user, to_events(events)), events.ranges)
            return
        done = labels.look_up([Cut((labels.attribute(profiler.update(events)),), 0)])
        (rows,) = done.cuts[0].pieces
        self._store.commit(rows.appends, rows.batch.ranges, done.extra, done.waiting)
        profiler.committed(rows)


def rebuild(settings: Settings, copy: Path | None, bar: Bar, say: Say) -> Rebuilt:
    """Rebuilds the histories of `stream.shard` and puts them in place.

    Raises:
        LockHeld: The stream, or another rebuild, holds the directory.
        CorruptStore: The copy was not closed in order either.
        SpringtideError: See `Rebuild.run`.
    """
    folder, spec = settings.stream_dir, FeatureSpec.from_settings(settings)
    map_bytes = settings.stream.map_gb << 30
    # 1.
    with DirectoryLock(folder):
        salt = load_salt(settings.salt_path, create=False)
        if (aside := takeover.finish(folder)) is not None:
            say(f"an earlier rebuild was complete and is in use now; the store before it is {aside}")
        Writer(settings.kafka, transactional_id=transactional_id(settings.stream.shard)).close()
        place = takeover.begin(folder)
        if copy is not None:
            HistoryStore.copied(copy, place, spec.history, map_bytes)
        store = HistoryStore(place, spec.history, map_bytes)
        try:
            check_identity(store, spec.digest, salt.fingerprint)
            found = Rebuild(settings, store, spec.digest, salt, bar).run()
        finally:
            store.close()
        # 4.
        takeover.promise(folder)
        found.aside = takeover.finish(folder)
    return found


def told(found: Rebuilt, place: Path) -> str:
    """The result in one line.

    >>> told(Rebuilt(records=10, rows=500, users=17), Path("histories"))
    'histories: 17 users, 500 rows of 10 records of the log; complete'
    >>> told(Rebuilt(records=10, rows=500, clicks=40, lost=60, users=17, incomplete=3), Path("h"))
    'h: 17 users, 500 rows of 10 records of the log and 40 positions of the clicks; 60 positions are gone from both: 3 users may lack their oldest events'
    """
    read = f"{found.rows:,} rows of {found.records:,} records of the log"
    read += f" and {found.clicks:,} positions of the clicks" if found.clicks else ""
    read += f" ({found.unreadable:,} records unreadable)" if found.unreadable else ""
    gone = "complete"
    if found.lost:
        gone = f"{found.lost:,} positions are gone from both: {found.incomplete:,} users may lack their oldest events"
    aside = f"; the old store is {found.aside}, remove it when you like" if found.aside else ""
    return f"{place}: {found.users:,} users, {read}; {gone}{aside}"


def asked(argv: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The copy to begin with, and the flags of settings.

    >>> asked(["--shard", "1", "--from", "copy"])
    (PosixPath('copy'), ['--stream.shard', '1'])

    Raises:
        SettingsError: The line is wrong.
    """
    parser = argparse.ArgumentParser(prog="springtide rebuild-history", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shard", metavar="N", help="the stream whose histories to rebuild (default stream.shard)")
    parser.add_argument("--from", dest="copy", type=Path, metavar="COPY", help="a store closed in order to begin with")
    found, flags = parser.parse_known_args(argv)
    return found.copy, [*(["--stream.shard", found.shard] if found.shard is not None else []), *flags]


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuilds once; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s rebuild %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
    try:
        copy, flags = asked(sys.argv[1:] if argv is None else argv)
        settings = load(flags, os.environ)
        if copy is not None and not copy.is_dir():
            raise SettingsError(f"--from {copy} is no directory; name the directory of a history store")
        found = rebuild(settings, copy, Bar(sys.stderr), logger.info)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("stopped; the old store is as it was")
        return 1
    print(told(found, settings.stream_dir / takeover.HISTORIES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
