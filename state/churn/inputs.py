"""The inputs of the churn model: the windows before a user's latest event, that event's action, and its age.

The windows are the row's own, bit for bit, at whatever moment churn is asked:
only the age grows. Windows as of the moment itself cannot be computed from a row.

1. A constant.
2. The windows of the user, without those of single categories: counts as
   log(1 + n), recencies and gaps as they are, in octaves.
3. The action of the latest event, one-hot.
4. The age: its logarithm, the square of the logarithm, and its share of the longest age.
5. The logarithm of the age times the features that measure how often the user
   comes: gaps, sessions, days. So an age is relative to the user's own pace.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
from numpy.typing import NDArray

from state.churn.moments import Horizon
from state.features.spec import FeatureSpec

CODE = 1
"""Raise this when the same row gives other inputs, or when training uses other inputs."""

F64 = NDArray[np.float64]
U16 = NDArray[np.uint16]

_COUNT, _STEP, _THOUSANDTHS = range(3)
_LOG_SCALE, _OCTAVES, _LONGEST_STEP = 4.0, 32.0, 160
_PACE = ("gap.", "session", "events.", "labels.distinct", "items.distinct", "last.", "truncated")
_MINUTE_MS = 60_000


class ChurnInputs:
    """Computes the churn inputs for one feature spec.

    Args:
        spec: The feature spec.
        horizon: The churn horizon.

    Attributes:
        columns: `[C]` int64, the indices of the features that are inputs.
        width: I, the number of inputs.
        digest: 63-bit digest of the inputs' meaning.

    >>> made = ChurnInputs(FeatureSpec(), Horizon.of(86_400_000, FeatureSpec()))
    >>> one = np.zeros((1, len(made.columns)), np.uint16)
    >>> made.of(one, np.array([0], np.uint8), np.array([0])).shape == (1, made.width)
    True
    """

    def __init__(self, spec: FeatureSpec, horizon: Horizon) -> None:
        names = [name for name in spec.names if not name.startswith("label.")]
        self.columns = np.array([spec.names.index(name) for name in names], np.int64)
        self._kinds = np.array([_kind(name) for name in names], np.int64)
        self._pace = np.array([place for place, name in enumerate(names) if name.startswith(_PACE)], np.int64)
        self._actions, self._reach_ms = len(spec.actions), horizon.reach_ms
        self.width = 1 + len(names) + self._actions + 3 + len(self._pace)
        told = "\n".join([str(horizon), *names, "", *spec.actions])
        self.digest = int.from_bytes(hashlib.sha256(told.encode()).digest()[:8], "big") >> 1

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
        known = action < self._actions
        actions[known, action[known]] = 1.0
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
