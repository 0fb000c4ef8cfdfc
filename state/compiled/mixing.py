"""The 64-bit mixing function that kernels of state and trainer share: ids of crosses, first rows, partners, dropout."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from state.compiled import compiled


@compiled("u8")
def mix(value: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of each of `[n]` uint64, computed by NumPy, for callers that need one call per batch and no kernel.

    >>> values = np.array([1, 2**63], np.uint64)
    >>> mixed(values).tolist() == [int(mix(value)) for value in values]
    True
    """
    mixed_values: NDArray[np.uint64] = cast(Any, mix).py_func(values)
    return mixed_values
