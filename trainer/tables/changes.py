"""What changed in a table since somebody last took it: rows by id, and ids that went or wait."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.tables.index import F32, I32, U64

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Changes:
    """Rows of a table, ordered by id: all of them, or those that changed since the last take.

    Attributes:
        ids: `[k]` uint64, ascending.
        rows: `[k, dim]` float32, the embedding rows.
        accum: `[k, dim]` float32, their Adagrad accumulators.
        last_seen_ms: `[k]` int64, log time of their last sighting.
        removed: `[r]` uint64, ascending: ids that expired or were evicted, and were not admitted again.
        pending_ids: `[p]` uint64, ascending: ids seen too seldom to have a row yet.
        pending_counts: `[p]` int32, their sightings; 0 means no longer pending.
        pending_seen_ms: `[p]` int64, log time of their last sighting.
    """

    ids: U64
    rows: F32
    accum: F32
    last_seen_ms: I64
    removed: U64
    pending_ids: U64
    pending_counts: I32
    pending_seen_ms: I64

    FIELDS = ("ids", "rows", "accum", "last_seen_ms", "removed", "pending_ids", "pending_counts", "pending_seen_ms")

    def digest(self) -> str:
        """SHA-256 (hex) over every array in the order of FIELDS."""
        sha = hashlib.sha256()
        for field in self.FIELDS:
            sha.update(np.ascontiguousarray(getattr(self, field)).tobytes())
        return sha.hexdigest()
