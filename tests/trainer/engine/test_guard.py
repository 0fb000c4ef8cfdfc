"""The guard: what it accepts, skips and holds."""

from __future__ import annotations

import math
from unittest import mock

import pytest

from trainer.engine import guard
from trainer.engine.guard import WARM_UP, GuardState, Verdict, judge

CANDIDATES = 64
UNKNOWN = math.log(CANDIDATES)


def judged(state: GuardState, loss: float, norm: float, rows: int, patience: int = 3) -> tuple[Verdict, GuardState]:
    with mock.patch.object(guard, "PATIENCE", patience):
        return judge(state, loss, norm, rows, CANDIDATES)


def settled() -> GuardState:
    state = GuardState()
    for _ in range(WARM_UP):
        _, state = judged(state, 2.0, 32.0, 1024)
    return state


def ordinary(rows: int, loss: float = 3.8, aligned: float = 0.0) -> tuple[float, float, int]:
    """An update whose rows have a gradient of length 1 each where nothing is known; a share of it in one direction."""
    length = -math.expm1(-loss)
    return loss, length * math.sqrt(rows * (1 - aligned**2) + (rows * aligned) ** 2), rows


def easy(rows: int = 4) -> tuple[float, float, int]:
    return ordinary(rows, loss=0.002)


@pytest.mark.parametrize(
    ("loss", "norm"), [(40.0, 32.0), (2.0, 20_000.0), (math.nan, 32.0), (2.0, math.inf), (2.0, math.nan)]
)
def test_far_or_infinite_step_is_skipped(loss: float, norm: float) -> None:
    before = settled()
    verdict, state = judged(before, loss, norm, 1024)
    assert verdict is Verdict.SKIP
    assert (state.accepted, state.skipped) == (before.accepted, 1)
    if not math.isfinite(loss + norm):
        assert (state.loss, state.norm) == (before.loss, before.norm)


def test_ordinary_records_after_200_small_easy_ones_are_learned() -> None:
    """The records that stopped training: 4 easy rows each, then 92 to 245 rows with a loss of 3.1 to 4.6."""
    state = settled()
    for _ in range(3):
        for _ in range(200):
            verdict, state = judged(state, *easy())
            assert verdict is Verdict.ACCEPT
        assert state.loss < 0.01
        for number in range(20):
            verdict, state = judged(state, *ordinary(92 + 8 * number, 3.1 + 0.075 * number))
            assert verdict is Verdict.ACCEPT


@pytest.mark.parametrize("rate", [0.2, 2.0, 20.0, 200.0, 2000.0, 20_000.0])
@pytest.mark.parametrize("after", [0.2, 20.0, 20_000.0])
def test_no_rate_and_no_change_of_rate_skips_a_step(rate: float, after: float) -> None:
    """Records of a tenth of a second at 0.2 to 20,000 clicks/s; quiet hours are single rows, easy or surprising."""
    state = GuardState()
    for clicks_per_s in (rate, after, rate):
        rows = max(1, round(clicks_per_s / 10))
        for number in range(100):
            # A single row varies from nothing to some nats beyond a blind guess; a mean of many rows hardly does.
            spread = UNKNOWN * math.sin(number) / math.sqrt(rows)
            verdict, state = judged(state, *ordinary(rows, max(0.001, 2.0 + 3 * spread)))
            assert verdict is Verdict.ACCEPT


@pytest.mark.parametrize("rows", [1, 64, 384, 2048])
def test_a_burst_of_one_category_is_learned_and_so_is_ordinary_traffic_after_it(rows: int) -> None:
    state = settled()
    for loss in (UNKNOWN + 6, 2.0, 0.1, *[1e-6] * 300):
        verdict, state = judged(state, *ordinary(rows, loss, aligned=1.0))
        assert verdict is Verdict.ACCEPT
    for number in range(20):
        verdict, state = judged(state, *ordinary(rows, 10.0 - number / 4))
        assert verdict is Verdict.ACCEPT


def test_a_window_of_few_rows_may_deviate_more() -> None:
    loss = 12 * UNKNOWN
    assert judged(settled(), loss, 1.0, 1)[0] is Verdict.ACCEPT
    assert judged(settled(), loss, 1.0, 245)[0] is Verdict.SKIP


@pytest.mark.parametrize("level", [50.0, 100.0])
def test_a_level_that_stays_becomes_the_usual_one_before_patience_ends(level: float) -> None:
    state, verdicts = settled(), []
    for _ in range(40):
        verdict, state = judged(state, level, 32.0, 1024, patience=20)
        verdicts.append(verdict)
    assert verdicts[0] is Verdict.SKIP and Verdict.HOLD not in verdicts
    assert set(verdicts[10:]) == {Verdict.ACCEPT}


@pytest.mark.parametrize("step", [(math.nan, 32.0), (2.0, math.inf), (1e9, 32.0), (2.0, 1e12)])
def test_steps_that_are_not_finite_or_explode_hold_training_at_the_patience(step: tuple[float, float]) -> None:
    state, verdicts = settled(), []
    while not state.held:
        verdict, state = judged(state, *step, 1024, patience=20)
        verdicts.append(verdict)
    assert verdicts == [*[Verdict.SKIP] * 19, Verdict.HOLD]


def test_one_good_step_renews_the_patience() -> None:
    _, state = judged(settled(), math.nan, 32.0, 1024)
    assert state.skipped == 1
    _, renewed = judged(state, 2.0, 32.0, 1024)
    assert renewed.skipped == 0


def test_released_training_is_not_held_again_for_the_same_steps() -> None:
    state = settled()
    while not state.held:
        _, state = judged(state, 1e9, 32.0, 1024)
    state = state.released()
    for _ in range(100):
        verdict, state = judged(state, 1e9, 32.0, 1024)
        assert verdict is Verdict.ACCEPT


def test_first_steps_are_not_compared() -> None:
    _, state = judged(GuardState(), 2.0, 1.0, 1)
    assert judged(state, 50.0, 900.0, 1)[0] is Verdict.ACCEPT
