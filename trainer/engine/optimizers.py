"""The optimizers: Adam for the dense weights, Adagrad for the rows that a step used.

Keras' optimizers turn the gradient of a few rows into one of the whole table;
TensorFlow's own operation for some rows takes 0.4 us a row, a compiled loop a
twentieth. The slots are state: a version carries them, and a trainer that
restores them goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.compiled import compiled_sums
from state.errors import SettingsError
from trainer.engine.facts import Moved
from trainer.engine.heads import BETA_1, BETA_2, EPSILON

F32 = npt.NDArray[np.float32]

_MOVING = Moved._fields[1:]
"""The slots of what moves within a step; its weights are among the dense ones."""


class Adam:
    """Adam (Kingma and Ba 2015) over named dense weights.

    Args:
        weights: The variables by name.
        learning_rate: Step size.
        rates: Factors of the step size by a name's prefix, the longest that fits; 1 elsewhere.
        moving: Weights, in this order, that move within a step (`trainer/engine/heads.py`): they are set, not moved, here.
        moving_rate: Factor of their step size.

    Attributes:
        moving: The slots of those; its own weights are not read.
        moving_rate: Their step size.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        learning_rate: float,
        rates: Mapping[str, float] | None = None,
        moving: Sequence[str] = (),
        moving_rate: float = 0.0,
    ) -> None:
        self._weights = dict(weights)
        self.moving = Moved.of(
            np.concatenate([weights[name].numpy().reshape(-1) for name in moving] or [np.zeros(0, np.float32)])
        )
        self.moving_rate, self._moving = learning_rate * moving_rate, {name: weights[name] for name in moving}
        # The longest prefix says it.
        known = sorted((rates or {}).items(), key=lambda each: len(each[0]))
        factors = {name: next((f for p, f in reversed(known) if name.startswith(p)), 1.0) for name in weights}
        self._rates = {name: np.float32(learning_rate * factors[name]) for name in weights}
        others = {name: weight for name, weight in weights.items() if name not in moving}
        self._first = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in others.items()}
        self._second = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in others.items()}
        self._powers = tf.Variable(np.array([BETA_1, BETA_2]), trainable=False)

    def apply(self, gradients: Sequence[Any], moved: Any) -> None:
        """One step, inside a tf.function.

        Args:
            gradients: In the order of the weights; those of moving weights are not read.
            moved: `[m]` float32, the moving weights, one behind another.
        """
        parts = tf.split(moved, [int(np.prod(weight.shape)) for weight in self._moving.values()])
        for weight, part in zip(self._moving.values(), parts, strict=True):
            weight.assign(tf.reshape(part, weight.shape))
        powers = self._powers.read_value()
        for (name, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            if name in self._moving:
                continue
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=self._first[name].handle,
                v=self._second[name].handle,
                beta1_power=powers[0],
                beta2_power=powers[1],
                lr=self._rates[name],
                beta1=BETA_1,
                beta2=BETA_2,
                epsilon=EPSILON,
                grad=gradient,
                use_locking=True,
            )
        self._powers.assign(powers * np.array([BETA_1, BETA_2]))

    def slots(self) -> dict[str, F32]:
        """A host copy of the state by name: `<weight>.m`, `<weight>.v`, the powers of both betas, and `moving.<slot>`."""
        held = {f"{name}.m": slot for name, slot in self._first.items()}
        held |= {f"{name}.v": slot for name, slot in self._second.items()}
        found = {name: np.array(slot.numpy()) for name, slot in (held | {"powers": self._powers}).items()}
        moving = self.moving
        return found | {f"moving.{name}": getattr(moving, name) for name in _MOVING}

    def set_slots(self, slots: Mapping[str, F32]) -> None:
        """Sets the whole state.

        Raises:
            SettingsError: A slot is missing: the version is of another model.
        """
        try:
            moving = [np.array(slots[f"moving.{name}"]) for name in _MOVING]
            if moving[0].shape != self.moving.fast.shape:
                raise ValueError(f"moving.{_MOVING[0]} of shape {moving[0].shape}")
            for name in self._first:
                self._first[name].assign(slots[f"{name}.m"])
                self._second[name].assign(slots[f"{name}.v"])
            self._powers.assign(slots["powers"])
            self.moving = Moved(np.zeros_like(moving[0]), *moving)
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"optimizer slot {error} does not fit this model; put the [model] settings back"
            ) from error


@compiled_sums
def _adagrad(rows: F32, accum: F32, slopes: F32, learning_rate: np.float32, epsilon: np.float32) -> None:
    for i in range(rows.shape[0]):
        for d in range(rows.shape[1]):
            accum[i, d] += slopes[i, d] * slopes[i, d]
            rows[i, d] -= learning_rate * slopes[i, d] / (np.sqrt(accum[i, d]) + epsilon)


def adagrad(rows: F32, accum: F32, slopes: F32, learning_rate: float) -> None:
    """Adagrad (Duchi, Hazan and Singer 2011) on copies of some rows of a table, in place.

    Args:
        rows: `[u, dim]` float32, each row of the table at most once.
        accum: Of the same shape, the sums of squared derivatives.
        slopes: Of the same shape, the derivatives.
        learning_rate: Step size.

    >>> rows, accum = np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32)
    >>> adagrad(rows, accum, np.full((1, 1), -3.0, np.float32), 0.5)
    >>> rows.round(4).tolist(), accum.tolist()
    ([[0.5]], [[9.0]])
    """
    _adagrad(rows, accum, slopes, np.float32(learning_rate), EPSILON)
