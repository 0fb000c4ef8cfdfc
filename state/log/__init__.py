"""Access to Kafka: topics, reads by position, acknowledged writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from state.config.sections import Kafka
from state.log.client import Topics, client_options
from state.log.reader import KERNELS, Reader
from state.log.records import PartitionBatch, TopicInfo
from state.log.writer import Writer, partition_of


class Log:
    """The cluster that the section `[kafka]` names; each reader, writer and topics object has its own connections."""

    def __init__(self, settings: Kafka) -> None:
        self._settings = settings

    def topics(self) -> Topics:
        """Connects for topic administration, see `Topics`."""
        return Topics(self._settings)

    def reader(
        self,
        topic: str,
        partitions: Sequence[int] | None = None,
        positions: Mapping[int, int] | None = None,
        committed_only: bool = True,
        leaders: Mapping[int, int] | None = None,
    ) -> Reader:
        """Reads partitions of a topic, see `Reader`."""
        return Reader(self._settings, topic, partitions, positions, committed_only, leaders)

    def writer(self, transactional_id: str | None = None) -> Writer:
        """Sends records, see `Writer`."""
        return Writer(self._settings, transactional_id)


__all__ = [
    "KERNELS",
    "Log",
    "PartitionBatch",
    "Reader",
    "TopicInfo",
    "Topics",
    "Writer",
    "client_options",
    "partition_of",
]
