"""Selects the crosses of a row that a private trainer learns, and those that it releases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOLD = ("context", "user attribute")
"""Kinds of crosses that are released with noise: their values are few and public, and many rows have each."""


class LearnedCrosses(NamedTuple):
    """The crosses of a row that are learned, by their index among all.

    Attributes:
        told: `[T]` int64, those that are released with noise.
        own: `[O]` int64, those that contain the user; only that user's requests read them.
    """

    told: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]

    @property
    def both(self) -> npt.NDArray[np.int64]:
        """`[T + O]` int64, in this order."""
        return np.concatenate(self)

    @classmethod
    def of(cls, kinds: Sequence[str], unit: str) -> LearnedCrosses:
        """Selects from crosses of these kinds, for a setting `privacy.unit`.

        With unit example no cross of a user is learned: the effect of a single row on it would be in the gradients of
        all later rows of the user.

        >>> LearnedCrosses.of(("every", "user", "context", "user*item", "user attribute"), "user").both.tolist()
        [2, 4, 1, 3]
        >>> LearnedCrosses.of(("user", "context", "user*item"), "example").both.tolist()
        [1]
        """
        own = [unit == "user" and (kind == "user" or kind.startswith("user*")) for kind in kinds]
        return cls(np.flatnonzero([kind in TOLD for kind in kinds]), np.flatnonzero(own))
