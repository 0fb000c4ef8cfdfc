"""The interface of a training engine: it measures a record without side effects, and applies the measured update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from state.compiled import layout
from trainer.engine.adam import FastSlots
from trainer.engine.compiled.threads import Threads
from trainer.engine.crosses import Crossed
from trainer.engine.record import Record

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

CROSS = "cross"
"""The table of crosses. Its rows are learned one training row after another and have no derivative."""


@layout("f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], i4[::1], f4[::1], f4[::1]")
class Scores(NamedTuple):
    """The scores and losses of a record, without dropout.

    Attributes:
        recent_logits: `[B, L]` float32, MASKED where there is no category.
        popular_logits: `[B, P]` float32.
        successor_logits: `[B, S]` float32.
        interest_loss: `[B]` float32, 0 without a target.
        rank: `[B]` int32, candidates before the target; all of them if the target is no candidate.
        engagement: `[2 B]` float32 logits, first of the rows' own pairs, then of their negatives.
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
    """A measured record: its scores and the update that it would cause.

    Attributes:
        squared_norm: Squared norm of the whole gradient.
        rows: By table, `[u]` int32, the rows that the update changes, the missing row first.
        crossed: What the crosses learn; None if the ranker does not read them.
        found: Engine-specific data that `apply` needs.
    """

    scores: Scores
    squared_norm: float
    rows: Mapping[str, I32]
    crossed: Crossed | None
    found: Any


@dataclass(frozen=True)
class Gradient:
    """The gradient of an update, which workers exchange.

    Attributes:
        dense: Derivatives by dense weights, by name.
        sparse: By table of embedding rows, `[u, dim]` float32, derivatives by the rows of `Measured.rows`.
        fast: The fast weights after the update.
    """

    dense: Mapping[str, F32]
    sparse: Mapping[str, F32]
    fast: FastSlots


class Engine(Protocol):
    """Computes training steps. Not thread-safe.

    Attributes:
        threads: The threads that share a step.
    """

    name: str
    threads: Threads

    def measure(self, record: Record, move: bool = True, own: I64 | None = None) -> Measured:
        """Scores a record and computes its gradient, without side effects.

        With `move` fast weights move within the record, as in training. Otherwise all rows see the same weights.
        With `own`, `[n]` ascending, only these rows are scored and have a gradient; crosses learn from all rows.
        """

    def apply(self, measured: Measured) -> None:
        """Applies the measured update to weights, rows and their slots. Nothing else may change them in between."""

    def rows(self, record: Record) -> dict[str, I32]:
        """By table of embedding rows, the rows that an update by `record` would change, the missing row first."""

    def gradient(self, measured: Measured) -> Gradient:
        """The gradient of a measured update; valid until the next record is measured."""

    def with_gradient(self, measured: Measured, gradient: Gradient) -> Measured:
        """The measured update with another gradient, by the rows of `measured.rows`. Replaces the engine's own."""

    def predict(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """The outputs of `Ranker.predict` with the present weights, for inputs of serving by name; changes nothing.

        Counts among the inputs are whole numbers.
        """
