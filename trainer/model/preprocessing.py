"""Preprocessing as TensorFlow operations: the scalings, and the graph that the bootstrap analysed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.model.default_model import feature_scaling, window_scaling
from trainer.model.model import Analysed, Preprocessing, Tensor

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]


class Logarithms:
    """The preprocessing without an analysis of past clicks: `[n, k]` raw integers to about [0, 2]; see `feature_scaling`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.log_scale, self.scale, _ = feature_scaling(names)

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, k]` float32 to `[n, k]` float32."""
        return tf.math.log(x + 1.0) * self.log_scale + x * self.scale


class WindowScaling:
    """Scales the windows of categories, `[n, F]` raw integers to about [-2, 4]; see `window_scaling`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.log_scale, self.scale, self.shift = window_scaling(names)

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, F]` float32 to `[n, F]` float32."""
        return tf.math.log(x + 1.0) * self.log_scale + x * self.scale + self.shift


def preprocessing_of(transform: Path) -> Preprocessing:
    """The preprocessing that the bootstrap analysed, `[B, D]` to `[B, D']` float32.

    TensorFlow Transform wrote a plain SavedModel, so neither it nor Beam is needed here.
    """
    loaded = tf.saved_model.load(str(transform / "transform_fn"))

    class Graph(tf.Module):
        """Holds the loaded graph, so that a saved model includes its constants."""

        def __init__(self) -> None:
            super().__init__(name="preprocessing")
            self.graph = loaded

        def __call__(self, x: Any) -> Any:
            """`[B, D]` float32 raw integers to `[B, D']` float32."""
            return self.graph.transform_fn({"features": x})["features"]

    return Graph()


def graph_of(preprocessing: Preprocessing | Analysed | None, names: tuple[str, ...]) -> Preprocessing:
    """The preprocessing of features `names` as TensorFlow operations; None takes logarithms."""
    if preprocessing is None:
        return Logarithms(names)
    return preprocessing_of(preprocessing.transform) if isinstance(preprocessing, Analysed) else preprocessing


def compiled_graph(preprocessing: Preprocessing, features: int) -> Callable[[U16], F32]:
    """A preprocessing of so many features as a function of host arrays: `[B, D]` uint16 to `[B, D']` float32."""
    signature = [tf.TensorSpec([None, features], tf.uint16)]
    graph = tf.function(lambda raw: preprocessing(tf.cast(raw, tf.float32)), signature, autograph=False)
    concrete = graph.get_concrete_function()
    return lambda raw: np.ascontiguousarray(concrete(tf.constant(raw)).numpy(), np.float32)
