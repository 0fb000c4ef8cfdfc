"""Following a topic: where reading starts and resumes, whatever became of the topic, and reading up to an end."""

from __future__ import annotations

import pytest

from state.errors import GapError, LogError, TruncatedLog, UnknownTopic, UnreachableBroker
from state.log.follow import Follower, Opening, Position, open_topic, read_to
from tests.memory_log import MemoryLog

TOPIC = "clicks"


class Reading:
    """A follower that stores how far it read, as a process does."""

    def __init__(self, log: MemoryLog) -> None:
        self.log, self.openings = log, list[Opening]()
        self.position: Position | None = None
        self.follower = Follower(log, TOPIC, stored=lambda: self.position, opened=self.openings.append)

    def read(self) -> list[bytes | None]:
        """Everything that has arrived."""
        found: list[bytes | None] = []
        for batch in self.follower.poll(0.0):
            found += batch.values
            leaders = {batch.partition: self.follower.reader.leader_epoch(batch.partition, batch.next)}
            self.position = Position(batch.topic_id, {batch.partition: batch.next}, leaders)
        return found


def send(log: MemoryLog, *values: bytes) -> None:
    with log.writer() as writer:
        for value in values:
            writer.send(TOPIC, 0, None, value)
        writer.flush()


@pytest.fixture
def log() -> MemoryLog:
    made = MemoryLog()
    made.topics().ensure(TOPIC, 1)
    send(made, b"0", b"1", b"2", b"3")
    return made


@pytest.fixture
def reading(log: MemoryLog) -> Reading:
    """Has read four records, and stored it."""
    made = Reading(log)
    assert made.read() == [b"0", b"1", b"2", b"3"]
    assert made.follower.lag() == 0 and not made.openings[0].resumed
    return made


@pytest.mark.parametrize("restarted", [False, True])
def test_reading_resumes_at_the_stored_position(log: MemoryLog, reading: Reading, restarted: bool) -> None:
    if restarted:
        reading.follower.disconnect()
    send(log, b"4", b"5")
    assert reading.read() == [b"4", b"5"]
    assert len(reading.openings) == 1 + restarted and reading.openings[-1].resumed == restarted


@pytest.mark.parametrize("restarted", [False, True])
def test_after_deleted_records_reading_continues_at_the_first_one_kept(
    log: MemoryLog, reading: Reading, restarted: bool
) -> None:
    if restarted:
        reading.follower.disconnect()
    send(log, b"4", b"5", b"6")
    log.topics().delete_before(TOPIC, {0: 6})
    assert [*reading.read(), *reading.read()] == [b"6"]
    (lost,) = reading.openings[-1].losses
    assert (lost.gaps[0].first, lost.gaps[0].next, reading.openings[-1].resumed) == (4, 6, False)


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("grown", [0, 5])
def test_in_a_truncated_log_reading_continues_where_it_is_still_the_one_that_was_read(
    log: MemoryLog, reading: Reading, restarted: bool, grown: int
) -> None:
    if restarted:
        reading.follower.disconnect()
    log.cut_back(TOPIC, {0: 2})
    send(log, *[b"new"] * grown)
    assert [*reading.read(), *reading.read()] == [b"new"] * grown
    (lost,) = reading.openings[-1].losses
    assert isinstance(lost, TruncatedLog) and reading.openings[-1].next == {0: 2}


def test_a_recreated_topic_is_read_from_its_beginning(log: MemoryLog, reading: Reading) -> None:
    log.topics().delete(TOPIC)
    with pytest.raises(UnknownTopic, match="does not exist"):
        reading.read()
    assert not reading.follower.connected
    log.topics().ensure(TOPIC, 1)
    send(log, b"another")
    assert reading.read() == [b"another"]
    assert reading.openings[-1].recreated


def test_the_caller_may_refuse_a_loss_or_move_the_reader(log: MemoryLog) -> None:
    def refuse(error: GapError) -> int:
        raise error

    log.topics().delete_before(TOPIC, {0: 3})
    with pytest.raises(GapError, match="begins at 3"):
        open_topic(log, TOPIC, [0], Position("", {0: 1}), refuse)
    follower = Follower(log, TOPIC, [0], opened=lambda opening: follower.reader.seek(0, opening.ends[0][1]))
    assert follower.poll(0.0) == []
    send(log, b"4")
    assert follower.poll(0.0)[0].values == [b"4"]


def test_an_outage_costs_only_time(log: MemoryLog, reading: Reading) -> None:
    log.go_away()
    assert reading.read() == []
    reading.follower.disconnect()
    with pytest.raises(UnreachableBroker):
        reading.read()
    log.come_back()
    send(log, b"4")
    assert reading.read() == [b"4"]


def test_reading_up_to_an_end_yields_all_and_reports_a_log_that_gives_nothing(log: MemoryLog) -> None:
    reader = log.reader(TOPIC)
    batches = [batch for found in read_to(reader, {0: 3}, max_records=2) for batch in found]
    assert [value for batch in batches for value in batch.values] == [b"0", b"1", b"2", b"3"]
    assert list(read_to(reader, {0: 3})) == []
    with pytest.raises(LogError, match=r"clicks gave nothing for 0 s at offset 4 of 9 of partition 0"):
        list(read_to(reader, {0: 9}, stalled_s=0, poll=lambda: reader.poll(0.0)))
