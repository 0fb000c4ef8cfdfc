"""An online logistic regression, as accurate as a regression that is refitted to all examples.

It keeps a Gaussian over the weights, and updates it with each example: inputs x and outcome y. The new mean is the
maximum of the prior Gaussian times the likelihood of the example. The new covariance follows from the curvature there
(Spiegelhalter and Lauritzen 1990, with their Laplace step taken at the mode). With g = C x, v = x C x and s the logit
before:

    s' = s + v (y - sigma(s'))            the logit at the mode, by bisection
    mean += g (y - sigma(s'))
    C    -= g g' r / (1 + r v)            r = sigma(s') (1 - sigma(s'))

There is no learning rate. Each variance grows slightly with each example, up to its initial value, so that the model can
follow users whose behaviour changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.compiled import compiled_sums

F64 = npt.NDArray[np.float64]

HALVINGS = 40


class OnlineRegression:
    """A logistic regression that learns online.

    Args:
        mean: `[I]` float64, the weights before the first example.
        variance: The initial variance of each weight.
        drift: The amount by which each variance grows with each example.
    """

    def __init__(self, mean: F64, variance: float, drift: float) -> None:
        self._first, self._variance, self._drift = mean.copy(), variance, drift
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self.mean: F64 = self._first.copy()
        # The matrix is symmetric: only the diagonal and the part above it are used.
        self._covariance: F64 = np.eye(self.mean.size) * self._variance

    def learn(self, inputs: F64, outcome: npt.NDArray[np.bool_]) -> F64:
        """Learns `[n, I]` float64 inputs and their `[n]` bool outcomes one after another.

        Returns `[n]` float64, the logit of each example before it was learned.
        """
        logits = np.empty(len(outcome))
        inputs, outcomes = np.ascontiguousarray(inputs), outcome.astype(np.float64)
        _learn(inputs, outcomes, self.mean, self._covariance, self._variance, self._drift, logits)
        return logits

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The whole state, to be stored in a version."""
        return {"mean": self.mean.copy(), "covariance": self._covariance[np.triu_indices(self.mean.size)]}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned."""
        self.mean = np.array(state["mean"])
        self._covariance = np.zeros((self.mean.size, self.mean.size))
        self._covariance[np.triu_indices(self.mean.size)] = state["covariance"]


@compiled_sums("f8[:, ::1], f8[::1], f8[::1], f8[:, ::1], f8, f8, f8[::1]")
def _learn(inputs: F64, outcomes: F64, mean: F64, covariance: F64, variance: float, drift: float, logits: F64) -> None:
    size = mean.shape[0]
    along = np.empty(size)
    for n in range(inputs.shape[0]):
        example = inputs[n]
        logit = 0.0
        for j in range(size):
            logit += mean[j] * example[j]
        logits[n] = logit
        along[:] = 0.0
        for i in range(size):
            value = example[i]
            total = covariance[i, i] * value
            for j in range(i + 1, size):
                total += covariance[i, j] * example[j]
                along[j] += covariance[i, j] * value
            along[i] += total
        spread = 0.0
        for j in range(size):
            spread += along[j] * example[j]
        low = high = logit
        reach = spread * (outcomes[n] - 1.0 / (1.0 + math.exp(-logit)))
        low, high = min(logit, logit + reach), max(logit, logit + reach)
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if middle - logit > spread * (outcomes[n] - 1.0 / (1.0 + math.exp(-middle))):
                high = middle
            else:
                low = middle
        share = 1.0 / (1.0 + math.exp(-0.5 * (low + high)))
        step, curve = outcomes[n] - share, share * (1.0 - share)
        curve /= 1.0 + curve * spread
        for i in range(size):
            mean[i] += along[i] * step
            scaled = curve * along[i]
            for j in range(i, size):
                covariance[i, j] -= scaled * along[j]
            if covariance[i, i] < variance:
                covariance[i, i] += drift
