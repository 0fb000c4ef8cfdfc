"""Sends pieces of a recording to Kafka with acknowledgement, and shows the progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from state.config.sections import Kafka
from state.log import Reader, Topics, partition_of
from state.log.bulk import BulkWriter, encode_batch
from state.log.follow import read_to
from state.process.log_lines import ProgressLine, bar
from state.recordings.rows import I64

LARGEST_VALUE = 900_000  # bytes; Kafka's own limit for a batch is 1 MiB unless the cluster says otherwise
PIECE_BYTES = 800_000
KNOWN_KEYS = 500_000

Record = tuple[bytes, bytes, int]


@dataclass(frozen=True)
class Piece:
    """n records that are sent together.

    Attributes:
        kafka_ms: `[n]` int64, Kafka timestamps.
    """

    keys: Sequence[bytes]
    values: Sequence[bytes]
    kafka_ms: I64

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int]) -> Piece:
        """The piece with only the records `rows`."""
        return Piece(
            [self.keys[row] for row in rows],
            [self.values[row] for row in rows],
            self.kafka_ms[np.array(rows, np.int64)],
        )

    def records(self) -> list[Record]:
        """Key, value and timestamp of each record."""
        return list(zip(self.keys, self.values, self.kafka_ms.tolist(), strict=True))


def rows_within(sizes: Sequence[int], limit: int = PIECE_BYTES) -> int:
    """How many of the first records, of these sizes, fit into one piece; at least one.

    >>> rows_within([4, 4, 4], limit=10), rows_within([11], limit=10)
    (2, 1)
    """
    return max(1, int(np.searchsorted(np.cumsum(sizes), limit, side="right")))


def missing(piece: Piece, arrived: Sequence[Record]) -> Piece:
    """The records of `piece` that have not arrived; equal records are counted individually.

    >>> piece = Piece([b"u", b"u"], [b"{}", b"{}"], np.array([5, 5]))
    >>> len(missing(piece, [(b"u", b"{}", 5)])), len(missing(piece, [(b"u", b"{}", 6)]))
    (1, 2)
    """
    arrived_counts = Counter(arrived)
    missing_rows = []
    for row, record in enumerate(piece.records()):
        if arrived_counts[record]:
            arrived_counts[record] -= 1
        else:
            missing_rows.append(row)
    return piece.take(missing_rows)


class Outbox:
    """Sends pieces to an existing topic; all records of a user go to one partition. Used by one thread."""

    def __init__(self, kafka: Kafka, topic: str) -> None:
        self._kafka = kafka
        self._topic = topic
        self._bulk = BulkWriter(kafka, topic)
        self._partitions: dict[bytes, int] = {}

    def send(self, piece: Piece) -> dict[int, int]:
        """Sends a piece; returns when all of it is acknowledged: by partition that received records, the position after them.

        Raises:
            LogError: Kafka refused, or did not answer; part of the piece may have arrived.
        """
        rows: dict[int, list[int]] = {}
        cached, partitions = self._partitions, self._bulk.partitions
        if len(cached) > KNOWN_KEYS:
            cached.clear()
        for row, key in enumerate(piece.keys):
            partition = cached.get(key)
            if partition is None:
                partition = cached[key] = partition_of(key, partitions)
            rows.setdefault(partition, []).append(row)
        batches = {
            partition: encode_batch(part.keys, part.values, part.kafka_ms)
            for partition, part in ((partition, piece.take(numbers)) for partition, numbers in rows.items())
        }
        begins = self._bulk.append(batches)
        return {partition: begin + len(rows[partition]) for partition, begin in begins.items()}

    def ends(self) -> dict[int, int]:
        """The position of the next record of each partition."""
        with Topics(self._kafka) as topics:
            return {partition: end for partition, (_, end) in topics.ends(self._topic).items()}

    def arrived_since(self, ends: Mapping[int, int]) -> list[Record]:
        """All records in the topic from the positions `ends` on, of any producer."""
        with Topics(self._kafka) as topics:
            ranges = topics.ends(self._topic)
        begins = {partition: max(begin, ends.get(partition, 0)) for partition, (begin, _) in ranges.items()}
        unread = {partition for partition, (_, end) in ranges.items() if begins[partition] < end}
        records: list[Record] = []
        if not unread:
            return records
        with Reader(
            self._kafka, self._topic, sorted(unread), {partition: begins[partition] for partition in unread}
        ) as reader:
            ends_now = {partition: ranges[partition][1] for partition in unread}
            for batches in read_to(reader, ends_now, stalled_s=self._kafka.request_timeout_s):
                for batch in batches:
                    for key, value, kafka_ms in zip(
                        batch.keys, batch.values, batch.timestamps_ms.tolist(), strict=True
                    ):
                        if key is not None and value is not None:
                            records.append((key, value, kafka_ms))
        return records

    def close(self) -> None:
        """Closes the connections."""
        self._bulk.close()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


LINE_EVERY_S = 10.0
BAR = 20
NAMED_ROWS = 5


def progress_line(done: int, total: int | None, rate: float, bad: int, called: str = "dead letter") -> str:
    """The progress of a replay as one line; `called` is the name of a bad row.

    >>> progress_line(500, 1000, 250.0, 2)
    '[##########----------]  50 %  500 of 1,000 rows  250 rows/s  2 dead letters'
    >>> progress_line(500, None, 250.0, 0)
    '500 rows  250 rows/s  0 dead letters'
    """
    letters = f"{bad:,} {called}{'s' * (bad != 1)}"
    if not total:
        return f"{done:,} rows  {rate:,.0f} rows/s  {letters}"
    return f"{bar(done, total, BAR)}  {done:,} of {total:,} rows  {rate:,.0f} rows/s  {letters}"


class Progress:
    """Writes the progress of one replay: in a terminal as one updating line, otherwise as a line every ten seconds.

    `row` and `called` are the names of a good and a bad row.
    """

    def __init__(
        self, out: TextIO, monotonic_s: Callable[[], float], row: str = "click", called: str = "dead letter"
    ) -> None:
        self._row, self._called = row, called
        self._line = ProgressLine(out, LINE_EVERY_S, monotonic_s)
        self._named = 0

    @property
    def took_s(self) -> float:
        """Seconds since the beginning."""
        return self._line.took_s

    def show(self, sent: int, done: int, total: int | None, bad: int) -> None:
        """Shows the progress if an update is due.

        `sent` rows are of this run, `done` rows of this and earlier runs. `total` is None if the rows are not counted yet.
        """
        self._line.show(lambda: progress_line(done, total, sent / self.took_s, bad, self._called))

    def name(self, row: str, reason: str) -> None:
        """Reports a bad row; after the first few, bad rows are only counted and shown at the end."""
        self._named += 1
        if self._named <= NAMED_ROWS:
            self.say(f"{row}: no {self._row}: {reason}")
        elif self._named == NAMED_ROWS + 1:
            self.say(f"further rows that are no {self._row}s are counted, not named")

    def say(self, line: str) -> None:
        """Writes a separate line."""
        self._line.say(line)
