"""Logarithms of many values at once in compiled kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from state.compiled import part_of_sums

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

_LN2 = np.float32(np.log(2.0))


@part_of_sums
def logarithms(values: F32, bits: I32, logs: F32, count: int, first: int) -> None:
    """Writes the logarithms of the first `count` values of each row to `logs`, from column `first` on.

    Args:
        values: `[A, n]` float32, at least 1; overwritten.
        bits: `values` viewed as int32.
        logs: `[A, m]` float32; the error is below 2e-6.
        count: The number of values of a row.
        first: A column of `logs`.
    """
    for a in range(values.shape[0]):
        to = logs[a, first : first + count]
        # In two loops, because `bits` is a view of `values`.
        for j in range(count):
            exponent = (bits[a, j] >> np.int32(23)) - np.int32(127)
            to[j] = np.float32(exponent) * _LN2
            bits[a, j] -= exponent << np.int32(23)
        for j in range(count):
            # log m = 2 artanh t for m in [1, 2).
            t = (values[a, j] - np.float32(1.0)) / (values[a, j] + np.float32(1.0))
            u = t * t
            series = np.float32(1 / 3) + u * (np.float32(1 / 5) + u * (np.float32(1 / 7) + u * np.float32(1 / 9)))
            to[j] += np.float32(2.0) * t * (np.float32(1.0) + u * series)
