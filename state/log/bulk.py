"""Appends whole record batches, for load generators and replays, at ten times the records per second of a producer.

Part of `state.log`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import kafka.errors as kafka_errors
from kafka import KafkaAdminClient
from kafka.protocol.producer import ProduceRequest

from state.config.sections import Kafka
from state.errors import UnknownTopic
from state.log.client import connect, translated
from state.log.records import I64
from state.log.topics import RETRY_S, Topics

RETRIES = 40


class BulkWriter:
    """Appends whole record batches to one topic.

    Writes are acknowledged (acks=all) but not idempotent: after a broken
    connection a batch may be in the log twice.
    """

    def __init__(self, settings: Kafka, topic: str) -> None:
        """Connects.

        Raises:
            UnreachableBroker: No broker answered in time.
            UnknownTopic: There is no such topic.
        """
        self._settings = settings
        self.topic = topic
        with Topics(settings) as topics:
            self.partitions = topics.describe(topic).partitions
        self._admin: Any = connect(settings, "connect a writer", KafkaAdminClient)
        with translated(settings, "connect a writer"):
            self._leaders: dict[int, int] = self._find_leaders()

    def append(self, batches: dict[int, bytes]) -> dict[int, int]:
        """Appends one encoded batch per partition and waits for all acknowledgements.

        Args:
            batches: Partition -> a batch made by `encode_batch`.

        Returns:
            Partition -> the offset of its batch's first record.

        Raises:
            UnreachableBroker: No acknowledgement arrived in time.
            LogError: The cluster refused a batch.
        """
        bases: dict[int, int] = {}
        left = batches
        with translated(self._settings, f"append to topic {self.topic}"):
            for attempt in range(RETRIES):
                answers = self._admin._manager.run(self._send, left)
                bases |= {number: base for number, (code, base) in answers.items() if not code}
                failed = {number: code for number, (code, _) in answers.items() if code}
                # Send only refused batches again: the others are in the log.
                left = {number: left[number] for number in failed}
                if not left:
                    return bases
                error = kafka_errors.for_code(next(iter(failed.values())))
                if attempt == RETRIES - 1 or not issubclass(error, kafka_errors.RetriableError):
                    raise error(f"partition {next(iter(failed))}")
                threading.Event().wait(RETRY_S)
                self._leaders = self._find_leaders()
        raise AssertionError("unreachable: the last attempt returns or raises")

    def close(self) -> None:
        """Closes the connections."""
        self._admin.close()

    def __enter__(self) -> BulkWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_leaders(self) -> dict[int, int]:
        (topic,) = self._admin.describe_topics([self.topic])
        if topic["error_code"]:
            raise UnknownTopic(f"topic {self.topic} does not exist", "create it")
        return {each["partition_index"]: each["leader_id"] for each in topic["partitions"]}

    async def _send(self, batches: dict[int, bytes]) -> dict[int, tuple[int, int]]:
        """Partition -> the error code (0: acknowledged) and the offset of the first record."""
        by_leader: dict[int, dict[int, bytes]] = {}
        for partition, batch in batches.items():
            by_leader.setdefault(self._leaders[partition], {})[partition] = batch
        topic_data = ProduceRequest.TopicProduceData
        sent = [
            self._admin._manager.send(
                ProduceRequest(
                    transactional_id=None,
                    acks=-1,
                    timeout_ms=int(self._settings.request_timeout_s * 1000),
                    topic_data=[
                        topic_data(
                            name=self.topic,
                            partition_data=[
                                topic_data.PartitionProduceData(index=partition, records=batch)
                                for partition, batch in mine.items()
                            ],
                        )
                    ],
                    min_version=3,
                    max_version=9,
                ),
                node_id=leader,
            )
            for leader, mine in by_leader.items()
        ]
        answers = {}
        for answer in sent:
            for topic in (await answer).responses:
                for partition in topic.partition_responses:
                    answers[partition.index] = (partition.error_code, partition.base_offset)
        return answers


def append_encoded(
    writer: BulkWriter,
    keys: Sequence[bytes],
    values: Sequence[bytes],
    timestamps_ms: I64,
    partitions: Sequence[int] | I64,
) -> None:
    """Appends records in whole batches, one per partition; each partition keeps the order of its records.

    Args:
        writer: The writer of the topic.
        keys: n keys.
        values: n values.
        timestamps_ms: `[n]` int64, Kafka's timestamps.
        partitions: `[n]` the partition of each record (see `partition_of`).
    """
    rows: dict[int, list[int]] = {}
    for row, partition in enumerate(partitions):
        rows.setdefault(int(partition), []).append(row)
    # Imported here, since it loads the compiler.
    from state.log.batch_encoder import encode_batch

    writer.append(
        {
            partition: encode_batch([keys[row] for row in mine], [values[row] for row in mine], timestamps_ms[mine])
            for partition, mine in rows.items()
        }
    )
