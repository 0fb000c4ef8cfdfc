"""Slices in the guard's watch: one that falls apart is held and named, and what happens to all or by chance is not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from tests.trainer.guard.test_watch import LIMITS, clean, start
from trainer.guard import PATIENCE, StepFigures, medians
from trainer.holding import Judgement, Standing, WindowWatch

SHARES = ((0.9, 0.1), (0.45, 0.2, 0.15, 0.1, 0.06, 0.04))
"""Of rows, by action and by city."""

ROWS = 150
Change = Callable[[StepFigures, int], StepFigures]
Times = Mapping[tuple[int, int], float]


def sliced(number: int, times: Times | None = None, loss: int = 0) -> StepFigures:
    """Step `number` of clean traffic with its slices, of which some lose so many times as much."""
    step, drawn = clean(number, ROWS), np.random.default_rng([5, number])
    found = np.zeros((2, len(SHARES), max(map(len, SHARES)), 3))
    known = np.zeros((2, 2))
    places = [drawn.choice(len(shares), ROWS, p=shares) for shares in SHARES]
    for kind in (0, 1):
        losses = drawn.normal(2.0, 1.2, ROWS).clip(0.0)
        if kind == loss:
            for (dimension, place), factor in (times or {}).items():
                losses[places[dimension] == place] *= factor
        known[kind] = ROWS, losses.sum()
        for dimension, at in enumerate(places):
            for power in (0, 1, 2):
                found[kind, dimension, :, power] = np.bincount(at, losses**power, found.shape[2])
    sums = {"known_rows": ROWS, "known_loss": known[0, 1], "pairs": ROWS, "engagement_loss": known[1, 1]}
    return dataclasses.replace(step, slices=found, sums={**step.sums, **sums})


def taken(
    watch: WindowWatch, first: int, last: int, times: Times | None = None, loss: int = 0, change: Change | None = None
) -> list[Judgement]:
    found = []
    for number in range(first, last):
        step = sliced(number, times, loss)
        found.append(watch.take(change(step, number) if change else step, start(number)))
    return found


def settled(until: int = 320, of: str = "") -> WindowWatch:
    watch = WindowWatch(LIMITS, of)
    assert {one.standing for one in taken(watch, 0, until)} == {Standing.PASS}
    return watch


def held(found: list[Judgement]) -> tuple[int, Judgement]:
    at = [one.standing for one in found].index(Standing.HOLD)
    return at, found[at]


@pytest.mark.parametrize("loss", [0, 1])
def test_a_failing_slice_is_held_and_named_although_the_whole_hardly_changes(loss: int) -> None:
    watch = settled()
    at, found = held(taken(watch, 320, 360, {(1, 3): 2.0}, loss))
    assert (found.rule, found.place) == ("slice", (loss, 1, 3))
    assert at < 30, "three windows"
    assert 1.5 < found.signal < 2.2 and found.usual == pytest.approx(1.0, abs=0.1)
    assert found.since is not None and 300 <= found.since.offset <= 320, "what is suspect begins before the poison"
    assert watch.shares_of_limit()["slice"] == 0.0, "after a hold all begins anew"


def test_a_small_slice_is_judged_once_several_windows_have_enough_rows() -> None:
    watch = settled(1200)
    at, found = held(taken(watch, 1200, 1440, {(1, 5): 3.0}))
    assert (found.rule, found.place) == ("slice", (0, 1, 5))
    assert 20 < at < 10 * 4 * PATIENCE, "60 rows a window, 128 a word, and two words at least"
    assert found.since is not None and 1200 - 10 * (PATIENCE + 1) <= found.since.offset <= 1200


def test_a_general_rise_is_no_slices() -> None:
    everywhere = {(0, place): 1.8 for place in range(2)}
    watch = settled()
    _, found = held(taken(watch, 320, 360, everywhere))
    assert (found.rule, found.place) == ("log_loss", None)
    watch = settled()
    little = taken(watch, 320, 420, {(0, place): 1.05 for place in range(2)})
    assert {one.standing for one in little} == {Standing.PASS}
    assert watch.shares_of_limit()["slice"] == 0.0


def test_clean_traffic_passes() -> None:
    watch = WindowWatch(LIMITS)
    assert {one.standing for one in taken(watch, 0, 3000)} == {Standing.PASS}


def test_one_deviating_window_delays_versions_and_a_vanished_slice_is_suspect_only_briefly() -> None:
    def without(step: StepFigures, number: int) -> StepFigures:
        assert step.slices is not None
        slices = step.slices.copy()
        slices[:, 1, 3] = 0.0
        return dataclasses.replace(step, slices=slices)

    watch = settled()
    odd = taken(watch, 320, 330, {(1, 3): 3.0})
    assert odd[-1].standing is Standing.SUSPECT and odd[-1].place == (0, 1, 3)
    gone = taken(watch, 330, 330 + 20 * PATIENCE, change=without)
    assert Standing.HOLD not in {one.standing for one in gone} and gone[-1].standing is Standing.PASS
    assert watch.shares_of_limit()["slice"] == 0.0


@pytest.mark.parametrize("at", [315, 327])
def test_a_restart_gives_the_same_verdicts(at: int) -> None:
    times = {(1, 3): 1.7, (1, 5): 3.0}

    def poisoned(watch: WindowWatch, first: int, last: int) -> list[Judgement]:
        return [one for n in range(first, last) for one in taken(watch, n, n + 1, times if n >= 320 else None)]

    whole = poisoned(settled(310), 310, 400)
    assert Standing.HOLD in {one.standing for one in whole}
    stopped = settled(310)
    before = poisoned(stopped, 310, at)
    again = WindowWatch(LIMITS)
    again.load(stopped.state())
    assert {name: array.tobytes() for name, array in again.state().items()} == {
        name: array.tobytes() for name, array in stopped.state().items()
    }
    assert before + poisoned(again, at, 400) == whole


def test_records_cut_differently_give_the_same_verdict() -> None:
    def halves(number: int, times: Times | None) -> list[StepFigures]:
        """The same sums in two records."""
        step = sliced(number, times)
        assert step.slices is not None
        half = StepFigures(step.log_ms - 500, {}, slices=0.25 * step.slices)
        return [half, dataclasses.replace(step, slices=0.75 * step.slices)]

    whole, cut = settled(), settled()
    times = {(1, 3): 2.0}
    _, found = held(taken(whole, 320, 360, times))
    parts = [cut.take(part, start(number)) for number in range(320, 360) for part in halves(number, times)]
    _, same = held(parts)
    assert (same.rule, same.place, same.since) == (found.rule, found.place, found.since)
    assert same.signal == pytest.approx(found.signal, rel=0.1)


def test_other_slices_start_from_scratch_and_everything_else_is_restored() -> None:
    state = settled(of="by city").state()
    watch = WindowWatch(LIMITS, "by country")
    watch.load(state)
    assert watch.windows == 32
    assert {one.standing for one in taken(watch, 320, 400, {(1, 3): 2.0})} == {Standing.PASS}
    same = WindowWatch(LIMITS, "by city")
    same.load(state)
    assert held(taken(same, 320, 400, {(1, 3): 2.0}))[1].rule == "slice"


def test_medians_are_numpys() -> None:
    drawn = np.random.default_rng(1).normal(size=(31, 7))
    drawn[np.random.default_rng(2).random(drawn.shape) < 0.4] = np.nan
    np.testing.assert_array_equal(medians(drawn), np.nanmedian(drawn, axis=0))
