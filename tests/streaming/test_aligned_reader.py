"""A log's partitions are polled by event time, those that come later too."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from state.log import Reader
from streaming.alignment import MAX_SKEW_MS, AlignedReader, Reached
from tests.memory_log import MemoryLog

CLICKS = "clicks"


@pytest.fixture
def log() -> MemoryLog:
    """Two partitions: a click a second in the first, two a second in the second, from the same time on."""
    made = MemoryLog()
    made.topics().ensure(CLICKS, 2)
    for partition, (clicks, step_ms) in enumerate([(300, 1000), (600, 500)]):
        write(made, partition, [number * step_ms for number in range(clicks)])
    return made


def write(log: MemoryLog, partition: int, times: list[int]) -> None:
    with log.writer() as writer:
        for at_ms in times:
            writer.send(CLICKS, partition, None, b"%d" % at_ms)


def read(reader: Reader, most: int) -> Iterator[dict[int, list[int]]]:
    """By partition the times that each poll finds, until one finds nothing."""
    reached: dict[int, int] = {}
    seconds = count()
    aligned = AlignedReader(reader, lambda one: Reached(reached.get(one), False), lambda: next(seconds) / 1000)
    while True:
        aligned.begin(most)
        if not (batches := aligned.poll(0.0)):
            return
        found = {batch.partition: [int(value or b"") for value in batch.values] for batch in batches}
        reached |= {partition: times[-1] for partition, times in found.items()}
        yield found
        reader.refresh()


def test_partitions_are_read_as_time_goes_on_in_them(log: MemoryLog) -> None:
    with log.reader(CLICKS) as reader:
        polls = list(read(reader, 30))
    assert [[at for one in polls for at in one.get(number, [])] for number in (0, 1)] == [
        list(range(0, 300_000, 1000)), list(range(0, 300_000, 500))
    ]  # fmt: skip
    assert all(sum(map(len, one.values())) <= 30 for one in polls)
    apart = [abs(one[0][-1] - one[1][-1]) for one in polls[3:] if len(one) == 2]
    assert len(apart) > 20 and max(apart) <= 3000


def test_a_partition_that_comes_later_is_read_when_its_time_has_come(log: MemoryLog) -> None:
    with log.reader(CLICKS) as reader:
        polls = read(reader, 30)
        before = [next(polls) for _ in range(3)]
        log.topics().grow(CLICKS, 3)
        write(log, 2, list(range(200_000, 300_000, 1000)))
        polls_after = list(polls)
    assert all(2 not in one for one in before)
    new = [number for number, one in enumerate(polls_after) if 2 in one]
    reached = [max(one[0][-1] for one in polls_after[: number + 1] if 0 in one) for number in new[1:]]
    assert min(reached) >= 200_000 - MAX_SKEW_MS - 30 * 1000
    assert sum(len(one.get(2, [])) for one in polls_after) == 100


def test_of_one_partition_nothing_is_asked() -> None:
    log = MemoryLog()
    log.topics().ensure(CLICKS, 1)
    write(log, 0, [0, 1])
    with log.reader(CLICKS) as reader:
        aligned = AlignedReader(reader, lambda one: pytest.fail("the clock was asked"))
        aligned.begin(10)
        assert [len(batch) for batch in aligned.poll(0.0)] == [2]


def test_what_was_decided_is_read_in_as_many_polls_as_it_takes_and_no_more(log: MemoryLog) -> None:
    with log.reader(CLICKS) as reader:
        aligned = AlignedReader(reader, lambda _: Reached(None, False))
        aligned.begin(20)
        found: list[int] = []
        while not aligned.is_done:
            found += [len(batch) for batch in aligned.poll(0.0)]
        assert sum(found) == 20 and aligned.poll(0.0) == []
