"""Reads the records of one branch of the training log. Loads no kernel, so that commands start quickly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from state.errors import MicroBatchError
from state.log import Reader
from state.log.follow import STALLED_S, read_to
from state.log.topic_plan import TRAINING_PARTITION
from state.microbatch.batch import MicroBatch
from state.microbatch.codec import decode
from state.registry.log_line import LogLine, counts

RECORDS = 512
logger = logging.getLogger(__name__)


def branch_records(
    reader: Reader,
    first: int,
    end: int,
    line: LogLine,
    read: Callable[[bytes], MicroBatch] = decode,
    stalled_s: float = STALLED_S,
) -> Iterator[tuple[int, MicroBatch]]:
    """Yields the records of a branch of the training log with offsets in [`first`, `end`), and their offsets.

    Unreadable records are logged and skipped.

    Raises:
        LogError: No record arrived for `stalled_s`, or the log cannot be read.
    """
    reader.seek(TRAINING_PARTITION, first)
    for batches in read_to(reader, {TRAINING_PARTITION: end}, RECORDS, stalled_s):
        for records in batches:
            for offset, value in zip(records.offsets.tolist(), records.values, strict=True):
                if offset >= end:
                    return
                try:
                    batch = read(value or b"")
                except MicroBatchError as error:
                    logger.warning("offset %d of the training log is left out: %s", offset, error)
                    continue
                if counts(line, batch.header.log_epoch, offset):
                    yield offset, batch
