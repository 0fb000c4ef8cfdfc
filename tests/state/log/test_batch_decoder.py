"""Record batches: what the client's own decoder reads, ours reads too, and damage is a range."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka.record.default_records import DefaultRecordBatch, DefaultRecordBatchBuilder

from state.errors import LogError
from state.log import batch_decoder
from state.log.batch_decoder import CRC_FROM, HEADER, decode_batches
from state.log.records import Chunk

Record = tuple[bytes | None, bytes | None, int, list[tuple[str, bytes | None]]]


def built(
    records: list[Record],
    base: int = 0,
    codec: int = 0,
    producer: int = -1,
    transactional: bool = False,
    control: bool = False,
) -> bytes:
    builder = DefaultRecordBatchBuilder(
        magic=2,
        compression_type=codec,
        is_transactional=transactional,
        producer_id=producer,
        producer_epoch=0 if producer >= 0 else -1,
        base_sequence=0 if producer >= 0 else -1,
        batch_size=2**24,
    )
    for number, (key, value, time_ms, headers) in enumerate(records):
        assert builder.append(number, time_ms, key, value, headers) is not None
    batch = bytearray(builder.build())
    struct.pack_into(">q", batch, 0, base)
    if control:
        (attributes,) = struct.unpack_from(">h", batch, CRC_FROM)
        struct.pack_into(">h", batch, CRC_FROM, attributes | 0x20)
        seal(batch)
    return bytes(batch)


def seal(batch: bytearray) -> None:
    import crc32c

    struct.pack_into(">I", batch, CRC_FROM - 4, crc32c.crc32c(bytes(batch[CRC_FROM:])))


def marker(base: int, producer: int, commit: bool) -> bytes:
    key = struct.pack(">hh", 0, 1 if commit else 0)
    return built([(key, b"\x00" * 6, 0, [])], base, producer=producer, transactional=True, control=True)


def plain(*values: bytes, base: int = 0, producer: int = -1, transactional: bool = False) -> bytes:
    return built([(b"k", value, 5, []) for value in values], base, 0, producer, transactional)


def ranges(chunks: list[Chunk]) -> list[tuple[int, int, list[bytes | None]]]:
    return [(chunk.first, chunk.next, list(chunk.values)) for chunk in chunks]


records = st.lists(
    st.tuples(
        st.none() | st.binary(max_size=200),
        st.none() | st.binary(max_size=300),
        st.integers(0, 2**42),
        st.lists(st.tuples(st.text(max_size=5), st.none() | st.binary(max_size=9)), max_size=3),
    ),
    min_size=1,
    max_size=30,
)


@given(records, st.integers(0, 2**50), st.sampled_from([0, 1, 4]))
def test_a_batch_reads_as_the_clients_own_decoder_reads_it(made: list[Record], base: int, codec: int) -> None:
    batch = built(made, base, codec)
    expected = list(DefaultRecordBatch(batch))
    (chunk,) = decode_batches(batch, base)
    assert chunk.corrupt == ""
    assert chunk.offsets.tolist() == [record.offset for record in expected]
    assert chunk.timestamps_ms.tolist() == [record.timestamp for record in expected]
    assert list(chunk.keys) == [record.key for record in expected]
    assert list(chunk.values) == [record.value for record in expected]
    assert (chunk.first, chunk.next) == (base, base + len(made))


@given(records, st.data())
def test_any_flipped_byte_behind_the_length_is_a_corrupt_range(made: list[Record], data: st.DataObject) -> None:
    batch = bytearray(built(made))
    at = data.draw(st.integers(16, len(batch) - 1))
    batch[at] ^= data.draw(st.integers(1, 255))
    follower = plain(b"next", base=len(made))
    chunks = decode_batches(bytes(batch) + follower, 0)
    assert chunks[0].corrupt
    assert ranges(chunks) == [(0, len(made), []), (len(made), len(made) + 1, [b"next"])]


@given(st.binary(max_size=120), st.integers(0, 6))
def test_bytes_that_parse_to_nothing_are_a_corrupt_range_whatever_they_are(body: bytes, count: int) -> None:
    batch = bytearray(HEADER.size) + body
    HEADER.pack_into(batch, 0, 0, len(batch) - 12, 0, 2, 0, 0, max(count - 1, 0), 0, 0, -1, -1, -1, count)
    seal(batch)
    (chunk,) = decode_batches(bytes(batch), 0)
    assert chunk.next == max(count, 1)
    assert chunk.corrupt or len(chunk.values) == count


def test_a_part_of_a_batch_at_the_end_is_left_for_the_next_fetch() -> None:
    data = plain(b"a", b"b") + plain(b"c", base=2)
    for cut in range(1, len(plain(b"c"))):
        assert ranges(decode_batches(data[:-cut], 0)) == [(0, 2, [b"a", b"b"])]


def test_a_position_inside_a_batch_leaves_out_what_lies_before() -> None:
    assert ranges(decode_batches(plain(b"a", b"b", b"c", base=10), 12)) == [(12, 13, [b"c"])]
    assert decode_batches(plain(b"a", base=10), 11) == []


def test_a_hole_between_batches_belongs_to_the_range_behind_it() -> None:
    data = plain(b"a") + plain(b"b", base=7)
    assert ranges(decode_batches(data, 0)) == [(0, 1, [b"a"]), (1, 8, [b"b"])]


def test_records_of_aborted_transactions_are_absent_and_of_committed_ones_are_not() -> None:
    data = (
        plain(b"bad", base=0, producer=7, transactional=True)
        + plain(b"free", base=1)
        + plain(b"good", base=2, producer=8, transactional=True)
        + marker(3, 7, commit=False)
        + plain(b"later", base=4, producer=7, transactional=True)
        + marker(5, 8, commit=True)
        + marker(6, 7, commit=True)
    )
    assert ranges(decode_batches(data, 0, aborted=[(7, 0)])) == [
        (0, 1, []),
        (1, 2, [b"free"]),
        (2, 3, [b"good"]),
        (3, 4, []),
        (4, 5, [b"later"]),
        (5, 6, []),
        (6, 7, []),
    ]
    everything = [value for c in decode_batches(data, 0, [(7, 0)], committed_only=False) for value in c.values]
    assert everything == [b"bad", b"free", b"good", b"later"]


def test_log_append_time_is_the_time_of_all_records() -> None:
    batch = bytearray(plain(b"a", b"b"))
    struct.pack_into(">h", batch, CRC_FROM, 0x08)
    struct.pack_into(">q", batch, CRC_FROM + 2 + 4 + 8, 777)
    seal(batch)
    (chunk,) = decode_batches(bytes(batch), 0)
    assert chunk.timestamps_ms.tolist() == [777, 777]


def test_a_missing_compression_library_is_an_error_and_no_dead_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = bytearray(plain(b"a"))
    struct.pack_into(">h", batch, CRC_FROM, 3)
    seal(batch)
    monkeypatch.setitem(batch_decoder._DECOMPRESS, 3, ("lz4", lambda: False, bytes))
    with pytest.raises(LogError, match=r"kafka-python\[lz4\]"):
        decode_batches(bytes(batch), 0)


@pytest.mark.parametrize(
    ("form", "at", "value", "why"),
    [
        (">h", CRC_FROM, 6, "compression"),
        # Memory is not allocated for a crafted count.
        (">i", HEADER.size - 4, 2**31 - 1, "record count"),
        (">b", 16, 1, "record format 1"),
    ],
)
def test_a_batch_that_cannot_be_read_is_a_corrupt_range(form: str, at: int, value: int, why: str) -> None:
    batch = bytearray(plain(b"a"))
    struct.pack_into(form, batch, at, value)
    seal(batch)
    (chunk,) = decode_batches(bytes(batch), 0)
    assert why in chunk.corrupt


def test_an_empty_batch_left_by_compaction_covers_its_positions() -> None:
    batch = bytearray(HEADER.size)
    HEADER.pack_into(batch, 0, 4, HEADER.size - 12, 0, 2, 0, 0, 9, 0, 0, -1, -1, -1, 0)
    seal(batch)
    (chunk,) = decode_batches(bytes(batch), 4)
    assert (chunk.first, chunk.next, len(chunk.values), chunk.corrupt) == (4, 14, 0, "")
    assert chunk.offsets.dtype == np.int64
