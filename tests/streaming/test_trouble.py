"""Topics that were deleted, compacted, aborted in or left without a marker, on a real broker."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.local_kafka import Broker
from state.accounts import StreamAccount, check_accounts
from state.config.loading import load
from state.config.settings import Settings
from state.errors import UnreachableBroker
from state.events.identity import load_salt, user_id
from state.log import Reader, Topics, Writer
from state.microbatch.codec import decode
from state.positions import Source
from streaming.rebuild import end_open_transaction, read
from streaming.writer import open_writer
from tests.conftest import KafkaFactory
from tests.one_kafka import Running, broker_like
from tests.segments import cut_back
from tests.streaming.streams import (
    BEGIN_MS,
    FOREVER,
    Follower,
    click,
    deduplicated,
    following,
    headers_of,
    histories_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)
from tests.trainer.clicks import microbatch


def totals(settings: Settings) -> dict[str, int]:
    """The accounts of a stream that has ended; they add up."""
    with histories_of(settings) as store:
        found = store.totals
    assert check_accounts(StreamAccount(**found)) == ()
    return found


def reached(log: Follower, wanted: dict[int, int], what: str) -> None:
    until(lambda: next_offsets(log.poll()) == wanted, f"{what}: {wanted}, now {next_offsets(log.poll())}")


def offsets(log: Follower, partition: int) -> list[int]:
    """The offsets of the rows of a partition, in the order of the log, each once."""
    batches, _ = deduplicated(log.poll())
    rows = [
        (batch.header.ranges[source].source.partition, offset)
        for batch in batches
        for source, offset in zip(batch.source.tolist(), batch.offset.tolist(), strict=True)
    ]
    return [offset for one, offset in rows if one == partition]


def test_aborted_records_huge_ones_and_clocks_that_jump_back(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 1, FOREVER)
        with running(settings, tmp_path / "log") as stream:
            # 1. Ten clicks, five that are aborted (and the marker), five in a committed transaction (and the marker).
            send(kafka, [click(number) for number in range(10)], 0, lambda number: 0)
            with Writer(kafka, transactional_id=f"shop-{kafka.clicks_topic}") as shop:
                with pytest.raises(RuntimeError, match="changed my mind"), shop.transaction():
                    for number in range(5):
                        shop.send(kafka.clicks_topic, 0, b"k", click(number, user="aborted"), (), BEGIN_MS + 10_000)
                    shop._producer.flush()
                    raise RuntimeError("changed my mind")
                with shop.transaction():
                    for number in range(10, 15):
                        shop.send(kafka.clicks_topic, 0, b"k", click(number), (), BEGIN_MS + number * 1000)
            reached(log, {0: 22}, "the transactions")
            # 2. 5 MB: the broker takes it, the stream does not.
            send(kafka, [click(15, item="x" * 5_000_000), click(16)], 15, lambda number: 0)
            reached(log, {0: 24}, "the click behind the huge one")
            # 3. The producers' clock jumps back by two hours, and forth again.
            for number, at_ms in enumerate((-7_200_000, -7_199_000, 20_000)):
                with Writer(kafka) as writer:
                    value = click(number, user="jumper", time=BEGIN_MS + at_ms)
                    writer.send(kafka.clicks_topic, 0, b"k", value, (), BEGIN_MS + at_ms)
                    writer.flush()
            reached(log, {0: 27}, "the clicks of another time")
            assert stream.stop() == 0, stream.lines
        letters = headers_of(kafka, kafka.dead_letters_topic)
        assert [(letter["reason"], letter["offset"]) for letter in letters] == [("too_large", "22")]
        assert offsets(log, 0) == [*range(10), *range(16, 21), 23, 24, 25, 26]
        batches, _ = deduplicated(log.poll())
        aborted, jumper = (user_id(load_salt(tmp_path / "salt"), name) for name in ("aborted", "jumper"))
        users = np.concatenate([batch.user for batch in batches])
        assert aborted not in users
        assert np.concatenate([batch.at_ms for batch in batches])[users == jumper].tolist() == [
            BEGIN_MS + at_ms for at_ms in (-7_200_000, -7_199_000, 20_000)
        ]
    assert totals(settings) == {"positions": 27, "rows": 19, "dead": 1, "filtered": 0, "absent": 7}
    assert not any(" ERROR " in line for line in stream.lines), stream.lines


def test_clicks_deleted_and_made_again_are_another_topic(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        old = topics.ensure(kafka.clicks_topic, 2, FOREVER).topic_id
        with running(settings, tmp_path / "log") as stream:
            send(kafka, [click(number) for number in range(20)])
            reached(log, {0: 10, 1: 10}, "the old topic")
            topics.delete(kafka.clicks_topic)
            new = topics.ensure(kafka.clicks_topic, 2, FOREVER).topic_id
            send(kafka, [click(number) for number in range(20, 26)], 20)
            assert stream.wait() == 1
        assert "UnknownTopic" in stream.lines[-1]
        assert new in stream.lines[-1] or "does not exist" in stream.lines[-1]
        assert not any("Traceback" in line for line in stream.lines)
        with running(settings, tmp_path / "again") as stream:
            until(lambda: sum(len(decode(value)) for value in log.poll()) == 26, "the new topic's clicks")
            assert stream.stop() == 0, stream.lines
        assert any("was recreated: reading it from its beginning" in line for line in stream.lines)
        with histories_of(settings) as store:
            assert store.positions() == {
                Source(old, 0): 10, Source(old, 1): 10, Source(new, 0): 3, Source(new, 1): 3,
            }  # fmt: skip
        _, marks = deduplicated(log.poll())
        assert {source.topic_id for source in marks} == {old, new}


@pytest.mark.nightly
def test_holes_that_compaction_left_are_absent(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    compacted = {
        "cleanup.policy": "compact", "min.cleanable.dirty.ratio": "0.001", "min.compaction.lag.ms": "0",
        "segment.ms": "1", "delete.retention.ms": "0",
    }  # fmt: skip
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 1, compacted)
        with Writer(kafka) as writer:
            for number in range(60):
                writer.send(
                    kafka.clicks_topic, 0, b"user-%d" % (number % 3), click(number), (), BEGIN_MS + number * 1000
                )
                writer.flush()

        def left() -> int:
            with Reader(kafka, kafka.clicks_topic) as reader:
                found = 0
                deadline = time.monotonic() + 10
                while reader.position(0) < 60 and time.monotonic() < deadline:
                    found += sum(len(batch) for batch in reader.poll(0.2))
                return found if reader.position(0) == 60 else 60

        # The broker's cleaner looks every 15 s.
        until(lambda: left() < 40, "compaction")
        with running(settings, tmp_path / "log") as stream:
            reached(log, {0: 60}, "what compaction left")
            assert stream.stop() == 0, stream.lines
        kept = offsets(log, 0)
        assert kept[-1] == 59 and len(kept) < 40
    assert totals(settings) == {"positions": 60, "rows": len(kept), "dead": 0, "filtered": 0, "absent": 60 - len(kept)}


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
