"""Reading a log in a test: until positions are reached, and what was found on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

from state.log import Log, PartitionBatch, Reader
from state.log.bulk import BulkWriter, encode_batch
from state.log.records import I64


def eventually(condition: Callable[[], bool], within_s: float = 60.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def write(log: Log, topic: str, values: list[bytes], partition: int = 0) -> None:
    """Writes records with keys k0, k1, ... and timestamps 1000, 1001, ..."""
    with log.writer() as writer:
        for number, value in enumerate(values):
            writer.send(topic, partition, b"k%d" % number, value, timestamp_ms=1000 + number)
        writer.flush()


def read_until(
    reader: Reader, wanted: dict[int, int], within_s: float = 60.0, most: int = 10_000
) -> list[PartitionBatch]:
    """Polls until the positions are reached."""
    batches = []
    deadline = time.monotonic() + within_s
    while any(reader.position(partition) < position for partition, position in wanted.items()):
        assert time.monotonic() < deadline, {p: reader.position(p) for p in wanted}
        batches += reader.poll(0.2, most)
    return batches


def next_batches(
    reader: Reader, most: int = 10_000, shares: dict[int, int] | None = None, within_s: float = 60.0
) -> list[PartitionBatch]:
    """What the first poll finds that finds anything."""
    deadline = time.monotonic() + within_s
    while not (batches := reader.poll(0.2, most, shares)):
        assert time.monotonic() < deadline, f"nothing came of {shares}"
    return batches


def all_ends(log: Log, topic: str) -> dict[int, int]:
    with log.topics() as topics:
        return {partition: end for partition, (_, end) in topics.ends(topic).items()}


def values(batches: list[PartitionBatch], partition: int = 0) -> list[bytes | None]:
    return [value for batch in batches if batch.partition == partition for value in batch.values]


def joined(batches: list[PartitionBatch], partition: int = 0) -> tuple[int, int]:
    """The positions that the batches cover; each begins where the one before it ended."""
    mine = [batch for batch in batches if batch.partition == partition]
    for before, after in pairwise(mine):
        assert before.next == after.first
    return mine[0].first, mine[-1].next


def append_encoded(
    writer: BulkWriter,
    keys: Sequence[bytes],
    values: Sequence[bytes],
    timestamps_ms: I64,
    partitions: Sequence[int] | I64,
) -> None:
    """Appends records in whole batches, one per partition of `partitions` (see `partition_of`); each partition keeps the order of its records."""
    rows: dict[int, list[int]] = {}
    for row, partition in enumerate(partitions):
        rows.setdefault(int(partition), []).append(row)
    writer.append(
        {
            partition: encode_batch([keys[row] for row in mine], [values[row] for row in mine], timestamps_ms[mine])
            for partition, mine in rows.items()
        }
    )
