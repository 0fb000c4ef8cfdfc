"""Writes who comes into a segment and who leaves it: first to the compacted topic, then to this host's copy of it.

1. At the start the topic is read to its end, from where the copy ends.
2. A change is a record; once it is acknowledged it is committed to the copy.

A crash between the two leaves a record that the next start reads. Nobody else
writes the topic.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping, Sequence

from deploy.segments.judging import JudgedUser
from state.errors import LogError
from state.log import Log, LogWriter, PartitionBatch
from state.metrics import SegmentMetrics
from state.process import killpoints
from state.segments.record import Member, Membership, key_of, member_of, membership_of, value_of
from state.segments.store import SegmentsPlace, SegmentStore, all_members

POLL_S, STALLED_S = 0.5, 30.0
_log = logging.getLogger(__name__)


class Members:
    """The memberships; used by one thread, the topic's and the store's only writer.

    Args:
        log: Where the topic is.
        topic: Its name.
        store: This host's copy.
        names: The segments that there are.
        metrics: Of the process.
    """

    def __init__(
        self, log: Log, topic: str, store: SegmentStore, names: Collection[str], metrics: SegmentMetrics
    ) -> None:
        self._kafka, self._topic, self._store, self._names = log, topic, store, names
        self._metrics = metrics
        self._writer: LogWriter | None = None

    def read_topic(self) -> None:
        """1. Takes what the topic has and the store has not; then members of segments that are no more leave.

        Raises:
            LogError: It cannot be read, or nothing came for half a minute.
            StoreFull: The store has no room; what is there stays.
        """
        with self._kafka.topics() as topics:
            topic_id, ends = topics.describe(self._topic).topic_id, topics.ends(self._topic)
        place = self._store.place()
        there = place is not None and place.topic_id == topic_id and place.next.keys() == ends.keys()
        if place is None or not there or not all(begin <= place.next[one] <= end for one, (begin, end) in ends.items()):
            place = SegmentsPlace(topic_id, {partition: begin for partition, (begin, _) in ends.items()})
            self._store.begin_anew(place)
        heard_s = time.monotonic()
        with self._kafka.reader(self._topic, None, place.next) as reader:
            while any(reader.position(partition) < end for partition, (_, end) in ends.items()):
                batches = reader.poll(POLL_S)
                for batch in batches:
                    place = SegmentsPlace(topic_id, {**place.next, batch.partition: batch.next})
                    self._store.commit(_changes(batch), place)
                if batches:
                    heard_s = time.monotonic()
                elif time.monotonic() - heard_s > STALLED_S:
                    raise LogError(f"topic {self._topic}: nothing came for {STALLED_S:g} s")
        for segment in self._store.sizes().keys() - {*self._names}:
            for page in all_members(self._store, segment):
                self._write({(segment, user): None for user, _ in page})
            _log.info("segment %s is no more: its members left", segment)
        self._show()

    def take(self, judged: Sequence[JudgedUser]) -> None:
        """2. Takes users in and out, as they were judged; durable in the topic and seen by readers of the store when it returns.

        Raises:
            LogError: The topic cannot be written; come again with the same users.
            StoreFull: The store has no room; likewise.
        """
        wanted = [(name, one) for one in judged for name in self._names]
        before = self._store.memberships([(name, one.user) for name, one in wanted])
        changes: dict[Member, Membership | None] = {}
        for (name, one), membership in zip(wanted, before, strict=True):
            if (name in one.within) != (membership is not None):
                changes[name, one.user] = Membership(one.at_ms, one.version) if name in one.within else None
        if changes:
            self._write(changes)
            self._show()

    def compact(self) -> None:
        """Takes bytes of who left out of the store's file; raises as `CompactStore.compact`."""
        self._store.compact()

    def disconnect(self) -> None:
        """Ends the connection; the next change makes another."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, changes: Mapping[Member, Membership | None]) -> None:
        if self._writer is None:
            self._writer = self._kafka.writer()
        for member, membership in changes.items():
            self._writer.send(self._topic, None, key_of(member), value_of(membership))
        self._writer.flush()
        killpoints.reach("segments.written")
        self._store.commit(changes)
        for (name, _), membership in changes.items():
            if name in self._names:
                self._metrics.changes.labels(name, "left" if membership is None else "joined").inc()

    def _show(self) -> None:
        sizes = self._store.sizes()
        for name in self._names:
            self._metrics.members.labels(name).set(sizes.get(name, 0))


def _changes(batch: PartitionBatch) -> dict[Member, Membership | None]:
    """What records say, the last one of each member; one that says nothing of ours is left out."""
    found: dict[Member, Membership | None] = {}
    for offset, key, value in zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True):
        member = member_of(key)
        try:
            membership = membership_of(value)
        except ValueError:
            member = None
        if member is None:
            _log.warning("record %d of partition %d of the segments is left out", offset, batch.partition)
        else:
            found[member] = membership
    return found
