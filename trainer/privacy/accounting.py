"""What the noise costs: epsilon of all updates that one unit may be in, and the noise that a budget asks for.

Each update tells two things of a unit, each with normal noise: its clipped
gradient, and its part of the counts. A unit is in so many updates at most, each
of which sees what the ones before told. Normal noise composes exactly: k updates
of noise s tell as much as one of noise s / sqrt(k) (Dong, Roth and Su 2022,
corollary 3.3), also where each is chosen in view of the former ones; and what one
tells is known in closed form (Balle and Wang 2018), which `dp-accounting` computes.
No amplification is claimed: rows come in the order of the log, and nobody draws
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import dp_accounting

from state.registry.privacy_ledger import PrivacyPeriod

COUNT_NOISE = 4.0
"""The noise of counts over that of gradients: counts are large, and so cost a sixteenth of what gradients do."""

_OF_ONE = 1.0 + COUNT_NOISE**-2
"""What an update tells, where its gradient alone tells 1: in 1 / noise squared."""


def epsilon_of(noise: float, delta: float) -> float:
    """Epsilon of one number of sensitivity 1 that is told with normal noise, at `delta`.

    >>> round(epsilon_of(3.73, 1e-5), 3), epsilon_of(math.inf, 1e-5)
    (1.0, 0.0)

    Args:
        noise: Its standard deviation; infinite tells nothing.
        delta: How likely epsilon may not hold.
    """
    return float(dp_accounting.get_epsilon_gaussian(noise, delta))


def together(periods: Iterable[PrivacyPeriod]) -> float:
    """The noise with which one number tells as much as all updates of these periods tell of one unit.

    >>> together([]), round(together([PrivacyPeriod(1, 0, 17, 8.0), PrivacyPeriod(1, 1, 17, 8.0)]), 3)
    (inf, 1.331)
    """
    told = sum(one.updates * _OF_ONE / one.noise**2 for one in periods)
    return 1.0 / math.sqrt(told) if told else math.inf


def spent(periods: Iterable[PrivacyPeriod], delta: float) -> float:
    """Epsilon of all updates of these periods."""
    return epsilon_of(together(periods), delta)


def noise_for(epsilon: float, delta: float, updates: int) -> float:
    """The standard deviation, over the clipping bound, with which `updates` updates of one unit cost `epsilon`.

    >>> round(noise_for(1.0, 1e-5, 1), 2), round(noise_for(1.0, 1e-5, 16), 2)
    (3.85, 15.38)

    Args:
        epsilon: The budget, above 0.
        delta: Of it.
        updates: That one unit is in, in all periods together.
    """
    return float(dp_accounting.get_sigma_gaussian(epsilon, delta)) * math.sqrt(updates * _OF_ONE)
