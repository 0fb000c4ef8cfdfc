"""Judges each update before it changes a weight: accept it, skip it, or hold training. Pure functions.

The guard skips an update of n rows if its loss or gradient is not finite, or if either far exceeds the expectation:

- The expected mean loss is the running mean of earlier updates. It is at least the logarithm of the number of
  candidates, which is the loss of uniform predictions.
- The expected norm of the gradient is at most n times that of one row. The norm of one row is the running norm per
  square root of rows, divided by 1 - exp(-running loss). Rows that the model predicts well have hardly any gradient.

The limit is `FACTOR` times the expectation, plus 1 / sqrt(n) times that. If an update is skipped for its size, the
running values rise as if it had been at the limit. So a lasting change is accepted after a few updates. `PATIENCE`
consecutive skips hold training.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from trainer.model.hyperparameters import HYPERPARAMETERS

WARM_UP = HYPERPARAMETERS.guard_warm_up
"""Accepted updates before the first comparison."""

FACTOR = HYPERPARAMETERS.guard_factor
"""Multiple of the expected loss or gradient above which an update is skipped."""

PATIENCE = HYPERPARAMETERS.guard_patience
"""Consecutive skipped updates after which training is held."""

MEMORY = HYPERPARAMETERS.guard_memory
"""Weight of the newest update in the running values."""


class Verdict(enum.StrEnum):
    """What happens to a measured update."""

    ACCEPT = "accept"
    SKIP = "skip"
    HOLD = "hold"


@dataclass(frozen=True)
class GuardState:
    """The guard's state, stored in each version.

    Attributes:
        norm: Running mean of the gradient norm per square root of rows.
        skipped: Updates skipped since the last accepted one.
    """

    loss: float = 0.0
    norm: float = 0.0
    accepted: int = 0
    skipped: int = 0
    held: bool = False

    def released(self) -> GuardState:
        """The state after an operator resumes training: the running values and the warm-up start again."""
        return GuardState()

    def expected(self, candidates: int) -> tuple[float, float]:
        """Returns the expected loss and gradient norm of one row that the model cannot predict.

        >>> loss, norm = GuardState(loss=0.001, norm=0.001).expected(64)
        >>> round(loss, 2), round(norm, 2)
        (4.16, 1.0)
        """
        unknown = -math.expm1(-self.loss) if self.loss > 0 else 1.0
        return max(self.loss, math.log(candidates)), self.norm / unknown


def judge(state: GuardState, loss: float, norm: float, rows: int, candidates: int) -> tuple[Verdict, GuardState]:
    """Judges one update and returns the verdict and the new state. HOLD is a skip after which no update may follow.

    Args:
        state: The guard's state.
        loss: Mean loss over the update's rows.
        norm: Norm of the gradient of the summed loss.
        rows: Rows of the update; 0 if there is nothing to learn and to judge.
        candidates: Candidates of a row.

    >>> verdict, state = judge(GuardState(), 2.0, 1.0, 1, 64)
    >>> verdict.value, state.accepted
    ('accept', 1)
    >>> judge(state, math.nan, 1.0, 1, 64)[0].value
    'skip'
    >>> judge(state, 0.0, 0.0, 0, 64) == (Verdict.ACCEPT, state)
    True
    >>> judge(replace(state, skipped=PATIENCE - 1), math.nan, 1.0, 1, 64)[0].value
    'hold'
    """
    if not rows:
        return Verdict.ACCEPT, state
    scaled = norm / math.sqrt(rows)
    finite = math.isfinite(loss) and math.isfinite(scaled)
    usual_loss, usual_norm = state.expected(candidates)
    most = FACTOR * (1.0 + 1.0 / math.sqrt(rows))
    too_large = loss > most * usual_loss or norm > rows * most * usual_norm
    if not finite or (too_large and state.accepted >= WARM_UP):
        skipped = state.skipped + 1
        state = replace(state, skipped=skipped, held=state.held or skipped >= PATIENCE)
        if finite:
            state = _moved(state, min(loss, FACTOR * usual_loss), min(scaled, FACTOR * usual_norm), MEMORY)
        return (Verdict.HOLD if state.held else Verdict.SKIP), state
    # The first updates are averaged evenly, so that none of them dominates for long.
    share = max(MEMORY, 1.0 / (state.accepted + 1))
    return Verdict.ACCEPT, replace(_moved(state, loss, scaled, share), accepted=state.accepted + 1, skipped=0)


def _moved(state: GuardState, loss: float, norm: float, share: float) -> GuardState:
    return replace(state, loss=state.loss + share * (loss - state.loss), norm=state.norm + share * (norm - state.norm))
