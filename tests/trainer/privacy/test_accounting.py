"""What the account says is what dp-accounting says of the events one by one, and what the closed form says of normal noise."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import optimize
from scipy.stats import norm

from state.registry.privacy_ledger import PrivacyPeriod
from trainer.privacy.accounting import COUNT_NOISE, epsilon_of, noise_for, spent, together


def exact(noise: float, delta: float) -> float:
    """Epsilon of normal noise in closed form (Balle and Wang 2018, theorem 8)."""

    def over(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b))) - delta

    return float(optimize.brentq(over, 0.0, 200.0, xtol=1e-10))


def one_by_one(periods: list[PrivacyPeriod]) -> dp_accounting.DpEvent:
    """Each update of each period, gradient and counts, as an event of its own."""
    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise), one.updates)
            for one in periods
            for noise in (one.noise, COUNT_NOISE * one.noise)
        ]
    )


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-7])
def test_one_update_costs_what_the_closed_form_says(noise: float, delta: float) -> None:
    assert abs(epsilon_of(noise, delta) - exact(noise, delta)) < 1e-6 * exact(noise, delta)


def test_updates_with_different_noise_cost_the_same_together_as_one_by_one() -> None:
    periods = [PrivacyPeriod(1, 0, 8, 6.0), PrivacyPeriod(1, 1, 8, 6.0), PrivacyPeriod(2, 1, 3, 11.0)]
    found = spent(periods, 1e-6)
    pld, rdp = PLDAccountant(value_discretization_interval=2e-3), RdpAccountant()
    for accountant in (pld, rdp):
        accountant.compose(one_by_one(periods))
    assert 0.0 <= pld.get_epsilon(1e-6) - found < 0.03
    assert found <= rdp.get_epsilon(1e-6) < 1.3 * found
    assert together([]) == math.inf and spent([], 1e-6) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0, 8.0])
@pytest.mark.parametrize("updates", [1, 240])
def test_the_noise_of_a_budget_spends_exactly_the_budget(epsilon: float, updates: int) -> None:
    noise = noise_for(epsilon, 1e-6, updates)
    found = spent([PrivacyPeriod(1, 0, updates, noise)], 1e-6)
    assert abs(found - epsilon) < 1e-9 * epsilon
