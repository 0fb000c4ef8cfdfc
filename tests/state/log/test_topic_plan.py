"""The plan of topics: one place says how each is made, and Kafka takes what the plan promises."""

from __future__ import annotations

import pytest
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType

from state import storage
from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings
from state.errors import LogError, UnknownTopic
from state.log import Reader, Topics, Writer, client_options, topic_plan
from state.log.records import Copies
from tests.conftest import KafkaFactory
from tests.reading import next_batches

HOUR_MS = 3_600_000


def settings_of(*flags: str) -> Settings:
    return load(list(flags), {})


@pytest.mark.parametrize(("retention_h", "base_keep_d", "hours"), [(24, 7, 168), (500, 7, 500)])
def test_the_training_log_outlives_the_oldest_version_one_can_go_back_to(
    retention_h: int, base_keep_d: int, hours: int
) -> None:
    settings = settings_of("--kafka.retention_h", str(retention_h), "--registry.base_keep_d", str(base_keep_d))
    assert topic_plan.microbatches(settings).config["retention.ms"] == str(hours * HOUR_MS)
    assert (
        topic_plan.clicks(settings).config
        == topic_plan.dead_letters(settings).config
        == {"retention.ms": str(retention_h * HOUR_MS)}
    )


@pytest.mark.parametrize("gigabytes", ["2", "10", "2000"])
def test_the_topics_of_the_local_kafka_stay_within_its_share(gigabytes: str) -> None:
    settings = settings_of("--storage.budget_gb", gigabytes)
    bounds, kept = topic_plan.bounds(settings), storage.kept_bytes(settings, storage.KAFKA)
    plans = (topic_plan.clicks(settings), topic_plan.microbatches(settings), topic_plan.dead_letters(settings))
    assert set(bounds) == {plan.name for plan in plans}
    most = {
        plan.name: plan.partitions * sum(int(bounds[plan.name][f"{one}.bytes"]) for one in ("retention", "segment"))
        for plan in plans
    }
    assert sum(most.values()) <= kept
    # The training log, from which is learned again after a rollback, has the most.
    assert max(most.values()) == most[topic_plan.microbatches(settings).name] > 0.5 * kept or gigabytes == "2000"


def test_a_record_of_the_largest_size_fits_a_segment_however_small_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topic_plan, "RECORD_BYTES", 15_000_000)
    bounds = topic_plan.bounds(settings_of("--storage.budget_gb", "0.5"))
    assert {name: int(one["segment.bytes"]) >= 16 << 20 for name, one in bounds.items()} == dict.fromkeys(bounds, True)
    assert all(int(one["retention.bytes"]) >= int(one["segment.bytes"]) for one in bounds.values())


def test_a_topic_is_bounded_again_at_each_start_and_keeps_what_its_owner_set(kafka_settings: KafkaFactory) -> None:
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 1, {"retention.ms": "12345000"})
        for megabytes in (100, 50):
            topics.bound(kafka.clicks_topic, {"retention.bytes": str(megabytes << 20), "segment.bytes": "20000000"})
        with pytest.raises(UnknownTopic):
            topics.bound("never-made", {"retention.bytes": "1"})
        with pytest.raises(LogError, match="does not set what bounds topic"):
            topics.bound(kafka.clicks_topic, {"retention.bytes": "many"})
    found = configured(kafka, kafka.clicks_topic)
    assert (found["retention.bytes"], found["segment.bytes"]) == (str(50 << 20), "20000000")
    assert found["retention.ms"] == "12345000"


def configured(kafka: Kafka, name: str) -> dict[str, str]:
    """What a topic is set to in the cluster."""
    admin = KafkaAdminClient(**client_options(kafka))
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all")
    admin.close()
    return {key: str(one["value"]) for key, one in found["topic"][name].items()}


def test_attributes_are_kept_by_key_and_only_configured_ones_are_planned() -> None:
    assert topic_plan.attributes(Settings()) == []
    settings = settings_of("--attributes.item_topic", "items", "--attributes.item_fields", "brand")
    assert topic_plan.attributes(settings) == [("items", 1, {"cleanup.policy": "compact"}, 0)]


def test_the_largest_micro_batch_fits_its_topic(kafka_settings: KafkaFactory) -> None:
    kafka = kafka_settings()
    planned = topic_plan.microbatches(settings_of("--kafka.microbatches_topic", kafka.microbatches_topic))
    with Topics(kafka) as topics, Writer(kafka, kafka.microbatches_topic) as writer:
        topics.ensure(*planned)
        with writer.transaction():
            writer.send(planned.name, 0, None, bytes(topic_plan.RECORD_BYTES))
        with Reader(kafka, planned.name) as reader:
            (batch,) = next_batches(reader)
    assert [len(value or b"") for value in batch.values] == [topic_plan.RECORD_BYTES]


def test_replicas_are_planned_and_what_a_lost_broker_would_cost_is_said(kafka_settings: KafkaFactory) -> None:
    planned = topic_plan.microbatches(settings_of("--kafka.replication", "3", "--kafka.min_insync_replicas", "2"))
    assert (planned.replication, planned.config["min.insync.replicas"]) == (3, "2")
    kafka = kafka_settings()
    with Topics(kafka) as topics:
        topics.ensure(kafka.clicks_topic, 2, {"min.insync.replicas": "2"}, replication=1)
        found = topics.copies(kafka.clicks_topic)
    assert found == Copies(replicas=1, min_insync=2, brokers=1) and not found.weakness()
    assert "one copy of each record" in Copies(1, 1, 3).weakness()
    assert "one copy is enough" in Copies(3, 1, 3).weakness()
    assert Copies(3, 2, 3).weakness() == ""
