"""Plans how each topic is created: partitions, retention, cleanup and largest record. No side effects.

| topic | partitions | kept | largest record |
|---|---|---|---|
| clicks | `kafka.clicks_partitions` | `kafka.retention_h` | the cluster's |
| dead letters | 1 | `kafka.retention_h` | the cluster's |
| micro-batches | 1 | while a version can be rolled back to, at least `kafka.retention_h` | `RECORD_BYTES` |
| attributes | 1 | the newest record of each key | the cluster's |
| segments | 1 | the newest record of each key | the cluster's |
| exposures | 1 | `kafka.retention_h`, at most 5 % of the local Kafka's share | the cluster's |

An existing topic is not changed, because its owner has configured it. Topics of the local Kafka are also limited in
bytes: the training log has 55 % of its share, clicks 30 %, dead letters 5 %, exposures 5 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from state import storage
from state.config.settings import Settings

TRAINING_PARTITION = 0  # the only partition of the training log
HOUR_MS = 3_600_000
RECORD_BYTES = 900_000  # of a micro-batch; a larger micro-batch is split
# Room for a record batch's overhead in addition to the micro-batch: headers of batch and record, with a margin.
BATCH_BYTES = 100_000
# Shares of the bytes that the local Kafka may keep.
MICROBATCHES_SHARE, CLICKS_SHARE, LETTERS_SHARE, EXPOSURES_SHARE = 0.55, 0.30, 0.05, 0.05
# Kafka removes whole segments, and a segment must have space for the largest record: by default 16 MiB, the
# cluster's limit.
SEGMENTS, LARGEST_SEGMENT, LARGEST_RECORD = 8, 1 << 30, 17 << 20


class TopicPlan(NamedTuple):
    """The configuration of a new topic; the fields are the arguments of `Topics.ensure`, in order.

    `replication` 0 is the cluster's default.
    """

    name: str
    partitions: int
    config: Mapping[str, str]
    replication: int = 0


def clicks(settings: Settings) -> TopicPlan:
    """The topic that shops write and the stream reads."""
    kafka = settings.kafka
    return _planned(settings, kafka.clicks_topic, _kept_for(kafka.retention_h), kafka.clicks_partitions)


def dead_letters(settings: Settings) -> TopicPlan:
    """The topic of the refused clicks."""
    return _planned(settings, settings.kafka.dead_letters_topic, _kept_for(settings.kafka.retention_h))


def exposures(settings: Settings) -> TopicPlan:
    """The topic that records the arm of a rollout that answered each user; it is read only during its rollout."""
    limits = _kept_below(int(storage.kept_bytes(settings, storage.KAFKA) * EXPOSURES_SHARE), LARGEST_RECORD)
    configuration = {**_kept_for(settings.kafka.retention_h), **limits, "compression.type": "zstd"}
    return _planned(settings, settings.kafka.exposures_topic, configuration)


def microbatches(settings: Settings) -> TopicPlan:
    """The training log. It outlives the oldest version that can be rolled back to, because training resumes there."""
    hours = max(settings.kafka.retention_h, settings.registry.base_keep_d * 24)
    largest = {"max.message.bytes": str(RECORD_BYTES + BATCH_BYTES)}
    return _planned(settings, settings.kafka.microbatches_topic, _kept_for(hours) | largest)


def bounds(settings: Settings) -> dict[str, dict[str, str]]:
    """Topic -> the configuration that limits it in the local Kafka: bytes of one partition and of one of its segments.

    The broker compresses the clicks, whose text is repetitive; micro-batches are compressed already.
    """
    largest = 2 * (RECORD_BYTES + BATCH_BYTES)
    limits = {
        plan.name: _kept_below(int(storage.kept_bytes(settings, storage.KAFKA) * share / plan.partitions), least)
        for plan, share, least in (
            (microbatches(settings), MICROBATCHES_SHARE, largest),
            (clicks(settings), CLICKS_SHARE, LARGEST_RECORD),
            (dead_letters(settings), LETTERS_SHARE, LARGEST_RECORD),
        )
    }
    limits[settings.kafka.clicks_topic] |= {"compression.type": "zstd"}
    return limits


def _kept_below(most: int, least_segment: int) -> dict[str, str]:
    # Kafka keeps up to `retention.bytes` and one segment more.
    segment = min(max(most // SEGMENTS, least_segment), LARGEST_SEGMENT)
    return {"retention.bytes": str(max(most - segment, segment)), "segment.bytes": str(segment)}


def attributes(settings: Settings) -> list[TopicPlan]:
    """The configured topics of users' and items' attributes."""
    wanted = settings.attributes
    return [attributes_of(settings, name) for name in (wanted.user_topic, wanted.item_topic) if name]


def attributes_of(settings: Settings, name: str) -> TopicPlan:
    """A compacted topic of attributes, which keeps the newest record of each key without a time limit."""
    return _planned(settings, name, {"cleanup.policy": "compact"})


def segments(settings: Settings) -> TopicPlan:
    """The topic of segment memberships. It is compacted within a day, so that erased users are removed by then."""
    return _planned(
        settings, settings.segments.topic, {"cleanup.policy": "compact", "max.compaction.lag.ms": str(24 * HOUR_MS)}
    )


def _planned(settings: Settings, name: str, config: Mapping[str, str], partitions: int = 1) -> TopicPlan:
    least = settings.kafka.min_insync_replicas
    in_step = {"min.insync.replicas": str(least)} if least else {}
    return TopicPlan(name, partitions, {**config, **in_step}, settings.kafka.replication)


def _kept_for(hours: int) -> dict[str, str]:
    return {"retention.ms": str(hours * HOUR_MS)}
