"""The probe of a version: fixed synthetic inputs, and the trainer's outputs for them.

    probe.<output>   `[64, ...]` float32, among the tensors of a version that answers need

Before a host serves a version, it runs the version's program on the same inputs and compares the outputs. The inputs
are derived from integers alone, so that later NumPy releases give the same values.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.errors import ProgramError

F32 = npt.NDArray[np.float32]

ROWS = 64
PREFIX = "probe."
TOLERANCE = 1e-5
"""Largest allowed difference of an output, relative to 1 + the trainer's largest output for the same row."""

_NOT_THERE = 1e8
"""Logits of absent candidates are beyond this value."""

WHOLE = frozenset(
    (
        "features", "category_windows", "recent_next", "popular_next", "successor_next", "sequence_actions", "sequence_ages",
    )
)  # fmt: skip
"""Inputs with integer values. Inputs whose name ends in `_mask` are 0 or 1; all others are embedding rows."""


def inputs(shapes: Mapping[str, tuple[int | None, ...]]) -> dict[str, F32]:
    """The probe's inputs for a program or model.

    Args:
        shapes: Input name -> shape; None or -1 means the number of rows.
    """
    return {
        name: _values(name, tuple(ROWS if size is None or size < 0 else size for size in shape))
        for name, shape in shapes.items()
    }


def _values(name: str, shape: tuple[int, ...]) -> F32:
    # Pseudorandom 64-bit numbers: SplitMix64's finaliser applied to a counter.
    with np.errstate(over="ignore"):
        drawn = np.arange(int(np.prod(shape)), dtype=np.uint64) + (
            np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        )
        drawn = (drawn ^ (drawn >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        drawn = (drawn ^ (drawn >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        drawn = (drawn ^ (drawn >> np.uint64(31))).reshape(shape)
    if name in WHOLE:
        # Twelve bits, shifted right at random: windows of all magnitudes.
        counts = (drawn >> np.uint64(52)) >> (drawn & np.uint64(7))
        counts[0] = 0
        return counts.astype(np.float32)
    if name.endswith("_mask"):
        return (drawn & np.uint64(1)).astype(np.float32)
    return (0.4 * ((drawn >> np.uint64(40)).astype(np.float64) / 2.0**24 - 0.5)).astype(np.float32)


def answers_in(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, F32]:
    """The trainer's outputs by name; empty for a version of an earlier release."""
    return {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}


def without(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a version without the probe: the trainer's state."""
    return {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}


def check(version: int, trained: Mapping[str, F32], answered: Mapping[str, F32]) -> float:
    """Compares a host's probe outputs with the trainer's, by name; returns the largest difference.

    Raises:
        ProgramError: An output differs by more than `TOLERANCE`, or is missing.
    """
    scales, largest = _scales(trained), 0.0
    for name, expected in trained.items():
        error = _difference(answered[name], expected, scales) if name in answered else float("inf")
        if error > TOLERANCE:
            raise ProgramError(
                f"version {version} answers otherwise than its trainer: {name} differs by {error:.2g} (allowed {TOLERANCE:g})",
                "answers stay at the last good version; check this host, and that its packages are those of the trainer",
            )
        largest = max(largest, error)
    return largest


def _scales(trained: Mapping[str, F32]) -> npt.NDArray[np.float64]:
    """1 + the largest output of each row, `[n]`: the scale of its rounding errors."""
    largest = [
        np.where(np.abs(output) < _NOT_THERE, np.abs(output), 0.0).reshape(len(output), -1).max(axis=1)
        for output in trained.values()
    ]
    scales: npt.NDArray[np.float64] = 1.0 + np.max(np.stack(largest).astype(np.float64), axis=0)
    return scales


def _difference(answered: F32, expected: F32, scales: npt.NDArray[np.float64]) -> float:
    """The largest difference over all rows; infinite if shapes differ or a value is NaN."""
    if answered.shape != expected.shape:
        return float("inf")
    actual, reference = (outputs.reshape(len(outputs), -1).astype(np.float64) for outputs in (answered, expected))
    # The logit of an absent candidate is its own scale.
    errors = np.abs(actual - reference) / np.where(np.abs(reference) < _NOT_THERE, scales[:, None], np.abs(reference))
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))
