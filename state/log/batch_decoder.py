"""Decodes whole Kafka record batches (format 2) into columns. No side effects. Part of `state.log`.

Format: https://kafka.apache.org/documentation/#recordbatch
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import crc32c
import kafka.codec as codecs
import numpy as np
import numpy.typing as npt

from state.compiled import compiled, inlined
from state.errors import LogError
from state.log.records import I64, Chunk

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
        length: Bytes after this field.
        crc: CRC-32C from `CRC_FROM` on.
        last_delta: Offset of the last record relative to the first.
        producer: The producer's id; `NO_PRODUCER` for none.
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


_ABORT = b"\x00\x00"

_DECOMPRESS: dict[int, tuple[str, Callable[[], bool], Callable[[bytes], bytes]]] = {
    1: ("gzip", codecs.has_gzip, codecs.gzip_decode),
    2: ("snappy", codecs.has_snappy, codecs.snappy_decode),
    3: ("lz4", codecs.has_lz4, codecs.lz4_decode),
    4: ("zstd", codecs.has_zstd, codecs.zstd_decode),
}


@inlined
def _varint(data: npt.NDArray[np.uint8], at: int, end: int) -> tuple[int, int]:
    """Decodes the zigzag varint at `at`: its value and the index after it; (0, -1) if it is incomplete."""
    value = np.uint64(0)
    shift = np.uint64(0)
    while at < end and shift < np.uint64(70):
        byte = np.uint64(data[at])
        at += 1
        value |= (byte & np.uint64(0x7F)) << shift
        if byte < np.uint64(0x80):
            return int(np.int64(value >> np.uint64(1)) ^ -np.int64(value & np.uint64(1))), at
        shift += np.uint64(7)
    return 0, -1


@compiled("const(u1[::1]), i8, i8, i8[:, ::1]")
def scan_records(data: npt.NDArray[np.uint8], at: int, end: int, out: I64) -> bool:
    """Reads the n records of one uncompressed batch in `data[at:end]`; returns whether they fill it exactly.

    Args:
        data: `[bytes]` uint8.
        at: Start of the first record.
        end: Required end of the last record.
        out: `[6, n]` int64, filled per record: the deltas of its offset and its timestamp, start and end of its key,
            start and end of its value. A missing key or value ends at -1.
    """
    for row in range(out.shape[1]):
        length, at = _varint(data, at, end)
        if at < 0 or length < 1 or at + length > end:
            return False
        stop = at + length
        at += 1  # record attributes, which Kafka does not use so far
        delta_ms, at = _varint(data, at, stop)
        if at < 0:
            return False
        delta, at = _varint(data, at, stop)
        if at < 0:
            return False
        out[0, row] = delta
        out[1, row] = delta_ms
        for column in range(2, 6, 2):
            size, at = _varint(data, at, stop)
            if at < 0 or size > stop - at:
                return False
            out[column, row] = at
            if size < 0:
                out[column + 1, row] = -1
            else:
                at += size
                out[column + 1, row] = at
        headers, at = _varint(data, at, stop)
        if at < 0 or headers < 0:
            return False
        for _ in range(2 * headers):
            size, at = _varint(data, at, stop)
            if at < 0 or size > stop - at:
                return False
            at += max(size, 0)
        if at != stop:
            return False
    return at == end


def decode_batches(
    data: bytes, position: int, aborted: Sequence[tuple[int, int]] = (), committed_only: bool = True
) -> list[Chunk]:
    """Decodes a fetched part of a partition's log into chunks whose ranges are contiguous from `position` on.

    Args:
        data: Whole batches, possibly followed by an incomplete one.
        position: The first position wanted; earlier records are left out.
        aborted: (producer id, first offset) of the aborted transactions that the broker reported with this part.
        committed_only: Whether to leave out records of aborted transactions.

    Raises:
        LogError: The library for the batch's compression is not installed.
    """
    chunks: list[Chunk] = []
    bytes_u8 = np.frombuffer(data, np.uint8)
    transactions = Transactions(aborted)
    at = 0
    while len(data) - at >= HEADER.size:
        header = BatchHeader(*HEADER.unpack_from(data, at))
        end = at + LENGTH_ENDS + header.length
        if header.length < HEADER.size - LENGTH_ENDS:
            chunks.append(Chunk(position, position + 1, corrupt=f"impossible batch length {header.length}"))
            break
        if end > len(data):
            break
        damage = f"record format {header.magic}" if header.magic != MAGIC else ""
        if not damage and crc32c.crc32c(memoryview(data)[at + CRC_FROM : end]) != header.crc:
            damage = "checksum"
        if damage:
            following = HEADER.unpack_from(data, end)[0] if len(data) - end >= HEADER.size else None
            chunk = _corrupt(position, header, following, damage)
        else:
            chunk = _chunk(data, bytes_u8, at, end, header, position)
            hidden = committed_only and transactions.hide(header, chunk)
            if hidden or header.attributes & CONTROL:
                chunk = Chunk(chunk.first, chunk.next, leader_epoch=header.leader_epoch)
        if chunk.next > position:
            chunks.append(chunk)
            position = chunk.next
        at = end
    return chunks


class Transactions:
    """Finds the records of aborted transactions in a fetched part. Pass it the batches in order."""

    def __init__(self, aborted: Sequence[tuple[int, int]]) -> None:
        self._begun = sorted(aborted, key=lambda transaction: transaction[1], reverse=True)
        self._open: set[int] = set()

    def hide(self, header: BatchHeader, chunk: Chunk) -> bool:
        """Whether to leave out the records of the next batch."""
        if header.producer == NO_PRODUCER:
            return False
        last = header.base + header.last_delta
        while self._begun and self._begun[-1][1] <= last:
            self._open.add(self._begun.pop()[0])
        if header.attributes & CONTROL:
            if chunk.keys and (chunk.keys[0] or b"")[2:4] == _ABORT:
                self._open.discard(header.producer)
            return False
        return bool(header.attributes & TRANSACTIONAL) and header.producer in self._open


def _corrupt(position: int, header: BatchHeader, following: int | None, reason: str) -> Chunk:
    """A chunk that skips an unreadable batch; the batch's header may also be wrong."""
    if following is not None and following > position:
        after = following
    elif 0 <= header.last_delta == header.records - 1 and header.base + header.last_delta >= position:
        after = header.base + header.last_delta + 1
    else:
        after = position + 1
    return Chunk(position, after, corrupt=f"{reason} of the batch at offset {header.base}")


def _chunk(
    data: bytes, bytes_u8: npt.NDArray[np.uint8], at: int, end: int, header: BatchHeader, position: int
) -> Chunk:
    base, count = header.base, header.records
    after = base + header.last_delta + 1
    start = at + HEADER.size
    codec = header.attributes & CODEC_MASK
    if codec:
        try:
            data = _decompressed(data[start:end], codec)
        except LogError:
            raise
        except Exception as problem:  # noqa: BLE001 - each codec has errors of its own
            return Chunk(
                position, after, corrupt=f"compression of the batch at offset {base}: {type(problem).__name__}"
            )
        bytes_u8 = np.frombuffer(data, np.uint8)
        start, end = 0, len(data)
    # A record takes at least 7 bytes; a higher count would only waste memory.
    if not 0 <= count <= (end - start) // 7:
        return Chunk(position, after, corrupt=f"record count of the batch at offset {base}")
    columns = np.empty((6, count), np.int64)
    if not scan_records(bytes_u8, start, end, columns):
        return Chunk(position, after, corrupt=f"records of the batch at offset {base}")
    offsets = columns[0] + base
    if base < position and count:
        wanted = offsets >= position
        columns, offsets = columns[:, wanted], offsets[wanted]
    append_time = header.attributes & LOG_APPEND_TIME
    times_ms = np.full(len(offsets), header.max_ms) if append_time else columns[1] + header.first_ms
    keys = _slices(data, columns[2], columns[3])
    values = _slices(data, columns[4], columns[5])
    return Chunk(position, after, offsets, times_ms, keys, values, leader_epoch=header.leader_epoch)


def _slices(data: bytes, begins: I64, ends: I64) -> list[bytes | None]:
    bounds = zip(begins.tolist(), ends.tolist(), strict=True)
    if len(ends) and ends.min() < 0:
        return [data[begin:end] if end >= 0 else None for begin, end in bounds]
    return [data[begin:end] for begin, end in bounds]


def _decompressed(payload: bytes, codec: int) -> bytes:
    if codec not in _DECOMPRESS:
        raise ValueError(f"codec {codec}")
    name, installed, decode = _DECOMPRESS[codec]
    if not installed():
        raise LogError(
            f"the topic's records are compressed with {name}, whose library is not installed: "
            f"pip install kafka-python[{name}], or set the producer's compression to gzip or zstd"
        )
    return bytes(decode(payload))
