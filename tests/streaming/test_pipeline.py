"""The stream as a real process on a real Kafka: nothing is lost, nothing counts twice, every end is clean or named."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from state.accounts import StreamAccount, check_accounts
from state.config.sections import Events, LogSettings
from state.events.decoding import Decoder, decode_json
from state.log import Topics
from state.microbatch.batch import gaps
from state.microbatch.codec import decode
from state.positions import Source
from tests.conftest import KafkaFactory
from tests.streaming.streams import (
    BEGIN_MS,
    FOREVER,
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

BAD = {
    "undecodable": b"{not json",
    "missing_field": click(1, user=None),
    "unknown_action": click(2, action="stare"),
    "wrong_type": click(3, item=[1]),
}


def test_clicks_become_micro_batches_and_bad_ones_dead_letters(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
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
            assert stream.stop(signal.SIGINT) == 0, stream.lines
        later = [decode(value) for value in log.poll()[before:]]
        assert sum(map(len, later)) == 20
        assert all(part.first >= 202 for batch in later for part in batch.header.ranges)


def test_a_new_partition_is_taken_up_from_its_beginning(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    kafka = kafka_settings()
    settings = settings_for(kafka, tmp_path / "state", tmp_path / "salt")
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 2, FOREVER)
        with running(settings, tmp_path / "log") as stream:
            send(kafka, [click(number) for number in range(10)])
            until(lambda: next_offsets(log.poll()) == {0: 5, 1: 5}, "first clicks")
            topics.grow(kafka.clicks_topic, 3)
            until(lambda: topics.describe(kafka.clicks_topic).partitions == 3, "the new partition")
            send(kafka, [click(number) for number in range(10, 16)], 10, lambda number: 2)
            until(lambda: next_offsets(log.poll()) == {0: 5, 1: 5, 2: 6}, "clicks of the new partition")
            assert stream.stop() == 0, stream.lines
        assert any("new partition 2" in line for line in stream.lines)


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


CLICKS = 6000
BATCH = 100
RATES = (8, 5, 2, 1)  # of the partitions


@pytest.mark.nightly
def test_four_partitions_with_a_backlog_come_out_in_order(kafka_settings: KafkaFactory, tmp_path: Path) -> None:
    """A click a second over all; each partition lies in one fetch, and would come whole before the next one."""
    settings = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt", cut_rows=BATCH)
    kafka, chance = settings.kafka, np.random.default_rng(7)
    of_click = np.repeat(np.arange(4), RATES)[chance.integers(0, sum(RATES), CLICKS)].tolist()
    with Topics(kafka) as topics, following(kafka, kafka.microbatches_topic) as log:
        topics.ensure(kafka.clicks_topic, 4, FOREVER)
        values = [click(number, user=f"user-{of_click[number]}-{number % 17}") for number in range(CLICKS)]
        send(kafka, values, partition=of_click.__getitem__)
        with running(settings, tmp_path / "log") as stream:
            until(lambda: sum(next_offsets(log.poll()).values()) == CLICKS, "all clicks in the log")
            assert stream.stop() == 0, stream.lines
        batches = [decode(value) for value in log.poll()]
    offsets: dict[Source, list[int]] = {}
    for batch in batches:
        for source, offset in zip(batch.source.tolist(), batch.offset.tolist(), strict=True):
            offsets.setdefault(batch.header.ranges[source].source, []).append(offset)
    assert {source.partition: found for source, found in offsets.items()} == {
        number: list(range(of_click.count(number))) for number in range(4)
    }, "in order within a partition, none lost and none twice"
    at_s = (np.concatenate([batch.at_ms for batch in batches]) - BEGIN_MS) // 1000
    # How long before a row others that happened later have come.
    late_s = np.maximum.accumulate(at_s) - at_s
    assert np.percentile(late_s, 99) <= 4 * BATCH
    assert late_s.max() <= 60 + 4 * BATCH
