"""The churn tensors of a version: the weights of a logistic regression, and the calibration of its logits.

    churn.about    `[3]` int64: the code of the inputs, the span in ms, the digest of the inputs
    churn.weights  `[2 + I]` float64: slope and intercept of the calibration, then a weight for each input

A version has them once enough was learned. Serving's store keeps them next to
the dense weights, under names that no dense weight has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from state.churn.inputs import CODE, ChurnInputs
from state.churn.moments import Horizon
from state.features.spec import FeatureSpec

PREFIX = "churn."
STORED = ":"
"""Prefix of these tensors' names where dense weights are stored by their own names."""

STEEPEST_LOGIT = 12.0
"""Logits are clipped to plus and minus this value."""

F64 = NDArray[np.float64]

_inputs_of = lru_cache(8)(ChurnInputs)


@dataclass(frozen=True)
class ChurnWeights:
    """The churn model as serving uses it.

    Attributes:
        horizon: The churn horizon.
        inputs: Computes the model's inputs.
        slope, intercept: The calibration.
        weights: `[I]` float64.
    """

    horizon: Horizon
    inputs: ChurnInputs
    slope: float
    intercept: float
    weights: F64

    def probabilities(self, inputs: F64) -> F64:
        """The probability that no event follows within the span, `[n]` float64, from `[n, I]` float64 inputs."""
        return calibrated(inputs @ self.weights, self.slope, self.intercept)


def calibrated(logits: F64, slope: float, intercept: float) -> F64:
    """Calibrated probabilities, `[n]` float64, of `[n]` float64 logits, after Platt (1999).

    >>> calibrated(np.array([0.0, 1e9]), 1.0, 0.0).round(4).tolist()
    [0.5, 1.0]
    """
    logits = np.clip(logits, -STEEPEST_LOGIT, STEEPEST_LOGIT)
    return np.asarray(1.0 / (1.0 + np.exp(-(slope * logits + intercept))))


def tensors_of(weights: ChurnWeights) -> dict[str, NDArray[Any]]:
    """The tensors of a version, by name."""
    about = np.array([CODE, weights.horizon.span_ms, weights.inputs.digest], np.int64)
    return {
        f"{PREFIX}about": about,
        f"{PREFIX}weights": np.concatenate([[weights.slope, weights.intercept], weights.weights]),
    }


def weights_in(stored: Mapping[str, NDArray[Any]], spec: FeatureSpec) -> ChurnWeights | None:
    """Decodes the churn weights of a version; None if it has none, or its inputs are not those of this release.

    Args:
        stored: The tensors stored with the version's dense weights.
        spec: The feature spec of the version.
    """
    about, held = (stored.get(f"{STORED}{PREFIX}{name}") for name in ("about", "weights"))
    if about is None or held is None or int(about[0]) != CODE:
        return None
    horizon = Horizon.of(int(about[1]), spec)
    inputs = _inputs_of(spec, horizon)
    if (int(about[2]), len(held)) != (inputs.digest, 2 + inputs.width):
        return None
    return ChurnWeights(horizon, inputs, float(held[0]), float(held[1]), held[2:])
