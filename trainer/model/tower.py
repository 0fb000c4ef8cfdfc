"""The tower: computes a user's vector from features and rows. A custom tower is plugged in by its path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.process.user_code import load_named
from state.registry.model_fit import FORMER_TOWERS
from trainer.model.default_model import dense_layers
from trainer.model.model import Preprocessing, Tensor


class Tower(Protocol):
    """What `build` returns: a `tf.Module` whose variables have unique names."""

    @property
    def trainable_variables(self) -> tuple[Any, ...]:
        """Its weights, in a fixed order."""

    def __call__(self, x: Tensor, training: bool, seed: Tensor) -> Tensor:
        """`[B, width_in]` float32 and a `[2]` int32 dropout seed to `[B, width]` float32."""


class DenseTower(tf.Module):
    """The default tower: dense layers with ReLU, and dropout after the first."""

    def __init__(self, width_in: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__(name="tower")
        self._dropout = dropout
        first = {name: tf.Variable(values, name=name) for name, values in dense_layers(width_in, hidden).items()}
        self.kernels = [first[f"kernel_{number}"] for number in range(len(hidden))]
        self.biases = [first[f"bias_{number}"] for number in range(len(hidden))]

    def __call__(self, x: Tensor, training: bool, seed: Tensor) -> Tensor:
        """See `Tower`."""
        first = self._first(x)
        return self._rest(dropped(first, self._dropout, seed) if training else first)

    def both(self, prepared: Tensor, rows: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
        """The vectors without and with dropout. The first layer, half the work, is computed once.

        Args:
            prepared: `[B, D']` float32. No weights precede it, so it gets no derivative.
            rows: `[B, k]` float32, the embedding rows; the rest of the input is zero.
            kept: `[B, hidden]` float32, 0 for a dropped unit, else the compensating factor. None drops nothing, and
                only one vector is returned.
        """
        kernel = self.kernels[0]
        parts = tf.split(
            kernel, [prepared.shape[1], rows.shape[1], kernel.shape[0] - prepared.shape[1] - rows.shape[1]]
        )
        first = tf.matmul(prepared, parts[0]) + tf.matmul(rows, parts[1])
        first = tf.nn.relu(tf.nn.bias_add(first, self.biases[0]))
        return (self._rest(first),) if kept is None else (self._rest(first), self._rest(first * kept))

    def _first(self, x: Tensor) -> Tensor:
        return tf.nn.relu(tf.nn.bias_add(tf.matmul(x, self.kernels[0]), self.biases[0]))

    def _rest(self, x: Tensor) -> Tensor:
        for kernel, bias in zip(self.kernels[1:], self.biases[1:], strict=True):
            x = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, kernel), bias))
        return x


def dropped(x: Tensor, share: float, seed: Tensor) -> Tensor:
    """Dropout of `[B, width]` float32 with one random byte for each unit: a quarter of the random words."""
    kept_bytes = 256 - round(256 * share)
    if kept_bytes == 256:
        return x
    width = x.shape[1]
    drawn = tf.random.stateless_uniform([tf.shape(x)[0], (width + 3) // 4], seed, None, None, tf.uint32, alg="philox")
    bytes_ = tf.reshape(tf.bitcast(drawn, tf.uint8), [tf.shape(x)[0], -1])[:, :width]
    return x * (tf.cast(bytes_ < kept_bytes, tf.float32) * (256.0 / kept_bytes))


def build(width_in: int, settings: ModelSettings) -> Tower:
    """Builds the tower of the setting `model.tower`; a custom builder has this signature.

    Args:
        width_in: Width of the tower's input.
        settings: The section `[model]`; the last of `hidden` is the width of the vector.
    """
    tower: Tower = DenseTower(width_in, settings.hidden, settings.dropout)
    return tower


def width_in(settings: ModelSettings, spec: FeatureSpec, preprocessing: Preprocessing) -> int:
    """Width of the tower's input: prepared features, and rows of the user, mean latest category and mean context."""
    return int(preprocessing(tf.zeros([1, len(spec.names)])).shape[-1]) + 3 * settings.dim


def load_builder(path: str) -> Callable[[int, ModelSettings], Tower]:
    """The function that `model.tower` names.

    Raises:
        SettingsError: There is no such function.
    """
    if path in FORMER_TOWERS:
        return build
    builder: Callable[[int, ModelSettings], Tower] = load_named(path, "model.tower")
    return builder


def named(tower: Tower) -> dict[str, Any]:
    """The weights of a tower by name, in their order.

    Raises:
        SettingsError: Two have the same name.
    """
    names: dict[str, Any] = {}
    for variable in tower.trainable_variables:
        name = variable.name.removesuffix(":0")
        if name in names:
            raise SettingsError(
                f"two weights of the tower are named {name!r}", "give each tf.Variable a name of its own"
            )
        names[name] = variable
    return names
