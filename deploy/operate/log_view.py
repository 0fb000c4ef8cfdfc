"""The training log and the clicks as a command sees them: their ends, and a reader; short of patience where Kafka is away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from state import layout
from state.config.settings import Settings
from state.errors import LogError, UnfitVersion
from state.log import KafkaLog, Log, LogReader
from state.log.accepted_gaps import Journal, past
from state.positions import Source
from state.registry.manifest import Manifest
from state.registry.registry import Registry

ASK_KAFKA_S = 5.0


def open_log(settings: Settings) -> Log:
    """The log of these settings."""
    return KafkaLog(settings.kafka)


@dataclass(frozen=True)
class LogView:
    """What the topics were when they were looked at.

    Attributes:
        log: Where they are.
        topic: Name of the training log.
        topic_id: Its id.
        partition: Its partition.
        begin: Its first offset kept.
        end: Where its next record goes.
        clicks_id: Id of the clicks topic.
        clicks: The ends of its partitions.
    """

    log: Log
    topic: str
    topic_id: str
    partition: int
    begin: int
    end: int
    clicks_id: str
    clicks: Mapping[int, tuple[int, int]]

    def reader(self, offset: int) -> LogReader:
        """Reads the training log from `offset`.

        Raises:
            LogError: It cannot be read.
        """
        return self.log.reader(self.topic, [self.partition], {self.partition: offset})

    def reaches(self, registry: Registry, version: Manifest) -> bool:
        """Whether the trainer could read on from a version, over the gaps that were accepted."""
        accepted = Journal(registry.path / layout.GAPS).accepted()
        return past(accepted, Source(self.topic_id, self.partition), version.log.next) >= self.begin

    def require_reach(self, registry: Registry, to: Manifest) -> None:
        """Refuses a version from which the trainer could not read on.

        Raises:
            UnfitVersion: The log begins behind it, or was made anew since.
        """
        if to.log.topic_id and to.log.topic_id != self.topic_id:
            raise UnfitVersion(
                f"version {to.version} was trained on topic id {to.log.topic_id}, {self.topic} is now {self.topic_id}: "
                "it was deleted and made again, so that the trainer cannot go on from there",
                f"let answers stay at it with `springtide pin {to.version}`, or restore the topic",
            )
        if not self.reaches(registry, to):
            raise UnfitVersion(
                f"version {to.version} goes on at offset {to.log.next} and the training log begins at {self.begin}: it can "
                "serve and not be trained on from",
                f"let answers stay at it with `springtide pin {to.version}`, or take a version that is not marked "
                "`serve only` in `springtide versions`",
            )


def look(settings: Settings, patience_s: float = ASK_KAFKA_S) -> LogView | None:
    """Asks Kafka for the ends of both topics; None where it does not answer in time, or a topic is not there."""
    partition = settings.trainer.partition
    kafka = replace(settings.kafka, request_timeout_s=min(patience_s, settings.kafka.request_timeout_s))
    try:
        log = open_log(replace(settings, kafka=kafka))
        topics = log.topics()
        try:
            ends = topics.ends(kafka.microbatches_topic)[partition]
            return LogView(
                log,
                kafka.microbatches_topic,
                topics.describe(kafka.microbatches_topic).topic_id,
                partition,
                *ends,
                topics.describe(kafka.clicks_topic).topic_id,
                topics.ends(kafka.clicks_topic),
            )
        finally:
            topics.close()
    except (LogError, KeyError):
        return None
