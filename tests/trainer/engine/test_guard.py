"""The guard: what it accepts, skips and holds."""

from __future__ import annotations

import math

import pytest

from trainer.engine.guard import WARM_UP, GuardState, Verdict, judge


def settled() -> GuardState:
    state = GuardState()
    for _ in range(WARM_UP):
        _, state = judge(state, 2.0, 32.0, 1024, factor=8.0, patience=3)
    return state


def test_usual_step_is_accepted() -> None:
    verdict, state = judge(settled(), 2.1, 33.0, 1024, factor=8.0, patience=3)
    assert verdict is Verdict.ACCEPT and state.accepted == WARM_UP + 1


@pytest.mark.parametrize(
    ("loss", "norm"), [(20.0, 32.0), (2.0, 300.0), (math.nan, 32.0), (2.0, math.inf), (2.0, math.nan)]
)
def test_far_or_infinite_step_is_skipped_and_leaves_the_running_values(loss: float, norm: float) -> None:
    before = settled()
    verdict, state = judge(before, loss, norm, 1024, factor=8.0, patience=3)
    assert verdict is Verdict.SKIP
    assert (state.loss, state.norm, state.accepted, state.skipped) == (before.loss, before.norm, before.accepted, 1)


def test_small_batch_is_measured_by_its_rows() -> None:
    # The gradient of 4 rows is 16 times smaller than that of 1,024 by noise alone.
    assert judge(settled(), 2.0, 2.0, 4, factor=8.0, patience=3)[0] is Verdict.ACCEPT
    assert judge(settled(), 2.0, 32.0, 4, factor=8.0, patience=3)[0] is Verdict.SKIP


def test_patience_ends_in_hold_and_one_good_step_renews_it() -> None:
    state = settled()
    for expected in (Verdict.SKIP, Verdict.SKIP):
        verdict, state = judge(state, 99.0, 32.0, 1024, factor=8.0, patience=3)
        assert verdict is expected
    _, renewed = judge(state, 2.0, 32.0, 1024, factor=8.0, patience=3)
    assert renewed.skipped == 0
    verdict, state = judge(state, 99.0, 32.0, 1024, factor=8.0, patience=3)
    assert verdict is Verdict.HOLD and state.held


def test_first_steps_are_not_compared() -> None:
    _, state = judge(GuardState(), 2.0, 1.0, 1, factor=2.0, patience=3)
    assert judge(state, 50.0, 900.0, 1, factor=2.0, patience=3)[0] is Verdict.ACCEPT
