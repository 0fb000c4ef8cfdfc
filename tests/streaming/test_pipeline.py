"""The stream as a process: clicks become micro-batches once, whatever broker, topic and process go through."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local_kafka import Broker
from state.accounts import StreamAccount, check_accounts
from state.config.loading import load
from state.config.sections import Events, LogSettings
from state.config.settings import Settings
from state.errors import UnreachableBroker
from state.events.decoding import Decoder, decode_json
from state.log import Topics
from state.microbatch.batch import gaps
from state.microbatch.codec import decode
from state.positions import Source
from streaming.rebuild import end_open_transaction, read
from streaming.writer import open_writer
from tests.conftest import KafkaFactory
from tests.one_kafka import Running, broker_like
from tests.segments import cut_back
from tests.streaming.streams import (
    FOREVER,
    Follower,
    click,
    deduplicated,
    following,
    headers_of,
    histories_of,
    next_offsets,
    rows_by_source,
    running,
    send,
    settings_for,
    until,
)
from tests.trainer.clicks import microbatch

BAD = {
    "undecodable": b"{not json",
    "missing_field": click(1, user=None),
    "unknown_action": click(2, action="stare"),
    "wrong_type": click(3, item=[1]),
}


def test_clicks_become_micro_batches_and_bad_ones_dead_letters_also_after_a_restart_and_of_a_new_partition(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    settings = replace(settings, logs=LogSettings(format="json"))
    with Topics(kafka) as topics:
        topic_id = topics.ensure(kafka.clicks_topic, 2, FOREVER).topic_id
    values = [click(number) for number in range(400)]
    values[100:100] = list(BAD.values())
    with (
        following(kafka, kafka.microbatches_topic) as log,
        following(kafka, kafka.dead_letters_topic) as letters,
    ):
        with running(settings, tmp_path / "log") as stream:
            send(kafka, values)
            until(lambda: next_offsets(log.poll()) == {0: 202, 1: 202}, "all clicks in the log")
            until(lambda: len(letters.poll()) == len(BAD), "dead letters")
            assert stream.stop() == 0, stream.lines
        # Each line is an object once the settings are known, and none names a user as it was sent.
        said = [json.loads(line) for line in stream.lines]
        assert {one["part"] for one in said} == {"stream"}
        assert said[-1]["message"] == said[-1]["event"] == "stopped; everything read is committed"
        assert not any("user-" in line for line in stream.lines)
        batches, marks = deduplicated(log.poll())

        # Ranges are contiguous, and each position has one outcome.
        reached: dict[Source, int] = {}
        for value in log.poll():
            header = decode(value).header
            assert gaps(header, reached) == []
            assert all(part.first == reached.get(part.source, 0) for part in header.ranges)
            reached |= {part.source: part.next for part in header.ranges}
        assert reached == marks == {Source(topic_id, 0): 202, Source(topic_id, 1): 202}
        assert sum(map(len, batches)) == 400
        # Without attribute topics a row has no attributes, and there is no store of them.
        assert {batch.user_attributes.shape[1] + batch.item_attributes.shape[1] for batch in batches} == {0}
        assert not (settings.stream_dir / "attributes").exists()

        # The store agrees with the log.
        with histories_of(settings) as store:
            assert store.positions() == marks
            assert store.totals == {"positions": 404, "rows": 400, "dead": 4, "filtered": 0, "absent": 0}
            assert check_accounts(StreamAccount(**store.totals)) == ()
            assert store.users() == 17

        # A dead letter names reason and coordinates, also by its key, and holds nothing of the record.
        assert set(letters.poll()) == {b""}
        keys = {f"{topic_id}:{number % 2}:{number // 2}".encode() for number, _ in enumerate(BAD, start=100)}
        assert {key for batch in letters.batches for key in batch.keys} == keys
        expected = {
            (reason, topic_id, str(number % 2), str(number // 2)) for number, reason in enumerate(BAD, start=100)
        }
        assert {tuple(headers.values()) for headers in headers_of(kafka, kafka.dead_letters_topic)} == expected

        # Started again, the stream goes on where it stopped; the group shows the same.
        with Topics(kafka) as topics:
            assert topics.committed(kafka.group, kafka.clicks_topic) == {0: 202, 1: 202}
        before = len(log.poll())
        with running(settings, tmp_path / "log") as stream:
            send(kafka, [click(number) for number in range(404, 424)], 404)
            until(lambda: next_offsets(log.poll()) == {0: 212, 1: 212}, "later clicks in the log")
            # A new partition is taken up from its beginning.
            with Topics(kafka) as topics:
                topics.grow(kafka.clicks_topic, 3)
                until(lambda: topics.describe(kafka.clicks_topic).partitions == 3, "the new partition")
            send(kafka, [click(number) for number in range(424, 430)], 424, lambda number: 2)
            until(lambda: next_offsets(log.poll()) == {0: 212, 1: 212, 2: 6}, "clicks of the new partition")
            assert stream.stop(signal.SIGINT) == 0, stream.lines
        assert any("new partition 2" in line for line in stream.lines)
        later = [decode(value) for value in log.poll()[before:]]
        assert sum(map(len, later)) == 26
        assert all(part.first >= 202 for batch in later for part in batch.header.ranges if part.source.partition < 2)


def test_the_last_clicks_of_a_backlog_are_cut_soon_also_if_records_may_wait_for_long(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt", cut_rows=256, cut_ms=20_000)
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 1, FOREVER)
        send(kafka, [click(number) for number in range(4 * 256 + 124)], partition=lambda number: 0)
        with running(settings, tmp_path / "log") as stream:
            reached(log, {0: 4 * 256 + 124}, "the backlog")
            assert stream.stop() == 0, stream.lines
        batches = [decode(value) for value in log.poll()]
    assert [len(batch) for batch in batches] == [256, 256, 256, 256, 124]
    # A tenth of `cut_ms` after the last click, and not all of it.
    assert batches[-1].header.created_ms - batches[-2].header.created_ms < settings.stream.cut_ms / 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Clicks in a topic and the rows that a stream without a crash makes of them; filled by the first test."""
    return {"folder": tmp_path_factory.mktemp("undisturbed")}


@pytest.mark.parametrize(
    "kill_at",
    [
        pytest.param("stream.taken:2", marks=pytest.mark.nightly),
        pytest.param("stream.sent:3", marks=pytest.mark.nightly),
        "stream.acknowledged:1",
        pytest.param("stream.committed:2", marks=pytest.mark.nightly),
        pytest.param("stream.grouped:1", marks=pytest.mark.nightly),
    ],
)
def test_after_kill_9_the_rows_are_those_of_an_undisturbed_run(
    kafka_settings: KafkaFactory, tmp_path: Path, undisturbed: dict[str, object], kill_at: str
) -> None:
    salt = Path(str(undisturbed["folder"])) / "salt"
    if "clicks" not in undisturbed:
        kafka = kafka_settings()
        with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
            topics.ensure(kafka.clicks_topic, 2, FOREVER)
            send(kafka, [click(number) for number in range(1000)])
            settings = settings_for(kafka, tmp_path / "calm", salt)
            with running(settings, tmp_path / "calm-log") as stream:
                until(lambda: next_offsets(log.poll()) == {0: 500, 1: 500}, "clicks of the calm run")
                assert stream.stop() == 0, stream.lines
            undisturbed["rows"] = rows_by_source(deduplicated(log.poll())[0])
            undisturbed["clicks"] = kafka.clicks_topic
            with histories_of(settings) as store:
                undisturbed["digest"] = store.digest()
    kafka = kafka_settings(clicks_topic=undisturbed["clicks"])
    settings = settings_for(kafka, tmp_path / "state", salt)
    with following(kafka, kafka.microbatches_topic) as log:
        with running(settings, tmp_path / "log", kill_at) as stream:
            assert stream.wait() == -signal.SIGKILL, stream.lines
        with running(settings, tmp_path / "log") as stream:
            until(lambda: next_offsets(log.poll()) == {0: 500, 1: 500}, "clicks after the crash")
            assert stream.stop() == 0, stream.lines
        rows = rows_by_source(deduplicated(log.poll())[0])
    assert rows == undisturbed["rows"]
    with histories_of(settings) as store:
        assert store.digest() == undisturbed["digest"]
        assert store.totals["rows"] == store.totals["positions"] == 1000


def asked_to_stop(settings: Events) -> Decoder:
    """A decoder whose making is a SIGTERM for the process, which is opening what it owns."""
    os.kill(os.getpid(), signal.SIGTERM)
    return decode_json(settings)


def test_a_stream_that_is_asked_to_stop_while_it_opens_ends_cleanly(
    kafka_settings: KafkaFactory, tmp_path: Path
) -> None:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    settings = replace(settings, events=Events(decoder=f"{__name__}:{asked_to_stop.__name__}"))
    with running(settings, tmp_path / "log") as stream:
        assert stream.wait() == 0, stream.lines
    assert stream.lines[-1].endswith("stopped; everything read is committed")


def reached(log: Follower, wanted: dict[int, int], what: str) -> None:
    until(lambda: next_offsets(log.poll()) == wanted, f"{what}: {wanted}, now {next_offsets(log.poll())}")


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
