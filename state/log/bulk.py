"""Encodes and appends whole record batches: ten times the records per second of a producer."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import crc32c
import kafka.errors as kafka_errors
import numpy as np
import numpy.typing as npt
from kafka import KafkaAdminClient
from kafka.protocol.producer import ProduceRequest

from state.compiled import compiled, inlined
from state.config.sections import Kafka
from state.errors import UnknownTopic
from state.log.batch_decoder import CRC_FROM, HEADER, LENGTH_ENDS, MAGIC, NO_PRODUCER, BatchHeader
from state.log.client import RETRY_S, Topics, connect, translated
from state.log.records import I64

RETRIES = 40


@inlined
def _put_varint(out: npt.NDArray[np.uint8], at: int, value: int) -> int:
    remaining = np.uint64((value << 1) ^ (value >> 63))
    while remaining >= np.uint64(0x80):
        out[at] = np.uint8((remaining & np.uint64(0x7F)) | np.uint64(0x80))
        remaining >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(remaining)
    return at + 1


@inlined
def _varint_size(value: int) -> int:
    remaining = np.uint64((value << 1) ^ (value >> 63))
    size = 1
    while remaining >= np.uint64(0x80):
        remaining >>= np.uint64(7)
        size += 1
    return size


@compiled("const(u1[::1]), i8[::1], const(u1[::1]), i8[::1], i8[::1], u1[::1]")
def put_records(
    keys: npt.NDArray[np.uint8],
    key_sizes: I64,
    values: npt.NDArray[np.uint8],
    value_sizes: I64,
    deltas_ms: I64,
    out: npt.NDArray[np.uint8],
) -> int:
    """Encodes records into `out`, without the batch header; returns the number of bytes written.

    `keys` and `values`, `[bytes]` uint8, are joined; `[n]` int64 are their sizes, and the timestamps relative to the
    batch's first. `out`, `[bytes]` uint8, has at least 40 bytes per record in addition to keys and values.
    """
    at = 0
    key_at = 0
    value_at = 0
    for row in range(len(key_sizes)):
        key_size = key_sizes[row]
        value_size = value_sizes[row]
        body = (
            2  # attributes, and the number of headers
            + _varint_size(deltas_ms[row])
            + _varint_size(row)
            + _varint_size(key_size)
            + key_size
            + _varint_size(value_size)
            + value_size
        )
        at = _put_varint(out, at, body)
        out[at] = 0
        at = _put_varint(out, at + 1, deltas_ms[row])
        at = _put_varint(out, at, row)
        at = _put_varint(out, at, key_size)
        out[at : at + key_size] = keys[key_at : key_at + key_size]
        at += key_size
        key_at += key_size
        at = _put_varint(out, at, value_size)
        out[at : at + value_size] = values[value_at : value_at + value_size]
        at += value_size
        value_at += value_size
        out[at] = 0
        at += 1
    return at


def encode_batch(keys: Sequence[bytes], values: Sequence[bytes], timestamps_ms: Sequence[int] | I64) -> bytes:
    """Encodes n keys, values and timestamps as one uncompressed record batch, like a producer without transactions."""
    count = len(values)
    times = np.asarray(timestamps_ms, np.int64)
    key_sizes = np.fromiter(map(len, keys), np.int64, count)
    value_sizes = np.fromiter(map(len, values), np.int64, count)
    body = np.empty(int(key_sizes.sum() + value_sizes.sum()) + 40 * count, np.uint8)
    size = put_records(
        np.frombuffer(b"".join(keys), np.uint8),
        key_sizes,
        np.frombuffer(b"".join(values), np.uint8),
        value_sizes,
        times - times[0],
        body,
    )
    batch = bytearray(HEADER.size) + body[:size].tobytes()
    header = BatchHeader(
        base=0,
        length=len(batch) - LENGTH_ENDS,
        leader_epoch=-1,
        magic=MAGIC,
        crc=0,
        attributes=0,
        last_delta=count - 1,
        first_ms=int(times[0]),
        max_ms=int(times.max()),
        producer=NO_PRODUCER,
        producer_epoch=-1,
        sequence=-1,
        records=count,
    )
    HEADER.pack_into(batch, 0, *header)
    struct.pack_into(">I", batch, CRC_FROM - 4, crc32c.crc32c(memoryview(batch)[CRC_FROM:]))
    return bytes(batch)


class BulkWriter:
    """Appends whole record batches to one topic.

    Writes are acknowledged (acks=all) but not idempotent: after a broken connection a batch may be in the log twice.
    """

    def __init__(self, settings: Kafka, topic: str) -> None:
        """Connects; `UnknownTopic` if there is no such topic."""
        self._settings = settings
        self.topic = topic
        with Topics(settings) as topics:
            self.partitions = topics.describe(topic).partitions
        self._admin: Any = connect(settings, "connect a writer", KafkaAdminClient)
        with translated(settings, "connect a writer"):
            self._leaders: dict[int, int] = self._find_leaders()

    def append(self, batches: dict[int, bytes]) -> dict[int, int]:
        """Appends one encoded batch per partition and waits for all acknowledgements.

        `batches` has a batch made by `encode_batch` for each partition. Returns the offset of each batch's first
        record.

        Raises:
            UnreachableBroker: No acknowledgement arrived in time.
            LogError: The cluster refused a batch.
        """
        bases: dict[int, int] = {}
        unsent = batches
        with translated(self._settings, f"append to topic {self.topic}"):
            for attempt in range(RETRIES):
                answers = self._admin._manager.run(self._send, unsent)
                bases |= {number: base for number, (code, base) in answers.items() if not code}
                failed = {number: code for number, (code, _) in answers.items() if code}
                # Sends only refused batches again, because the others are in the log.
                unsent = {number: unsent[number] for number in failed}
                if not unsent:
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
        return {partition["partition_index"]: partition["leader_id"] for partition in topic["partitions"]}

    async def _send(self, batches: dict[int, bytes]) -> dict[int, tuple[int, int]]:
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
                                for partition, batch in batches_of_leader.items()
                            ],
                        )
                    ],
                    min_version=3,
                    max_version=9,
                ),
                node_id=leader,
            )
            for leader, batches_of_leader in by_leader.items()
        ]
        answers = {}
        for answer in sent:
            for topic in (await answer).responses:
                for partition in topic.partition_responses:
                    answers[partition.index] = (partition.error_code, partition.base_offset)
        return answers
