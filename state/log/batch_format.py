"""The layout of Kafka's record batches, format 2: header, checksum and attribute bits.

Part of `state.log`. Format: https://kafka.apache.org/documentation/#recordbatch
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER = struct.Struct(">qiibIhiqqqhii")
CRC_FROM = 21  # the checksum covers the batch from its attributes to its end
LENGTH_ENDS = 12
MAGIC = 2
NO_PRODUCER = -1

CODEC_MASK = 0x07
LOG_APPEND_TIME = 0x08
TRANSACTIONAL = 0x10
CONTROL = 0x20


class BatchHeader(NamedTuple):
    """The fields of `HEADER`, in its order.

    Attributes:
        base: Offset of the first record.
        length: Bytes after this field.
        leader_epoch: Epoch of the leader that wrote the batch.
        magic: The format.
        crc: CRC-32C from `CRC_FROM` on.
        attributes: Codec and flags.
        last_delta: Offset of the last record relative to the first.
        first_ms: Timestamp of the first record.
        max_ms: The latest timestamp.
        producer: The producer's id; `NO_PRODUCER` for none.
        producer_epoch: The epoch of that producer.
        sequence: The producer's sequence number of the first record.
        records: The number of records.
    """

    base: int
    length: int
    leader_epoch: int
    magic: int
    crc: int
    attributes: int
    last_delta: int
    first_ms: int
    max_ms: int
    producer: int
    producer_epoch: int
    sequence: int
    records: int
