"""Follows a topic of attributes into the store: the last record of a key wins, a tombstone removes.

1. Records are read by position; what was read is stored beside the attributes.
2. A record that says nothing (no key, no JSON object, a wrong type) is refused
   with a reason, reported before the positions move, and changes nothing.
3. The newest record of each key and the positions are one commit.

The topic is read again from its beginning where the store belongs to other
fields, another salt or another topic, or where positions are gone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from state.attributes.store import OUTCOMES, AttributeStore, TopicPosition, pack
from state.attributes.values import TEXT_CHARACTERS, AttributeTable, id_of
from state.config.sections import Kafka
from state.errors import DecodeError, GapError, LogError, StoreFull
from state.events.dead_letters import DeadLetter, Reason
from state.events.identity import Salt, public_id, user_id
from state.log import PartitionBatch, Reader, Topics
from state.positions import Source
from state.process import killpoints
from state.process.said_once import SaidOnce
from state.storage.waiting import Room

RECORDS = 5000
POLL_S = 0.1
REFRESH_S = 5.0
RETRY_S = 1.0
logger = logging.getLogger(__name__)

Report = Callable[[Sequence[DeadLetter]], None]


class AttributeFollower:
    """Keeps one side of the store up with its topic. One thread, the store's only writer.

    Args:
        kafka: How to connect.
        topic: Its name.
        table: What a record says.
        salt: Of the users' pseudonyms.
        store: Where attributes go.
        report: Takes refused records; when it returns they are told for good.
        most_bytes: Larger records are refused.
    """

    def __init__(
        self,
        kafka: Kafka,
        topic: str,
        table: AttributeTable,
        salt: Salt,
        store: AttributeStore,
        report: Report,
        most_bytes: int,
    ) -> None:
        self._kafka, self._topic, self._table, self._store = kafka, topic, table, store
        self._report, self._most_bytes, self._salt = report, most_bytes, salt
        self._identity = f"{table.digest}-{salt.fingerprint}" if table.side == "user" else table.digest
        self._reader: Reader | None = None
        self._ends: dict[int, int] = {}
        self._refresh_s = 0.0
        self.place = store.place(table.side) or TopicPosition(self._identity, "", {})

    @property
    def side(self) -> str:
        """The side: user or item."""
        return self._table.side

    @property
    def connected(self) -> bool:
        """Whether the topic is being read."""
        return self._reader is not None

    @property
    def unread(self) -> int:
        """Positions between ours and where the topic ended when it was connected."""
        return sum(max(0, end - self.place.next.get(partition, 0)) for partition, end in self._ends.items())

    def connect(self) -> None:
        """Begins to read where the store ends.

        Raises:
            UnknownTopic: There is no such topic.
            LogError: No broker answered, or the cluster refused.
        """
        with Topics(self._kafka) as topics:
            topic_id, ends = topics.describe(self._topic).topic_id, topics.ends(self._topic)
        place = self._store.place(self.side)
        anew = TopicPosition(self._identity, topic_id, {partition: begin for partition, (begin, _) in ends.items()})
        if (
            place is None
            or (place.identity, place.topic_id) != (self._identity, topic_id)
            or _is_gone(place.next, ends)
        ):
            if place is not None:
                logger.warning("the %ss' attributes are read anew from the beginning of %s", self.side, self._topic)
            self._store.begin_anew(self.side, anew)
            place = anew
        self.place = replace(place, next={**anew.next, **place.next})
        self._ends = {partition: end for partition, (_, end) in ends.items()}
        self._reader = Reader(self._kafka, self._topic, None, self.place.next)
        self._note_end()

    def disconnect(self) -> None:
        """Closes the reader; `connect` goes on where the store ends."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def step(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> list[int]:
        """Takes what has arrived, waiting at most `timeout_s`; returns the ids whose attributes changed.

        Raises:
            LogError: The topic cannot be read on; `disconnect` and `connect` again.
            StoreFull: Nothing of this step was kept.
        """
        assert self._reader is not None
        changed: list[int] = []
        for batch in self._reader.poll(timeout_s, RECORDS):
            changed += self._take(batch)
        if clock() >= self._refresh_s:
            self._reader.refresh()
            self._refresh_s = clock() + REFRESH_S
        return changed

    def _take(self, batch: PartitionBatch) -> list[int]:
        source = Source(batch.topic_id, batch.partition)
        changes: dict[int, bytes | None] = {}
        bad: list[DeadLetter] = []
        counts: Counter[str] = Counter(dict(self.place.counts))
        for offset, key, value in zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True):
            try:
                one, packed = self._id(key), None if value is None else self._pack(value)
            except DecodeError as error:
                bad.append(DeadLetter(source, offset, Reason(error.reason), key, value))
                continue
            changes[one] = packed
            counts["removed" if packed is None else "value"] += 1
        for first, after, _ in batch.corrupt:
            bad += [DeadLetter(source, lost, Reason.CORRUPT_RECORD, None, None) for lost in range(first, after)]
        counts["dead"] += len(bad)
        passed = sum(counts[name] for name in OUTCOMES) - sum(self.place.counts.values())
        counts["absent"] += batch.next - batch.first - passed
        if bad:
            # Told first: a crash in between tells it twice, and never not at all.
            self._report(bad)
        killpoints.reach("attributes.reported")
        self.place = replace(self.place, next={**self.place.next, batch.partition: batch.next}, counts=dict(counts))
        self._note_end(commit=False)
        self._store.commit(self.side, changes, self.place)
        killpoints.reach("attributes.committed")
        return list(changes)

    def _note_end(self, commit: bool = True) -> None:
        """Remembers that the topic was once read to where it ended."""
        if self.place.caught_up or self.unread:
            return
        self.place = replace(self.place, caught_up=True)
        if commit:
            self._store.commit(self.side, {}, self.place)

    def _id(self, key: bytes | None) -> int:
        text = id_of(key)
        return user_id(self._salt, text) if self.side == "user" else public_id(text)

    def _pack(self, value: bytes) -> bytes:
        texts = self._table.read(value, self._most_bytes)
        return pack(self._table.ids(texts), [text and text[:TEXT_CHARACTERS] for text in texts])


def follow(followers: Sequence[AttributeFollower], timeout_s: float) -> dict[str, list[int]]:
    """One round over both sides; one whose positions are gone is read anew in the next round.

    Returns:
        By side the ids whose attributes changed.

    Raises:
        LogError: A topic cannot be read now; what was read is kept.
    """
    changed: dict[str, list[int]] = {}
    for one in followers:
        if not one.connected:
            one.connect()
        try:
            changed[one.side] = one.step(timeout_s)
        except GapError as error:
            logger.warning("%s", error)
            one.disconnect()
    return changed


def keep_following(
    followers: Sequence[AttributeFollower],
    stop: threading.Event,
    take: Callable[[str, list[int]], None],
    meanwhile: str,
    room: Room | None = None,
) -> None:
    """Follows until `stop`; a broker that is away, a topic that is gone or a disk that is full costs only time.

    Args:
        followers: Of both sides.
        stop: Ends it.
        take: Is told a side and the ids whose attributes changed.
        meanwhile: What goes on while a topic cannot be read, for the log.
        room: Counts how often the store had none.

    Raises:
        StoreError: The store cannot be written, though there is room.
    """
    say = SaidOnce(logger.warning)
    while not stop.is_set():
        try:
            changed = follow(followers, POLL_S)
            for side, ids in changed.items():
                take(side, ids)
            say.clear()
            # What was refused is read again; a look that finds nothing yet says nothing of room.
            if room is not None and (any(changed.values()) or not any(one.unread for one in followers)):
                room.found("following attributes")
        except (LogError, StoreFull) as error:
            # The store has how far it was read: that is where it is read on.
            if room is not None and isinstance(error, StoreFull):
                room.refused(error, "following attributes")
            else:
                say(f"{error}; {meanwhile}, and it is tried again")
            for one in followers:
                one.disconnect()
            stop.wait(RETRY_S)


def _is_gone(ours: Mapping[int, int], ends: Mapping[int, tuple[int, int]]) -> bool:
    """Whether a position is not in the log any more, or not yet.

    >>> _is_gone({0: 5}, {0: (5, 9), 1: (0, 3)}), _is_gone({0: 4}, {0: (5, 9)}), _is_gone({1: 0}, {0: (0, 0)})
    (False, True, True)
    """
    return any(
        not ends.get(partition, (1, 0))[0] <= at <= ends.get(partition, (1, 0))[1] for partition, at in ours.items()
    )
