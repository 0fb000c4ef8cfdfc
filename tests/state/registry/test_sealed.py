"""A document that is no document: whatever lies there is refused by one error, so that whoever reads it can say what to do."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from state.experiments.experiment import Experiment, Schedule
from state.registry import manifest, sealed


@given(st.binary(max_size=60))
@example(b"")
@example(b"{}")
@example(b"\xff")
@example(sealed.seal(b"[1]"))
@example(sealed.seal(b"{}"))
def test_bytes_that_are_no_document_are_refused_by_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        manifest.decode(data)
    with pytest.raises(ValueError, match=r"."):
        sealed.decode(data, Experiment)


def test_each_flipped_byte_of_a_document_is_seen() -> None:
    data = sealed.encode(Schedule(7, "retrain-1"))
    assert sealed.decode(data, Schedule) == Schedule(7, "retrain-1")
    for place in range(len(data)):
        with pytest.raises(ValueError, match=r"."):
            sealed.decode(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], Schedule)
