"""What training needs of a ranker besides its graph: tables, inputs, dense weights and learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from state.errors import SettingsError
from trainer.model.inputs import Input

F32 = npt.NDArray[np.float32]


class Model(Protocol):
    """A ranker to train: a `Ranker`, or the `DefaultModel`, which has no graph. `Ranker` describes the attributes."""

    tables: Mapping[str, int]
    inputs: tuple[Input, ...]
    sizes: Mapping[str, int | None]
    dense: Mapping[str, Any]
    initial_ranges: Mapping[str, float]
    learning_rates: Mapping[str, float]
    fast_weights: tuple[str, ...]

    def shapes(self, training: bool = False) -> dict[str, tuple[int | None, ...]]:
        """The shape of each input of serving, or of training, by name."""

    def weights(self) -> dict[str, F32]:
        """A host copy of every dense weight by name."""

    def set_weights(self, weights: Mapping[str, F32]) -> None:
        """Sets every dense weight.

        Raises:
            SettingsError: A weight is missing or has another shape: the version is of another model.
        """


def require_shapes(dense: Mapping[str, Any], weights: Mapping[str, F32]) -> None:
    """Refuses `weights` without one for each of `dense`, or with another shape.

    Raises:
        SettingsError: A weight is missing or has another shape: the version is of another model.
    """
    for name, weight in dense.items():
        if name not in weights or weights[name].shape != tuple(weight.shape):
            present = f"shape {weights[name].shape}" if name in weights else "none"
            raise SettingsError(
                f"dense weight {name}: expected shape {tuple(weight.shape)}, the version has {present}",
                "put the [model] settings back, or go on from it: `springtide upgrade --reason TEXT`",
            )
