"""Users whose clicks up to a place are forgotten for good: what an erasure names, and which rows and events are its.

An erasure names users and, for each source of clicks, the offset up to which
theirs are gone. What they click later makes a new user of the same pseudonym.
So it is asked of positions, never of the clock: a record that lies in a log or
a copy stays gone whoever reads it again, and whenever.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from state.features.masked_users import MaskedUsers
from state.positions import Range

Flags = NDArray[np.bool_]
Until = tuple[tuple[int, int, int], ...]

EVERYTHING = (1 << 63) - 1
"""The offset of a source, all of whose clicks are named: one of a topic that nobody writes any more."""


@dataclass(frozen=True)
class Erasure:
    """Users that are forgotten.

    Attributes:
        id: Its number, from 1 on; none is given twice.
        generation: Of the control that set it.
        at_ms: When that was, wall clock.
        users: Their pseudonyms.
        until: (topic word, partition, next): clicks before that offset are gone; a source without an entry has none.
    """

    id: int
    generation: int
    at_ms: int
    users: MaskedUsers
    until: Until = ()

    def _offsets(self, topic: NDArray[Any], partition: NDArray[Any], offset: NDArray[Any]) -> Flags:
        out = np.zeros(len(offset), np.bool_)
        for word, part, after in self.until:
            out |= (topic == word) & (partition == part) & (offset < after)
        return out

    def to_bytes(self, before: str) -> bytes:
        """The erasure as a file, which names the one before it: a line of JSON, then the users as `MaskedUsers` writes them.

        Args:
            before: SHA-256 of the file of the erasure before; empty for the first.
        """
        head = {
            "id": self.id,
            "generation": self.generation,
            "at_ms": self.at_ms,
            "until": self.until,
            "before": before,
        }
        return json.dumps(head, sort_keys=True).encode() + b"\n" + self.users.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[Erasure, str]:
        """What `to_bytes` wrote: the erasure, and the SHA-256 of the file before.

        Raises:
            ValueError: It is no such file.
        """
        line, _, users = data.partition(b"\n")
        head = json.loads(line)
        until = tuple((int(word), int(part), int(after)) for word, part, after in head["until"])
        made = cls(int(head["id"]), int(head["generation"]), int(head["at_ms"]), MaskedUsers.from_bytes(users), until)
        return made, str(head["before"])


@dataclass(frozen=True)
class Erased:
    """All erasures so far; never changed.

    Attributes:
        entries: In order.

    >>> gone = Erased((Erasure(1, 5, 0, MaskedUsers.of([7]), ((42, 0, 100),)),))
    >>> gone.last, gone.hides(7, through=0), gone.hides(7, through=1), gone.hides(8, through=0)
    (1, True, False, False)
    >>> Erased.from_bytes(gone.to_bytes()) == gone
    True
    """

    entries: tuple[Erasure, ...] = ()
    NOBODY: ClassVar[Erased]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __iter__(self) -> Iterator[Erasure]:
        return iter(self.entries)

    def __repr__(self) -> str:
        # Not the pseudonyms: an error or a log line may hold it.
        return f"Erased({len(self.entries)})"

    @property
    def last(self) -> int:
        """The number of the newest erasure; 0 where there is none."""
        return self.entries[-1].id if self.entries else 0

    @cached_property
    def users(self) -> MaskedUsers:
        """All users that were ever named."""
        return reduce(lambda known, one: known | one.users, self.entries, MaskedUsers.NOBODY)

    def after(self, through: int) -> Erased:
        """The erasures whose number is above `through`."""
        return self if not through else Erased(tuple(one for one in self.entries if one.id > through))

    def up_to(self, through: int) -> Erased:
        """The erasures whose number is `through` or below."""
        return self if through >= self.last else Erased(tuple(one for one in self.entries if one.id <= through))

    def hides(self, user: int, through: int) -> bool:
        """Whether what is kept of `user` counts no more in a copy that has taken erasures up to `through` into account."""
        return user in self.users and any(one.id > through and user in one.users for one in self.entries)

    def rows(
        self,
        user: NDArray[np.uint64],
        source: NDArray[np.uint16],
        offset: NDArray[np.int64],
        ranges: Sequence[Range],
    ) -> Flags:
        """Which rows of a batch are gone.

        Args:
            user: `[n]` uint64 pseudonyms.
            source: `[n]` uint16 indices into `ranges`.
            offset: `[n]` int64.
            ranges: The batch's source ranges.

        Returns:
            `[n]` bool.
        """
        out = np.zeros(len(user), np.bool_)
        # Erased users hardly ever come again: the rest is done for their rows alone.
        theirs = np.flatnonzero(self.users.has(user))
        if not len(theirs):
            return out
        words, parts = ([getattr(part.source, name) for part in ranges] for name in ("topic", "partition"))
        topic, partition = (np.array(values or [0], np.int64)[source[theirs]] for values in (words, parts))
        for one in self.entries:
            mine = one.users.has(user[theirs])
            if mine.any():
                out[theirs[mine & one._offsets(topic, partition, offset[theirs])]] = True
        return out

    def events(self, history: NDArray[Any], user: int) -> Flags:
        """Which events of one user's history (`[m]` EVENT) are gone."""
        out = np.zeros(len(history), np.bool_)
        if user in self.users:
            for one in self.entries:
                if user in one.users:
                    out |= one._offsets(history["topic"], history["partition"], history["offset"])
        return out

    @cached_property
    def files(self) -> tuple[tuple[str, bytes], ...]:
        """By SHA-256 the file of each erasure, in order; the last one leads to all others."""
        found: list[tuple[str, bytes]] = []
        for one in self.entries:
            data = one.to_bytes(found[-1][0] if found else "")
            found.append((hashlib.sha256(data).hexdigest(), data))
        return tuple(found)

    @property
    def digest(self) -> str:
        """The SHA-256 of the newest erasure's file; empty without one."""
        return self.files[-1][0] if self.files else ""

    def to_bytes(self) -> bytes:
        """All of them in one value: their files, each behind its length."""
        return b"".join(len(data).to_bytes(8, "big") + data for _, data in self.files)

    @classmethod
    def from_bytes(cls, data: bytes) -> Erased:
        """What `to_bytes` wrote.

        Raises:
            ValueError: It is no such value.
        """
        found, at = [], 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "big")
            found.append(Erasure.from_bytes(data[at + 8 : at + 8 + size])[0])
            at += 8 + size
        return cls(tuple(found))

    def and_also(
        self, users: MaskedUsers, until: Iterable[tuple[int, int, int]], generation: int, at_ms: int
    ) -> Erased:
        """These, and one more."""
        return Erased((*self.entries, Erasure(self.last + 1, generation, at_ms, users, tuple(sorted(until)))))


Erased.NOBODY = Erased()
