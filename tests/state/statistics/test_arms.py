"""Two arms are told apart where they differ, and no more often than stated where they do not, also while their shares change."""

from __future__ import annotations

import math

import numpy as np

from state.statistics.arms import difference, lift
from state.statistics.confidence_sequence import UNBOUNDED, BlockSums

ALPHA = 0.05
TRIALS = 500
MOST_ALARMS = ALPHA * TRIALS + 3 * math.sqrt(TRIALS * ALPHA * (1 - ALPHA))


def test_two_equal_arms_are_told_apart_no_more_often_than_stated_while_the_share_grows() -> None:
    random = np.random.default_rng(1)
    different = lifted = fixed = 0
    for _ in range(TRIALS):
        arm, other = BlockSums(), BlockSums()
        alarms = np.zeros(3, np.bool_)
        for look in range(40):
            clicked = (random.random(300) < 0.3).astype(np.float64)
            rows = 30 if look < 20 else 150
            arm.add(clicked[:rows])
            other.add(clicked[rows:])
            found, ratio = difference(arm, other, ALPHA, 2_000), lift(arm, other, ALPHA, 2_000)
            assert ratio is not None
            spread = 1.96 * math.sqrt(arm.variance + other.variance)
            alarms |= (not found.low <= 0 <= found.high, not ratio.low <= 0 <= ratio.high, abs(found.value) > spread)
        different, lifted, fixed = np.array((different, lifted, fixed)) + alarms
    assert different <= MOST_ALARMS
    assert lifted <= MOST_ALARMS
    assert fixed > 2 * MOST_ALARMS, "intervals of fixed size would have done"


def test_a_better_arm_is_found_with_its_lift() -> None:
    random = np.random.default_rng(2)
    arm, other = BlockSums(), BlockSums()
    for sums, rate in ((arm, 0.12), (other, 0.10)):
        users = random.integers(1, 2**63, 20_000, np.uint64)
        sums.add((random.random(20_000) < rate).astype(np.float64), users)
    found, ratio = difference(arm, other, ALPHA, 10_000), lift(arm, other, ALPHA, 10_000)
    assert 0 < found.low < 0.02 < found.high
    assert ratio is not None and 0 < ratio.low < 0.2 < ratio.high
    turned = lift(other, arm, ALPHA, 10_000)
    assert turned is not None and turned.high < 0
    assert math.isclose((1 + turned.value) * (1 + ratio.value), 1)


def test_arms_without_clicks_have_no_lift_and_few_have_no_end() -> None:
    arm, other = BlockSums(), BlockSums()
    assert lift(arm, other) is None
    arm.add(np.ones(1_000))
    other.add(np.ones(10))
    found, ratio = difference(arm, other), lift(arm, other)
    assert (found.low, found.high) == UNBOUNDED
    assert ratio is not None and (ratio.low, ratio.high) == (-1.0, math.inf)
