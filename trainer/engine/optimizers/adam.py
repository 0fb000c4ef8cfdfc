"""Adam of the dense weights, and the slots of those that move within a record.

The slots are state: a version carries them, and a trainer that restores them
goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.errors import SettingsError
from trainer.engine.optimizers.fast_weights import FastSlots
from trainer.model.hyperparameters import HYPERPARAMETERS

F32 = npt.NDArray[np.float32]

BETA_1, BETA_2 = np.float32(HYPERPARAMETERS.beta_1), np.float32(HYPERPARAMETERS.beta_2)
EPSILON = np.float32(HYPERPARAMETERS.epsilon)

_SLOTS = FastSlots._fields[1:]
"""The slots of the fast weights; these themselves are among the dense ones."""


class Adam:
    """Adam (Kingma and Ba 2015) over named dense weights.

    Args:
        weights: The variables by name.
        learning_rate: Step size.
        rates: Factors of the step size by a name's prefix, the longest that fits; 1 elsewhere.
        fast_weights: Weights, in this order, that move within a record: they are set, not moved, here.
        fast_rate: Factor of their step size.

    Attributes:
        fast: The slots of those; its own weights are not read.
        fast_rate: Their step size.
        epsilon: What is added to the root of the mean squared derivative; it is taken with the first step.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        learning_rate: float,
        rates: Mapping[str, float] | None = None,
        fast_weights: Sequence[str] = (),
        fast_rate: float = 0.0,
    ) -> None:
        self._weights = dict(weights)
        self.fast = FastSlots.of(
            np.concatenate([weights[name].numpy().reshape(-1) for name in fast_weights] or [np.zeros(0, np.float32)])
        )
        self.fast_rate, self._fast = learning_rate * fast_rate, {name: weights[name] for name in fast_weights}
        # The longest prefix says it.
        known = sorted((rates or {}).items(), key=lambda each: len(each[0]))
        factors = {name: next((f for p, f in reversed(known) if name.startswith(p)), 1.0) for name in weights}
        self._rates = {name: np.float32(learning_rate * factors[name]) for name in weights}
        others = {name: weight for name, weight in weights.items() if name not in fast_weights}
        self._first = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in others.items()}
        self._second = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in others.items()}
        self._powers = tf.Variable(np.array([BETA_1, BETA_2]), trainable=False)
        self.epsilon = EPSILON

    def apply(self, gradients: Sequence[Any], moved: Any) -> None:
        """One step, inside a tf.function.

        Args:
            gradients: In the order of the weights; those of fast weights are not read.
            moved: `[m]` float32, the fast weights, one behind another.
        """
        sizes = np.array([int(np.prod(weight.shape)) for weight in self._fast.values()], np.int32)
        parts = tf.split(moved, sizes) if sizes.size else ()
        for weight, part in zip(self._fast.values(), parts, strict=True):
            weight.assign(tf.reshape(part, weight.shape))
        powers = self._powers.read_value()
        for (name, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            if name in self._fast:
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
                epsilon=self.epsilon,
                grad=gradient,
                use_locking=True,
            )
        self._powers.assign(powers * np.array([BETA_1, BETA_2]))

    def slots(self) -> dict[str, F32]:
        """A host copy of the state by name: `<weight>.m`, `<weight>.v`, the powers of both betas, and `moving.<slot>`."""
        held = {f"{name}.m": slot for name, slot in self._first.items()}
        held |= {f"{name}.v": slot for name, slot in self._second.items()}
        found = {name: np.array(slot.numpy()) for name, slot in (held | {"powers": self._powers}).items()}
        return found | {f"moving.{name}": getattr(self.fast, name) for name in _SLOTS}

    def set_slots(self, slots: Mapping[str, F32]) -> None:
        """Sets the whole state.

        Raises:
            SettingsError: A slot is missing: the version is of another model.
        """
        try:
            moving = [np.array(slots[f"moving.{name}"]) for name in _SLOTS]
            if moving[0].shape != self.fast.fast.shape:
                raise ValueError(f"moving.{_SLOTS[0]} of shape {moving[0].shape}")
            for name in self._first:
                self._first[name].assign(slots[f"{name}.m"])
                self._second[name].assign(slots[f"{name}.v"])
            self._powers.assign(slots["powers"])
            self.fast = FastSlots(np.zeros_like(moving[0]), *moving)
        except (KeyError, ValueError) as error:
            raise SettingsError(
                f"optimizer slot {error} does not fit this model",
                "put the [model] settings back, or `springtide upgrade`",
            ) from error
