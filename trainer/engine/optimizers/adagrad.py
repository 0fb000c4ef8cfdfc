"""Adagrad of the rows that a step used, at the learning rate `model.learning_rate`, which `Graph.apply` of the compiled engine gives it.

Keras' optimizers turn the gradient of a few rows into one of the whole table;
TensorFlow's own operation for some rows takes 0.4 us a row, a compiled loop a
twentieth.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.compiled import compiled_sums
from trainer.model.hyperparameters import HYPERPARAMETERS

F32 = npt.NDArray[np.float32]

EPSILON = np.float32(HYPERPARAMETERS.epsilon)


@compiled_sums("f4[:, ::1], f4[:, ::1], f4[:, ::1], f4, f4")
def _adagrad(rows: F32, accum: F32, gradient: F32, learning_rate: np.float32, epsilon: np.float32) -> None:
    for i in range(rows.shape[0]):
        for d in range(rows.shape[1]):
            accum[i, d] += gradient[i, d] * gradient[i, d]
            rows[i, d] -= learning_rate * gradient[i, d] / (np.sqrt(accum[i, d]) + epsilon)


def adagrad(rows: F32, accum: F32, gradient: F32, learning_rate: float) -> None:
    """Adagrad (Duchi, Hazan and Singer 2011) on copies of some rows of a table, in place.

    Args:
        rows: `[u, dim]` float32, each row of the table at most once.
        accum: Of the same shape, the sums of squared derivatives.
        gradient: Of the same shape, the derivatives.
        learning_rate: Step size.

    >>> rows, accum = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    >>> adagrad(rows, accum, np.full((1, 1), -3.0, np.float32), 0.5)
    >>> rows.round(4).tolist(), accum.tolist()
    ([[0.5]], [[9.0]])
    """
    _adagrad(rows, accum, gradient, np.float32(learning_rate), EPSILON)
