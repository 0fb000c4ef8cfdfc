"""The churn model's contract between trainer and serving: its moments, its inputs, and its tensors in a version.

**Moments.** A user has churned at a moment if no event follows within the span. Moments follow each event, up to the
user's next event. The first moment is drawn at random, and the others follow one stride apart. So each user is sampled
once per stride, at any time of day, and mostly not at a click.

**Inputs.** The windows before a user's latest event, that event's action, and its age. At every moment the windows are
the row's own, bit for bit; only the age grows.

1. A constant.
2. The windows of the user, without those of single categories: counts as log(1 + n); recencies and gaps unchanged, in
   octaves.
3. The action of the latest event, one-hot.
4. The age: its logarithm, the square of the logarithm, and its share of the longest age.
5. The logarithm of the age times the features that measure how often the user comes: gaps, sessions, days.

**Tensors.** A version contains them once enough rows were learned. Serving's store keeps them with the dense weights,
under names that no dense weight has.

    churn.about    `[3]` int64: the code of the inputs, the span in ms, the digest of the inputs
    churn.weights  `[2 + I]` float64: slope and intercept of the calibration, then a weight for each input
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.features.arrays import DAY_MS
from state.features.spec import FeatureSpec

MOST_STRIDES = 64
"""Maximum number of moments after one event. It bounds their number for a short span and a long window."""


class Horizon(NamedTuple):
    """The time spans of a churn question.

    Attributes:
        span_ms: The time without an event that counts as churn.
        stride_ms: The time between two moments of one user.
        reach_ms: The age at and beyond which churn is neither learned nor predicted.
    """

    span_ms: int
    stride_ms: int
    reach_ms: int

    @classmethod
    def of(cls, span_ms: int, spec: FeatureSpec) -> Horizon:
        """The horizon for a span. A user without an event in the longest window is unknown, so the reach ends there."""
        longest_ms = spec.windows_s[-1] * 1000
        stride_ms = min(DAY_MS, span_ms, longest_ms)
        return cls(span_ms, stride_ms, min(longest_ms, MOST_STRIDES * stride_ms))


CODE = 1
"""Increment this when the same row gives other inputs, or when training uses other inputs."""

F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]

_COUNT, _STEP, _THOUSANDTHS = range(3)
_LOG_SCALE, _OCTAVES, _LONGEST_STEP = 4.0, 32.0, 160
_PACE = ("gap.", "session", "events.", "labels.distinct", "items.distinct", "last.", "truncated")
_MINUTE_MS = 60_000


class ChurnInputs:
    """Computes the churn inputs for one feature spec.

    Attributes:
        columns: `[C]` int64, the indices of the features that are inputs.
        width: I, the number of inputs.
        digest: 63-bit digest of the inputs' meaning.
    """

    def __init__(self, spec: FeatureSpec, horizon: Horizon) -> None:
        names = [name for name in spec.names if not name.startswith("label.")]
        self.columns = np.array([spec.names.index(name) for name in names], np.int64)
        self._kinds = np.array([_kind(name) for name in names], np.int64)
        self._pace = np.array([column for column, name in enumerate(names) if name.startswith(_PACE)], np.int64)
        self._actions, self._reach_ms = len(spec.actions), horizon.reach_ms
        self.width = 1 + len(names) + self._actions + 3 + len(self._pace)
        meaning = "\n".join([str(horizon), *names, "", *spec.actions])
        self.digest = int.from_bytes(hashlib.sha256(meaning.encode()).digest()[:8], "big") >> 1

    def of(self, windows: U16, action: NDArray[np.uint8], age_ms: NDArray[np.int64]) -> F64:
        """The inputs, `[n, I]` float64.

        Args:
            windows: `[n, C]` uint16, the features of `columns` before each user's latest event.
            action: `[n]` uint8, the action of that event.
            age_ms: `[n]` int64, the age of that event.
        """
        rows = len(action)
        scaled = _scales()[self._kinds[None, :], windows]
        actions = np.zeros((rows, self._actions))
        is_known = action < self._actions
        actions[is_known, action[is_known]] = 1.0
        log_age = np.log1p(age_ms / _MINUTE_MS) / _LOG_SCALE
        ages = np.stack([log_age, log_age * log_age, age_ms / self._reach_ms], 1)
        return np.concatenate(
            [np.ones((rows, 1)), scaled, actions, ages, scaled[:, self._pace] * log_age[:, None]], axis=1
        )


def _kind(name: str) -> int:
    """The scale of a feature: `_COUNT`, `_STEP` or `_THOUSANDTHS`."""
    if name.endswith("recency") or name.startswith("gap.") or name in ("session.age", "events.oldest"):
        return _STEP
    return _THOUSANDTHS if name.startswith(("clock.", "labels.top_share")) else _COUNT


@cache
def _scales() -> F64:
    """`[kind, 65536]` float64: the scaled value of each integer, by kind of scale."""
    every = np.arange(65536, dtype=np.float64)
    return np.stack([np.log1p(every) / _LOG_SCALE, np.minimum(every, _LONGEST_STEP) / _OCTAVES, every / 1000])


PREFIX = "churn."
STORED = ":"
"""Prefix of these tensors' names where dense weights are stored by their own names."""

STEEPEST_LOGIT = 12.0
"""Logits are clipped to plus and minus this value."""

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
    """Calibrated probabilities, `[n]` float64, of `[n]` float64 logits, after Platt (1999)."""
    logits = np.clip(logits, -STEEPEST_LOGIT, STEEPEST_LOGIT)
    return np.asarray(1.0 / (1.0 + np.exp(-(slope * logits + intercept))))


def tensors_of(weights: ChurnWeights) -> dict[str, NDArray[Any]]:
    """The tensors of a version, by name."""
    header = np.array([CODE, weights.horizon.span_ms, weights.inputs.digest], np.int64)
    return {
        f"{PREFIX}about": header,
        f"{PREFIX}weights": np.concatenate([[weights.slope, weights.intercept], weights.weights]),
    }


def weights_in(stored: Mapping[str, NDArray[Any]], spec: FeatureSpec) -> ChurnWeights | None:
    """Decodes the churn weights of a version; None if it has none, or its inputs are not those of this release."""
    header, weights = (stored.get(f"{STORED}{PREFIX}{name}") for name in ("about", "weights"))
    if header is None or weights is None or int(header[0]) != CODE:
        return None
    horizon = Horizon.of(int(header[1]), spec)
    inputs = _inputs_of(spec, horizon)
    if (int(header[2]), len(weights)) != (inputs.digest, 2 + inputs.width):
        return None
    return ChurnWeights(horizon, inputs, float(weights[0]), float(weights[1]), weights[2:])
