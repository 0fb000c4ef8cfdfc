"""The members of segments: their records in the compacted topic, and this host's copy of it in LMDB; and lookalikes.

Other programs read the topic, so a change of the format of its records needs another topic. If the copy cannot be
trusted, it is rebuilt from the beginning of the topic.

Lookalikes are the users nearest to a segment's members, in one file per segment for the workers of this host. The
process that stores members removes all files when control changes, so none contains an erased user.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import lmdb
import msgspec

from state.disk import documents
from state.disk import files as durable
from state.disk.lmdb_store import LmdbStore, keys_with
from state.errors import CorruptStore

_KEY = re.compile(rb"([0-9a-f]{16}):([A-Za-z0-9_-]{1,64})")


class Membership(NamedTuple):
    """When a user joined a segment, milliseconds since the Unix epoch, and by which version."""

    since_ms: int
    version: int


Member = tuple[str, int]
"""A segment's name, and a pseudonym."""


def key_of(member: Member) -> bytes:
    """The key of a record."""
    segment, user = member
    return b"%016x:%b" % (user, segment.encode())


def value_of(membership: Membership | None) -> bytes | None:
    """The value of a record; None, a tombstone, for a user who is out.

    >>> value_of(Membership(1500, 7))
    b'{"in": true, "since": "1970-01-01T00:00:01.500Z", "since_ms": 1500, "version": 7}'
    """
    if membership is None:
        return None
    since = datetime.fromtimestamp(membership.since_ms / 1000, UTC).isoformat(timespec="milliseconds")
    fields = {"in": True, "since": since.replace("+00:00", "Z"), "since_ms": membership.since_ms}
    return json.dumps(fields | {"version": membership.version}).encode()


def member_of(key: bytes | None) -> Member | None:
    """Segment and user of a record with this key; None if the key is malformed.

    >>> member_of(b"00000000000000ab:sporty"), member_of(b"ab"), member_of(None)
    (('sporty', 171), None, None)
    """
    match = _KEY.fullmatch(key or b"")
    return None if match is None else (match[2].decode(), int(match[1], 16))


def membership_of(value: bytes | None) -> Membership | None:
    """The membership in a record's value; None for a tombstone, ValueError if it is not a record of a membership.

    >>> membership_of(value_of(Membership(1500, 7))), membership_of(None)
    (Membership(since_ms=1500, version=7), None)
    """
    if value is None:
        return None
    try:
        fields = json.loads(value)
        return Membership(int(fields["since_ms"]), int(fields["version"])) if fields["in"] is True else None
    except (KeyError, TypeError) as error:
        raise ValueError(f"no record of a membership: {error}") from None


_VALUE = struct.Struct(">qQ")
_POSITION, _SIZE = b"place", b"size:"
LAST_USER = (1 << 64) - 1


@dataclass(frozen=True)
class SegmentsPosition:
    """The topic, by its id, and the next offset of each partition up to which it was read."""

    topic_id: str
    next: Mapping[int, int]


class SegmentStore(LmdbStore):
    """Members by segment and pseudonym. One thread commits; any thread of any process may read.

    The arguments are those of `LmdbStore`.
    """

    noun = "members of segments"
    databases = ("members",)
    writer = "`springtide segments run`"
    remedy = "remove it: it is read again from Kafka"
    origin = "Kafka"

    def _bind(self) -> None:
        self._members = self._databases["members"]

    def position(self) -> SegmentsPosition | None:
        """The position up to which the topic was read; None before anything was read."""
        stored = self._stored(_POSITION)
        return None if stored is None else documents.decode(stored, SegmentsPosition)

    def sizes(self) -> dict[str, int]:
        """The number of members of each segment, in one snapshot; empty segments may be missing."""
        with self._env.begin(db=self._meta) as transaction:
            entries = keys_with(transaction.cursor(), _SIZE, _SIZE)
        return {key[len(_SIZE) :].decode(): int(value) for key, value in entries}

    def memberships(self, members: Sequence[Member]) -> list[Membership | None]:
        """The membership of each user in the segment, in one snapshot; None for a user who is not in it."""
        with self._env.begin(db=self._members) as transaction:
            values = [transaction.get(_key(member)) for member in members]
        return [None if value is None else Membership(*_VALUE.unpack(value)) for value in values]

    def page(self, segment: str, start: int, most: int) -> list[tuple[int, Membership]]:
        """The first `most` members of a segment from the pseudonym `start` on, in the order of pseudonyms."""
        prefix = _prefix(segment)
        with self._env.begin(db=self._members) as transaction:
            pairs = keys_with(transaction.cursor(), prefix, _key((segment, start)), most)
        return [(int.from_bytes(key[len(prefix) :], "big"), Membership(*_VALUE.unpack(value))) for key, value in pairs]

    def commit(self, changes: Mapping[Member, Membership | None], position: SegmentsPosition | None = None) -> None:
        """Adds members, or removes those with None, and stores `position`, if given, as the position; atomic."""
        moved = dict[str, int]()
        with self._write() as transaction:
            for member, membership in changes.items():
                key = _key(member)
                was = transaction.get(key, db=self._members) is not None
                if membership is not None:
                    transaction.put(key, _VALUE.pack(*membership), db=self._members)
                elif was:
                    transaction.delete(key, db=self._members)
                moved[member[0]] = moved.get(member[0], 0) + (membership is not None) - was
            self._note(transaction, moved, position)

    def restart_at(self, position: SegmentsPosition) -> None:
        """Deletes everything; the topic is then read again from `position`."""
        sizes = {name: -size for name, size in self.sizes().items()}
        with self._write() as transaction:
            transaction.drop(self._members, delete=False)
            self._note(transaction, sizes, position)

    def _note(self, transaction: lmdb.Transaction, moved: Mapping[str, int], position: SegmentsPosition | None) -> None:
        for name, change in moved.items():
            key = _SIZE + name.encode()
            size = int(transaction.get(key, db=self._meta) or 0) + change
            if size:
                transaction.put(key, b"%d" % size, db=self._meta)
            else:
                transaction.delete(key, db=self._meta)
        if position is not None:
            transaction.put(_POSITION, msgspec.json.encode(position), db=self._meta)


def all_members(store: SegmentStore, segment: str, at_once: int = 1000) -> Iterator[list[tuple[int, Membership]]]:
    """All members of a segment in the order of pseudonyms, in pages. Concurrent changes may be missed."""
    start: int | None = 0
    while start is not None:
        page = store.page(segment, start, at_once)
        start = page[-1][0] + 1 if len(page) == at_once and page[-1][0] < LAST_USER else None
        if page:
            yield page


def _prefix(segment: str) -> bytes:
    return segment.encode() + b"\0"


def _key(member: Member) -> bytes:
    segment, user = member
    return _prefix(segment) + user.to_bytes(8, "big")


class NearUser(NamedTuple):
    """A user, by the pseudonym (16 hexadecimal digits), and the mean cosine similarity with the members."""

    pseudonym: str
    similarity: float


class PrecisionAt(NamedTuple):
    """Precision at k of several rankings: the share of held-out members among the first k."""

    k: int
    lookalikes: float
    most_clicks: float
    chance: float


class LookalikeList(msgspec.Struct, frozen=True):
    """The lookalikes of one segment.

    Attributes:
        version: The version whose embeddings were used.
        members: Number of members with which users were compared.
        lookalikes: The users, nearest first.
        precision: Quality of the ranking; empty if too few members could be held out.
    """

    version: int
    at_ms: int
    members: int
    users: int
    lookalikes: tuple[NearUser, ...]
    precision: tuple[PrecisionAt, ...]


def write_lookalikes(folder: Path, segment: str, lookalikes: LookalikeList) -> None:
    """Writes a segment's list; durable once its directory is in place and synced."""
    durable.write(folder / f"{segment}.json", documents.encode_sealed(lookalikes))


def read_lookalikes(folder: Path, segment: str) -> LookalikeList | None:
    """Reads a segment's list; None if there is none."""
    path = folder / f"{segment}.json"
    try:
        return documents.decode_sealed(path.read_bytes(), LookalikeList)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptStore(f"{path} is damaged ({error})", "remove it: it is computed again") from error
