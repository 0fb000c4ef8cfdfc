"""Log time: a row's own time where the header believes it, else what its partition had reached."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from state.errors import MicroBatchError
from state.microbatch.batch import TOLERANCE_MS, MicroBatch, in_log_time, log_times
from state.microbatch.codec import decode, encode, split
from tests.trainer.clicks import START_MS, microbatch

FAR_MS = 10 * TOLERANCE_MS


def told(times: list[int], delays: list[int], clocks: tuple[tuple[int, int], ...]) -> MicroBatch:
    """A batch of one micro-batch's first rows, with times and clocks after the start."""
    whole = decode(microbatch(0))
    batch = whole.take(np.arange(len(whole)) < len(times))
    header = replace(batch.header, clocks=tuple((START_MS + begin, START_MS + end) for begin, end in clocks))
    at_ms, delay_ms = START_MS + np.array(times, np.int64), np.array(delays, np.int64)
    return replace(batch, header=header, at_ms=at_ms, delay_ms=delay_ms)


@pytest.mark.parametrize(
    ("times", "delays", "expected"),
    [
        ([5, 3, 8], [0, 0, 0], [5, 3, 8]),
        # Ahead of what is believed, and far behind what was reached.
        ([5, FAR_MS, 7, -FAR_MS, 8], [0] * 5, [5, 5, 7, 7, 8]),
        # The first row is judged by what the partition had reached before.
        ([-FAR_MS, 5], [0, 0], [2, 5]),
        # An impression whose label came later is of its own time; of a wrong clock, as long before as it waited.
        ([-FAR_MS, FAR_MS, 7], [FAR_MS + 6, 4, 0], [-FAR_MS, 2, 7]),
        # One that waits is of the time at which its wait began.
        ([FAR_MS, 7], [4 - FAR_MS, 0], [4, 7]),
        # In a replay at full speed a record spans hours.
        ([0, FAR_MS, 2 * FAR_MS], [0, 0, 0], [0, FAR_MS, 2 * FAR_MS]),
    ],
)
def test_the_log_time_of_rows(times: list[int], delays: list[int], expected: list[int]) -> None:
    end = 2 * FAR_MS if max(times) > FAR_MS else 8
    batch = told(times, delays, ((2, end), (0, 0)))
    assert (log_times(batch) - START_MS).tolist() == expected
    assert in_log_time(batch).at_ms.tolist() == log_times(batch).tolist()


def test_without_clocks_it_is_the_rows_own_time() -> None:
    batch = decode(microbatch(0))
    assert in_log_time(batch) is batch
    assert batch.header.clocks == ()


def test_clocks_are_written_read_and_split_with_their_ranges() -> None:
    whole = decode(microbatch(0))
    header = replace(whole.header, clocks=((1, 2), (3, 4)))
    assert decode(encode(header, whole.columns)).header == header
    # The first half of the rows is of the first source, the second of the other.
    parts = [decode(value).header for value in split(header, whole.columns, 900_000, max_rows=len(whole) // 2)]
    assert [part.clocks for part in parts] == [((1, 2),), ((3, 4),)]
    with pytest.raises(MicroBatchError, match="2 ranges and 1 clocks"):
        encode(replace(header, clocks=((1, 2),)), whole.columns)
