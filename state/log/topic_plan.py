"""What topics there are and how each is made: partitions, retention, cleanup and the largest record, said once.

| topic | partitions | kept | largest record |
|---|---|---|---|
| clicks | `kafka.clicks_partitions` | `kafka.retention_h` | the cluster's |
| dead letters | 1 | `kafka.retention_h` | the cluster's |
| micro-batches | 1 | as long as a version can be rolled back to, `kafka.retention_h` at least | `stream.max_record_bytes` |
| attributes | 1 | the newest record of each key | the cluster's |

Each has `kafka.replication` replicas, of which `kafka.min_insync_replicas` must have a record. A topic that is there already stays as it is: its owner knows better. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from state.config.settings import Settings

HOUR_MS = 3_600_000
# What a record batch weighs beside the micro-batch in it: headers of batch and record, with room to spare.
BATCH_BYTES = 100_000


class TopicPlan(NamedTuple):
    """How a topic is made, in the order of `Topics.ensure`.

    Attributes:
        name: Its name.
        partitions: How many it has.
        config: Kafka's settings of the topic.
        replication: How many replicas it has; 0: the cluster's default.
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
    """The topic of records that are no events."""
    return _planned(settings, settings.kafka.dead_letters_topic, _kept_for(settings.kafka.retention_h))


def microbatches(settings: Settings) -> TopicPlan:
    """The training log. It outlives the oldest version that can be rolled back to, which is learned on from there.

    >>> plan = microbatches(Settings())
    >>> plan.partitions, plan.config
    (1, {'retention.ms': '604800000', 'max.message.bytes': '1000000'})
    """
    hours = max(settings.kafka.retention_h, settings.registry.base_keep_d * 24)
    largest = {"max.message.bytes": str(settings.stream.max_record_bytes + BATCH_BYTES)}
    return _planned(settings, settings.kafka.microbatches_topic, _kept_for(hours) | largest)


def attributes(settings: Settings) -> list[TopicPlan]:
    """The topics of users' and items' attributes, those that are configured."""
    wanted = settings.attributes
    return [attributes_of(settings, name) for name in (wanted.user_topic, wanted.item_topic) if name]


def attributes_of(settings: Settings, name: str) -> TopicPlan:
    """A topic of attributes: what is true of each key, however long ago it was said."""
    return _planned(settings, name, {"cleanup.policy": "compact"})


def _planned(settings: Settings, name: str, config: Mapping[str, str], partitions: int = 1) -> TopicPlan:
    least = settings.kafka.min_insync_replicas
    in_step = {"min.insync.replicas": str(least)} if least else {}
    return TopicPlan(name, partitions, {**config, **in_step}, settings.kafka.replication)


def _kept_for(hours: int) -> dict[str, str]:
    return {"retention.ms": str(hours * HOUR_MS)}
