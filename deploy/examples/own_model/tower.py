"""A custom user tower: one layer, a feature cross of the input with this layer, and a residual block."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

CROSSED = 32


class ResidualTower(tf.Module):
    """`y = h + (x A) * (h B) C + relu(h K1 + b1) K2` with `h = relu(x K0 + b0)`.

    Args:
        width_in: Width of the input.
        width: Width of the output.
        dropout: Share of `h` dropped while training.
    """

    def __init__(self, width_in: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        # A fixed seed: the initial weights are the same in every process.
        drawn = np.random.default_rng(7)

        def weight(name: str, rows: int, columns: int) -> Any:
            reach = (6.0 / (rows + columns)) ** 0.5
            return tf.Variable(drawn.uniform(-reach, reach, (rows, columns)).astype(np.float32), name=name)

        self.kernel_0 = weight("kernel_0", width_in, width)
        self.bias_0 = tf.Variable(np.zeros(width, np.float32), name="bias_0")
        self.cross_in = weight("cross_in", width_in, CROSSED)
        self.cross_hidden = weight("cross_hidden", width, CROSSED)
        self.cross_out = weight("cross_out", CROSSED, width)
        self.kernel_1 = weight("kernel_1", width, width)
        self.bias_1 = tf.Variable(np.zeros(width, np.float32), name="bias_1")
        self.kernel_2 = weight("kernel_2", width, width)

    def __call__(self, x: Any, training: bool, seed: Any) -> Any:
        """Maps `[B, width_in]` float32 and a `[2]` int32 seed to `[B, width]` float32."""
        h = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, self.kernel_0), self.bias_0))
        if training:
            # The seed is a hash of the step's position in the log, so a replay drops the same units.
            kept = tf.random.stateless_uniform(tf.shape(h), seed) >= self.dropout
            h = h * tf.cast(kept, tf.float32) / (1.0 - self.dropout)
        crossed = tf.matmul(tf.matmul(x, self.cross_in) * tf.matmul(h, self.cross_hidden), self.cross_out)
        block = tf.matmul(tf.nn.relu(tf.nn.bias_add(tf.matmul(h, self.kernel_1), self.bias_1)), self.kernel_2)
        return h + crossed + block


def build(width_in: int, settings: Any) -> ResidualTower:
    """Builds the tower of the setting `model.tower`.

    Args:
        width_in: Width of the tower's input.
        settings: The section `[model]`; the last element of `hidden` is the width of the vector.
    """
    return ResidualTower(width_in, settings.hidden[-1], settings.dropout)
