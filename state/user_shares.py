"""Sets of the 64 shares of users. A user's share is the pseudonym modulo 64; a serving host may hold a subset."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Commands read settings without it.
    import numpy as np
    from numpy.typing import NDArray

SHARES = 64
_RANGE = re.compile(r"([0-9]{1,2})(?:-([0-9]{1,2}))?")


@dataclass(frozen=True, slots=True)
class UserShares:
    """A set of shares. `user in shares` is True if a pseudonym belongs to one of them.

    Attributes:
        mask: Bit s is set if share s is in the set.
    """

    mask: int

    @classmethod
    def of(cls, shares: Iterable[int]) -> UserShares:
        """The set of these shares."""
        mask = 0
        for share in shares:
            mask |= 1 << share
        return cls(mask)

    @classmethod
    def parse(cls, text: str) -> UserShares:
        """Parses numbers and ranges, both ends included; an empty text means all shares.

        >>> shares = UserShares.parse("0-15,32")
        >>> 64 + 7 in shares, 16 in shares, str(shares), UserShares.parse("") == ALL
        (True, False, '0-15,32', True)

        Raises:
            ValueError: The text has another form, or names no share or one above 63.
        """
        if not text:
            return ALL
        shares = set[int]()
        for part in text.split(","):
            match = _RANGE.fullmatch(part.strip())
            first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
            if not first <= last < SHARES:
                raise ValueError(
                    f"{part.strip()!r} names no shares: write numbers from 0 to {SHARES - 1}, as in 0-15,32"
                )
            shares.update(range(first, last + 1))
        return cls.of(shares)

    def __contains__(self, user: int) -> bool:
        return bool(self.mask >> (user % SHARES) & 1)

    def __iter__(self) -> Iterator[int]:
        return (share for share in range(SHARES) if self.mask >> share & 1)

    def __and__(self, other: UserShares) -> UserShares:
        return UserShares(self.mask & other.mask)

    def __str__(self) -> str:
        """The form that `parse` reads, in ascending ranges; `none` for the empty set."""
        shares = [*self]
        ends = [-2, *(n for n, after in pairwise([*shares, SHARES + 1]) if after != n + 1)]
        ranges = [(next(share for share in shares if share > before), last) for before, last in pairwise(ends)]
        return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in ranges) or "none"

    @property
    def is_all(self) -> bool:
        """Whether every user belongs to the set."""
        return self.mask == ALL.mask

    def covers(self, other: UserShares) -> bool:
        """Whether all shares of `other` are in the set."""
        return not other.mask & ~self.mask

    def has(self, users: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of `[n]` uint64 pseudonyms belong to the set, `[n]` bool."""
        return (self.mask >> users % SHARES & 1).astype(bool)


ALL = UserShares((1 << SHARES) - 1)
