"""Follows a compacted topic of attributes and writes the attributes to the store."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from state.attributes.values import (
    OUTCOMES,
    TEXT_CHARACTERS,
    AttributeStore,
    AttributeTable,
    TopicPosition,
    id_of,
    pack,
)
from state.config.sections import Kafka
from state.errors import DecodeError, LogError, StoreFull
from state.events.decoding import DeadLetter, Reason
from state.events.identity import Salt, public_id, user_id
from state.log import Log, PartitionBatch
from state.log.follow import Follower, Opening, Position
from state.positions import Source
from state.process import killpoints
from state.process.log_lines import SaidOnce
from state.storage import Room

RECORDS = 5000
POLL_S = 0.1
RETRY_S = 1.0
logger = logging.getLogger(__name__)

Report = Callable[[Sequence[DeadLetter]], None]


class AttributeFollower:
    """Keeps one side of the store (users or items) up to date with its topic. For one thread, the store's only writer.

    Args:
        report: Receives refused records. When it returns, they are durably reported.
    """

    def __init__(
        self, kafka: Kafka, topic: str, table: AttributeTable, salt: Salt, store: AttributeStore, report: Report
    ) -> None:
        self._topic, self._table, self._store = topic, table, store
        self._report, self._salt = report, salt
        self._identity = f"{table.digest}-{salt.fingerprint}" if table.side == "user" else table.digest
        self._log = Follower(Log(kafka), topic, stored=self._stored, opened=self._opened)
        self._ends: dict[int, int] = {}
        self.position = store.position(table.side) or TopicPosition(self._identity, "", {})

    @property
    def side(self) -> str:
        """The side: user or item."""
        return self._table.side

    @property
    def connected(self) -> bool:
        """Whether the topic is being read."""
        return self._log.connected

    @property
    def unread(self) -> int:
        """Positions between the follower's position and the topic's end as of `connect`."""
        return sum(max(0, end - self.position.next.get(partition, 0)) for partition, end in self._ends.items())

    def connect(self) -> None:
        """Starts to read at the position that the store holds."""
        self._log.connect()

    def disconnect(self) -> None:
        """Closes the reader; the next step resumes at the position that the store holds."""
        self._log.disconnect()

    def step(self, timeout_s: float) -> list[int]:
        """Polls for at most `timeout_s` and commits the records; returns the ids whose attributes changed.

        Raises:
            LogError: The topic cannot be read now; the next step connects again.
            StoreFull: This step committed nothing; call `disconnect`.
        """
        changed: list[int] = []
        for batch in self._log.poll(timeout_s, RECORDS):
            changed += self._take(batch)
        return changed

    def _stored(self) -> Position | None:
        position = self._store.position(self.side)
        return None if position is None else Position(position.topic_id, position.next)

    def _opened(self, opening: Opening) -> None:
        """Clears the store and reads from the beginning, unless the store matches the topic up to its position."""
        begins = {partition: begin for partition, (begin, _) in opening.ends.items()}
        position = self._store.position(self.side)
        if (
            position is None
            or position.identity != self._identity
            or not opening.resumed
            or not position.next.keys() <= begins.keys()
        ):
            if position is not None:
                logger.warning("the %ss' attributes are read again from the beginning of %s", self.side, self._topic)
            position = TopicPosition(self._identity, opening.topic_id, begins)
            self._store.restart_at(self.side, position)
            for partition, begin in begins.items():
                self._log.reader.seek(partition, begin)
        self.position = replace(position, next={**begins, **position.next})
        self._ends = {partition: end for partition, (_, end) in opening.ends.items()}
        self._note_end()

    def _take(self, batch: PartitionBatch) -> list[int]:
        source = Source(batch.topic_id, batch.partition)
        changes: dict[int, bytes | None] = {}
        bad: list[DeadLetter] = []
        counts: Counter[str] = Counter(dict(self.position.counts))
        for offset, key, value in zip(batch.offsets.tolist(), batch.keys, batch.values, strict=True):
            try:
                identity = self._id(key)
                stored = None if value is None else packed(self._table, value)
            except DecodeError as error:
                bad.append(DeadLetter(source, offset, Reason(error.reason)))
                continue
            changes[identity] = stored
            counts["removed" if stored is None else "value"] += 1
        for first, after, _ in batch.corrupt:
            bad += [DeadLetter(source, lost, Reason.CORRUPT_RECORD) for lost in range(first, after)]
        counts["dead"] += len(bad)
        passed = sum(counts[name] for name in OUTCOMES) - sum(self.position.counts.values())
        counts["absent"] += batch.next - batch.first - passed
        if bad:
            # Reports before the commit, so that a crash in between reports the records twice rather than never.
            self._report(bad)
        killpoints.reach("attributes.reported")
        self.position = replace(
            self.position, next={**self.position.next, batch.partition: batch.next}, counts=dict(counts)
        )
        self._note_end(commit=False)
        self._store.commit(self.side, changes, self.position)
        killpoints.reach("attributes.committed")
        return list(changes)

    def _note_end(self, commit: bool = True) -> None:
        if self.position.caught_up or self.unread:
            return
        self.position = replace(self.position, caught_up=True)
        if commit:
            self._store.commit(self.side, {}, self.position)

    def _id(self, key: bytes | None) -> int:
        text = id_of(key)
        return user_id(self._salt, text) if self.side == "user" else public_id(text)


def packed(table: AttributeTable, value: bytes) -> bytes:
    """A record's value as the store keeps it.

    Raises:
        DecodeError: The record is invalid or too large.
    """
    texts = table.read(value)
    return pack(table.ids(texts), [text and text[:TEXT_CHARACTERS] for text in texts])


def follow(followers: Sequence[AttributeFollower], timeout_s: float) -> dict[str, list[int]]:
    """Runs one step of each follower; returns the ids whose attributes changed, by side."""
    return {follower.side: follower.step(timeout_s) for follower in followers}


def keep_following(
    followers: Sequence[AttributeFollower],
    stop: threading.Event,
    take: Callable[[str, list[int]], None],
    meanwhile: str,
    room: Room | None = None,
) -> None:
    """Follows until `stop` is set. An unreachable broker, a missing topic or a full disk is retried.

    Args:
        followers: The followers of both sides.
        stop: Ends the loop.
        take: Called with a side and the ids whose attributes changed.
        meanwhile: Describes, for the log message, what continues while a topic cannot be read.
        room: Counts how often the store was full.
    """
    say = SaidOnce(logger.warning)
    while not stop.is_set():
        try:
            changed = follow(followers, POLL_S)
            for side, ids in changed.items():
                take(side, ids)
            say.clear()
            # A refused batch is read again. A poll without records does not show that there is space again.
            if room is not None and (any(changed.values()) or not any(follower.unread for follower in followers)):
                room.found("following attributes")
        except (LogError, StoreFull) as error:
            # The store holds the committed positions; reading resumes there.
            if room is not None and isinstance(error, StoreFull):
                room.refused(error, "following attributes")
            else:
                say(f"{error}; {meanwhile}, and it is tried again")
            for follower in followers:
                follower.disconnect()
            stop.wait(RETRY_S)
