"""Rebuilds a stream's lost histories from Kafka: `springtide rebuild-history [--from COPY] [--if-lost]`.

1. Takes the directory's lock and fences the stream's writer, so that the micro-batch log has an end. If an earlier
   release had shards, their writers are fenced too.
2. Reads the micro-batch log to its end, from a copy's positions or from the beginning, along the branch that control
   names. Its rows are what the lost store had; its ranges are the positions. Impressions that it opens and does not
   close wait again.
3. Reads positions that the log no longer covers from the clicks themselves. Positions that are gone there too are
   counted.
4. Builds the store in another directory and swaps it in at the end; the old one is kept.

The result equals the lost store, event by event and offset by offset, if that had committed everything it wrote.
Otherwise it is what the store would have been.

The end of the training log is repaired too, because a power cut may have left a transaction open there. Acknowledged
records stay visible, and no reader waits behind that transaction.
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
from state.errors import MicroBatchError, SettingsError, UnknownTopic
from state.events.identity import load_salt
from state.features.spec import FeatureSpec
from state.history.rewinding import line_of
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Log, Reader, Topics, Writer
from state.log.follow import read_to
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode
from state.process.part import Work, run_process
from state.process.progress_line import ProgressLine
from state.registry.specs import SpecActions
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
"""Last positions that are searched for hidden records; a transaction has two or three."""

Say = Callable[[str], None]
logger = logging.getLogger(__name__)


class KeptRecord(NamedTuple):
    """A record of the training log."""

    timestamp_ms: int
    value: bytes


def end_hanging(settings: Settings, writer: Writer) -> None:
    """Repairs the end of the training log after a power cut.

    Acknowledged records stay visible, and no reader waits behind them. The newest transaction may have lost its
    marker but not its records. What Kafka's coordinator knows of it comes from another log, so there are two cases:

    1. The coordinator considers it ended. Then no reader gets past it. The next transaction of the same writer ends
       it too, because its marker closes everything open before it. A micro-batch without rows is written in one.
    2. The coordinator considers a transaction open, perhaps the following one, and aborts it when the writer starts.
       Its marker also closes everything open before it, and hides records that others may have learned and served
       from. They are written again; readers that have them skip them by position.

    The stream's own writer does both, after it has fenced any other.

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
    """By position the micro-batches after the last one that readers see.

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
    """By position the micro-batches at the positions `[first, end)`; other records are left out.

    Raises:
        LogError: Kafka is not reachable.
    """
    found: dict[int, KeptRecord] = {}
    with Reader(kafka, kafka.microbatches_topic, [0], {0: first}, committed_only=committed_only) as reader:
        for batches in read_to(reader, {0: end}, stalled_s=kafka.request_timeout_s):
            for batch in batches:
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


def rebuild(settings: Settings, copy: Path | None, progress: ProgressLine, say: Say) -> Rebuilt:
    """Rebuilds the stream's histories and puts them in place.

    Raises:
        LockHeld: The stream, a shard of it, or another rebuild, holds the directory.
        CorruptStore: The copy was not closed cleanly either.
        SpringtideError: See `Rebuild.run`.
    """
    folder, spec = settings.stream_dir, FeatureSpec.from_settings(settings)
    log = Log(settings.kafka)
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
    """Whether the histories were open when the machine or its container went down; False if there are none yet.

    Raises:
        LockHeld: The stream has them open.
    """
    with DirectoryLock(settings.stream_dir):
        takeover.finish(settings.stream_dir)
        return takeover.is_lost(settings.stream_dir) or bool(former_shards(settings.state_dir))


class RebuildLine(NamedTuple):
    """The arguments of `rebuild-history`.

    Attributes:
        copy: A store to begin with.
        if_lost: Whether to do nothing if the histories can be opened.
        flags: Flags of settings.
    """

    copy: Path | None
    if_lost: bool
    flags: list[str]


def asked(argv: Sequence[str]) -> RebuildLine:
    """Parses a command line.

    >>> asked(["--from", "copy", "--kafka.port", "9192"])
    RebuildLine(copy=PosixPath('copy'), if_lost=False, flags=['--kafka.port', '9192'])

    Raises:
        SettingsError: The command line is wrong.
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

    def start(words: Sequence[str]) -> tuple[Settings, Work]:
        copy, if_lost, flags = asked(words)
        settings = load(flags, os.environ)

        def work() -> None:
            if copy is not None and not copy.is_dir():
                raise SettingsError(f"--from {copy} is no directory", "name the directory of a history store")
            if if_lost and not are_lost(settings):
                print(f"the histories in {settings.stream_dir} are not lost: nothing is rebuilt")
                return
            found = rebuild(settings, copy, progress_on(sys.stderr), logger.info)
            print(told(found, settings.stream_dir / HISTORIES))

        return settings, work

    return run_process("rebuild", start, argv, logger)


if __name__ == "__main__":
    sys.exit(main())
