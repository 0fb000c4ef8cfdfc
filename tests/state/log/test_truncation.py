"""A log that is cut back behind a position is noticed, whether it has grown again or not, by a reader that runs and by one that begins."""

from __future__ import annotations

import time

import pytest

from deploy.kafka.broker import Broker
from state.config.sections import Kafka
from state.errors import TruncatedLog
from state.log import Log
from state.positions import Gap, Source
from tests.reading import read_until, values
from tests.segments import cut_back

TOPIC = "truncated-clicks"


def write(log: Log, sent: list[bytes]) -> None:
    """One record batch each."""
    with log.writer() as writer:
        for value in sent:
            writer.send(TOPIC, 0, None, value)
            writer.flush()


@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_a_partition_of_kafka_cut_back_and_grown_again(own: Broker) -> None:
    log = Log(Kafka(bootstrap_servers=own.bootstrap_servers))
    with log.topics() as topics:
        topic_id = topics.ensure(TOPIC, 1).topic_id
    write(log, [b"old %d" % number for number in range(10)])
    with log.reader(TOPIC) as running:
        read_until(running, {0: 10})
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
        assert values(read_until(again, {0: 15})) == [b"new %d" % number for number in range(9)]
        assert again.leader_epoch(0, 6) == epoch < again.leader_epoch(0, 7) == again.leader_epoch(0, 15)
