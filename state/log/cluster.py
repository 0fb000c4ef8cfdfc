"""A Kafka cluster as a log. Part of `state.log`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from state.config.sections import Kafka
from state.log.contract import Log
from state.log.reader import Reader
from state.log.topics import Topics
from state.log.writer import Writer


class KafkaLog(Log):
    """The cluster that the settings name; each reader, writer and topics object has its own connections.

    Args:
        settings: Connection settings.
    """

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
        from_end: bool = False,
        leaders: Mapping[int, int] | None = None,
    ) -> Reader:
        """Follows partitions of a topic, see `Reader`."""
        return Reader(self._settings, topic, partitions, positions, committed_only, from_end, leaders=leaders)

    def writer(self, transactional_id: str | None = None) -> Writer:
        """Sends records, see `Writer`."""
        return Writer(self._settings, transactional_id)
