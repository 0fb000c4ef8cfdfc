"""The topics of a log in memory. Part of `state.log`; `state.log.memory.MemoryLog` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from state.errors import LogError
from state.log.contract import LogTopics
from state.log.memory_state import MemoryState, Partition, Topic
from state.log.records import TopicInfo


class MemoryTopics(LogTopics):
    """What topics a log in memory has."""

    def __init__(self, state: MemoryState) -> None:
        self._state = state
        state.require("connect to Kafka")

    def ensure(
        self, name: str, partitions: int, config: Mapping[str, str] | None = None, replication: int = 0
    ) -> TopicInfo:
        """Makes the topic if there is none; an existing one stays as it is."""
        with self._state.changed:
            self._state.require(f"create topic {name}")
            if name not in self._state.topics:
                made = Topic(self._state.ids(), dict(config or {}), [Partition() for _ in range(partitions)])
                self._state.topics[name] = made
            return self.describe(name)

    def describe(self, name: str) -> TopicInfo:
        """The topic's id and number of partitions."""
        with self._state.changed:
            found = self._state.topic(name, f"describe topic {name}")
            return TopicInfo(found.topic_id, len(found.partitions))

    def names(self) -> list[str]:
        """All topics, sorted."""
        with self._state.changed:
            self._state.require("list topics")
            return sorted(self._state.topics)

    def ends(self, name: str, committed_only: bool = False) -> dict[int, tuple[int, int]]:
        """Per partition the first position kept and the position of the next record."""
        with self._state.changed:
            found = self._state.topic(name, f"read ends of {name}").partitions
            ends = [each.stable_end if committed_only else each.end for each in found]
            return {number: (each.begin, end) for number, (each, end) in enumerate(zip(found, ends, strict=True))}

    def offset_before(self, name: str, time_ms: int) -> dict[int, int]:
        """Per partition the first position whose record's timestamp is `time_ms` or later, else the end."""
        with self._state.changed:
            found = self._state.topic(name, f"read ends of {name}").partitions
            return {number: each.offset_before(time_ms) for number, each in enumerate(found)}

    def delete(self, name: str) -> None:
        """Deletes the topic with all its records."""
        with self._state.changed:
            self._state.topic(name, f"delete topic {name}")
            del self._state.topics[name]
            self._state.groups = {key: at for key, at in self._state.groups.items() if key[1] != name}
            self._state.changed.notify_all()

    def delete_before(self, name: str, positions: Mapping[int, int]) -> None:
        """Deletes records before a position per partition, as retention does."""
        doing = f"delete records of {name}"
        with self._state.changed:
            for number, offset in positions.items():
                partition = self._state.partition(name, number, doing)
                if offset > partition.end:
                    raise LogError(f"cannot {doing}: partition {number} ends at {partition.end}, before {offset}")
                partition.delete_before(offset)
            self._state.changed.notify_all()

    def grow(self, name: str, partitions: int) -> None:
        """Gives the topic more partitions."""
        with self._state.changed:
            found = self._state.topic(name, f"grow topic {name}").partitions
            if partitions <= len(found):
                raise LogError(f"cannot grow topic {name}: it has {len(found)} partitions already")
            found.extend(Partition() for _ in range(partitions - len(found)))
            self._state.changed.notify_all()

    def commit(self, group: str, name: str, positions: Mapping[int, int]) -> None:
        """Writes positions of a consumer group."""
        with self._state.changed:
            for number in positions:
                self._state.partition(name, number, f"commit positions of group {group}")
            self._state.groups.setdefault((group, name), {}).update(positions)

    def committed(self, group: str, name: str) -> dict[int, int]:
        """Positions of a consumer group in a topic."""
        with self._state.changed:
            self._state.require(f"read positions of group {group}")
            return dict(self._state.groups.get((group, name), {}))

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
