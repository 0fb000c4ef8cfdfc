"""Decides about each update before it changes a weight: accept, skip, or hold training. Pure.

An update of n rows is skipped where its loss or its gradient is not finite, or
where either is far beyond what is expected of n rows:

- The mean loss is expected to be the running mean of earlier updates, and at
  least the logarithm of the number of candidates, which is what a row costs
  when nothing is known about it.
- The norm of the gradient is expected to be at most n times the gradient of one
  row, because n gradients may all point the same way. The gradient of one row
  is the running norm per square root of rows, divided by 1 - exp(-running
  loss): a row that the model knows already has hardly any gradient, and says
  nothing about the gradient of one that it does not know.

An update may exceed the expectation `factor` times, and 1 / sqrt(n) times that
on top, because a mean of n rows varies so much by chance. An update that is
skipped for its size raises the running values as if it had been at the limit.
A change that lasts is therefore accepted after a few updates, and the windows
of `trainer/guard` judge it. `patience` skips in a row hold training: updates
that are not finite, or that keep growing.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from trainer.model.hyperparameters import HYPERPARAMETERS

WARM_UP = HYPERPARAMETERS.guard_warm_up
"""Accepted updates before the first comparison."""

MEMORY = HYPERPARAMETERS.guard_memory
"""Share of the newest update in the running values."""


class Verdict(enum.StrEnum):
    """What happens with a measured update."""

    ACCEPT = "accept"
    SKIP = "skip"
    HOLD = "hold"


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers; part of each version.

    Attributes:
        loss: Running mean of the loss.
        norm: Running mean of the gradient norm per square root of rows.
        accepted: Updates accepted so far.
        skipped: Updates skipped since the last accepted one.
        held: Whether training is held.
    """

    loss: float = 0.0
    norm: float = 0.0
    accepted: int = 0
    skipped: int = 0
    held: bool = False

    def released(self) -> GuardState:
        """The state once an operator lets training go on: what comes next is the new usual, and is compared after the warm-up."""
        return GuardState()

    def expected(self, candidates: int) -> tuple[float, float]:
        """The loss and the gradient norm of one row of which nothing is known.

        >>> loss, norm = GuardState(loss=0.001, norm=0.001).expected(64)
        >>> round(loss, 2), round(norm, 2)
        (4.16, 1.0)
        """
        unknown = -math.expm1(-self.loss) if self.loss > 0 else 1.0
        return max(self.loss, math.log(candidates)), self.norm / unknown


def judge(
    state: GuardState, loss: float, norm: float, rows: int, candidates: int, factor: float, patience: int
) -> tuple[Verdict, GuardState]:
    """Decides about one update and remembers it.

    Args:
        state: What was remembered.
        loss: Mean loss over the update's rows.
        norm: Norm of the gradient of the summed loss.
        rows: Rows of the update; 0 where none of them teaches anything, so that there is nothing to judge.
        candidates: Candidates of a row.
        factor: How many times the expectation is too much.
        patience: Skips in a row at which training is held.

    Returns:
        The verdict and the new state; HOLD is a skip after which no update may follow.

    >>> verdict, state = judge(GuardState(), 2.0, 1.0, 1, 64, factor=8.0, patience=2)
    >>> verdict.value, state.accepted
    ('accept', 1)
    >>> verdict, state = judge(state, math.nan, 1.0, 1, 64, factor=8.0, patience=2)
    >>> judge(state, 0.0, 0.0, 0, 64, factor=8.0, patience=2) == (Verdict.ACCEPT, state)
    True
    >>> verdict.value, judge(state, math.nan, 1.0, 1, 64, factor=8.0, patience=2)[0].value
    ('skip', 'hold')
    """
    if not rows:
        return Verdict.ACCEPT, state
    scaled = norm / math.sqrt(rows)
    finite = math.isfinite(loss) and math.isfinite(scaled)
    usual_loss, usual_norm = state.expected(candidates)
    most = factor * (1.0 + 1.0 / math.sqrt(rows))
    too_large = loss > most * usual_loss or norm > rows * most * usual_norm
    if not finite or (too_large and state.accepted >= WARM_UP):
        skipped = state.skipped + 1
        state = replace(state, skipped=skipped, held=state.held or skipped >= patience)
        if finite:
            state = _moved(state, min(loss, factor * usual_loss), min(scaled, factor * usual_norm), MEMORY)
        return (Verdict.HOLD if state.held else Verdict.SKIP), state
    # The first updates are averaged evenly, so that none of them weighs for long.
    share = max(MEMORY, 1.0 / (state.accepted + 1))
    return Verdict.ACCEPT, replace(_moved(state, loss, scaled, share), accepted=state.accepted + 1, skipped=0)


def _moved(state: GuardState, loss: float, norm: float, share: float) -> GuardState:
    return replace(state, loss=state.loss + share * (loss - state.loss), norm=state.norm + share * (norm - state.norm))
