"""The privacy accountant: epsilon of all updates that one unit may take part in, and the noise that a budget requires.

Each update releases two values that depend on a unit, each with Gaussian noise: its clipped gradient, and its part of the
counts. Gaussian noise composes exactly: k updates with noise s reveal as much as one with noise s / sqrt(k), even if
each is chosen adaptively (Dong, Roth and Su 2022, corollary 3.3). The cost of one release has a closed form (Balle
and Wang 2018), which `dp-accounting` computes. There is no amplification by sampling, because rows come in the order of
the log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from state.registry.privacy_ledger import PrivacyPeriod

COUNT_NOISE = 4.0
"""The noise of counts relative to that of gradients. Counts are large, so they cost a sixteenth of the gradients."""

_OF_ONE = 1.0 + COUNT_NOISE**-2
"""The cost of an update in units of 1 / noise squared, if its gradient alone costs 1."""


def epsilon_of(noise: float, delta: float) -> float:
    """Epsilon of one number of sensitivity 1 that is released with Gaussian noise, at `delta`.

    >>> round(epsilon_of(3.73, 1e-5), 3), epsilon_of(math.inf, 1e-5)
    (1.0, 0.0)
    """
    # It loads SciPy's statistics, which takes a second and which a trainer without a budget does not need.
    import dp_accounting

    return float(dp_accounting.get_epsilon_gaussian(noise, delta))


def together(periods: Iterable[PrivacyPeriod]) -> float:
    """The noise with which one number reveals as much as all updates of these periods reveal of one unit.

    >>> together([]), round(together([PrivacyPeriod(1, 0, 17, 8.0), PrivacyPeriod(1, 1, 17, 8.0)]), 3)
    (inf, 1.331)
    """
    squared = sum(period.updates * _OF_ONE / period.noise**2 for period in periods)
    return 1.0 / math.sqrt(squared) if squared else math.inf


def spent(periods: Iterable[PrivacyPeriod], delta: float) -> float:
    """Epsilon of all updates of these periods."""
    return epsilon_of(together(periods), delta)


def noise_for(epsilon: float, delta: float, updates: int) -> float:
    """The standard deviation, over the clipping bound, with which `updates` updates of one unit cost `epsilon`.

    >>> round(noise_for(1.0, 1e-5, 1), 2), round(noise_for(1.0, 1e-5, 16), 2)
    (3.85, 15.38)
    """
    import dp_accounting

    return float(dp_accounting.get_sigma_gaussian(epsilon, delta)) * math.sqrt(updates * _OF_ONE)
