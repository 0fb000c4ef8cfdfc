"""The privacy accountant, and the noise that it accounts for.

SciPy's statistics are imported where they are used: the import takes a second of each test process.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path

import numpy as np
import pytest

from state.config.loading import load
from state.errors import SettingsError
from state.registry.privacy_ledger import PrivacyPeriod
from trainer.engine.private_step import Noise
from trainer.privacy.accounting import COUNT_NOISE, epsilon_of, noise_for, spent, together
from trainer.privacy.history import own_key


def exact(noise: float, delta: float) -> float:
    """Epsilon of normal noise in closed form (Balle and Wang 2018, theorem 8)."""

    from scipy import optimize
    from scipy.stats import norm

    def over(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - math.exp(epsilon + norm.logcdf(-a - b))) - delta

    return float(optimize.brentq(over, 0.0, 200.0, xtol=1e-10))


def one_by_one(periods: list[PrivacyPeriod]) -> object:
    """Each update of each period, gradient and counts, as an event of its own."""
    import dp_accounting

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
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

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


KEY = bytes(range(32))
COUNT = 400_001


def test_the_same_key_and_name_make_the_same_bits_for_any_count() -> None:
    first = Noise(KEY).normal("a name", COUNT)
    assert Noise(KEY).normal("a name", COUNT).tobytes() == first.tobytes()
    for count in (1, 2, 7, 1000):
        assert Noise(KEY).normal("a name", count).tobytes() == first[:count].tobytes()


def test_another_key_or_name_makes_noise_that_has_nothing_to_do_with_it() -> None:
    one = Noise(KEY).normal("a name", COUNT)
    for other in (Noise(KEY[::-1]).normal("a name", COUNT), Noise(KEY).normal("another name", COUNT)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / np.sqrt(COUNT)


@pytest.mark.parametrize("seed", range(3))
def test_the_noise_is_normal_in_mean_variance_tails_and_shape(seed: int) -> None:
    found = Noise(bytes([seed] * 32)).normal("a name", COUNT)
    assert abs(found.mean()) < 5 / np.sqrt(COUNT)
    assert abs(found.var() - 1.0) < 5 * np.sqrt(2 / COUNT)
    from scipy import stats

    assert stats.kstest(found, "norm").pvalue > 1e-4
    assert 4.0 < np.abs(found).max() < 8.6
    # The two of a pair have nothing to do with each other, nor have their squares.
    pairs = found[: COUNT - 1].reshape(-1, 2)
    for one in (pairs, pairs**2):
        assert abs(np.corrcoef(one.T)[0, 1]) < 5 / np.sqrt(len(pairs))


def test_a_key_is_made_once_for_its_owner_alone_and_is_not_made_again_once_something_was_learned(
    tmp_path: Path,
) -> None:
    settings = load(["--paths.state", str(tmp_path / "state"), "--privacy.epsilon", "8"], {})
    first = own_key(settings)
    path = settings.privacy_key_path
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert own_key(settings) == first and len(first) == 32
    settings.privacy_ledger_path.parent.mkdir(parents=True)
    settings.privacy_ledger_path.write_text("{}")
    path.unlink()
    with pytest.raises(SettingsError, match="there is no key of the noise"):
        own_key(settings)
