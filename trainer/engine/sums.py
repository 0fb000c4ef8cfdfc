"""Small compiled loops of a step on the host: summing derivatives by row, their norm, and dropout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.compiled import compiled, compiled_sums
from state.compiled.mixing import mix
from trainer.tables.index import I32

F32 = npt.NDArray[np.float32]


@compiled_sums("f4[:, ::1], i4[::1], f4[:, ::1]")
def _gather(sums: F32, at: I32, slopes: F32) -> None:
    for i in range(at.shape[0]):
        for d in range(slopes.shape[1]):
            sums[at[i], d] += slopes[i, d]


@compiled_sums("f4[:, ::1]")
def _square(slopes: F32) -> float:
    total = 0.0
    for i in range(slopes.shape[0]):
        row = np.float32(0.0)
        for d in range(slopes.shape[1]):
            row += slopes[i, d] * slopes[i, d]
        total += float(row)
    return total


@compiled("u8, i8, f4, f4[::1]")
def _drop(seed: np.uint64, least: int, factor: np.float32, kept: F32) -> None:
    word, left = np.uint64(0), 0
    for i in range(kept.shape[0]):
        if left == 0:
            seed = seed + np.uint64(0x9E3779B97F4A7C15)
            word, left = mix(seed), 8
        kept[i] = factor if np.int64(word & np.uint64(255)) >= least else np.float32(0.0)
        word = word >> np.uint64(8)
        left -= 1


def gather(sums: F32, at: I32, slopes: F32) -> None:
    """Adds each of `slopes` `[n, dim]` to the row of `sums` `[u, dim]` with the index in `at` `[n]`, in order."""
    _gather(sums, at, slopes)


def square(slopes: F32) -> float:
    """The sum of the squares of `[u, dim]`.

    >>> square(np.array([[3.0, 4.0]], np.float32))
    25.0
    """
    return float(_square(slopes))


def dropout(seed: tuple[int, int], rows: int, width: int, share: float) -> F32:
    """Draws the dropout factor of each unit: 0 for a `share` of them, and the compensating factor for the others.

    Args:
        seed: Two int32.
        rows: B.
        width: Units of a row.
        share: In [0, 1), rounded to 1/256.

    Returns:
        `[B, width]` float32.

    >>> dropout((1, 2), 1, 4, 0.0).tolist()
    [[1.0, 1.0, 1.0, 1.0]]
    """
    least = round(256 * share)
    kept = np.empty((rows, width), np.float32)
    state = np.uint64((seed[0] << 32 | seed[1]) & (2**64 - 1))
    _drop(state, least, np.float32(256.0 / (256 - least)), kept.reshape(-1))
    return kept
