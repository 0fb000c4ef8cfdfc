"""Writes acknowledged records to topics, one by one or in transactions."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaProducer
from kafka.partitioner.default import murmur2

from state.config.sections import Kafka
from state.errors import LogError, UnreachableBroker
from state.log.client import Topics, connect, translated
from state.log.records import Headers

MAX_RECORD_BYTES = 16 * 1024 * 1024
# With the default of 100 ms, each transaction would take 100 ms longer, because the
# first request for its coordinator always comes too early.
RETRY_BACKOFF_MS = 2

# The client can lose a transaction's request when the broker dies. It then sends
# nothing until the delivery time-out, long after the broker is reachable again. A new
# writer finds the broker at once, so the time-out is short.
PATIENCE = 3


class Writer:
    """Sends records that all replicas acknowledge (acks=all), without duplicates (idempotent). Not thread-safe.

    With a transactional id, every record belongs to a `transaction`, and a second writer with the same id fences the
    first.
    After an error, close the writer and create another.
    """

    def __init__(self, settings: Kafka, transactional_id: str | None = None) -> None:
        """Connects; with a transactional id this also aborts its predecessor's open transaction."""
        self._settings = settings
        self._patience_s = settings.request_timeout_s / PATIENCE
        self._known: set[str] = set()
        self._pending: list[Any] = []
        self._topics = Topics(settings)
        try:
            self._producer: Any = self._open(transactional_id)
        except BaseException:
            self._topics.close()
            raise

    def send(
        self,
        topic: str,
        partition: int | None,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> None:
        """Queues a record; `flush` or the end of the transaction waits for its acknowledgement.

        Raises:
            UnknownTopic: There is no such topic, and none is created.
            LogError: The record is too large, or outside a transaction.
        """
        if topic not in self._known:
            self._topics.describe(topic)
            self._known.add(topic)
        with translated(self._settings, f"write to topic {topic}"):
            try:
                self._pending.append(
                    self._producer.send(
                        topic,
                        value=value,
                        key=key,
                        headers=list(headers),
                        partition=partition,
                        timestamp_ms=timestamp_ms,
                    )
                )
            except (AssertionError, ValueError) as problem:
                raise LogError(f"cannot write to partition {partition} of topic {topic}: {problem}") from problem

    def flush(self) -> None:
        """Waits until all replicas have acknowledged every record sent so far.

        Raises:
            UnreachableBroker: No acknowledgement in time; records may or may not be in the log.
            LogError: The cluster refused a record.
        """
        pending, self._pending = self._pending, []
        deadline = time.monotonic() + self._patience_s
        with translated(self._settings, "write records"):
            for future in pending:
                future.get(timeout=max(0.001, deadline - time.monotonic()))

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A transaction: records sent in the block become visible together at its end, or not at all.

        1. Begin. 2. The block sends. 3. Wait until every record is acknowledged. 4. Commit.
        An exception in the block aborts the transaction and propagates.

        Raises:
            LogError: Another writer took over the transactional id.
            UnreachableBroker: No broker answered within a third of the request time-out; the outcome is unknown.
            LogError: The cluster refused; nothing became visible.
        """
        with translated(self._settings, "begin a transaction"):
            self._producer.begin_transaction()
        try:
            yield
            self.flush()
            with translated(self._settings, "commit a transaction"):
                self._end("begin_commit")
        except UnreachableBroker:
            # No broker would receive the abort; the next writer with this id ends the transaction.
            raise
        except BaseException:
            self._abort()
            raise

    def close(self, timeout_s: float = 5.0) -> None:
        """Closes the connections; records not acknowledged by then are dropped."""
        self._pending = []
        try:
            self._producer.close(timeout=timeout_s)
        except kafka_errors.KafkaTimeoutError:
            # The client does not finish closing if it cannot flush.
            self._producer._sender.force_close()
            self._producer._sender.join(timeout_s)
            self._producer._closed = True
        self._topics.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, transactional_id: str | None) -> Any:
        request_ms = int(self._settings.request_timeout_s * 1000)
        producer = connect(
            self._settings,
            "connect a writer",
            KafkaProducer,
            acks="all",
            enable_idempotence=True,
            transactional_id=transactional_id,
            retry_backoff_ms=RETRY_BACKOFF_MS,
            max_block_ms=request_ms,
            delivery_timeout_ms=2 * request_ms,
            max_request_size=MAX_RECORD_BYTES,
            batch_size=256 * 1024,
            allow_auto_create_topics=False,
            metrics_enabled=False,
        )
        if transactional_id is not None:
            try:
                with translated(self._settings, "begin as a transactional writer"):
                    producer.init_transactions()
            except BaseException:
                producer.close(timeout=0)
                raise
        return producer

    def _end(self, begin: str) -> None:
        """Commits or aborts, with a time limit; the client's own methods wait forever for an unreachable broker."""
        result = getattr(self._producer._transaction_manager, begin)()
        self._producer._sender.wakeup()
        if not result.wait(int(self._patience_s * 1000)):
            raise kafka_errors.KafkaTimeoutError("the transaction's coordinator does not answer")

    def _abort(self) -> None:
        self._pending = []
        try:
            self._end("begin_abort")
        except (kafka_errors.KafkaError, RuntimeError):
            # Fenced, or the broker is unreachable. The coordinator ends the
            # transaction by itself, and the first error is reported.
            return


def partition_of(key: bytes, partitions: int) -> int:
    """The partition that Kafka's clients choose for a key."""
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)
