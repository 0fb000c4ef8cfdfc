"""Adam for the dense weights in host arrays, and averaged Adam for the fast weights, which change within a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled_sums, layout, part_of_sums
from state.errors import SettingsError
from trainer.model.hyperparameters import HYPERPARAMETERS

F32 = npt.NDArray[np.float32]

AVERAGE_SHARE = np.float32(HYPERPARAMETERS.average_share)
USER_LR_SCALE = np.float32(HYPERPARAMETERS.user_lr_scale)
AVERAGE_MOVES, FIRST_MOVES = np.float32(HYPERPARAMETERS.average_moves), np.float32(HYPERPARAMETERS.first_moves)
BETA_1, BETA_2 = np.float32(HYPERPARAMETERS.beta_1), np.float32(HYPERPARAMETERS.beta_2)
EPSILON = np.float32(HYPERPARAMETERS.epsilon)
LEAST = np.float32(1e-30)
"""Smaller moments are zero. Those of a unit that no row activates any longer would soon be subnormal, and stay so: a
processor takes thirty times as long for these. A moment this small changes no weight."""
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
def move(slots: FastSlots, gradient: F32, rate: np.float32, users: int) -> None:
    """One step of Adam without momentum, averaged (Defazio et al. 2024), in place; sets `gradient` to zero.

    The first `users` weights move at `USER_LR_SCALE`.
    """
    slots.moves[0] += _ONE
    slots.moves[1] *= BETA_2
    step = rate * np.sqrt(_ONE - slots.moves[1])
    share = max(_ONE / AVERAGE_MOVES, FIRST_MOVES / (slots.moves[0] + FIRST_MOVES))
    weights, fast, slow, second = slots.weights, slots.fast, slots.slow, slots.second
    for i in range(gradient.shape[0]):
        second[i] += (gradient[i] * gradient[i] - second[i]) * (_ONE - BETA_2)
        scaled = step * USER_LR_SCALE if i < users else step
        fast[i] -= scaled * gradient[i] / (np.sqrt(second[i]) + EPSILON)
        slow[i] += share * (fast[i] - slow[i])
        weights[i] = fast[i] + AVERAGE_SHARE * (slow[i] - fast[i])
        gradient[i] = _ZERO


class FastMoves(NamedTuple):
    """Means over the moves that fast weights made from the same slots, which workers add up.

    Attributes:
        fast: `[m]` float32, the change of `fast` by a move.
        slow: `[m]` float32, the change of the mean of `fast` over the moves, by one more than their number.
        second: `[m]` float32, the squared derivative.
    """

    fast: F32
    slow: F32
    second: F32

    @classmethod
    def between(cls, before: FastSlots, after: FastSlots) -> FastMoves:
        """The moves from `before`, one or more, that led to `after`."""
        count = int(after.moves[0] - before.moves[0])
        old, squares = _kept(before, count), float(BETA_2) ** count
        mean_fast = _mean(before.slow, after.slow, old)
        return cls(
            fast=(after.fast - before.fast) / np.float32(count),
            slow=((mean_fast - before.fast) / (count + 1)).astype(np.float32),
            second=_mean(before.second, after.second, squares).astype(np.float32),
        )

    def applied(self, before: FastSlots, count: int) -> FastSlots:
        """The slots after `count` such moves."""
        old, squares = _kept(before, count), BETA_2 ** np.float32(count)
        fast = before.fast + np.float32(count) * self.fast
        mean_fast = before.fast + np.float32(count + 1) * self.slow
        slow = mean_fast + np.float32(old) * (before.slow - mean_fast)
        second = self.second + squares * (before.second - self.second)
        moves = before.moves * np.array([1.0, squares], np.float32) + np.array([count, 0.0], np.float32)
        return FastSlots(fast + AVERAGE_SHARE * (slow - fast), fast, slow, second, moves)


def _kept(slots: FastSlots, count: int) -> float:
    """The weight of `slow` that remains after `count` moves."""
    moves = float(slots.moves[0]) + np.arange(1, count + 1)
    shares = np.maximum(1.0 / AVERAGE_MOVES, FIRST_MOVES / (moves + FIRST_MOVES))
    return float(np.prod(1.0 - shares))


def _mean(before: F32, after: F32, kept: float) -> npt.NDArray[np.float64]:
    """The mean of new values in `after = kept * before + (1 - kept) * mean`."""
    return (after - kept * before.astype(np.float64)) / (1.0 - kept)


SLOTS = FastSlots._fields[1:]
"""The slots of the fast weights. The weights themselves are among the dense weights."""


class HostAdam:
    """Adam (Kingma and Ba 2015) over named dense weights in host arrays. Not thread-safe.

    Args:
        weights: Initial values by name, float32.
        rates: Factors of the step size by prefix of a name. The longest matching prefix counts; otherwise 1.
        fast_weights: Names, in this order, of the weights that change within a record.

    Attributes:
        weights: Every weight by name, in the order of the argument: views of two flat arrays, changed in place.
        gradient: `[m]` float32, derivatives by the weights that are not fast, read by `apply`.
        gradients: Views of it by name.
        fast: The slots of the fast weights; its field `weights` is not read.
        fast_rate: Step size of the fast weights.
    """

    def __init__(
        self,
        weights: Mapping[str, F32],
        learning_rate: float,
        rates: Mapping[str, float] | None = None,
        fast_weights: Sequence[str] = (),
        fast_rate: float = 0.0,
    ) -> None:
        moved = [name for name in weights if name not in fast_weights]
        sizes = [weights[name].size for name in moved]
        self._bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        by_name = step_sizes(weights, learning_rate, rates)
        self._rates = np.array([by_name[name] for name in moved], np.float32)
        self._flat = _flat(weights, moved)
        self._fast_flat = _flat(weights, fast_weights)
        self.gradient, self._first, self._second = (np.zeros_like(self._flat) for _ in range(3))
        shapes = {name: weights[name].shape for name in weights}
        of_moved, of_fast = ({name: shapes[name] for name in names} for names in (moved, fast_weights))
        views = _views(self._flat, of_moved) | _views(self._fast_flat, of_fast)
        self.weights = {name: views[name] for name in weights}
        self.gradients = _views(self.gradient, of_moved)
        self._slots = {"m": _views(self._first, of_moved), "v": _views(self._second, of_moved)}
        self._powers = np.array([BETA_1, BETA_2])
        self.fast, self.fast_rate = FastSlots.of(self._fast_flat.copy()), learning_rate * fast_rate

    def apply(self, fast: FastSlots) -> None:
        """One step with `gradient`; `fast` replaces the fast weights and their slots."""
        _adam(self._flat, self._first, self._second, self.gradient, self._bounds, self._rates, self._powers)
        self._powers *= np.array([BETA_1, BETA_2])
        self._fast_flat[:] = fast.weights
        self.fast = fast

    def slots(self) -> dict[str, F32]:
        """A host copy of the state by name: `<weight>.m`, `<weight>.v`, `powers` of both betas, and `moving.<slot>`."""
        copies = {f"{name}.{kind}": view.copy() for kind, views in self._slots.items() for name, view in views.items()}
        return copies | {"powers": self._powers.copy()} | {f"moving.{name}": getattr(self.fast, name) for name in SLOTS}

    def set_slots(self, slots: Mapping[str, F32]) -> None:
        """Restores the whole state.

        Raises:
            SettingsError: A slot is missing or has another shape: the version is of another model.
        """
        try:
            self.fast = moving_slots(slots, self.fast)
            for kind, views in self._slots.items():
                for name, view in views.items():
                    view[...] = slots[f"{name}.{kind}"]
            self._powers = np.array(slots["powers"], np.float32)
        except (KeyError, ValueError) as error:
            raise misfit(error) from error


@compiled_sums("f4[::1], f4[::1], f4[::1], f4[::1], i8[::1], f4[::1], f4[::1]")
def _adam(
    weights: F32, first: F32, second: F32, gradient: F32, bounds: npt.NDArray[np.int64], rates: F32, powers: F32
) -> None:
    correction = np.sqrt(_ONE - powers[1]) / (_ONE - powers[0])
    for part in range(rates.shape[0]):
        begin, end = bounds[part], bounds[part + 1]
        _move(weights[begin:end], first[begin:end], second[begin:end], gradient[begin:end], rates[part] * correction)


@part_of_sums
def _move(weights: F32, first: F32, second: F32, gradient: F32, rate: np.float32) -> None:
    for i in range(weights.shape[0]):
        mean = first[i] + (gradient[i] - first[i]) * (_ONE - BETA_1)
        square = second[i] + (gradient[i] * gradient[i] - second[i]) * (_ONE - BETA_2)
        first[i] = mean if abs(mean) > LEAST else _ZERO
        second[i] = square if square > LEAST else _ZERO
        weights[i] -= rate * first[i] / (np.sqrt(second[i]) + EPSILON)


def _flat(weights: Mapping[str, F32], names: Sequence[str]) -> F32:
    return np.concatenate([np.zeros(0, np.float32), *(weights[name].reshape(-1) for name in names)])


def _views(flat: F32, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, F32]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    parts = np.split(flat, ends[:-1]) if shapes else []
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def step_sizes(names: Iterable[str], learning_rate: float, rates: Mapping[str, float] | None) -> dict[str, np.float32]:
    """The step size of each weight: `learning_rate` times the factor of the longest matching prefix in `rates`.

    >>> {name: float(size) for name, size in step_sizes(["a.b", "a.c", "d"], 1.0, {"a.": 2.0, "a.c": 4.0}).items()}
    {'a.b': 2.0, 'a.c': 4.0, 'd': 1.0}
    """
    by_length = sorted((rates or {}).items(), key=lambda entry: -len(entry[0]))
    factors = {name: next((factor for prefix, factor in by_length if name.startswith(prefix)), 1.0) for name in names}
    return {name: np.float32(learning_rate * factor) for name, factor in factors.items()}


def moving_slots(slots: Mapping[str, F32], like: FastSlots) -> FastSlots:
    """Reads the slots of the fast weights from a version. The field `weights` is zero and not read.

    Raises:
        KeyError: A slot is missing.
        ValueError: A slot has another shape than in `like`.
    """
    moving = [np.array(slots[f"moving.{name}"]) for name in SLOTS]
    if moving[0].shape != like.fast.shape:
        raise ValueError(f"moving.{SLOTS[0]} of shape {moving[0].shape}")
    return FastSlots(np.zeros_like(moving[0]), *moving)


def misfit(error: Exception) -> SettingsError:
    """The error for slots that do not fit the model."""
    return SettingsError(
        f"optimizer slot {error} does not fit this model",
        "put the [model] settings back, or `springtide upgrade`",
    )
