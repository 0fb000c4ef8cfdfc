"""What a store of histories records of the erasures that it applied.

LMDB keeps deleted data on free pages of its file until they are reused. So a store is compacted after an erasure, but
not at each one: copying the whole file is expensive.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

FORGOTTEN = "erased"  # name of the store's extra
PAGES_MS = 600_000
"""Least time between two compactions of a store."""


@dataclass(frozen=True)
class ForgottenUsers:
    """How far a store has applied erasures.

    Attributes:
        through: The last erasure whose users' records are removed.
        pages: The last erasure whose users' records are also gone from free pages.
        paged_ms: When the store was last compacted, wall clock.
    """

    through: int = 0
    pages: int = 0
    paged_ms: int = 0

    def due_ms(self) -> int | None:
        """When the store is due for compaction; None if it is not needed."""
        return None if self.pages >= self.through else self.paged_ms + PAGES_MS

    def to_json(self) -> bytes:
        """Encodes it as the store keeps it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, value: bytes | None) -> ForgottenUsers:
        """Decodes the output of `to_json`; None if nothing was erased yet."""
        return cls() if value is None else cls(**json.loads(value))
