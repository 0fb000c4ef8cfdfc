"""Which crosses of a row a private trainer learns of, and which of them it tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOLD = ("context", "user attribute")
"""Kinds of crosses that are told: their values are few and known, and many rows have each."""


class LearnedCrosses(NamedTuple):
    """Which crosses of a row are learned, by their places among all.

    Attributes:
        told: `[T]` int64, with noise.
        own: `[O]` int64, those with the user in them, which are read in that user's answers alone.
    """

    told: npt.NDArray[np.int64]
    own: npt.NDArray[np.int64]

    @property
    def both(self) -> npt.NDArray[np.int64]:
        """`[T + O]` int64, in this order."""
        return np.concatenate(self)

    @classmethod
    def of(cls, kinds: Sequence[str], unit: str) -> LearnedCrosses:
        """Those of crosses of such kinds, for a setting `privacy.unit`.

        What a single row taught a user's own crosses would be in the gradients of all later rows of the user: of unit example
        none is learned.

        >>> LearnedCrosses.of(("every", "user", "context", "user*item", "user attribute"), "user").both.tolist()
        [2, 4, 1, 3]
        >>> LearnedCrosses.of(("user", "context", "user*item"), "example").both.tolist()
        [1]
        """
        own = [unit == "user" and (kind == "user" or kind.startswith("user*")) for kind in kinds]
        return cls(np.flatnonzero([kind in TOLD for kind in kinds]), np.flatnonzero(own))
