"""Encodes records as one Kafka record batch, which load generators append as a whole. No side effects.

Part of `state.log`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import crc32c
import numpy as np
import numpy.typing as npt

from state.compiled import compiled
from state.log.batch_format import CRC_FROM, HEADER, LENGTH_ENDS, MAGIC, NO_PRODUCER, BatchHeader
from state.log.records import I64


@compiled
def _put_varint(out: npt.NDArray[np.uint8], at: int, value: int) -> int:
    rest = np.uint64((value << 1) ^ (value >> 63))
    while rest >= np.uint64(0x80):
        out[at] = np.uint8((rest & np.uint64(0x7F)) | np.uint64(0x80))
        rest >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(rest)
    return at + 1


@compiled
def _varint_size(value: int) -> int:
    rest = np.uint64((value << 1) ^ (value >> 63))
    size = 1
    while rest >= np.uint64(0x80):
        rest >>= np.uint64(7)
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

    Args:
        keys: `[bytes]` uint8, all keys joined.
        key_sizes: `[n]` int64, sizes of the keys, bytes.
        values: `[bytes]` uint8, all values joined.
        value_sizes: `[n]` int64, sizes of the values, bytes.
        deltas_ms: `[n]` int64, timestamps relative to the batch's first.
        out: `[bytes]` uint8, at least 40 bytes per record in addition to keys and values.
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
    """Encodes one uncompressed record batch, as a producer without transactions does.

    Args:
        keys: n keys.
        values: n values.
        timestamps_ms: `[n]` int64, when each record was made.
    """
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
