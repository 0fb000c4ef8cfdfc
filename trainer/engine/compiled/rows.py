"""Products and sums over rows of matrices.

A row is passed as its matrix and a number: each view of one would be counted in and out.
"""

from __future__ import annotations

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32

_ZERO = np.float32(0.0)


@part_of_sums
def dot(a: F32, row: int, first: int, b: F32, at: int) -> np.float32:
    """The product of a part of `a[row]` from `first` on with `b[at]`."""
    total: np.float32 = _ZERO
    for d in range(b.shape[1]):
        total += a[row, first + d] * b[at, d]
    return total


@part_of_sums
def add(out: F32, at: int, to: int, factor: np.float32, a: F32, row: int, first: int, width: int) -> None:
    """Adds to `out[at]` from `to` on `factor` times `width` numbers of `a[row]` from `first` on."""
    for d in range(width):
        out[at, to + d] += factor * a[row, first + d]
