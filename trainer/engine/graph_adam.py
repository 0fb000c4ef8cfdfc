"""Adam for the dense weights in TensorFlow variables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.engine.adam import (
    BETA_1,
    BETA_2,
    EPSILON,
    F32,
    SLOTS,
    FastSlots,
    misfit,
    moving_slots,
    step_sizes,
)


class Adam:
    """`HostAdam` over named dense weights in TensorFlow variables; `apply` assigns the fast weights.

    Attributes:
        fast, fast_rate: See `HostAdam`.
        epsilon: Added to the root of the mean squared derivative. Read at the first step.
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
        self._rates = step_sizes(weights, learning_rate, rates)
        slow_weights = {name: weight for name, weight in weights.items() if name not in fast_weights}
        self._first = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in slow_weights.items()}
        self._second = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in slow_weights.items()}
        self._powers = tf.Variable(np.array([BETA_1, BETA_2]), trainable=False)
        self.epsilon = EPSILON

    def apply(self, gradients: Sequence[Any], moved: Any) -> None:
        """One step, inside a tf.function. Gradients of fast weights are not read; `moved` are the new ones, `[m]`."""
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
        """See `HostAdam`."""
        slots = {f"{name}.m": slot for name, slot in self._first.items()}
        slots |= {f"{name}.v": slot for name, slot in self._second.items()}
        state = {name: np.array(slot.numpy()) for name, slot in (slots | {"powers": self._powers}).items()}
        return state | {f"moving.{name}": getattr(self.fast, name) for name in SLOTS}

    def set_slots(self, slots: Mapping[str, F32]) -> None:
        """See `HostAdam`."""
        try:
            self.fast = moving_slots(slots, self.fast)
            for name in self._first:
                self._first[name].assign(slots[f"{name}.m"])
                self._second[name].assign(slots[f"{name}.v"])
            self._powers.assign(slots["powers"])
        except (KeyError, ValueError) as error:
            raise misfit(error) from error
