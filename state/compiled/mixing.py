"""The mixing of 64 bits that kernels of state and trainer share: ids of crosses, first rows, partners, dropout."""

from __future__ import annotations

import numpy as np

from state.compiled import compiled


@compiled
def mix(value: np.uint64) -> np.uint64:
    """splitmix64's finaliser (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
