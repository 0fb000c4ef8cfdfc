"""Sets of users, and erasures: the erased users, the offsets up to which they are erased, and the rows and events to remove.

An erasure names users and, for each source of clicks, the offset below which their clicks are removed. Later clicks
create a new user with the same pseudonym. Erasures depend on positions, never on the clock, so a record in a log or a
copy stays erased whenever it is read again.
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

from state.positions import Range

Flags = NDArray[np.bool_]
Until = tuple[tuple[int, int, int], ...]

STORED = np.dtype("<u8")

EVERYTHING = (1 << 63) - 1
"""Offset of a source all of whose clicks are erased, because its topic is no longer written."""


class MaskedUsers:
    """Pseudonyms of users, `[n]` uint64, ascending and unique; immutable."""

    NOBODY: ClassVar[MaskedUsers]

    def __init__(self, ids: NDArray[np.uint64]) -> None:
        self.ids = ids
        self.ids.flags.writeable = False

    @classmethod
    def of(cls, users: Iterable[int]) -> MaskedUsers:
        """Builds the set from pseudonyms in any order."""
        return cls(np.unique(np.fromiter(users, np.uint64)))

    @classmethod
    def from_bytes(cls, data: bytes) -> MaskedUsers:
        """Decodes the output of `to_bytes`; ValueError if the pseudonyms are not in order."""
        ids = np.frombuffer(data, STORED).astype(np.uint64)
        if not np.all(ids[1:] > ids[:-1]):
            raise ValueError("users of a mask are not in order")
        return cls(ids)

    def to_bytes(self) -> bytes:
        """Encodes the pseudonyms, 8 bytes each, little-endian and ascending."""
        return self.ids.astype(STORED).tobytes()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of `to_bytes`, hexadecimal; it names the file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def has(self, users: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of `users` (`[n]` uint64) are in the set (`[n]` bool)."""
        members = np.zeros(len(users), np.bool_)
        if not len(self.ids):
            return members
        # In sorted order, consecutive lookups access the same part of a large set.
        order = np.argsort(users)
        ordered = users[order]
        indices = np.minimum(np.searchsorted(self.ids, ordered), len(self.ids) - 1)
        members[order] = self.ids[indices] == ordered
        return members

    def __contains__(self, user: int) -> bool:
        if not self.ids.size:
            return False
        index = int(self.ids.searchsorted(np.uint64(user)))
        return index < len(self.ids) and int(self.ids[index]) == user

    def __iter__(self) -> Iterator[int]:
        return iter(self.ids.tolist())

    def __len__(self) -> int:
        return len(self.ids)

    def __or__(self, others: MaskedUsers) -> MaskedUsers:
        if not len(others) or self is others:
            return self
        return MaskedUsers(np.union1d(self.ids, others.ids)) if len(self) else others

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskedUsers) and np.array_equal(self.ids, other.ids)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        # Without the pseudonyms, because the text may appear in an error or a log line.
        return f"MaskedUsers({len(self)})"


MaskedUsers.NOBODY = MaskedUsers(np.empty(0, np.uint64))


@dataclass(frozen=True)
class Erasure:
    """One erasure: a set of users whose clicks are removed.

    Attributes:
        id: Its number, from 1 on, never reused.
        until: (topic word, partition, next): clicks before that offset are removed. A source without an entry keeps
            all clicks.
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
        """Encodes the erasure as a file that names the previous file: a line of JSON, then the bytes of `users`."""
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
        """Decodes the output of `to_bytes`; ValueError if the data is not such a file.

        Returns the erasure and the SHA-256 of the previous file.
        """
        line, _, users = data.partition(b"\n")
        head = json.loads(line)
        until = tuple((int(topic), int(part), int(after)) for topic, part, after in head["until"])
        erasure = cls(
            int(head["id"]), int(head["generation"]), int(head["at_ms"]), MaskedUsers.from_bytes(users), until
        )
        return erasure, str(head["before"])


@dataclass(frozen=True)
class Erased:
    """All erasures so far, in order; immutable."""

    entries: tuple[Erasure, ...] = ()
    NOBODY: ClassVar[Erased]

    def __bool__(self) -> bool:
        return bool(self.entries)

    def __iter__(self) -> Iterator[Erasure]:
        return iter(self.entries)

    def __repr__(self) -> str:
        # Without the pseudonyms, because the text may appear in an error or a log line.
        return f"Erased({len(self.entries)})"

    @property
    def last(self) -> int:
        """The number of the newest erasure; 0 if there is none."""
        return self.entries[-1].id if self.entries else 0

    @cached_property
    def users(self) -> MaskedUsers:
        """All users named in any erasure."""
        return reduce(lambda known, entry: known | entry.users, self.entries, MaskedUsers.NOBODY)

    def after(self, through: int) -> Erased:
        """The erasures with a number above `through`."""
        return self if not through else Erased(tuple(entry for entry in self.entries if entry.id > through))

    def up_to(self, through: int) -> Erased:
        """The erasures with the number `through` or below."""
        return self if through >= self.last else Erased(tuple(entry for entry in self.entries if entry.id <= through))

    def hides(self, user: int, through: int) -> bool:
        """Whether an erasure above number `through` names `user`; a copy has applied the erasures up to `through`."""
        return user in self.users and any(entry.id > through and user in entry.users for entry in self.entries)

    def rows(
        self, user: NDArray[np.uint64], source: NDArray[np.uint16], offset: NDArray[np.int64], ranges: Sequence[Range]
    ) -> Flags:
        """Which rows of a batch are erased; the arguments are those of `Mask.rows`."""
        out = np.zeros(len(user), np.bool_)
        # Computes the rest only for rows of erased users, because these rarely return.
        erased_rows = np.flatnonzero(self.users.has(user))
        if not len(erased_rows):
            return out
        words, parts = ([getattr(part.source, name) for part in ranges] for name in ("topic", "partition"))
        topic, partition = (np.array(values or [0], np.int64)[source[erased_rows]] for values in (words, parts))
        for entry in self.entries:
            is_named = entry.users.has(user[erased_rows])
            if is_named.any():
                out[erased_rows[is_named & entry._offsets(topic, partition, offset[erased_rows])]] = True
        return out

    def events(self, history: NDArray[Any], user: int) -> Flags:
        """Which events of one user's history (`[m]` EVENT) are erased."""
        out = np.zeros(len(history), np.bool_)
        if user in self.users:
            for entry in self.entries:
                if user in entry.users:
                    out |= entry._offsets(history["topic"], history["partition"], history["offset"])
        return out

    @cached_property
    def files(self) -> tuple[tuple[str, bytes], ...]:
        """The file of each erasure as (SHA-256, bytes), in order; each file names the preceding one."""
        files: list[tuple[str, bytes]] = []
        for entry in self.entries:
            data = entry.to_bytes(files[-1][0] if files else "")
            files.append((hashlib.sha256(data).hexdigest(), data))
        return tuple(files)

    @property
    def digest(self) -> str:
        """The SHA-256 of the newest erasure's file; empty if there is none."""
        return self.files[-1][0] if self.files else ""

    def to_bytes(self) -> bytes:
        """Encodes all erasures as one value: their files, each after its length."""
        return b"".join(len(data).to_bytes(8, "big") + data for _, data in self.files)

    @classmethod
    def from_bytes(cls, data: bytes) -> Erased:
        """Decodes the output of `to_bytes`; ValueError if the data is not such a value."""
        erasures, at = [], 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "big")
            erasures.append(Erasure.from_bytes(data[at + 8 : at + 8 + size])[0])
            at += 8 + size
        return cls(tuple(erasures))

    def and_also(
        self, users: MaskedUsers, until: Iterable[tuple[int, int, int]], generation: int, at_ms: int
    ) -> Erased:
        """Returns these erasures and a new one."""
        return Erased((*self.entries, Erasure(self.last + 1, generation, at_ms, users, tuple(sorted(until)))))


Erased.NOBODY = Erased()
