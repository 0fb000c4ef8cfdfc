"""Shapley values of groups of inputs: how much each changes the explained function, on average over orders.

Some inputs are the user's and the others are an unknown user's. A group's
Shapley value (Shapley 1953, "A Value for n-Person Games") is the mean, over
all orders in which the groups become the user's, of the change that its own
turn makes. Each order's changes add up to the whole difference, so the values
do too. With more than `EXACT` groups `ORDERS` random orders stand for all:
half of them, and the same ones reversed (Castro, Gomez and Tejada 2009).
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

EXACT = 4
"""Groups, at most, for which all orders are taken."""

ORDERS = 32
"""Even. The orders are always the same ones, so that an explanation can be had again."""


class Coalitions:
    """The sets of groups at which the function is wanted.

    >>> coalitions = Coalitions(2)
    >>> coalitions.members.tolist()
    [[False, False], [False, True], [True, False], [True, True]]
    >>> coalitions.shares(np.array([0.0, 0.0, 3.0, 4.0])).tolist()
    [3.5, 0.5]

    Args:
        groups: One or more.

    Attributes:
        members: `[n, groups]` bool, the groups that are the user's; none in the first row, all in the last.
    """

    def __init__(self, groups: int) -> None:
        if groups <= EXACT:
            self._orders = np.array(list(permutations(range(groups))))
        else:
            rng = np.random.default_rng(groups)
            half = np.array([rng.permutation(groups) for _ in range(ORDERS // 2)])
            self._orders = np.concatenate([half, half[:, ::-1]])
        turns = np.argsort(self._orders, axis=1)
        joined = turns[:, None, :] < np.arange(groups + 1)[:, None]
        self.members, at = np.unique(joined.reshape(-1, groups), axis=0, return_inverse=True)
        self._at = at.reshape(len(self._orders), groups + 1)

    def shares(self, values: F64) -> F64:
        """The value of each group, `[groups]` float64; they add up to the last of `values` less the first.

        Args:
            values: `[n]` float64, the function at `members`.
        """
        found = np.zeros(self._orders.shape[1])
        np.add.at(found, self._orders, np.diff(values[self._at], axis=1))
        return found / len(self._orders)
