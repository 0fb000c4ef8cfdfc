"""Loops over one row: dot products, sums, softmax over candidates, rank of the target, the log normaliser."""

from __future__ import annotations

import math

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32, I32

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
_LOWEST = np.float32(-87.0)
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


@part_of_sums
def dot(a: F32, row: int, first: int, b: F32, at: int) -> np.float32:
    """The dot product of `b[at]` with the part of `a[row]` that begins at `first`."""
    total: np.float32 = _ZERO
    begin = np.uint64(first)
    for d in range(b.shape[1]):
        total += a[row, begin + np.uint64(d)] * b[at, d]
    return total


@part_of_sums
def add(out: F32, at: int, column: int, factor: np.float32, a: F32, row: int, first: int, width: int) -> None:
    """Adds `factor` times `width` numbers of `a[row]`, beginning at `first`, to `out[at]`, beginning at `column`."""
    to, begin = np.uint64(column), np.uint64(first)
    for d in range(width):
        out[at, to + np.uint64(d)] += factor * a[row, begin + np.uint64(d)]


@part_of_sums
def divide(joined: F32, row: int, recent: F32, popular: F32, successor: F32) -> None:
    """Copies the numbers of a row's candidates, `[L + P + S]` or more, to `row` of `[B, L]`, `[B, P]` and `[B, S]`."""
    of_popular, of_successors = joined[recent.shape[1] :], joined[recent.shape[1] + popular.shape[1] :]
    for j in range(recent.shape[1]):
        recent[row, j] = joined[j]
    for j in range(popular.shape[1]):
        popular[row, j] = of_popular[j]
    for j in range(successor.shape[1]):
        successor[row, j] = of_successors[j]


@part_of_sums
def exponentials(x: F32, highest: np.float32, out: F32, bits: I32, scale: F32) -> np.float32:
    """Writes exp(x - highest) (Cephes' expf) to `out`; returns the sum. `scale` is `bits` viewed as float32."""
    for i in range(x.shape[0]):
        value = max(x[i] - highest, _LOWEST)
        n = np.floor(value * _LOG2_E + _HALF)
        r = value - n * _LN2_HIGH - n * _LN2_LOW
        poly = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        out[i] = poly * r * r + r + _ONE
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    total = _ZERO
    for i in range(x.shape[0]):
        # Values at or below exp(-87), and masked slots, are treated as zero.
        out[i] = out[i] * scale[i] if x[i] - highest > _LOWEST else _ZERO
        total += out[i]
    return total


@part_of_sums
def highest_of(x: F32) -> np.float32:
    """The maximum of `[n]`."""
    highest: np.float32 = x[0]
    for i in range(1, x.shape[0]):
        highest = max(highest, x[i])
    return highest


@part_of_sums
def rank_of(logits: F32, target: int) -> int:
    """The number of candidates ranked before the target, without the last slot. On a tie the lower slot ranks first."""
    slots: int = logits.shape[0] - 1
    if target >= slots:
        return slots
    target_logit, before = logits[target], 0
    for i in range(slots):
        if logits[i] > target_logit or (logits[i] == target_logit and i < target):
            before += 1
    return before


@part_of_sums
def normaliser_of(total: np.float32, highest: np.float32) -> np.float32:
    """log(1 + sum of exp(logit)): 0 if there is no candidate."""
    if highest > _ZERO:
        return highest + np.float32(math.log(total + math.exp(-highest)))
    return np.float32(math.log1p(total * math.exp(highest)))
