"""Broker trouble against the real Kafka: the stream loses nothing, doubles nothing, and says what it met.

deploy/kafka/README.md says the same in a table.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deploy.kafka.broker import Broker
from state.accounts import StreamAccount, check_accounts
from state.config.sections import Kafka
from state.config.settings import Settings
from state.errors import LogError
from state.events.identity import load_salt, user_id
from state.history.store import HistoryStore
from state.layout import HISTORIES
from state.log import Reader, Topics, Writer
from state.log.bulk import BulkWriter, append_encoded
from state.microbatch.codec import decode
from state.positions import Source
from tests.conftest import KafkaFactory
from tests.disks import small_disk
from tests.streaming.streams import (
    BEGIN_MS,
    FOREVER,
    Follower,
    click,
    deduplicated,
    following,
    headers_of,
    next_offsets,
    running,
    send,
    settings_for,
    until,
)


def totals(settings: Settings) -> dict[str, int]:
    """The accounts of a stream that has ended; they add up."""
    store = HistoryStore(settings.stream_dir / HISTORIES, map_bytes=1 << 30)
    found = store.totals
    store.close()
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


def test_a_topic_that_takes_no_5_mb_refuses_them_at_the_producer(kafka_settings: KafkaFactory) -> None:
    kafka = kafka_settings()
    with Topics(kafka) as topics, Writer(kafka) as writer:
        topics.ensure(kafka.clicks_topic, 1, {"max.message.bytes": "1048588"})
        writer.send(kafka.clicks_topic, 0, None, click(1, item="x" * 5_000_000))
        with pytest.raises(LogError):
            writer.flush()
        assert topics.ends(kafka.clicks_topic) == {0: (0, 0)}


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
        assert any("another one than before: reading it from its beginning" in line for line in stream.lines)
        store = HistoryStore(settings.stream_dir / HISTORIES, map_bytes=1 << 30)
        assert store.positions() == {
            Source(old, 0): 10, Source(old, 1): 10, Source(new, 0): 3, Source(new, 1): 3,
        }  # fmt: skip
        store.close()
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


AWAY_S = float(os.environ.get("AWAY_S", "4"))


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore:unclosed <s:ResourceWarning")
def test_a_broker_away_restarted_and_with_a_damaged_batch(own: Broker, tmp_path: Path) -> None:
    kafka = Kafka(bootstrap_servers=own.bootstrap_servers)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 1, FOREVER)
    with following(kafka, kafka.microbatches_topic) as log:
        with running(settings, tmp_path / "log") as stream:
            send(kafka, [click(number) for number in range(40)], 0, lambda number: 0)
            reached(log, {0: 40}, "before")
            # 1. Killed, away, back: a click that is sent meanwhile waits in its producer.
            with Writer(replace(kafka, request_timeout_s=AWAY_S + 60)) as writer:
                writer.send(kafka.clicks_topic, 0, b"k", click(40), (), BEGIN_MS + 40_000)
                writer.flush()
                own.kill()
                writer.send(kafka.clicks_topic, 0, b"k", click(41), (), BEGIN_MS + 41_000)
                gone_s = time.monotonic()
                until(lambda: time.monotonic() - gone_s >= AWAY_S, "the time away", AWAY_S + 60)
                own.start()
                writer.flush()
            back_s = time.monotonic()
            reached(log, {0: 42}, "after it was back")
            print(f"away {AWAY_S:g} s; rows again {time.monotonic() - back_s:.2f} s after the first write")
            # 2. Restarted in order, under load.
            own.stop()
            own.start()
            send(kafka, [click(number) for number in range(42, 80)], 42, lambda number: 0)
            reached(log, {0: 80}, "after the restart")
            assert stream.stop() == 0, stream.lines
        # 3. Bytes flip in the segment of a stopped broker.
        with BulkWriter(kafka, kafka.clicks_topic) as bulk:
            for first in (80, 83, 86):
                values = [click(number, item=f"batch-{first}") for number in range(first, first + 3)]
                append_encoded(bulk, [b"k"] * 3, values, np.arange(first, first + 3) * 1000 + BEGIN_MS, [0] * 3)
        own.stop()
        segments = sorted((own.directory / "data" / f"{kafka.clicks_topic}-0").glob("*.log"))
        (segment,) = [one for one in segments if b"batch-83" in one.read_bytes()]
        segment.write_bytes(segment.read_bytes().replace(b"batch-83", b"bAtch-83", 1))
        own.start()
        with running(settings, tmp_path / "again") as stream:
            reached(log, {0: 89}, "behind the damaged batch")
            assert stream.stop() == 0, stream.lines
        assert offsets(log, 0) == [*range(83), 86, 87, 88]
        letters = headers_of(kafka, kafka.dead_letters_topic)
        assert [(one["reason"], one["offset"]) for one in letters] == [
            ("corrupt_record", str(at)) for at in (83, 84, 85)
        ]
    assert totals(settings) == {"positions": 89, "rows": 86, "dead": 3, "filtered": 0, "absent": 0}
    for name in ("log", "again"):
        assert not any("Traceback" in line for line in (tmp_path / name).read_text().splitlines())


@pytest.mark.nightly
def test_on_a_full_disk_the_stream_waits_says_so_in_one_line_and_goes_on_where_there_is_room(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    with (
        small_disk(tmp_path / "disk", "2m") as disk,
        Topics(kafka) as topics,
        following(kafka, kafka.microbatches_topic) as log,
    ):
        settings = settings_for(kafka, disk.path / "state", tmp_path / "salt", cut_rows=1000, batch_events=500)
        settings = replace(settings, storage=replace(settings.storage, memory_dir=""))
        topics.ensure(kafka.clicks_topic, 1, FOREVER)
        users = 20_000
        with BulkWriter(kafka, kafka.clicks_topic) as bulk:
            for first in range(0, users, 2000):
                values = [click(number, user=f"user-{number}") for number in range(first, first + 2000)]
                append_encoded(
                    bulk, [b"k"] * 2000, values, np.arange(first, first + 2000) * 1000 + BEGIN_MS, [0] * 2000
                )
        with running(settings, tmp_path / "log") as stream:

            def said() -> list[str]:
                return [line for line in stream.lines if "waits for room" in line]

            until(said, "it waits for room")
            disk.remount("size=64m")
            reached(log, {0: users}, "all clicks once there is room")
            assert stream.stop() == 0, stream.lines
            assert len(said()) == 1 and "free space" in said()[0], stream.lines
            assert not any("Traceback" in line or " ERROR " in line for line in stream.lines)
        assert offsets(log, 0) == list(range(users))
        assert totals(settings)["rows"] == users
