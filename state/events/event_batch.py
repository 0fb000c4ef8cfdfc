"""Parsed clicks as columns, the input of all later stages."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from state.events.dead_letters import DeadLetter
from state.positions import Range


@dataclass(frozen=True, slots=True, eq=False)
class EventBatch:
    """Events as columns, in order of arrival.

    Attributes:
        user: `[n]` uint64 pseudonyms.
        item: `[n]` uint64.
        category: `[n]` uint64.
        action: `[n]` uint8, an index of the configured actions.
        at_ms: `[n]` int64, event time.
        label: `[n]` float32; NaN if unknown.
        weight: `[n]` float32, the weight of the action.
        context: `[n, K]` uint64; 0 for none.
        source: `[n]` uint16, an index of `ranges`.
        offset: `[n]` int64.
        ranges: The positions read, with their outcomes.
        dead: The records that could not become events.
        names: Id -> name of the categories not announced within ten minutes of event time.
        item_names: Likewise for items, without names that are too long.
        request: `[n]` uint64 ids of requests, 0 for none; empty if no field is configured.
    """

    user: NDArray[np.uint64]
    item: NDArray[np.uint64]
    category: NDArray[np.uint64]
    action: NDArray[np.uint8]
    at_ms: NDArray[np.int64]
    label: NDArray[np.float32]
    weight: NDArray[np.float32]
    context: NDArray[np.uint64]
    source: NDArray[np.uint16]
    offset: NDArray[np.int64]
    ranges: tuple[Range, ...]
    dead: tuple[DeadLetter, ...]
    names: dict[int, str]
    item_names: dict[int, str] = field(default_factory=dict)
    request: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    def __len__(self) -> int:
        """The number of events."""
        return len(self.user)

    def __bool__(self) -> bool:
        """Always true: a batch without events still moves positions."""
        return True
