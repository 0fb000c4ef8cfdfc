"""The set of users of a mask and its file, as sorted pseudonyms; all masks that name the same file share one set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

STORED = np.dtype("<u8")


class MaskedUsers:
    """Pseudonyms of users, `[n]` uint64, ascending and unique; immutable.

    >>> users = MaskedUsers.of([9, 3, 9])
    >>> len(users), 3 in users, 4 in users, users.has(np.array([9, 1], np.uint64)).tolist()
    (2, True, False, [True, False])
    """

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
