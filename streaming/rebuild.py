"""Rebuilds a stream's lost histories from Kafka: `springtide rebuild-history [--from COPY] [--if-lost]`.

1. Acquire the lock of the directory and fence the stream's writer, so that the training log has an end. Also fence the
   writers of shards of an earlier release.
2. Read the training log to its end, along the branch that control names, from the positions of a copy or from the start.
   Its rows are the events of the lost store, and its ranges are the positions. Impressions that it opens but does not
   close wait again.
3. If the training log no longer reaches back to some positions, read them from the clicks topic. Positions that are
   missing there too are counted.
4. Build the new store next to the old one, set the old one aside, and move the new one into place.

If the lost store had committed everything it wrote, the result is identical, event by event and offset by offset.
Otherwise the result is what the store would have become.

The command also preserves the end of the training log after a power cut: acknowledged records stay visible, and no
reader waits at the end. A power cut can lose the marker of the newest transaction but not its records. The coordinator of
Kafka keeps its state in another log, so there are two cases:

1. The coordinator considers the transaction ended. Readers then block at it. The next transaction of the same writer
   resolves this, because its marker also closes the open transaction before it. The writer therefore writes a micro-batch
   without rows.
2. The coordinator considers a transaction open, possibly the next one, and aborts it when the writer starts. The abort
   marker also closes the open transaction before it, and hides records that others may have learned from. They are written
   again; readers that already have them skip them by position.

Both are done by the stream's own writer, after every other writer has been fenced.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import MicroBatchError, SettingsError, SpringtideError, UnknownTopic, of_disk
from state.events.identity import load_salt
from state.features.spec import FeatureSpec
from state.history.rewinding import line_of
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import KafkaLog, LogWriter, Reader, Topics
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from state.process import log_lines
from state.process.private_files import keep_private
from state.process.progress_line import ProgressLine
from state.registry.spec_actions import SpecActions
from state.storage.shares import STREAM, map_bytes
from streaming import takeover
from streaming.desired import ControlWatch
from streaming.fencing import note_first_release, open_writer
from streaming.former_shards import former_shards, replaced
from streaming.going_back import take_back
from streaming.histories import check_identity
from streaming.rebuild_log import Rebuild
from streaming.rebuild_report import Rebuilt, progress_on, told

ENDED_S = 3.0
LOOK_S = 0.1
TAIL = 64
"""Positions that are looked at for what is hidden; a transaction has two or three."""


class KeptRecord(NamedTuple):
    """A record of the training log."""

    timestamp_ms: int
    value: bytes


def end_hanging(settings: Settings, writer: LogWriter) -> None:
    """Does what the first lines of this file say.

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
            time.sleep(LOOK_S)
    # 1.
    if stable < end:
        empty = next(map(_without_rows, read(kafka, stable, end, committed_only=False).values()), None)
        if empty is None:
            return
        with writer.transaction():
            writer.send(topic, 0, None, empty)
        logger.warning(
            "positions %d to %d of %s belonged to a transaction that nobody ended, as after a power cut; it is committed",
            *(stable, end - 1, topic),
        )
        return
    # 2.
    if hidden := hidden_at_the_end(kafka, begin, end):
        with writer.transaction():
            for record in hidden.values():
                writer.send(topic, 0, None, record.value, [], record.timestamp_ms)
        logger.warning(
            "positions %d to %d of %s belonged to a transaction that was given up, as after a power cut; they are written once more",
            *(min(hidden), max(hidden), topic),
        )


def hidden_at_the_end(kafka: Kafka, begin: int, end: int) -> dict[int, KeptRecord]:
    """By position the micro-batches behind the last one that readers see.

    Args:
        kafka: Where the training log is; no transaction is open there.
        begin: Its first position.
        end: The position after its last one.

    Raises:
        LogError: Kafka is not reachable.
    """
    first = max(begin, end - TAIL)
    seen = max(read(kafka, first, end, committed_only=True), default=first - 1)
    return {at: record for at, record in read(kafka, first, end, committed_only=False).items() if at > seen}


def read(kafka: Kafka, first: int, end: int, committed_only: bool) -> Mapping[int, KeptRecord]:
    """By position the micro-batches at the positions `[first, end)`; what is none is left out.

    Raises:
        LogError: Kafka is not reachable.
    """
    found: dict[int, KeptRecord] = {}
    deadline_s = time.monotonic() + kafka.request_timeout_s
    with Reader(kafka, kafka.microbatches_topic, [0], {0: first}, committed_only=committed_only) as reader:
        while reader.position(0) < end and time.monotonic() < deadline_s:
            for batch in reader.poll(LOOK_S):
                times = batch.timestamps_ms.tolist()
                for at, time_ms, value in zip(batch.offsets.tolist(), times, batch.values, strict=True):
                    if at < end and _decoded(value) is not None:
                        found[at] = KeptRecord(time_ms, value or b"")
    return found


def _decoded(value: bytes | None) -> MicroBatch | None:
    try:
        return decode(value or b"")
    except MicroBatchError:
        return None


def _without_rows(record: KeptRecord) -> bytes:
    """A micro-batch without rows, made like this one."""
    whole = decode(record.value)
    return encode(replace(whole.header, ranges=(), clocks=()), whole.take(np.zeros(len(whole), np.bool_)).columns)


logger = logging.getLogger(__name__)

Say = Callable[[str], None]


def rebuild(settings: Settings, copy: Path | None, progress: ProgressLine, say: Say) -> Rebuilt:
    """Rebuilds the stream's histories and puts them in place.

    Raises:
        LockHeld: The stream, a shard of it, or another rebuild, holds the directory.
        CorruptStore: The copy was not closed in order either.
        SpringtideError: See `Rebuild.run`.
    """
    folder, spec = settings.stream_dir, FeatureSpec.from_settings(settings)
    log = KafkaLog(settings.kafka)
    # 1.
    with DirectoryLock(folder), replaced(settings, log):
        salt = load_salt(settings.salt_path, create=False)
        if (aside := takeover.finish(folder)) is not None:
            say(f"an earlier rebuild was complete and is in use now; the store before it is {aside}")
        note_first_release(folder)
        try:
            with open_writer(settings) as writer:
                end_hanging(settings, writer)
        except UnknownTopic as error:
            logger.warning("no writer is fenced: %s", error)
        place = takeover.begin(folder)
        most = map_bytes(settings, STREAM, HISTORIES, copy or place)
        if copy is not None:
            HistoryStore.copied(copy, place, spec.history, most)
        store = HistoryStore(place, spec.history, most)
        try:
            check_identity(store, spec, salt.fingerprint, actions := SpecActions(settings.registry_dir, spec))
            desired = ControlWatch(settings.registry_dir, line_of(store)).desired
            take_back(log, settings, spec, store, desired)
            # 2. and 3.
            found = Rebuild(settings, store, actions, salt, progress, desired).run()
        finally:
            store.close()
        # 4.
        takeover.promise(folder)
        found.aside = takeover.finish(folder)
    return found


def are_lost(settings: Settings) -> bool:
    """Whether the histories were open where the machine or its container went down; not where there are none yet.

    Raises:
        LockHeld: The stream has them open.
    """
    with DirectoryLock(settings.stream_dir):
        takeover.finish(settings.stream_dir)
        return takeover.is_lost(settings.stream_dir) or bool(former_shards(settings.state_dir))


class RebuildLine(NamedTuple):
    """What a command line says.

    Attributes:
        copy: A store to begin with.
        if_lost: Whether nothing is to be done where the histories can be opened.
        flags: Of settings.
    """

    copy: Path | None
    if_lost: bool
    flags: list[str]


def asked(argv: Sequence[str]) -> RebuildLine:
    """Takes a command line apart.

    >>> asked(["--from", "copy", "--kafka.port", "9192"])
    RebuildLine(copy=PosixPath('copy'), if_lost=False, flags=['--kafka.port', '9192'])

    Raises:
        SettingsError: The line is wrong.
    """
    parser = argparse.ArgumentParser(prog="springtide rebuild-history", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--from", dest="copy", type=Path, metavar="COPY", help="cleanly closed history store to start from"
    )
    parser.add_argument(
        "--if-lost",
        action="store_true",
        help="rebuild only if the histories were lost with the machine or its container",
    )
    found, flags = parser.parse_known_args(argv)
    return RebuildLine(found.copy, found.if_lost, flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Rebuilds once; returns the exit code."""
    keep_private()
    log_lines.begin("rebuild")
    try:
        copy, if_lost, flags = asked(sys.argv[1:] if argv is None else argv)
        settings = load(flags, os.environ)
        log_lines.follow(settings.logs)
        if copy is not None and not copy.is_dir():
            raise SettingsError(f"--from {copy} is no directory", "name the directory of a history store")
        if if_lost and not are_lost(settings):
            print(f"the histories in {settings.stream_dir} are not lost: nothing is rebuilt")
            return 0
        found = rebuild(settings, copy, progress_on(sys.stderr), logger.info)
    except (SpringtideError, OSError) as problem:
        error = of_disk(problem)
        logger.error("%s: %s", type(error).__name__, error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("stopped; the old store is as it was")
        return 1
    print(told(found, settings.stream_dir / HISTORIES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
