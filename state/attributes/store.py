"""The newest attributes of each user and item in LMDB, committed together with the positions in their topics.

If the store cannot be trusted (a power cut, damage, other settings, another topic), it is cleared and the topic is read
from its beginning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from state.attributes.values import SIDES
from state.disk import documents
from state.disk.lmdb_store import LmdbStore, put_all

OUTCOMES = ("value", "removed", "dead", "absent")


@dataclass(frozen=True)
class TopicPosition:
    """The position in one topic, and the settings with which the attributes were built.

    Attributes:
        identity: Digest of the fields and the salt from which the ids were computed.
        topic_id: Id of the topic; positions in another topic are invalid.
        next: Partition -> next offset.
        counts: Positions passed, by outcome (`OUTCOMES`).
        caught_up: Whether the topic was once read up to its end at connect time.
    """

    identity: str
    topic_id: str
    next: Mapping[int, int]
    counts: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    caught_up: bool = False


class AttributeStore(LmdbStore):
    """Attributes by side and id. One thread commits; any thread of any process may read.

    The arguments are those of `LmdbStore`.
    """

    noun = "attributes"
    databases = SIDES
    writer = "the stream or the applier"
    remedy = "remove it: it is read again from Kafka"
    origin = "Kafka"

    def read_many(self, side: str, ids: Sequence[int]) -> list[bytes | None]:
        """The values of several ids in one snapshot; decode them with `ids_in` and `texts_in`."""
        with self._env.begin(db=self._databases[side], buffers=False) as transaction:
            return [transaction.get(identity.to_bytes(8, "big")) for identity in ids]

    def position(self, side: str) -> TopicPosition | None:
        """The position in the side's topic; None if nothing was read yet."""
        with self._env.begin(db=self._meta) as transaction:
            stored = transaction.get(side.encode())
        return None if stored is None else documents.decode(stored, TopicPosition)

    def count(self, side: str) -> int:
        """The number of ids that have attributes."""
        with self._env.begin() as transaction:
            return int(transaction.stat(self._databases[side])["entries"])

    def commit(self, side: str, changes: Mapping[int, bytes | None], position: TopicPosition) -> None:
        """Sets or removes (None) the changed values and stores the position, in one transaction.

        If it raises, nothing was changed. Users of other shares are left out.
        """
        with self._write() as transaction:
            own = (identity for identity in changes if side != "user" or identity in self.shares)
            values = {identity.to_bytes(8, "big"): changes[identity] for identity in own}
            put_all(transaction, self._databases[side], values)
            transaction.put(side.encode(), msgspec.json.encode(position), db=self._meta)

    def restart_at(self, side: str, position: TopicPosition) -> None:
        """Clears a side and sets its position; the topic is read again from `position`."""
        with self._write() as transaction:
            transaction.drop(self._databases[side], delete=False)
            transaction.put(side.encode(), msgspec.json.encode(position), db=self._meta)


def pack(ids: Sequence[int], texts: Sequence[str | None]) -> bytes:
    """Encodes a value: `ids` and their texts, in the order of the attributes."""
    return np.array(ids, "<u8").tobytes() + json.dumps(texts, separators=(",", ":"), ensure_ascii=False).encode()


def ids_in(value: bytes, attributes: int) -> NDArray[np.uint64]:
    """The ids in a value, `[A]` uint64."""
    return np.frombuffer(value, "<u8", attributes)


def texts_in(value: bytes, attributes: int) -> list[str | None]:
    """The texts in a value; None for an attribute without one."""
    texts: list[str | None] = json.loads(value[8 * attributes :])
    return texts
