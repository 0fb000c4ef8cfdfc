"""Administers Kafka topics: creates and describes them, finds their ends and the positions of groups."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from uuid import UUID

import kafka.errors as kafka_errors
from kafka import KafkaAdminClient
from kafka.admin import ConfigResource, ConfigResourceType, OffsetSpec
from kafka.protocol.consumer import IsolationLevel
from kafka.structs import OffsetAndMetadata, TopicPartition

from state.config.sections import Kafka
from state.errors import LogError, UnknownTopic
from state.log.client import connect, translated, unreachable
from state.log.records import Copies, TopicInfo

RETRY_S = 0.05

Answer = TypeVar("Answer")


class Topics:
    """Administers topics. Thread-safe; calls wait for each other.

    Raises:
        UnreachableBroker: No broker answered within kafka.request_timeout_s. Every method may raise it.
        LogError: The cluster refused. Every method may raise it.
    """

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._admin: Any = connect(settings, "connect to Kafka", KafkaAdminClient)

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        """Creates the topic if there is none; an existing topic stays unchanged.

        Returns when every partition has a leader.
        """
        wanted = {
            name: {"num_partitions": partitions, "replication_factor": replication or -1, "configs": dict(config or {})}
        }

        def create() -> None:
            with contextlib.suppress(kafka_errors.TopicAlreadyExistsError):
                self._admin.create_topics(wanted)
            self._admin.wait_for_topics([name], timeout_ms=self._timeout_ms)

        self._call(f"create topic {name}", create)
        return self.describe(name)

    def bound(self, name: str, config: Mapping[str, str]) -> None:
        """Sets the given configuration of a topic; other entries stay unchanged."""
        self.describe(name)
        wanted, doing = ConfigResource(ConfigResourceType.TOPIC, name, dict(config)), f"set what bounds topic {name}"
        answer = self._call(doing, lambda: self._admin.alter_configs([wanted], raise_on_unknown=False))
        if (status := answer["topic"][name]) != "OK":
            raise LogError(f"Kafka does not {doing} ({status})", "let this client alter configurations")

    def describe(self, name: str) -> TopicInfo:
        """The topic's id and number of partitions.

        Raises:
            UnknownTopic: There is no such topic; nothing is created.
        """
        topic = self._described(name)
        return TopicInfo(UUID(str(topic["topic_id"])).hex, len(topic["partitions"]))

    def copies(self, name: str) -> Copies:
        """The topic's replication, and the number of the cluster's brokers."""
        topic = self._described(name)
        wanted = ConfigResource(ConfigResourceType.TOPIC, name, {"min.insync.replicas": None})
        answer = self._call(
            f"describe topic {name}", lambda: self._admin.describe_configs([wanted], config_filter="all")
        )
        brokers = self._call("describe the cluster", self._admin.describe_cluster)["brokers"]
        return Copies(
            min((len(partition["replica_nodes"]) for partition in topic["partitions"]), default=0),
            int(answer["topic"][name]["min.insync.replicas"]["value"]),
            len(brokers),
        )

    def names(self) -> list[str]:
        """All topics that we are allowed to see, sorted."""
        return sorted(self._call("list topics", self._admin.list_topics))

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        """Partition -> the first retained position, and that of the next record or of the first open transaction."""
        partitions = self._partitions(name)
        begin = self._offsets(name, dict.fromkeys(partitions, OffsetSpec.EARLIEST))
        end = self._offsets(name, dict.fromkeys(partitions, OffsetSpec.LATEST), committed_only)
        return {partition.partition: (begin[partition], end[partition]) for partition in partitions}

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        """Partition -> the first position whose record's Kafka timestamp is `time_ms` or later.

        If all records are older, it is the end offset, so a reader that starts there sees only new records.
        """
        partitions = self._partitions(name)
        offsets = self._offsets(name, dict.fromkeys(partitions, time_ms))
        end = self._offsets(name, dict.fromkeys(partitions, OffsetSpec.LATEST))
        return {
            partition.partition: offsets[partition] if offsets[partition] >= 0 else end[partition]
            for partition in partitions
        }

    def delete(self, name: str) -> None:
        """Deletes the topic with all its records; returns when it is gone."""
        topic_id = self.describe(name).topic_id
        self._call(f"delete topic {name}", lambda: self._admin.delete_topics([name]))
        deadline = time.monotonic() + self._settings.request_timeout_s
        while time.monotonic() < deadline:
            try:
                if self.describe(name).topic_id != topic_id:
                    return
            except UnknownTopic:
                return
            threading.Event().wait(RETRY_S)
        raise LogError(f"topic {name} was not deleted within {self._settings.request_timeout_s:g} s", "try again")

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        """Deletes records before a position per partition, as retention does."""
        before = {TopicPartition(name, partition): offset for partition, offset in positions.items()}
        self._call(f"delete records of {name}", lambda: self._admin.delete_records(before))

    def grow(self, name: str, partitions: int) -> None:
        """Increases the number of the topic's partitions."""
        self._call(f"grow topic {name}", lambda: self._admin.create_partitions({name: partitions}))
        self._call(f"grow topic {name}", lambda: self._admin.wait_for_topics([name], timeout_ms=self._timeout_ms))

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        """Commits positions of a consumer group without members, for lag tools."""
        offsets = {
            TopicPartition(name, partition): OffsetAndMetadata(offset, "", -1)
            for partition, offset in positions.items()
        }

        def commit() -> None:
            for problem in self._admin.alter_group_offsets(group, offsets).values():
                if problem is not kafka_errors.NoError:
                    raise problem()

        self._call(f"commit positions of group {group}", commit)

    def committed(self, group: str, name: str) -> dict[int, int]:
        """The committed positions of a consumer group in a topic; partitions without one are absent."""
        answer = self._call(f"read positions of group {group}", lambda: self._admin.list_group_offsets([group]))
        return {
            partition.partition: position.offset
            for partition, position in answer.get(group, {}).items()
            if partition.topic == name and position.offset >= 0
        }

    def close(self) -> None:
        """Closes the connections."""
        self._admin.close()

    def __enter__(self) -> Topics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _timeout_ms(self) -> int:
        return int(self._settings.request_timeout_s * 1000)

    def _described(self, name: str) -> Any:
        (topic,) = self._call(f"describe topic {name}", lambda: self._admin.describe_topics([name]))
        if topic["error_code"]:
            problem = kafka_errors.for_code(topic["error_code"])
            with translated(self._settings, f"use topic {name}"):
                raise problem(name)
        return topic

    def _partitions(self, name: str) -> list[TopicPartition]:
        return [TopicPartition(name, number) for number in range(self.describe(name).partitions)]

    def _offsets(
        self, name: str, specs: Mapping[TopicPartition, object], committed_only: bool = False
    ) -> dict[TopicPartition, int]:
        level = IsolationLevel.READ_COMMITTED if committed_only else IsolationLevel.READ_UNCOMMITTED
        answer = self._call(f"read ends of {name}", lambda: self._admin.list_partition_offsets(dict(specs), level))
        return {partition: int(offset.offset) for partition, offset in answer.items()}

    def _call(self, doing: str, ask: Callable[[], Answer]) -> Answer:
        """Sends a request, and retries it while the cluster returns a retriable error."""
        deadline = time.monotonic() + self._settings.request_timeout_s
        while True:
            try:
                with self._lock, translated(self._settings, doing):
                    return ask()
            except LogError as problem:
                cause = problem.__cause__
                passing = isinstance(cause, kafka_errors.RetriableError) and not isinstance(problem, UnknownTopic)
                if not passing:
                    raise
                if time.monotonic() + RETRY_S >= deadline:
                    raise unreachable(self._settings, doing, cause or problem) from problem
            threading.Event().wait(RETRY_S)
