"""Sizes of the blocks in which the tower multiplies matrices, and the transposed copies that it multiplies with.

Before it multiplies, OpenBLAS copies both matrices into its own layout. For a
block of 64 rows that takes a quarter of the time. For processors with AVX-512 it
has kernels for small products that copy nothing: where rows, columns and depth
multiply to at most `SMALL`, and neither matrix is transposed. There blocks are
that small; elsewhere they are large.

The size follows from the shapes and the kind of processor alone, never from the
number of threads: sums have the same bits for any number of threads.
"""

from __future__ import annotations

from functools import cache

import scipy.linalg.cython_blas  # noqa: F401  loads the BLAS of compiled loops
from threadpoolctl import threadpool_info

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32

SMALL = 1_000_000
"""Multiplications of the largest product that OpenBLAS computes without copies."""

_WITH_SMALL = {"SkylakeX", "Cooperlake", "SapphireRapids"}
"""Kinds of processor, as OpenBLAS names them, for which it has those kernels."""

_ROWS, _WEIGHTS = 64, 128
"""Rows of a block, and rows of a weight matrix in a block of derivatives, where products are not small."""

_TILE = 16


@cache
def _small() -> int:
    kinds = {library.get("architecture") for library in threadpool_info() if library["internal_api"] == "openblas"}
    return SMALL if kinds and kinds <= _WITH_SMALL else 0


def rows_of_block(weights: int) -> int:
    """Rows that are multiplied at once with matrices of at most so many weights."""
    return _fitting(_small() // weights, _ROWS)


def weights_of_block(rows: int, outputs: int) -> int:
    """Rows of a weight matrix whose derivatives are computed at once, of so many rows of a batch and outputs."""
    return _fitting(_small() // (rows * outputs), _WEIGHTS)


def _fitting(most: int, large: int) -> int:
    """The largest multiple of 4 up to `most` and `large`; `large` where there is none.

    >>> _fitting(17, 64), _fitting(3, 64), _fitting(99, 64)
    (16, 64, 64)
    """
    return min(most - most % 4, large) or large


@part_of_sums
def transpose(given: F32, first: int, end: int, part: int, parts: int, out: F32) -> None:
    """Columns `first` to `end` of `given` become rows of `out`; of the rows of `given` every `parts`-th tile from `part` on."""
    for begin in range(part * _TILE, given.shape[0], parts * _TILE):
        rows, columns = min(begin + _TILE, given.shape[0]), end - (end - first) % 4
        # Sixteen numbers at a time are moved in registers: a third of the time of one at a time.
        whole = rows - (rows - begin) % 4
        for b in range(begin, whole, 4):
            for d in range(first, columns, 4):
                a0, a1, a2, a3 = given[b, d], given[b, d + 1], given[b, d + 2], given[b, d + 3]
                b0, b1, b2, b3 = given[b + 1, d], given[b + 1, d + 1], given[b + 1, d + 2], given[b + 1, d + 3]
                c0, c1, c2, c3 = given[b + 2, d], given[b + 2, d + 1], given[b + 2, d + 2], given[b + 2, d + 3]
                d0, d1, d2, d3 = given[b + 3, d], given[b + 3, d + 1], given[b + 3, d + 2], given[b + 3, d + 3]
                at = d - first
                out[at, b], out[at, b + 1], out[at, b + 2], out[at, b + 3] = a0, b0, c0, d0
                out[at + 1, b], out[at + 1, b + 1], out[at + 1, b + 2], out[at + 1, b + 3] = a1, b1, c1, d1
                out[at + 2, b], out[at + 2, b + 1], out[at + 2, b + 2], out[at + 2, b + 3] = a2, b2, c2, d2
                out[at + 3, b], out[at + 3, b + 1], out[at + 3, b + 2], out[at + 3, b + 3] = a3, b3, c3, d3
        for b in range(begin, rows):
            for d in range(first if b >= whole else columns, end):
                out[d - first, b] = given[b, d]
