"""What topics there are and how each is made: partitions, retention, cleanup and the largest record, said once.

| topic | partitions | kept | largest record |
|---|---|---|---|
| clicks | `kafka.clicks_partitions` | `kafka.retention_h` | the cluster's |
| dead letters | 1 | `kafka.retention_h` | the cluster's |
| micro-batches | 1 | as long as a version can be rolled back to, `kafka.retention_h` at least | `stream.max_record_bytes` |
| attributes | 1 | the newest record of each key | the cluster's |

A topic that is there already stays as it is: its owner knows better. Pure.
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
    """

    name: str
    partitions: int
    config: Mapping[str, str]


def clicks(settings: Settings) -> TopicPlan:
    """The topic that shops write and the stream reads."""
    kafka = settings.kafka
    return TopicPlan(kafka.clicks_topic, kafka.clicks_partitions, _kept_for(kafka.retention_h))


def dead_letters(settings: Settings) -> TopicPlan:
    """The topic of records that are no events."""
    return TopicPlan(settings.kafka.dead_letters_topic, 1, _kept_for(settings.kafka.retention_h))


def microbatches(settings: Settings) -> TopicPlan:
    """The training log. It outlives the oldest version that can be rolled back to, which is learned on from there.

    >>> plan = microbatches(Settings())
    >>> plan.partitions, plan.config
    (1, {'retention.ms': '604800000', 'max.message.bytes': '1000000'})
    """
    hours = max(settings.kafka.retention_h, settings.registry.base_keep_d * 24)
    largest = {"max.message.bytes": str(settings.stream.max_record_bytes + BATCH_BYTES)}
    return TopicPlan(settings.kafka.microbatches_topic, 1, _kept_for(hours) | largest)


def attributes(settings: Settings) -> list[TopicPlan]:
    """The topics of users' and items' attributes, those that are configured."""
    wanted = settings.attributes
    return [attributes_of(name) for name in (wanted.user_topic, wanted.item_topic) if name]


def attributes_of(name: str) -> TopicPlan:
    """A topic of attributes: what is true of each key, however long ago it was said."""
    return TopicPlan(name, 1, {"cleanup.policy": "compact"})


def _kept_for(hours: int) -> dict[str, str]:
    return {"retention.ms": str(hours * HOUR_MS)}
