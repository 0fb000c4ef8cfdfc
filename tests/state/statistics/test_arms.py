"""Arms of an experiment: a better one is found, equal ones are not told apart, lost answers are noticed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from state.statistics.confidence_sequence import (
    UNBOUNDED,
    BlockSums,
    SampleRatio,
    difference,
    half_width,
    lift,
    log_evidence,
    tuning,
)

ALPHA, PLANNED = 0.05, 2_000
TRIALS = 300
MOST_ALARMS = ALPHA * TRIALS + 3 * math.sqrt(TRIALS * ALPHA * (1 - ALPHA))
HOURS = ((0.02, 0.2), (0.1, 0.3), (0.5, 0.5))
"""The share of the first arm, and what all users do."""


def test_a_better_arm_is_found_with_its_lift() -> None:
    random = np.random.default_rng(2)
    arm, other = BlockSums(), BlockSums()
    for sums, rate in ((arm, 0.12), (other, 0.10)):
        users = random.integers(1, 2**63, 20_000, np.uint64)
        sums.add((random.random(20_000) < rate).astype(np.float64), users)
    found, ratio = difference([(arm, other)], ALPHA, 10_000), lift([(arm, other)], ALPHA, 10_000)
    assert 0 < found.low < 0.02 < found.high
    assert found.value == pytest.approx(arm.mean - other.mean)
    half = half_width(arm.variance + other.variance, 10_000, tuning(10_000, ALPHA), ALPHA)
    assert found.high - found.value == pytest.approx(half)
    assert ratio is not None and 0 < ratio.low < 0.2 < ratio.high
    turned = lift([(other, arm)], ALPHA, 10_000)
    assert turned is not None and turned.high < 0
    assert math.isclose((1 + turned.value) * (1 + ratio.value), 1)


def test_arms_without_clicks_have_no_lift_and_few_have_no_end() -> None:
    arm, other = BlockSums(), BlockSums()
    assert lift([(arm, other)], ALPHA, PLANNED) is None
    arm.add(np.ones(1_000))
    other.add(np.ones(10))
    found, ratio = difference([(arm, other)], ALPHA, PLANNED), lift([(arm, other)], ALPHA, PLANNED)
    assert (found.low, found.high) == UNBOUNDED
    assert ratio is not None and (ratio.low, ratio.high) == (-1.0, math.inf)


def test_equal_arms_are_told_apart_no_more_often_than_stated_while_share_and_hour_change() -> None:
    random, alarms, fooled = np.random.default_rng(2), np.zeros(2, np.int64), 0
    for _ in range(TRIALS):
        strata = [(BlockSums(), BlockSums()) for _ in HOURS]
        alarm = np.zeros(2, np.bool_)
        for (one, other), (share, rate) in zip(strata, HOURS, strict=True):
            for _ in range(10):
                clicked, rows = (random.random(1_000) < rate).astype(np.float64), int(1_000 * share)
                one.add(clicked[:rows])
                other.add(clicked[rows:])
                found, ratio = difference(strata, ALPHA, PLANNED), lift(strata, ALPHA, PLANNED)
                alarm |= (
                    not found.low <= 0 <= found.high,
                    ratio is not None and not ratio.low <= 0 <= ratio.high,
                )
        alarms += alarm
        together = BlockSums(), BlockSums()
        for pair in strata:
            for whole, part in zip(together, pair, strict=True):
                whole.totals += part.totals
                whole.counts += part.counts
        fooled += difference([together], ALPHA, PLANNED).low > 0
    assert alarms.max() <= MOST_ALARMS
    assert fooled > 0.9 * TRIALS, "all rows together would have called them different"


def test_a_better_arm_is_found_over_all_strata() -> None:
    random, strata = np.random.default_rng(3), []
    for share, rate in HOURS:
        one, other = BlockSums(), BlockSums()
        rows = int(20_000 * share)
        one.add((random.random(rows) < 1.2 * rate).astype(np.float64), random.integers(1, 2**63, rows, np.uint64))
        rest = 20_000 - rows
        other.add((random.random(rest) < rate).astype(np.float64), random.integers(1, 2**63, rest, np.uint64))
        strata.append((one, other))
    found = lift([*strata, (BlockSums(), strata[0][1])], ALPHA, PLANNED)
    assert found is not None and 0 < found.low < 0.2 < found.high


def test_right_shares_are_doubted_no_more_often_than_stated() -> None:
    random = np.random.default_rng(1)
    alarms = 0
    for _ in range(TRIALS):
        ratio = SampleRatio([0.1, 0.9])
        for step in (0.1, 0.5):
            if step != 0.1:
                ratio.change([step, 1 - step])
            for came in random.binomial(50, step, 50).tolist():
                ratio.add([came, 50 - came])
        alarms += ratio.mismatch(ALPHA)
    assert alarms <= MOST_ALARMS


@pytest.mark.parametrize("first", [True, False])
def test_a_lost_tenth_of_an_arm_is_found_in_either_step_and_stays_found(first: bool) -> None:
    random = np.random.default_rng(2)
    ratio = SampleRatio([0.5, 0.5])
    for lost in (first, not first):
        for came in random.binomial(100, 0.45 / 0.95 if lost else 0.5, 200).tolist():
            ratio.add([came, 100 - came])
        if not lost and not first:
            assert not ratio.mismatch(0.001)
        ratio.change([0.5, 0.5])
    assert ratio.mismatch(0.001)


@pytest.mark.parametrize(("counts", "share"), [((3, 8), 0.5), ((20, 60), 0.3)])
def test_the_evidence_is_the_integral_of_the_likelihoods_over_the_mixture(
    counts: tuple[int, int], share: float
) -> None:
    """Bayes' factor by the trapezoid rule over the density of the shares, of which the closed form knows nothing."""
    shares = np.linspace(0, 1, 1_000_001)[1:-1]
    density = shares ** (100 * share - 1) * (1 - shares) ** (100 * (1 - share) - 1)
    density /= np.trapezoid(density, shares)
    likelihood = (shares / share) ** counts[0] * ((1 - shares) / (1 - share)) ** counts[1]
    assert math.exp(log_evidence(counts, [share, 1 - share])) == pytest.approx(
        float(np.trapezoid(likelihood * density, shares)), rel=1e-6
    )
