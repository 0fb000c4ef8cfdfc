"""Keeps the end of the training log after a power cut: what was acknowledged there stays visible, and nobody waits behind it.

Of the newest transaction its marker may be lost, and its records not. What
Kafka's coordinator knows of it comes from another log, so that there are two cases:

1. It takes the transaction for ended. Then nobody reads past it. The next
   transaction of the same writer ends it too, for its marker closes what is
   open before it: a micro-batch without rows is written in one.
2. It takes one for open, the next one perhaps, and gives that one up when the
   writer begins. Its marker closes what is open before it likewise, and hides
   records that others may have learned and answered from. They are written once
   more: whoever has them passes over them by position.

Both are done by the stream's own writer, which has fenced any other before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from state.config.sections import Kafka
from state.config.settings import Settings
from state.errors import MicroBatchError
from state.log import LogWriter, Reader, Topics
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode, encode

ENDED_S = 3.0
LOOK_S = 0.1
TAIL = 64
"""Positions that are looked at for what is hidden; a transaction has two or three."""
logger = logging.getLogger(__name__)


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
