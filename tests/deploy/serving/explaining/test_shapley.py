"""Shares of groups are Shapley values: they add up whatever the function, and are near to those of all orders."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from deploy.serving.answers.explaining import EXACT, ORDERS, Coalitions


def exact(function: np.ndarray, groups: int) -> np.ndarray:
    """The values by their definition, of a function by the bits of its coalitions."""
    found = np.zeros(groups)
    for group in range(groups):
        others = [1 << one for one in range(groups) if one != group]
        for size in range(groups):
            for chosen in combinations(others, size):
                change = function[sum(chosen) + (1 << group)] - function[sum(chosen)]
                found[group] += change / (groups * comb(groups - 1, size))
    return found


@pytest.mark.parametrize("groups", [1, 2, EXACT, 10])
def test_shares_are_shapley_values(groups: int) -> None:
    """Exactly, of few groups; of more, those of a logistic function of a sum with some products, nearly."""
    rng = np.random.default_rng(groups)
    bits = (np.arange(1 << groups)[:, None] >> np.arange(groups)) & 1
    inner = bits @ rng.normal(size=groups) + (bits @ rng.normal(size=groups)) * bits[:, 0]
    function = 1 / (1 + np.exp(-inner))
    coalitions = Coalitions(groups)
    assert not coalitions.members[0].any() and coalitions.members[-1].all()
    assert len(coalitions.members) <= min(1 << groups, 2 + ORDERS * (groups - 1))
    found = coalitions.shares(function[coalitions.members @ (1 << np.arange(groups))])
    assert found.sum() == pytest.approx(function[-1] - function[0])
    wanted = exact(function, groups)
    apart = np.abs(found - wanted).max()
    assert apart < (1e-12 if groups <= EXACT else 0.05 * np.abs(wanted).sum())
