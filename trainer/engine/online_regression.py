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
    """The weights of a softmax regression with Adagrad. A subclass learns them.

    Args:
        name: The tensor of the weights in versions.
        first: The weights before any row is learned, float64.

    Attributes:
        learned: The number of rows that taught the weights.
    """

    def __init__(self, name: str, first: F64) -> None:
        self._name, self._first = name, first
        self.clear()

    def clear(self) -> None:
        """Forgets the weights. The trainer clears the tables."""
        self.learned = 0
        self._weights, self._squares = self._first.copy(), np.zeros_like(self._first)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """The weights, their sums of squared gradients, and how many rows taught them; empty if none did."""
        if not self.learned:
            return {}
        return {"weights": self._weights.copy(), "squares": self._squares.copy(), "learned": np.array(self.learned)}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned; a release without it, or with other features, starts from scratch."""
        self.clear()
        if "weights" in state and state["weights"].shape == self._weights.shape:
            self._weights = np.array(state["weights"], np.float64)
            self._squares = np.array(state["squares"], np.float64)
            self.learned = int(state["learned"])

    def served(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors that serving reads; none before enough rows taught the weights."""
        return {self._name: self._weights.copy()} if self.learned >= LEAST_ROWS else {}
