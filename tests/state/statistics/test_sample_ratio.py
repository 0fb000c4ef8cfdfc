"""A sample ratio that is not what it should be is found, at every look and across changed shares, and one that is, no more often than stated."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from state.statistics.sample_ratio import SampleRatio, log_evidence

ALPHA = 0.05
TRIALS = 1000


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
    assert alarms <= ALPHA * TRIALS + 3 * math.sqrt(TRIALS * ALPHA * (1 - ALPHA))


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


def test_a_ratio_goes_on_after_a_restart() -> None:
    ratio = SampleRatio([0.01, 0.99])
    ratio.add([12, 950])
    ratio.change([0.05, 0.95])
    ratio.add([40, 990])
    restarted = SampleRatio.from_json(json.loads(json.dumps(ratio.document())))
    for one in (ratio, restarted):
        one.add([400, 990])
    assert restarted.document() == ratio.document()
    assert restarted.p_value == ratio.p_value < 1e-9
