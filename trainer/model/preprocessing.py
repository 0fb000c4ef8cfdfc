"""Scales raw integers for a neural network: logarithms, and windows that are centred by their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.model.hyperparameters import HYPERPARAMETERS

Tensor = Any
"""A `tf.Tensor`; TensorFlow ships no types."""

Preprocessing = Callable[[Tensor], Tensor]
"""`[B, D]` float32 raw integers to `[B, D']` float32. The setting `model.preprocessing` makes it from the bootstrap's
analysis."""


class Logarithms:
    """The preprocessing without an analysis of past clicks: `[n, k]` raw integers to about [0, 2].

    Counts become log(1 + x) / 4. A recency is a logarithm already (eight steps
    an octave, 255 for never) and is only scaled.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        recency = np.array(["recency" in name or name.startswith("gap.") for name in names])
        self.scale = np.where(recency, 1 / 128, 0.0).astype(np.float32)
        self.log_scale = np.where(recency, 0.0, 1 / 4).astype(np.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, k]` float32 to `[n, k]` float32."""
        return tf.math.log(x + 1.0) * self.log_scale + x * self.scale


class WindowScaling:
    """Scales the windows of categories, `[n, F]` raw integers to about [-2, 4]: log(1 + x), centred by their kind.

    The kinds differ more than the categories of one user do.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        by_kind = HYPERPARAMETERS.window_scaling
        rows = [by_kind[next((kind for kind in by_kind if name.startswith(kind)), "")] for name in names]
        self.log_scale, self.scale, self.shift = np.array(rows, np.float32).T.copy()

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, F]` float32 to `[n, F]` float32."""
        return tf.math.log(x + 1.0) * self.log_scale + x * self.scale + self.shift
