"""What an engine is: it measures a record without changing anything, and applies what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from state.compiled import layout
from trainer.engine.record import Record

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

CROSS = "cross"
"""The table of crosses, whose rows are learned row after row and have no derivative."""


@layout("f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], i4[::1], f4[::1], f4[::1]")
class Scores(NamedTuple):
    """The measures of a record, without dropout.

    Attributes:
        recent_logits: `[B, L]` float32, MASKED where there is no category.
        popular_logits: `[B, P]` float32.
        successor_logits: `[B, S]` float32.
        interest_loss: `[B]` float32, 0 without a target.
        rank: `[B]` int32, candidates before the target; all of them where it is none.
        engagement: `[2 B]` float32 logits, of the rows' own pairs and then of their negatives.
        engagement_loss: `[2 B]` float32.
    """

    recent_logits: F32
    popular_logits: F32
    successor_logits: F32
    interest_loss: F32
    rank: I32
    engagement: F32
    engagement_loss: F32


@dataclass(frozen=True)
class Measured:
    """A record as an engine measured it.

    Attributes:
        scores: Before learning.
        squared_norm: Of the whole gradient.
        rows: `[u]` int32 of each table, the rows that change when it is applied, the missing one first.
        found: What the engine needs to apply it.
    """

    scores: Scores
    squared_norm: float
    rows: Mapping[str, I32]
    found: Any


class Engine(Protocol):
    """Computes steps. One thread."""

    name: str

    def measure(self, record: Record, move: bool = True) -> Measured:
        """Scores a record and finds its gradient; changes nothing.

        Args:
            record: Of the trainer's tables as they are.
            move: Whether fast weights move within the record, as they do in training; else all rows see the same.
        """

    def apply(self, measured: Measured) -> None:
        """Changes weights, rows and their slots as measured; called before anything else changes them."""
