"""Ends a transaction of the training log whose marker was lost with the power: the coordinator takes it for ended, and nobody reads past it.

The next transaction of the same writer ends it too: its marker closes what is
open before it. So a micro-batch without rows is written in one, by the stream's
own writer, which has fenced any other before.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np

from state.config.settings import Settings
from state.errors import MicroBatchError
from state.log import LogWriter, Reader, Topics
from state.microbatch.codec import decode, encode

ENDED_S = 3.0
LOOK_S = 0.1
logger = logging.getLogger(__name__)


def end_hanging(settings: Settings, writer: LogWriter) -> None:
    """Ends it, if there is one.

    Raises:
        LogError: Kafka is not reachable, or refuses.
    """
    kafka = settings.kafka
    topic = kafka.microbatches_topic
    deadline_s = time.monotonic() + ENDED_S
    with Topics(kafka) as topics:
        while True:
            end, stable = (topics.ends(topic, committed_only=only)[0][1] for only in (False, True))
            if stable >= end:
                return
            if time.monotonic() >= deadline_s:
                break
            time.sleep(LOOK_S)
    empty = nothing_of(settings, stable, end)
    if empty is None:
        return
    with writer.transaction():
        writer.send(topic, 0, None, empty)
    logger.warning(
        "positions %d to %d of %s belonged to a transaction that nobody ended, as after a power cut; it is committed",
        *(stable, end - 1, topic),
    )


def nothing_of(settings: Settings, first: int, end: int) -> bytes | None:
    """A micro-batch without rows, made like the first one at the positions `[first, end)`; None where there is none."""
    kafka = settings.kafka
    deadline_s = time.monotonic() + kafka.request_timeout_s
    with Reader(kafka, kafka.microbatches_topic, [0], {0: first}, committed_only=False) as reader:
        while reader.position(0) < end and time.monotonic() < deadline_s:
            for batch in reader.poll(LOOK_S):
                for value in batch.values:
                    try:
                        whole = decode(value or b"")
                    except MicroBatchError:
                        continue
                    header = replace(whole.header, ranges=(), clocks=())
                    return encode(header, whole.take(np.zeros(len(whole), np.bool_)).columns)
    return None
