"""Statistics of a categorical feature, whose values are ids: frequent values, distinct values, and missing values.

It uses two mergeable sketches of tfx-bsl, which TensorFlow Data Validation uses too. Misra-Gries (Misra and Gries,
Finding repeated elements, 1982) finds the most frequent values; it is exact while there are no more values than
buckets. K minimum values (Bar-Yossef et al., Counting distinct elements in a data stream, 2002) estimates the number of
distinct values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tfx_bsl.sketches import KmvSketch, MisraGriesSketch

BUCKETS = 4096
DISTINCT_BUCKETS = 2048


class Categorical:
    """Counts the ids of one feature; 0 is a missing value.

    Args:
        listed: Whether the most frequent values are stored. For users only the number of distinct ids is.

    >>> counted = Categorical()
    >>> counted.add(np.array([7, 9, 7, 0], np.uint64))
    >>> counted.rows, counted.missing, counted.frequent(), counted.distinct
    (4, 1, [(7, 2.0), (9, 1.0)], 2)
    """

    def __init__(self, listed: bool = True) -> None:
        self.rows = self.missing = 0
        self._listed = listed
        self._frequent = MisraGriesSketch(BUCKETS)
        self._different = KmvSketch(DISTINCT_BUCKETS)

    def add(self, ids: NDArray[np.uint64]) -> None:
        """Counts `[n]` uint64 ids."""
        found, counts = np.unique(ids, return_counts=True)
        self.rows += len(ids)
        if len(found) and found[0] == 0:
            self.missing += int(counts[0])
            found, counts = found[1:], counts[1:]
        if not len(found):
            return
        values = pa.array(found.view(np.int64))
        self._different.AddValues(values)
        if self._listed:
            self._frequent.AddValues(values, pa.array(counts.astype(np.float32)))

    def merge(self, other: Categorical) -> None:
        """Adds the counts of `other`, which does not change."""
        self.rows += other.rows
        self.missing += other.missing
        self._frequent.Merge(other._frequent)
        self._different.Merge(other._different)

    @property
    def distinct(self) -> int:
        """Estimated number of distinct values, exact up to about two thousand."""
        return int(self._different.Estimate())

    def frequent(self, most: int = BUCKETS) -> list[tuple[int, float]]:
        """The most frequent values with their counts, highest count first, lower id first among equals."""
        estimate: Any = self._frequent.Estimate()
        if not len(estimate):
            return []
        values: Sequence[bytes] = estimate.field("values").to_pylist()
        counts: Sequence[float] = estimate.field("counts").to_pylist()
        # The sketch returns an id as a signed decimal number.
        found = [(int(value) % 2**64, count) for value, count in zip(values, counts, strict=True)]
        return sorted(found, key=lambda entry: (-entry[1], entry[0]))[:most]
