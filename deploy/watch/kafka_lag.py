"""How far the clicks in Kafka are and how far the stream has committed them, for `springtide status`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from state.config.settings import Settings
from state.errors import SpringtideError, UnknownTopic
from state.log import Topics

LONGEST_WAIT_S = 3.0


def kafka_lag(settings: Settings, connect: Callable[[Any], Topics] = Topics) -> dict[str, Any]:
    """End of the clicks topic, the stream's committed positions, and their difference."""
    kafka = dataclasses.replace(settings.kafka, request_timeout_s=min(LONGEST_WAIT_S, settings.kafka.request_timeout_s))
    try:
        with connect(kafka) as topics:
            ends = topics.ends(kafka.clicks_topic)
            committed = topics.committed(kafka.group, kafka.clicks_topic)
            training = topics.ends(kafka.microbatches_topic)
    except SpringtideError as error:
        # A broker that says so is there: before `up` has made the topics there are none.
        return {"answers": False, "problem": str(error), "away": not isinstance(error, UnknownTopic)}
    return {
        "answers": True,
        "away": False,
        "problem": "",
        "servers": kafka.bootstrap_servers,
        "clicks": sum(end for _, end in ends.values()),
        # A group that has committed nothing stands at the beginning.
        "lag": sum(end - committed.get(partition, begin) for partition, (begin, end) in ends.items()),
        "training_log": sum(end for _, end in training.values()),
    }
