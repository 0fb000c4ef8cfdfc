"""An encoded batch is what the client's own decoder takes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from kafka.record.default_records import DefaultRecordBatch

from state.log.batch_encoder import encode_batch


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.binary(max_size=40), st.binary(max_size=400), st.integers(0, 2**42)), min_size=1))
def test_an_encoded_batch_is_read_by_the_client(made: list[tuple[bytes, bytes, int]]) -> None:
    keys, values, times = (list(column) for column in zip(*made, strict=True))
    batch = DefaultRecordBatch(encode_batch(keys, values, times))
    assert batch.validate_crc()
    assert [(r.key, r.value, r.timestamp) for r in batch] == made
    assert batch.max_timestamp == max(times)
