"""The topic of dead letters: whatever writes one again uses the same key, so compaction and readers keep it once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from kafka.admin import ConfigResource, ConfigResourceType, KafkaAdminClient
from prometheus_client import CollectorRegistry

from state.config.settings import Settings
from state.events.decoding import DeadLetter, Reason
from state.features.spec import FeatureSpec
from state.log import PartitionBatch, Topics, Writer, topic_plan
from state.metrics import StreamMetrics
from state.positions import Source
from state.process.environment import wall_ms
from streaming.distributed.account import WriteBuckets
from streaming.distributed.bucket import BucketRows
from streaming.distributed.job import plan_of
from streaming.distributed.worker import close_workers
from streaming.rows import Cut, Encoding, Rows
from streaming.writer import StreamWriter, report_to
from tests.conftest import KafkaFactory
from tests.streaming.pieces import piece
from tests.streaming.streams import FOREVER, following, headers_of, settings_for, until

NODE = "1"  # the only broker of tests


@pytest.fixture
def shop(kafka_settings: KafkaFactory, tmp_path: Path) -> Settings:
    """Settings whose topics exist."""
    settings = settings_for(kafka_settings(), tmp_path / "state", tmp_path / "salt")
    with Topics(settings.kafka) as topics:
        topics.ensure(settings.kafka.clicks_topic, 1, FOREVER)
        for planned in (topic_plan.microbatches(settings), topic_plan.dead_letters(settings)):
            topics.ensure(*planned)
    return settings


def refused(settings: Settings, offset: int) -> Rows:
    """A batch of the clicks' partition 0: one row at `offset`, and the next record is refused."""
    with Topics(settings.kafka) as topics:
        source = Source(topics.describe(settings.kafka.clicks_topic).topic_id, 0)
    rows = piece((source, offset, 1), dead=1)
    letter = DeadLetter(source, offset + 1, Reason.UNDECODABLE)
    return replace(
        rows, batch=replace(rows.batch, dead=(letter,)), vectors=FeatureSpec.from_settings(settings).empty(1)
    )


def write_bundle_twice(settings: Settings, rows: Rows) -> None:
    """Writes a bundle as an engine does that repeats it from its last checkpoint."""
    step = WriteBuckets(plan_of(settings))
    for _ in range(2):
        step.start_bundle()
        list(step.process(BucketRows(rows)))
        list(step.finish_bundle())
    step.teardown()
    close_workers()


def keys_of(batches: list[PartitionBatch]) -> list[bytes | None]:
    return [key for batch in batches for key in batch.keys]


def compact_now(settings: Settings, letters: int) -> list[dict[str, str]]:
    """Makes the topic compacted; returns the headers of its dead letters once so many are left."""
    kafka = settings.kafka
    eager = {"cleanup.policy": "compact,delete", "segment.ms": "1", "min.cleanable.dirty.ratio": "0.01"}
    often = ConfigResource(ConfigResourceType.BROKER, NODE, {"log.cleaner.backoff.ms": "100"})
    admin = KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers)
    admin.alter_configs([often], raise_on_unknown=False)
    admin.close()
    with Topics(kafka) as topics:
        topics.bound(kafka.dead_letters_topic, eager)
    left: list[dict[str, str]] = []

    def compacted() -> bool:
        # The open segment is never compacted; a later record closes it.
        writer.send(kafka.dead_letters_topic, 0, b"a later record", b"")
        writer.flush()
        left[:] = filter(None, headers_of(kafka, kafka.dead_letters_topic))
        return len(left) == letters

    with Writer(kafka) as writer:
        until(compacted, "the topic is compacted")
    return left


def test_a_dead_letter_that_is_written_again_has_the_same_key_and_compaction_keeps_one(
    shop: Settings, tmp_path: Path
) -> None:
    kafka = shop.kafka
    # 1. A bundle of a distributed job is repeated; the local form repeats a transaction; attributes are read again.
    of_job, local = refused(shop, 0), refused(shop, 2)
    write_bundle_twice(shop, of_job)
    writer = StreamWriter(shop, Encoding.of(shop.stream, "spec", "salt", 0, 1), Event())
    for _ in range(2):
        writer.write([Cut((local,), wall_ms())])
    writer.close()
    of_attributes = DeadLetter(Source("ab" * 16, 3), 7, Reason.WRONG_TYPE)
    report_to(kafka, StreamMetrics(CollectorRegistry()))([of_attributes, of_attributes])
    # 2. A reader that takes each key once has each dead letter once.
    topic_id = of_job.batch.dead[0].source.topic_id
    wanted = [f"{topic_id}:0:1".encode(), f"{topic_id}:0:3".encode(), f"{'ab' * 16}:3:7".encode()]
    with following(kafka, kafka.dead_letters_topic) as topic:
        until(lambda: len(topic.poll()) == 6, "each dead letter twice")
        assert keys_of(topic.batches) == [wanted[0], wanted[0], wanted[1], wanted[1], wanted[2], wanted[2]]
        # An empty value: with null, compaction would remove the dead letter.
        assert topic.poll() == [b""] * 6
    # 3. So does compaction. It drops records without a key, as 0.1.0 wrote them.
    named = headers_of(kafka, kafka.dead_letters_topic)
    with Writer(kafka) as plain:
        plain.send(kafka.dead_letters_topic, 0, None, b"", [(name, text.encode()) for name, text in named[0].items()])
        plain.flush()
    assert headers_of(kafka, kafka.dead_letters_topic)[-1] == named[0]
    left = compact_now(shop, len(wanted))
    assert [":".join((one["topic_id"], one["partition"], one["offset"])).encode() for one in left] == wanted
