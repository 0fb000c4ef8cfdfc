"""The rules that keep a poisoned step out of the weights: accept, skip, hold. Pure.

A step is measured before it is applied: its mean loss, and the norm of its
gradient over the square root of its rows (the noise of a sum of n gradients
grows so). Either of them far above the running value of accepted steps, or not
finite, is a skip. Many skips in a row are no accident any more: hold, until a
person decides.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from trainer.model.hyperparameters import HYPERPARAMETERS

WARM_UP = HYPERPARAMETERS.guard_warm_up
"""Accepted steps before the first judgement by comparison."""

MEMORY = HYPERPARAMETERS.guard_memory
"""Share of the newest accepted step in the running values."""


class Verdict(enum.StrEnum):
    """What happens with a measured step."""

    ACCEPT = "accept"
    SKIP = "skip"
    HOLD = "hold"


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers; part of each version.

    Attributes:
        loss: Running mean loss of accepted steps.
        norm: Running gradient norm, per square root of rows.
        accepted: Steps accepted so far.
        skipped: Steps skipped since the last accepted one.
        held: Whether training is held.
    """

    loss: float = 0.0
    norm: float = 0.0
    accepted: int = 0
    skipped: int = 0
    held: bool = False

    def released(self) -> GuardState:
        """Once training may go on."""
        return replace(self, held=False, skipped=0)


def judge(
    state: GuardState, loss: float, norm: float, rows: int, factor: float, patience: int
) -> tuple[Verdict, GuardState]:
    """Decides about one step and remembers it.

    Args:
        state: What was remembered.
        loss: Mean loss over the step's rows.
        norm: Norm of the gradient of the summed loss.
        rows: Rows of the step; 0 where none of them is to be learned from, so that there is nothing to judge.
        factor: How many times the running value is too much.
        patience: Skips in a row at which training is held.

    Returns:
        The verdict; HOLD is a skip after which no step may follow.

    >>> verdict, state = judge(GuardState(), 2.0, 1.0, 1, factor=8.0, patience=2)
    >>> verdict.value, state.accepted
    ('accept', 1)
    >>> verdict, state = judge(state, math.nan, 1.0, 1, factor=8.0, patience=2)
    >>> judge(state, 0.0, 0.0, 0, factor=8.0, patience=2) == (Verdict.ACCEPT, state)
    True
    >>> verdict.value, judge(state, math.nan, 1.0, 1, factor=8.0, patience=2)[0].value
    ('skip', 'hold')
    """
    if not rows:
        return Verdict.ACCEPT, state
    scaled = norm / math.sqrt(rows)
    bad = not (math.isfinite(loss) and math.isfinite(scaled))
    if not bad and state.accepted >= WARM_UP:
        bad = loss > factor * state.loss or scaled > factor * state.norm
    if bad:
        skipped = state.skipped + 1
        held = state.held or skipped >= patience
        return (Verdict.HOLD if held else Verdict.SKIP), replace(state, skipped=skipped, held=held)
    # The first steps are averaged evenly, so that none of them weighs for long.
    share = max(MEMORY, 1.0 / (state.accepted + 1))
    return Verdict.ACCEPT, GuardState(
        loss=state.loss + share * (loss - state.loss),
        norm=state.norm + share * (scaled - state.norm),
        accepted=state.accepted + 1,
    )
