"""Limits what private learning uses: the updates of a period that each user takes part in, and the crosses of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import mixed

U64 = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]

PLACES = 1 << 20
"""Number of buckets: 2 MB of a durable version before compression. With a million users in a period, a user shares the
bucket with one other on average."""


class Participation:
    """Counts the updates of the period that users took part in; part of each version.

    No id is stored. A user is counted in a bucket that is a hash of the id. Users with the same bucket share its
    allowance, so no user ever gets more.
    """

    def __init__(self, updates: int, period_ms: int) -> None:
        self._updates, self.period_ms = updates, period_ms
        self.clear()

    def clear(self) -> None:
        """Resets to the initial state."""
        self._period, self.left_out = -1, 0
        self._used: npt.NDArray[np.uint16] = np.zeros(PLACES, np.uint16)

    @property
    def began(self) -> bool:
        """Whether anything was learned under a budget."""
        return self._period >= 0

    def begin(self, log_ms: int) -> None:
        """Sets the log time to `log_ms`. A new period resets all counts."""
        if (period := log_ms // self.period_ms) > self._period:
            self._period = period
            self._used[:] = 0

    def admit(self, users: U64) -> Flags:
        """Which rows of an update take part, `[n]` bool: all rows of a user, or none.

        >>> allowance = Participation(1, 1000)
        >>> allowance.begin(500)
        >>> users = np.array([7, 8, 7], np.uint64)
        >>> allowance.admit(users).tolist(), allowance.admit(users[:2]).tolist(), allowance.left_out
        ([True, True, True], [False, False], 2)
        >>> allowance.begin(1000)
        >>> allowance.admit(users[:1]).tolist()
        [True]
        """
        counters = (mixed(users) & np.uint64(PLACES - 1)).astype(np.int64)
        admitted: Flags = self._used[counters] < self._updates
        self._used[np.unique(counters[admitted])] += 1
        self.left_out += int(users.size - admitted.sum())
        return admitted

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """A copy of the whole state, by name."""
        return {"period": np.array(self._period), "left_out": np.array(self.left_out), "used": self._used.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Restores what `state` returned; an empty state resets the counts."""
        self.clear()
        if "used" in state:
            self._period, self.left_out = int(state["period"]), int(state["left_out"])
            self._used = np.array(state["used"], np.uint16)


RELEASED = ("context", "user attribute")
"""Kinds of crosses that are released with noise: their values are few and public, and many rows have each."""


class LearnedCrosses(NamedTuple):
    """The crosses of a row that are learned, by their index among all.

    Attributes:
        released: `[T]` int64, those that are released with noise.
        own: `[O]` int64, those that contain the user; only that user's requests read them.
    """

    released: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]

    @property
    def both(self) -> npt.NDArray[np.int64]:
        """`[T + O]` int64, in this order."""
        return np.concatenate(self)

    @classmethod
    def of(cls, kinds: Sequence[str], unit: str) -> LearnedCrosses:
        """Selects from crosses of these kinds, for a setting `privacy.unit`.

        With unit `example`, crosses of users are not learned, because a single row would affect the gradients of all
        later rows of its user.

        >>> LearnedCrosses.of(("every", "user", "context", "user*item", "user attribute"), "user").both.tolist()
        [2, 4, 1, 3]
        >>> LearnedCrosses.of(("user", "context", "user*item"), "example").both.tolist()
        [1]
        """
        own = [unit == "user" and (kind == "user" or kind.startswith("user*")) for kind in kinds]
        return cls(np.flatnonzero([kind in RELEASED for kind in kinds]), np.flatnonzero(own))
