"""Sends pieces of a recording to Kafka with acknowledgement; all records of a user go to one partition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from state.config.sections import Kafka
from state.log import Reader, Topics, partition_of
from state.log.bulk import BulkWriter, encode_batch
from state.log.follow import read_to
from state.recordings.rows import I64

LARGEST_VALUE = 900_000  # bytes; Kafka's own limit for a batch is 1 MiB unless the cluster says otherwise
PIECE_BYTES = 800_000
KNOWN_KEYS = 500_000

Record = tuple[bytes, bytes, int]


@dataclass(frozen=True)
class Piece:
    """n records that are sent together.

    Attributes:
        keys: n keys.
        values: n values.
        kafka_ms: `[n]` int64, Kafka timestamps.
    """

    keys: Sequence[bytes]
    values: Sequence[bytes]
    kafka_ms: I64

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> Piece:
        """Returns the piece with only the records `rows`."""
        return Piece(
            [self.keys[row] for row in rows],
            [self.values[row] for row in rows],
            self.kafka_ms[np.array(rows, np.int64)],
        )

    def records(self) -> list[Record]:
        """Returns key, value and timestamp of each record."""
        return list(zip(self.keys, self.values, self.kafka_ms.tolist(), strict=True))


def rows_within(sizes: Sequence[int], limit: int = PIECE_BYTES) -> int:
    """Returns how many of the first records, of these sizes, fit into one piece; at least one.

    >>> rows_within([4, 4, 4], limit=10), rows_within([11], limit=10)
    (2, 1)
    """
    return max(1, int(np.searchsorted(np.cumsum(sizes), limit, side="right")))


def missing(piece: Piece, arrived: Sequence[Record]) -> Piece:
    """Returns the records of `piece` that have not arrived; equal records are counted individually.

    >>> piece = Piece([b"u", b"u"], [b"{}", b"{}"], np.array([5, 5]))
    >>> len(missing(piece, [(b"u", b"{}", 5)])), len(missing(piece, [(b"u", b"{}", 6)]))
    (1, 2)
    """
    there = Counter(arrived)
    left = []
    for row, record in enumerate(piece.records()):
        if there[record]:
            there[record] -= 1
        else:
            left.append(row)
    return piece.take(left)


class Outbox:
    """Sends pieces to a topic. Used by one thread.

    Args:
        kafka: Connection settings.
        topic: An existing topic.
    """

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._kafka = kafka
        self._topic = topic
        self._bulk = BulkWriter(kafka, topic)
        self._partitions: dict[bytes, int] = {}

    def send(self, piece: Piece) -> dict[int, int]:
        """Sends a piece; returns when all of it is acknowledged.

        Returns:
            By partition that received records, the position after them.

        Raises:
            LogError: Kafka refused, or did not answer; part of the piece may have arrived.
        """
        rows: dict[int, list[int]] = {}
        known, partitions = self._partitions, self._bulk.partitions
        if len(known) > KNOWN_KEYS:
            known.clear()
        for row, key in enumerate(piece.keys):
            partition = known.get(key)
            if partition is None:
                partition = known[key] = partition_of(key, partitions)
            rows.setdefault(partition, []).append(row)
        batches = {
            partition: encode_batch(mine.keys, mine.values, mine.kafka_ms)
            for partition, mine in ((partition, piece.take(numbers)) for partition, numbers in rows.items())
        }
        begins = self._bulk.append(batches)
        return {partition: begin + len(rows[partition]) for partition, begin in begins.items()}

    def ends(self) -> dict[int, int]:
        """Returns the position of the next record of each partition.

        Raises:
            LogError: Kafka does not answer.
        """
        with Topics(self._kafka) as topics:
            return {partition: end for partition, (_, end) in topics.ends(self._topic).items()}

    def arrived_since(self, ends: Mapping[int, int]) -> list[Record]:
        """Returns all records in the topic from the positions `ends` on, of any producer.

        Raises:
            LogError: Kafka does not answer.
        """
        with Topics(self._kafka) as topics:
            kept = topics.ends(self._topic)
        begins = {partition: max(begin, ends.get(partition, 0)) for partition, (begin, _) in kept.items()}
        left = {partition for partition, (_, end) in kept.items() if begins[partition] < end}
        found: list[Record] = []
        if not left:
            return found
        with Reader(self._kafka, self._topic, sorted(left), {one: begins[one] for one in left}) as reader:
            ends_now = {partition: kept[partition][1] for partition in left}
            for batches in read_to(reader, ends_now, stalled_s=self._kafka.request_timeout_s):
                for batch in batches:
                    for key, value, kafka_ms in zip(
                        batch.keys, batch.values, batch.timestamps_ms.tolist(), strict=True
                    ):
                        if key is not None and value is not None:
                            found.append((key, value, kafka_ms))
        return found

    def close(self) -> None:
        """Closes the connections."""
        self._bulk.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
