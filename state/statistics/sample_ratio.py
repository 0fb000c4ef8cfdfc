"""Sample ratio test: whether the split of users between the arms of an experiment matches its shares. Pure.

A mismatch means that users or their events are lost on one side. Then no other comparison of the arms is valid. The
test is valid at any time.

The test is that of Lindon and Malek, Anytime-valid inference for multinomial count data, 2022. If the shares are right,
the Bayes factor of a Dirichlet mixture against them is a martingale. So it ever reaches 1 / alpha with probability at
most alpha (Ville, 1939). When the shares change, a new factor begins with the next user, and the product of all factors
is also a martingale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

CONCENTRATION = 100.0
"""Concentration of the mixture at the stated shares, in users. A higher value detects small deviations of many users
sooner."""


def log_evidence(counts: Sequence[int], shares: Sequence[float]) -> float:
    """The logarithm of the Bayes factor against the shares: log B(c p + n) - log B(c p) - sum of n_i log p_i.

    B is the multivariate beta function, n the users of each arm, p the expected shares, each more than 0, with sum 1,
    and c is `CONCENTRATION`.

    >>> round(log_evidence([500, 500], [0.5, 0.5]), 2), round(log_evidence([450, 550], [0.5, 0.5]), 2)
    (-1.2, 3.35)
    """
    alphas = [CONCENTRATION * share for share in shares]
    return (
        math.lgamma(CONCENTRATION)
        - math.lgamma(CONCENTRATION + sum(counts))
        + sum(
            math.lgamma(alpha + count) - math.lgamma(alpha) - count * math.log(share)
            for alpha, count, share in zip(alphas, counts, shares, strict=True)
        )
    )


class SampleRatio:
    """Test state: the users of each arm since the shares last changed, and the earlier evidence.

    A user counts once under the same shares. Each share is more than 0, and their sum is 1.

    >>> ratio = SampleRatio([0.5, 0.5])
    >>> ratio.add([480, 520])
    >>> ratio.change([0.1, 0.9])
    >>> ratio.add([210, 790])
    >>> ratio.mismatch(alpha=0.001)
    True
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self._shares, self._counts, self._before, self._most = list(shares), [0] * len(shares), 0.0, 0.0

    def add(self, counts: Sequence[int]) -> None:
        """Adds new users of each arm."""
        self._counts = [count + added for count, added in zip(self._counts, counts, strict=True)]
        self._most = max(self._most, self.log_evidence)

    def change(self, shares: Sequence[float]) -> None:
        """Sets the shares that are in force from now on."""
        self._before, self._shares, self._counts = self.log_evidence, list(shares), [0] * len(shares)

    @property
    def log_evidence(self) -> float:
        """Logarithm of the evidence against all shares so far."""
        return self._before + log_evidence(self._counts, self._shares)

    @property
    def p_value(self) -> float:
        """One over the highest evidence ever reached; valid at any time."""
        return math.exp(-self._most)

    def mismatch(self, alpha: float) -> bool:
        """Whether the split of users contradicts the shares; `alpha` is the rate of false alarms over all times."""
        return self.p_value <= alpha

    def document(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"shares": self._shares, "counts": self._counts, "before": self._before, "most": self._most}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SampleRatio:
        """Restores the state that `document` returned."""
        ratio = cls(document["shares"])
        ratio._counts, ratio._before, ratio._most = list(document["counts"]), document["before"], document["most"]
        return ratio
