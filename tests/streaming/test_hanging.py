"""What was acknowledged at the end of the training log is seen after a power cut, whatever Kafka's coordinator takes its transaction for."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.kafka.broker import Broker
from state.config.loading import load
from state.config.settings import Settings
from state.errors import UnreachableBroker
from state.log import Topics
from state.microbatch.codec import decode
from streaming.rebuild import end_open_transaction, read
from streaming.writer import open_writer
from tests.one_kafka import Running, broker_like
from tests.segments import cut_back
from tests.trainer.clicks import microbatch

ALL = 1 << 40


@pytest.fixture
def own(kafka: Running, tmp_path: Path) -> Iterator[Broker]:
    broker = broker_like(kafka, tmp_path / "kafka", retention_h=876_000).start()
    yield broker
    broker.kill()


@pytest.fixture
def settings(own: Broker, tmp_path: Path) -> Settings:
    plain = load(["--paths.state", str(tmp_path / "state")], env={})
    settings = replace(
        plain, kafka=replace(plain.kafka, bootstrap_servers=own.bootstrap_servers, request_timeout_s=20.0)
    )
    with Topics(settings.kafka) as topics:
        topics.ensure(settings.kafka.clicks_topic, 1)
        topics.ensure(settings.kafka.microbatches_topic, 1)
    return settings


def seen(settings: Settings, patience_s: float = 60.0) -> list[bytes]:
    """The micro-batches with rows that every reader sees, up to the end of the log."""
    deadline_s = time.monotonic() + patience_s
    with Topics(settings.kafka) as topics:
        while True:
            (begin, end), (_, stable) = (
                topics.ends(settings.kafka.microbatches_topic, committed_only=only)[0] for only in (False, True)
            )
            # A transaction is acknowledged before its marker is written, which may come between both questions.
            if stable == end or time.monotonic() >= deadline_s:
                break
            time.sleep(0.05)
    assert stable == end, "nobody reads past an open transaction"
    records = read(settings.kafka, begin, end, committed_only=True).values()
    return [record.value for record in records if len(decode(record.value))]


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_records_whose_marker_is_lost_are_seen_once_more(
    own: Broker, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    topic, data = settings.kafka.microbatches_topic, own.directory / "data"
    first, second, third = map(microbatch, range(3))

    # 1. The coordinator takes it for ended.
    with open_writer(settings) as writer, writer.transaction():
        writer.send(topic, 0, None, first)
    # It answers before it has written the marker, and before it takes the transaction for ended; the next writer waits for that.
    open_writer(settings).close()
    own.kill()
    assert cut_back(data, topic, 0, ALL, in_a_transaction=True) == 1
    own.start()
    with pytest.raises(AssertionError, match="nobody reads past"):
        seen(settings, patience_s=3.0)
    with caplog.at_level(logging.WARNING, "streaming.rebuild"), open_writer(settings) as writer:
        end_open_transaction(settings, writer)
    assert "positions 0 to 0 of" in caplog.text and "it is committed" in caplog.text
    assert seen(settings) == [first]

    # 2. It takes the next one for open, of which no record is left.
    with pytest.raises(UnreachableBroker, match="killed"), open_writer(settings) as writer:
        with writer.transaction():
            writer.send(topic, 0, None, second)
        assert seen(settings) == [first, second], "its marker is written"
        with Topics(settings.kafka) as topics:
            end = topics.ends(topic)[0][1]
        with writer.transaction():
            writer.send(topic, 0, None, third)
            writer.flush()
            own.kill()
            raise UnreachableBroker("killed", "start it again")
    assert cut_back(data, topic, 0, end, in_a_transaction=True) == end - 1
    own.start()
    with caplog.at_level(logging.WARNING, "streaming.rebuild"), open_writer(settings) as writer:
        assert seen(settings) == [first], "Kafka gave it up when the writer began"
        end_open_transaction(settings, writer)
        assert f"positions {end - 2} to {end - 2} of" in caplog.text and "written again" in caplog.text
        assert seen(settings) == [first, second]
        # 3. Nothing hangs, nothing is hidden: nothing is done.
        end_open_transaction(settings, writer)
    assert seen(settings) == [first, second]
    assert len([one for one in caplog.records if one.name == "streaming.rebuild"]) == 2
