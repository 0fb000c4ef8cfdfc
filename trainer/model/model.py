"""What training needs of a ranker besides its graph: its attributes and weights, its preprocessing, and the targets of rows.

Nothing here loads TensorFlow, so host code and graphs share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from state.errors import SettingsError
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.inputs import Input

F32 = npt.NDArray[np.float32]

Tensor = Any
"""A `tf.Tensor`, or on the host a NumPy array; TensorFlow ships no types."""

Preprocessing = Callable[[Tensor], Tensor]
"""`[B, D]` float32 raw integers to `[B, D']` float32. The setting `model.preprocessing` makes it from the bootstrap's
analysis."""

MASKED = -1e9
"""The logit of a masked candidate."""

NEGATIVE_SHIFT = float(np.log((1.0 - HYPERPARAMETERS.assumed_click_rate) / HYPERPARAMETERS.assumed_click_rate))
"""Added in training to each engagement logit of a log without impressions. One negative is drawn for each click, which
alone would mean even odds. The shift log((1 - r) / r) corrects this for the click rate r (King and Zeng 2001)."""


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


class StoredTable(Protocol):
    """Keeps the table of a preprocessing from one start to the next."""

    def load(self) -> F32 | None:
        """The table that `save` stored for the same analysis and environment; None if there is none."""

    def save(self, table: F32) -> None:
        """Stores the table."""


@dataclass(frozen=True)
class Analysed:
    """The preprocessing that the bootstrap analysed. Its graph needs TensorFlow, its stored table does not.

    Attributes:
        transform: The directory with the analysed graph.
        table: Of the default preprocessing: `[65536, D]` float32, the value of each feature for each raw integer.
    """

    transform: Path
    table: StoredTable


class Targets(NamedTuple):
    """The training targets of B rows.

    Attributes:
        slot: `[B]` int32, the candidate that was clicked, in the order of the logits; -1 for none.
        weight: `[B]` float32, factor of a row's interest loss, 0 without a target.
        label: `[B]` float32, whether the user engaged with the row's own item.
        label_shift: `[B]` float32, added to its logit before the loss.
        label_weight: `[B]` float32, factor of its loss; 0 leaves it out.
        negative_shift: `[B]` float32, added to the logit of the drawn negative, whose label is 0.
        negative_weight: `[B]` float32, factor of its loss; 0 leaves it out.
    """

    slot: Tensor
    weight: Tensor
    label: Tensor
    label_shift: Tensor
    label_weight: Tensor
    negative_shift: Tensor
    negative_weight: Tensor
