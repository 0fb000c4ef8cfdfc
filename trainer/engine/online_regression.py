"""A log-linear score whose weights the trainer learns online, as part of the trainer's state and of versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

LEAST_ROWS = 64
"""So many rows must have taught the weights before a version has them."""


class OnlineRegression:
    """The weights of a softmax regression, and the state of their optimizer. A subclass learns them.

    Args:
        name: The tensor of the weights in versions.
        first: The values before any row is learned, float64: `weights`, and the optimizer's by name.

    Attributes:
        learned: The number of rows that taught the weights.
    """

    def __init__(self, name: str, first: Mapping[str, F64]) -> None:
        self._name, self._first = name, first
        self.clear()

    def clear(self) -> None:
        """Forgets the weights. The trainer clears the tables."""
        self.learned = 0
        self._values = {name: value.copy() for name, value in self._first.items()}

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The weights, the state of the optimizer, and how many rows taught them; empty if none did."""
        if not self.learned:
            return {}
        return {name: value.copy() for name, value in self._values.items()} | {"learned": np.array(self.learned)}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned; a release with other features or another optimizer starts from scratch."""
        self.clear()
        if all(name in state and state[name].shape == value.shape for name, value in self._values.items()):
            self._values = {name: np.array(state[name], np.float64) for name in self._values}
            self.learned = int(state["learned"])

    def served(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors that serving reads; none before enough rows taught the weights."""
        return {self._name: self._values["weights"].copy()} if self.learned >= LEAST_ROWS else {}
