"""The guard's watch: what is let through, what is suspect and what is held, from which place, and again after a restart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from state.config.sections import GuardSettings
from tests.trainer.batches import micro_batch
from tests.trainer.engine.test_step import fresh
from trainer.guard import BUCKETS, CROWDS, NAMES, RULES, OpenWindow, StepFigures, WindowStart
from trainer.holding import Judgement, Standing, WindowWatch, figures_of

LIMITS = GuardSettings(window_s=10.0)
ROWS, STEP_MS = 100, 1000
TOPIC = "ab" * 16
Change = Callable[[StepFigures], StepFigures]


def clean(number: int, rows: int = ROWS, users: int = 200) -> StepFigures:
    """Step `number` of traffic in which nothing happens but chance."""
    drawn = np.random.default_rng([3, number])
    crowds = np.stack([np.bincount(drawn.integers(0, most, rows), minlength=BUCKETS) for most in (users, 400, 12)])
    losses = drawn.normal(2.0, 1.2, rows).clip(0.0)
    pairs = drawn.random(2 * rows) < 0.5
    known = int(0.8 * rows)
    sums = {
        "rows": rows,
        "positions": rows + 2,
        "dead": 2,
        "known_rows": known,
        "known_loss": losses[:known].sum(),
        "new_rows": rows - known,
        "new_loss": losses[known:].sum() * 1.5,
        "pairs": 2 * rows,
        "engagement_loss": drawn.normal(0.6, 0.4, 2 * rows).sum(),
        "predicted": rows,
        "positives": pairs.sum(),
        "squared_norm": rows * drawn.normal(1.0, 0.1),
    }
    return StepFigures((number + 1) * STEP_MS, sums, crowds.astype(np.int32))


def start(number: int) -> WindowStart:
    return WindowStart(number, number * STEP_MS, ((TOPIC, 0, number * ROWS),))


def gradient_of(cut: int) -> float:
    """The signal of the gradient of 4096 rows that a trainer learns in records of `cut` rows."""
    trainer, window = fresh(), OpenWindow(start(0))
    for first in range(0, 8192, 512):
        trainer.step(micro_batch(512, first))
    for first in range(8192, 12_288, cut):
        batch = micro_batch(cut, first)
        window.add(figures_of(batch, trainer.step(batch), first))
    return float(window.signals(np.zeros((len(CROWDS), BUCKETS), np.float32))[NAMES.index("gradient")])


def test_a_backlog_of_large_records_has_the_same_gradient_as_small_ones() -> None:
    floor = next(rule.floor for rule in RULES if rule.name == "gradient")
    small, large = gradient_of(512), gradient_of(4096)
    assert abs(large - small) < floor


def judged(
    watch: WindowWatch, first: int, last: int, change: Change = lambda step: step, **how: int
) -> Iterator[Judgement]:
    for number in range(first, last):
        yield watch.take(change(clean(number, **how)), start(number))


def settled(until: int = 320, limits: GuardSettings = LIMITS) -> WindowWatch:
    watch = WindowWatch(limits)
    assert {one.standing for one in judged(watch, 0, until)} == {Standing.PASS}
    return watch


def crowd(step: StepFigures, kind: int, share: float) -> StepFigures:
    """One id more, with such a share of the rows."""
    assert step.crowds is not None
    crowds = step.crowds.copy()
    crowds[kind] = (crowds[kind] * (1 - share)).astype(np.int32)
    crowds[kind, 900] = step.sums["rows"] - crowds[kind].sum()
    return dataclasses.replace(step, crowds=crowds)


def scaled(step: StepFigures, **factors: float) -> StepFigures:
    return dataclasses.replace(step, sums={name: value * factors.get(name, 1) for name, value in step.sums.items()})


POISONS: dict[str, Change] = {
    "log_loss": lambda step: scaled(step, known_loss=1.6),
    "new_users": lambda step: scaled(step, new_loss=2.0),
    "engagement": lambda step: scaled(step, engagement_loss=1.8),
    "calibration": lambda step: scaled(step, positives=1 / 3),
    "gradient": lambda step: scaled(step, squared_norm=30.0),
    "skipped": lambda step: dataclasses.replace(step, sums={**step.sums, "skipped": 0.6 * step.sums["rows"]}),
    "dead_letters": lambda step: scaled(step, dead=17.0),
    "user": lambda step: crowd(step, 0, 0.5),
    "item": lambda step: crowd(step, 1, 0.5),
    "category": lambda step: crowd(step, 2, 0.8),
}


@pytest.mark.parametrize("rule", NAMES)
def test_each_rule_holds_its_poison_within_two_windows(rule: str) -> None:
    watch = settled()
    found = list(judged(watch, 320, 340, POISONS[rule]))
    at = [one.standing for one in found].index(Standing.HOLD)
    assert found[at].rule == rule
    assert at < 20, "a window, and the rows that the next one needs"
    assert found[at].total >= 9.0 and abs(math.log((found[at].signal + 1e-9) / (found[at].usual + 1e-9))) > 0.3
    since = found[at].since
    assert since is not None and 300 <= since.offset <= 320, "what is suspect begins before the poison"
    assert since.clicks == ((TOPIC, 0, since.offset * ROWS),)


def test_versions_wait_after_a_deviating_window_until_a_usual_one() -> None:
    watch = settled()
    odd = [one.standing for one in judged(watch, 320, 330, POISONS["log_loss"])]
    assert odd[:4] == [Standing.PASS] * 4, "too few rows to tell"
    assert set(odd[4:]) == {Standing.SUSPECT}
    after = [one.standing for one in judged(watch, 330, 360)]
    assert Standing.HOLD not in after
    assert after[10:] == [Standing.PASS] * 20


def test_versions_wait_for_half_a_minute_at_most() -> None:
    watch = WindowWatch(dataclasses.replace(LIMITS, window_s=60.0))
    assert {one.standing for one in judged(watch, 0, 1980)} == {Standing.PASS}
    odd = [one.standing for one in judged(watch, 1980, 2040, POISONS["log_loss"])]
    assert odd.count(Standing.SUSPECT) == 31 and odd[-1] is Standing.PASS
    assert Standing.HOLD in [one.standing for one in judged(watch, 2040, 2060, POISONS["log_loss"])]


def test_many_windows_with_small_deviations_are_held_too() -> None:
    found = [one.standing for one in judged(settled(), 320, 420, lambda step: scaled(step, known_loss=1.22))]
    assert 20 < found.index(Standing.HOLD) < 90


def test_tenfold_traffic_passes() -> None:
    watch = settled()
    assert {one.standing for one in judged(watch, 320, 370, rows=10 * ROWS)} == {Standing.PASS}


def test_a_loss_that_drifts_up_by_and_by_passes() -> None:
    watch = WindowWatch(LIMITS)
    found = set()
    for number in range(1200):
        drifted = scaled(clean(number), known_loss=1 + number / 1200)
        found.add(watch.take(drifted, start(number)).standing)
    assert found == {Standing.PASS}


def test_nothing_is_judged_before_the_warm_up_nor_where_few_users_click() -> None:
    early = WindowWatch(LIMITS)
    assert {one.standing for one in judged(early, 0, 290, POISONS["user"])} == {Standing.PASS}
    few = WindowWatch(LIMITS)
    assert {one.standing for one in judged(few, 0, 320, users=19)} == {Standing.PASS}
    assert {one.standing for one in judged(few, 320, 360, POISONS["log_loss"], users=19)} == {Standing.PASS}


def test_a_category_with_a_constant_large_share_is_no_takeover() -> None:
    watch = WindowWatch(LIMITS)
    found = {one.standing for one in judged(watch, 0, 600, lambda step: crowd(step, 2, 0.7))}
    assert found == {Standing.PASS}


def test_after_a_hold_new_windows_are_compared_with_each_other() -> None:
    watch = settled()
    first = [one.standing for one in judged(watch, 320, 340, POISONS["category"])]
    rest = {one.standing for one in judged(watch, 320 + first.index(Standing.HOLD) + 1, 800, POISONS["category"])}
    assert rest == {Standing.PASS}


def test_windows_of_another_release_are_dropped() -> None:
    state = settled().state()
    state["about"] = np.frombuffer(state["about"].tobytes().replace(b"log_loss", b"logloss"), np.uint8)
    watch = WindowWatch(LIMITS)
    watch.load(state)
    watch.load({})
    assert {one.standing for one in judged(watch, 320, 360, POISONS["user"])} == {Standing.PASS}
