"""Attributes of users and items: decodes the records of their compacted topics, and derives the ids of the values.

    a value     the id of "user:age_band=25-34"; numbers become bands
    none        the id of "user:age_band": the record has no such value (null, "" or missing)
    unknown     the id of "user:age_band?": there is no record, or a tombstone removed it

The model treats none and unknown like any other value.

The newest attributes of each user and item are in LMDB, committed together with the positions in their topics.

If the store cannot be trusted (a power cut, damage, other settings, another topic), it is cleared and the topic is read
from its beginning.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from state.config.sections import Attributes
from state.config.sources import Field, fields_of
from state.disk import documents
from state.disk.lmdb_store import LmdbStore, put_all
from state.errors import DecodeError
from state.events.decoding import MOST_EVENT_BYTES, Reason, why
from state.events.identity import context_text, public_id

U64 = NDArray[np.uint64]

SIDES = ("user", "item")
CACHED_IDS = 100_000
TEXT_CHARACTERS = 200  # a longer value is shown truncated; its id is that of the whole text

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class Joined(NamedTuple):
    """The attributes of n rows, as of the time of the join.

    Attributes:
        user: `[n, Au]` uint64 ids of the users' attributes.
        item: `[n, Ai]` uint64 ids of the items' attributes; 0 where the row has no item.
        names: Id -> text, for values that were not announced recently.
        fields: The names of the attributes of users and of items.
    """

    user: U64
    item: U64
    names: Mapping[int, str]
    fields: tuple[tuple[str, ...], tuple[str, ...]]


def band(value: float, edges: Sequence[float]) -> str:
    """The band of a number. The lower edge belongs to the band.

    >>> [band(value, (10.0, 50.0)) for value in (9.5, 10, 50)]
    ['<10', '10-50', '>=50']
    """
    index = bisect_right(edges, value)
    if index == 0:
        return f"<{edges[0]:g}"
    return f">={edges[-1]:g}" if index == len(edges) else f"{edges[index - 1]:g}-{edges[index]:g}"


def id_of(key: bytes | None) -> str:
    """Decodes the plain id in a record's key; DecodeError if the key is missing, empty, or not valid UTF-8."""
    if not key:
        raise DecodeError(Reason.MISSING_FIELD if key is None else Reason.EMPTY_ID)
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise DecodeError(Reason.UNDECODABLE) from None


class AttributeTable:
    """The attributes of one side: decodes records and computes ids.

    Args:
        side: `user` or `item`.

    Attributes:
        unknown: `[A]` uint64, the ids used where there is no record.
        digest: Digest of everything that determines a record's ids.
    """

    def __init__(self, side: str, fields: Sequence[Field]) -> None:
        self.side = side
        self.fields = tuple(fields)
        self.names = tuple(field.name for field in fields)
        self.unknown = np.array([self.unknown_id(name) for name in self.names], np.uint64)
        described = json.dumps([side, *([field.name, field.path, *field.edges] for field in fields)])
        self.digest = hashlib.sha256(described.encode()).hexdigest()[:16]
        self._ids: dict[tuple[str, str | None], int] = {}

    def unknown_id(self, name: str) -> int:
        """The id of an attribute where there is no record."""
        return public_id(f"{self.side}:{name}?")

    def none_id(self, name: str) -> int:
        """The id of an attribute where the record has no value for it."""
        return public_id(f"{self.side}:{name}")

    def read(self, value: bytes, most_bytes: int = MOST_EVENT_BYTES) -> list[str | None]:
        """The values in a record as text, in the order of the attributes; None where there is no value.

        >>> AttributeTable("item", fields_of(["brand", "price:10|50"])).read(b'{"price": 12, "brand": null, "more": 1}')
        [None, '10-50']

        Raises:
            DecodeError: The record exceeds `most_bytes` or is not a JSON object, or a value has another type.
        """
        if len(value) > most_bytes:
            raise DecodeError(Reason.TOO_LARGE)
        try:
            record = _decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise DecodeError(why(value, error)) from None
        return [_text(field, record.get(field.path)) for field in self.fields]

    def ids(self, texts: Sequence[str | None]) -> list[int]:
        """The ids of the texts that `read` returned."""
        return [self._id(name, text) for name, text in zip(self.names, texts, strict=True)]

    def _id(self, name: str, text: str | None) -> int:
        key = name, text
        identity = self._ids.get(key)
        if identity is None:
            identity = self.none_id(name) if text is None else public_id(f"{self.side}:{name}={text}")
            if len(self._ids) >= CACHED_IDS:
                self._ids.clear()
            if len(text or "") <= TEXT_CHARACTERS:
                self._ids[key] = identity
        return identity


def _text(field: Field, value: Any) -> str | None:
    """A value as text, or the band of a number; DecodeError if the type is not allowed, or the number is not finite."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | bool | int | float):
        raise DecodeError(Reason.WRONG_TYPE)
    if not field.edges:
        return context_text(value)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DecodeError(Reason.WRONG_TYPE)
    return band(number, field.edges)


def tables_of(settings: Attributes) -> dict[str, AttributeTable]:
    """The tables of the sides that have a topic, users first."""
    return {
        side: AttributeTable(side, fields_of(getattr(settings, f"{side}_fields")))
        for side in SIDES
        if getattr(settings, f"{side}_topic")
    }


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
