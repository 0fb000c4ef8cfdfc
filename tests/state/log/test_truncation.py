"""A log that is cut back behind a position is noticed, whether it has grown again or not, by a reader that runs and by one that begins."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.kafka.broker import Broker
from deploy.kafka.configuration import free_port
from state.config.sections import Kafka
from state.errors import TruncatedLog
from state.log import Log
from state.positions import Gap, Source
from tests.memory_log import MemoryLog
from tests.segments import cut_back

TOPIC = "clicks"


def write(log: Log | MemoryLog, values: list[bytes]) -> None:
    """One record batch each."""
    with log.writer() as writer:
        for value in values:
            writer.send(TOPIC, 0, None, value)
            writer.flush()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "kafka", free_port(), heap_mb=256).start()
    yield broker
    broker.stop()


@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_a_partition_of_kafka_cut_back_and_grown_again(own: Broker) -> None:
    log = Log(Kafka(bootstrap_servers=own.bootstrap_servers))
    with log.topics() as topics:
        topic_id = topics.ensure(TOPIC, 1).topic_id
    write(log, [b"old %d" % number for number in range(10)])
    with log.reader(TOPIC) as running:
        deadline = time.monotonic() + 30
        while running.position(0) < 10:
            running.poll(0.2)
            assert time.monotonic() < deadline
        epoch = running.leader_epoch(0, 10)
        assert epoch >= 0
        # The leader that is elected lacks the last four records; then others take their offsets, and more.
        own.kill()
        cut_back(own.directory / "data", TOPIC, 0, 6)
        own.start()
        # 1. It has not grown yet: the end says it, whoever comes.
        with pytest.raises(TruncatedLog, match=r"we were at 10, but what we read ends at 6: the log was cut back, so"):
            log.reader(TOPIC, positions={0: 10})
        write(log, [b"new %d" % number for number in range(9)])
        deadline = time.monotonic() + 60
        # 2. A reader that was there before.
        with pytest.raises(TruncatedLog) as raised:
            while time.monotonic() < deadline:
                assert running.poll(0.2) == []
        assert (
            "ends at 6: the log was cut back and has grown again to 15, so that offsets 6 to 9 are used twice"
            in str(raised.value)
        )
        assert raised.value.kept == 6
        assert raised.value.gaps == (Gap(Source(topic_id, 0), 6, 10),)
    # 3. One that begins and knows the epoch of the record before its position.
    with pytest.raises(TruncatedLog, match="ends at 6"):
        log.reader(TOPIC, positions={0: 10}, leaders={0: epoch})
    # 4. What is not cut off is read on, and the next epoch is told from there.
    with log.reader(TOPIC, positions={0: 6}, leaders={0: epoch}) as again:
        values: list[bytes | None] = []
        deadline = time.monotonic() + 60
        while again.position(0) < 15 and time.monotonic() < deadline:
            values += [value for batch in again.poll(0.2) for value in batch.values]
        assert values == [b"new %d" % number for number in range(9)]
        assert again.leader_epoch(0, 6) == epoch < again.leader_epoch(0, 7) == again.leader_epoch(0, 15)


def test_the_log_in_memory_reports_the_same() -> None:
    log = MemoryLog()
    log.topics().ensure(TOPIC, 1)
    write(log, [b"old"] * 10)
    running = log.reader(TOPIC)
    running.poll(0.0)
    epoch = running.leader_epoch(0, 10)
    log.cut_back(TOPIC, {0: 6})
    with pytest.raises(TruncatedLog, match=r"ends at 6: the log was cut back, so that offsets 6 to 9"):
        running.poll(0.0)
    write(log, [b"new"] * 9)
    for ask in (lambda: running.poll(0.0), lambda: log.reader(TOPIC, positions={0: 10}, leaders={0: epoch})):
        with pytest.raises(TruncatedLog, match="has grown again to 15") as raised:
            ask()
        assert raised.value.kept == 6
    assert log.reader(TOPIC, positions={0: 10}).poll(0.0)[0].first == 10, "without an epoch nobody can tell"


def test_cutting_back_the_file_of_a_partition_cuts_between_records(tmp_path: Path) -> None:
    folder = tmp_path / f"{TOPIC}-0"
    folder.mkdir()
    batches = [(8 * b"\0" + (49).to_bytes(4, "big") + bytes(11) + (0).to_bytes(4, "big") + bytes(34))] * 3
    whole = b"".join(number.to_bytes(8, "big") + batch[8:] for number, batch in enumerate(batches))
    (folder / "00000000000000000000.log").write_bytes(whole + bytes(100))
    cut_back(tmp_path, TOPIC, 0, 2)
    assert (folder / "00000000000000000000.log").stat().st_size == len(whole) * 2 // 3
