"""A command's view of the training log and the clicks topic: their ends, and a reader; Kafka must answer soon."""

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
    """Opens the log of these settings."""
    return KafkaLog(settings.kafka)


@dataclass(frozen=True)
class LogView:
    """The state of both topics at one moment.

    Attributes:
        log: The log that holds the topics.
        topic: Name of the training log's topic.
        topic_id: Id of that topic.
        partition: Partition of the training log.
        begin: Its first kept offset.
        end: The offset of its next record.
        clicks_id: Id of the clicks topic.
        clicks: By partition of the clicks topic, its first kept and its next offset.
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
        """Returns a reader of the training log from `offset` on.

        Raises:
            LogError: The log cannot be read.
        """
        return self.log.reader(self.topic, [self.partition], {self.partition: offset})

    def reaches(self, registry: Registry, version: Manifest) -> bool:
        """Returns whether the trainer could continue from a version, across accepted gaps."""
        accepted = Journal(registry.path / layout.GAPS).accepted()
        return past(accepted, Source(self.topic_id, self.partition), version.log.next) >= self.begin

    def require_reach(self, registry: Registry, to: Manifest) -> None:
        """Checks that the trainer could continue from a version.

        Raises:
            UnfitVersion: The log begins after the version's position, or the topic was recreated since.
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
    """Asks Kafka for the ends of both topics; returns None if it does not answer in time or a topic does not exist."""
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
