"""A confidence sequence leaves the true mean out at its stated rate at most, over all looks and with users whose rows are alike, and finds a difference."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from state.statistics.confidence_sequence import BLOCKS, UNBOUNDED, BlockSums, ConfidenceSequence, half_width, tuning

ALPHA = 0.05
TRIALS = 300
LOOKS, ROWS = 60, 64
MOST_ALARMS = ALPHA * TRIALS + 3 * math.sqrt(TRIALS * ALPHA * (1 - ALPHA))
"""Three deviations of the binomial distribution above what is stated."""


def without_zero(sequence: ConfidenceSequence) -> bool:
    low, high = sequence.interval()
    return low > 0 or high < 0


def test_a_look_at_every_step_of_equal_rankers_finds_a_difference_no_more_often_than_stated() -> None:
    random = np.random.default_rng(1)
    alarms = fixed = 0
    for _ in range(TRIALS):
        sequence, sums = ConfidenceSequence(ALPHA, LOOKS * ROWS), BlockSums()
        alarm = fixed_alarm = False
        # Losses have a long tail to one side; their differences do not, and less than half of all rows differ.
        for row in random.exponential(1.0, (LOOKS, ROWS, 2)) * (random.random((LOOKS, ROWS, 1)) < 0.4):
            differences = row[:, 0] - row[:, 1]
            sequence.add(differences)
            alarm = alarm or without_zero(sequence)
            sums.add(differences)
            fixed_alarm = fixed_alarm or abs(sums.mean) > 1.96 * math.sqrt(sums.variance)
        alarms, fixed = alarms + alarm, fixed + fixed_alarm
    assert alarms <= MOST_ALARMS
    assert fixed > 3 * MOST_ALARMS, "an interval of fixed size would have done"


def test_rows_of_a_user_that_are_alike_raise_no_more_alarms_and_would_if_they_were_taken_for_independent() -> None:
    random = np.random.default_rng(2)
    alarms = independent = 0
    for _ in range(TRIALS):
        pseudonyms = random.integers(1, 2**63, 300, np.uint64)
        likings = random.normal(0, 1, 300)
        sequence, careless = ConfidenceSequence(ALPHA, LOOKS * ROWS), ConfidenceSequence(ALPHA, LOOKS * ROWS)
        alarm = careless_alarm = False
        for who, noise in zip(random.integers(0, 300, (LOOKS, ROWS)), random.normal(0, 1, (LOOKS, ROWS)), strict=True):
            sequence.add(likings[who] + noise, pseudonyms[who])
            careless.add(likings[who] + noise)
            alarm, careless_alarm = alarm or without_zero(sequence), careless_alarm or without_zero(careless)
        alarms, independent = alarms + alarm, independent + careless_alarm
    assert alarms <= MOST_ALARMS
    assert independent > 2 * MOST_ALARMS, "there was nothing to take care of"


def test_a_true_difference_is_found_and_lies_in_the_interval() -> None:
    random = np.random.default_rng(3)
    for difference in (-0.05, 0.1):
        sequence = ConfidenceSequence(ALPHA, 20_000)
        found = None
        for rows in random.normal(difference, 1.0, (200, 100)):
            sequence.add(rows, random.integers(1, 2**63, 100, np.uint64))
            low, high = sequence.interval()
            assert low <= difference <= high
            found = sequence.rows if found is None and without_zero(sequence) else found
        assert found is not None and found < 20_000


def of_mixture(total: float, variance: float, tuned: float) -> float:
    """E of exp(l S - l^2 V / 2) over l of a normal distribution of variance 1 / r, by the trapezoid rule: what the boundary is solved from."""
    slopes: NDArray[np.float64] = np.linspace(-60, 60, 2_000_001) / math.sqrt(tuned)
    density = np.sqrt(tuned / (2 * math.pi)) * np.exp(-tuned * slopes * slopes / 2)
    return float(np.trapezoid(np.exp(slopes * total - slopes * slopes * variance / 2) * density, slopes))


@pytest.mark.parametrize("rows", [10, 1_000, 50_000])
def test_on_the_boundary_the_mixture_martingale_is_one_over_alpha(rows: int) -> None:
    """The mixture, integrated, is the oracle: by Ville's inequality it reaches 1 / alpha with probability alpha at most."""
    tuned = tuning(2_000, ALPHA)
    # Of variance 1 a row, the mean's is 1 / rows.
    boundary = rows * half_width(1 / rows, rows, tuned, ALPHA)
    assert of_mixture(boundary, rows, tuned) == pytest.approx(1 / ALPHA, rel=1e-6)
    assert of_mixture(-boundary, rows, tuned) == pytest.approx(1 / ALPHA, rel=1e-6)


def test_intervals_are_about_narrowest_after_the_planned_rows() -> None:
    """For a stated number of rows no other tuning makes the interval narrower by more than a hundredth."""
    widths = [half_width(1 / 5_000, 5_000, tuning(planned, ALPHA), ALPHA) for planned in np.geomspace(50, 500_000, 400)]
    assert half_width(1 / 5_000, 5_000, tuning(5_000, ALPHA), ALPHA) < 1.01 * min(widths)


def test_a_sequence_goes_on_after_a_restart_bit_for_bit() -> None:
    random = np.random.default_rng(4)
    sequence = ConfidenceSequence(0.01, 7_000)
    sequence.add(random.normal(0.3, 1.0, 1_001))
    restarted = ConfidenceSequence.from_json(json.loads(json.dumps(sequence.document(), allow_nan=False)))
    more, users = random.normal(0.3, 1.0, 500), random.integers(1, 2**63, 500, np.uint64)
    for one in (sequence, restarted):
        one.add(more[:200])
        one.add(more[200:], users[200:])
    assert restarted.interval() == sequence.interval()
    assert restarted.document() == sequence.document()


def test_a_document_of_other_blocks_is_refused() -> None:
    document = ConfidenceSequence().document()
    with pytest.raises(ValueError, match="reshape"):
        ConfidenceSequence.from_json(document | {"totals": document["totals"][1:]})


def test_the_variance_of_independent_rows_is_that_of_their_mean() -> None:
    values = np.random.default_rng(5).normal(2.0, 3.0, BLOCKS)
    sums = BlockSums()
    for piece in np.split(values, [3, 100]):
        sums.add(piece)
    assert sums.variance == pytest.approx(values.var(ddof=1) / BLOCKS)
    assert sums.mean == pytest.approx(values.mean())


def test_clicks_that_come_later_are_credited_to_what_was_shown() -> None:
    users = np.arange(1, 1_001, dtype=np.uint64)
    shown, known = BlockSums(), BlockSums()
    shown.add(np.zeros(1_000), users)
    shown.credit(np.ones(100), users[:100])
    known.add(np.where(users <= 100, 1.0, 0.0), users)
    assert shown.document() == known.document() and shown.mean == 0.1


def test_too_little_has_no_interval() -> None:
    sequence = ConfidenceSequence()
    assert (sequence.rows, sequence.mean, sequence.interval()) == (0, 0.0, UNBOUNDED)
    sequence.add(np.ones(63))
    sequence.add(np.zeros(10_000))
    assert sequence.interval() == UNBOUNDED
