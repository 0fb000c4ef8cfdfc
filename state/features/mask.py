"""The mask: the clicks that an operator excludes, by log position, time, user, item or category, and those of erased users.

A masked event is left out of every window as if it had never happened, but is not deleted. The bound on a history
counts events before the mask is applied, so a masked event still uses one of the `features.history` places of its user.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.events.identity import public_id
from state.features.erased import Erased, MaskedUsers
from state.positions import Range

I64 = NDArray[np.int64]
HASH_WORD = {"category": 1, "item": 2}
"""Index of the int64 word with the hash, in an event as the window kernel reads it."""


Column = Literal["item", "category"]


class Named(NamedTuple):
    """The clicks on one item, or in one category, within a time span.

    Attributes:
        column: Whether `name` is an item or a category.
        name: As in the clicks.
        first_ms: Event time in milliseconds from which they are excluded.
        next_ms: Event time up to which they are excluded, itself not included.
    """

    column: Column
    name: str
    first_ms: int
    next_ms: int


class ClickColumns(NamedTuple):
    """The columns of a batch that masks read, `[n]` each.

    Attributes:
        user: uint64 pseudonyms.
        item: uint64 hashes.
        category: uint64 hashes.
        at_ms: int64 event times.
        source: uint16 indices into the ranges of the batch.
        offset: int64.
    """

    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    at_ms: I64
    source: NDArray[np.uint16]
    offset: I64

    @classmethod
    def of(cls, batch: Any) -> ClickColumns:
        """The columns of an `EventBatch` or a `MicroBatch`."""
        return cls(*(getattr(batch, name) for name in cls._fields))


class Hidden(NamedTuple):
    """The parts of a mask that depend only on the event, in the form that the window kernel reads.

    Attributes:
        offsets: `[k, 3]` int64: topic | partition << 32, first, next.
        times: `[t, 2]` int64: from, to; milliseconds.
        named: `[m, 4]` int64: word of the event, hash of the item or category, from, to.
    """

    offsets: I64
    times: I64
    named: I64


@dataclass(frozen=True)
class Mask:
    """The events that no answer and no training step may use.

    Attributes:
        generation: The control generation that set it.
        offsets: (topic word, partition, first, next); offsets in [first, next).
        times: (from, to) of event time in milliseconds, [from, to).
        users: Pseudonyms.
        named: Items and categories, each with a time span.
        erased: Erased users, each up to an offset. No rollback and no `unmask` undoes an erasure.
    """

    generation: int = 0
    offsets: tuple[tuple[int, int, int, int], ...] = ()
    times: tuple[tuple[int, int], ...] = ()
    users: MaskedUsers = MaskedUsers.NOBODY
    erased: Erased = Erased.NOBODY
    named: tuple[Named, ...] = ()
    NONE: ClassVar[Mask]

    def __bool__(self) -> bool:
        return bool(self.offsets or self.times or self.users or self.erased or self.named)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the mask names, independent of the generation."""
        parts: list[Any] = [sorted(self.offsets), sorted(self.times), self.users.digest, self.erased.digest]
        if self.named:
            parts.append(sorted(self.named))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def hidden(self) -> Hidden:
        """The parts that the window kernel checks per event; the caller applies users and erasures."""
        offsets = [(topic | partition << 32, first, last) for topic, partition, first, last in self.offsets]
        return Hidden(
            np.array(offsets, np.int64).reshape(-1, 3),
            np.array(self.times, np.int64).reshape(-1, 2),
            np.array(
                [
                    (HASH_WORD[column], np.uint64(public_id(name)).astype(np.int64), begin, end)
                    for column, name, begin, end in self.named
                ],
                np.int64,
            ).reshape(-1, 4),
        )

    def rows(self, clicks: ClickColumns, ranges: Sequence[Range]) -> NDArray[np.bool_]:
        """Which rows of a batch are masked (`[n]` bool); `ranges` are the batch's source ranges."""
        words = [part.source.topic for part in ranges] or [0]
        partitions = [part.source.partition for part in ranges] or [0]
        topic, partition = np.array(words, np.int64)[clicks.source], np.array(partitions, np.int64)[clicks.source]
        out = self._events(topic, partition, clicks.offset, clicks.at_ms, clicks.item, clicks.category)
        if self.users:
            out |= self.users.has(clicks.user)
        if self.erased:
            out |= self.erased.rows(clicks.user, clicks.source, clicks.offset, ranges)
        return out

    def events(self, history: NDArray[Any], user: int = 0) -> NDArray[np.bool_]:
        """Which events of one user's history (`[m]` EVENT) are masked."""
        if user in self.users:
            return np.ones(len(history), np.bool_)
        names = ("topic", "partition", "offset", "at_ms", "item", "category")
        out = self._events(*(history[name] for name in names))
        return out | self.erased.events(history, user) if self.erased else out

    def _events(
        self,
        topic: NDArray[Any],
        partition: NDArray[Any],
        offset: NDArray[Any],
        at_ms: NDArray[Any],
        item: NDArray[Any],
        category: NDArray[Any],
    ) -> NDArray[np.bool_]:
        out = np.zeros(len(offset), np.bool_)
        for word, part, first, last in self.offsets:
            out |= (topic == word) & (partition == part) & (offset >= first) & (offset < last)
        for begin, end in self.times:
            out |= (at_ms >= begin) & (at_ms < end)
        for column, name, begin, end in self.named:
            out |= ((item if column == "item" else category) == public_id(name)) & (at_ms >= begin) & (at_ms < end)
        return out

    def to_json(self) -> dict[str, Any]:
        """The mask as JSON values, users in order; erasures are left out."""
        return {**self._without_users(), "users": [f"{user:016x}" for user in self.users]}

    @classmethod
    def from_json(cls, values: dict[str, Any] | str) -> Mask:
        """Decodes the output of `to_json`, as values or as text."""
        document: dict[str, Any] = json.loads(values) if isinstance(values, str) else values
        return cls._of(document, MaskedUsers.of(int(user, 16) for user in document.get("users", ())))

    def to_bytes(self) -> bytes:
        """Encodes the mask compactly: a line of JSON without users, then the bytes of `users` and `erased`."""
        head = {**self._without_users(), "masked_users": len(self.users)}
        return json.dumps(head).encode() + b"\n" + self.users.to_bytes() + self.erased.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> Mask:
        """Decodes the output of `to_bytes`, or the JSON that release 0.1.0 wrote; ValueError if the data is neither."""
        line, _, users = data.partition(b"\n")
        document = json.loads(line)
        if "users" in document:
            return cls.from_json(document)
        size = 8 * int(document["masked_users"]) if "masked_users" in document else len(users)
        masked, erased = MaskedUsers.from_bytes(users[:size]), Erased.from_bytes(users[size:])
        return replace(cls._of(document, masked), erased=erased)

    def _without_users(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "offsets": [list(part) for part in self.offsets],
            "times": [list(part) for part in self.times],
            **({"named": [list(part) for part in self.named]} if self.named else {}),
        }

    @classmethod
    def _of(cls, document: dict[str, Any], users: MaskedUsers) -> Mask:
        return cls(
            generation=int(document.get("generation", 0)),
            offsets=tuple((int(a), int(b), int(c), int(d)) for a, b, c, d in document.get("offsets", ())),
            times=tuple((int(a), int(b)) for a, b in document.get("times", ())),
            users=users,
            named=tuple(Named(*part) for part in document.get("named", ())),
        )


Mask.NONE = Mask()

MaskAt = Callable[[int], Mask]
"""Control generation -> the mask of the records that the stream wrote under it."""


def always(mask: Mask) -> MaskAt:
    """Uses the same mask for every record."""
    return lambda _: mask
