"""Dot products and sums over matrix rows.

A row is passed as its matrix and an index, because each view would be reference-counted.
"""

from __future__ import annotations

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32

_ZERO = np.float32(0.0)


@part_of_sums
def dot(a: F32, row: int, first: int, b: F32, at: int) -> np.float32:
    """The dot product of `b[at]` with the part of `a[row]` that begins at `first`."""
    total: np.float32 = _ZERO
    for d in range(b.shape[1]):
        total += a[row, first + d] * b[at, d]
    return total


@part_of_sums
def add(out: F32, at: int, to: int, factor: np.float32, a: F32, row: int, first: int, width: int) -> None:
    """Adds `factor` times `width` numbers of `a[row]`, beginning at `first`, to `out[at]`, beginning at `to`."""
    for d in range(width):
        out[at, to + d] += factor * a[row, first + d]
