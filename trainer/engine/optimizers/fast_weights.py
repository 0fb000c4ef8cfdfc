"""Adam for the fast weights, which change within a record: without momentum, averaged over the latest moves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import layout, part_of_sums
from trainer.model.hyperparameters import HYPERPARAMETERS

F32 = npt.NDArray[np.float32]

AVERAGE_SHARE = np.float32(HYPERPARAMETERS.average_share)
USER_LR_SCALE = np.float32(HYPERPARAMETERS.user_lr_scale)
AVERAGE_MOVES, FIRST_MOVES = np.float32(HYPERPARAMETERS.average_moves), np.float32(HYPERPARAMETERS.first_moves)
_BETA_2, _EPSILON = np.float32(HYPERPARAMETERS.beta_2), np.float32(HYPERPARAMETERS.epsilon)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@layout("f4[::1], f4[::1], f4[::1], f4[::1], f4[::1]")
class FastSlots(NamedTuple):
    """The fast weights, concatenated, and their slots.

    Attributes:
        weights: `[m]` float32, the weights that score and that the gradient is taken at.
        fast: `[m]` float32, the iterate that the derivatives move.
        slow: `[m]` float32, the mean of `fast` over the latest moves.
        second: `[m]` float32, the mean of the squared derivatives.
        moves: `[2]` float32: the number of moves, and Adam's second beta to that power.
    """

    weights: F32
    fast: F32
    slow: F32
    second: F32
    moves: F32

    @classmethod
    def of(cls, weights: F32) -> FastSlots:
        """The slots before the first move."""
        moves = np.array([0.0, 1.0], np.float32)
        return cls(weights, weights.copy(), weights.copy(), np.zeros_like(weights), moves)


@part_of_sums
def count_move(slots: FastSlots) -> None:
    """Counts one more move; call it before `move`."""
    slots.moves[0] += _ONE
    slots.moves[1] *= _BETA_2


@part_of_sums
def move(slots: FastSlots, gradient: F32, begin: int, end: int, rate: np.float32, users: int) -> None:
    """One step of Adam without momentum, averaged (Defazio et al. 2024), of weights `begin` to `end`, in place.

    Sets `gradient` to zero. The first `users` weights move at `USER_LR_SCALE`. Call `count_move` first.
    """
    step = rate * np.sqrt(_ONE - slots.moves[1])
    share = max(_ONE / AVERAGE_MOVES, FIRST_MOVES / (slots.moves[0] + FIRST_MOVES))
    # Loops over slices are vectorized; loops from `begin` to `end` are not.
    weights, fast, slow = slots.weights[begin:end], slots.fast[begin:end], slots.slow[begin:end]
    second, slopes = slots.second[begin:end], gradient[begin:end]
    for i in range(slopes.shape[0]):
        second[i] += (slopes[i] * slopes[i] - second[i]) * (_ONE - _BETA_2)
        scaled = step * USER_LR_SCALE if begin + i < users else step
        fast[i] -= scaled * slopes[i] / (np.sqrt(second[i]) + _EPSILON)
        slow[i] += share * (fast[i] - slow[i])
        weights[i] = fast[i] + AVERAGE_SHARE * (slow[i] - fast[i])
        slopes[i] = _ZERO
