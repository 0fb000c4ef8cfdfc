"""The ranker interface: scores of candidates and pairs as a function of inputs and weights, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.errors import SettingsError
from trainer.model.inputs import Input, specs
from trainer.model.preprocessing import Tensor

F32 = npt.NDArray[np.float32]

MASKED = -1e9
"""The logit of a masked candidate."""


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


class Ranker(tf.Module):
    """The base class of rankers; subclass it and set the attributes before the first call.

    All computations are pure functions of inputs and weights, made of operations
    that are differentiable and built into LiteRT.

    Attributes:
        tables: Width of the embedding rows of each table it reads: user, item, category, context, and any of its own.
        inputs: Its inputs: from `trainer.model.inputs.INPUTS` by `pick`, rows of its own tables by `own_rows`.
        sizes: The size of each letter of their shapes.
        dense: Every dense weight by name, in a fixed order. A version stores them under these names.
        initial_ranges: By table, a new row is uniform in plus and minus this; 0.05 by default.
        origin: What configured it, for messages: the setting, for a custom ranker.
        learning_rates: Factors of Adam's step size by prefix of a weight's name. The longest match counts; else 1.
        fast_weights: Names of dense weights that only `score` reads and that change within a record, every few rows.
            They are averaged over their latest moves.
        fast_learning_rates: Factors of the fast weights' step size, by prefix of a name in the same way.
    """

    tables: Mapping[str, int]
    inputs: tuple[Input, ...]
    sizes: Mapping[str, int | None]
    dense: Mapping[str, Any]
    initial_ranges: Mapping[str, float] = {}
    origin: str = ""
    learning_rates: Mapping[str, float] = {}
    fast_weights: tuple[str, ...] = ()
    fast_learning_rates: Mapping[str, float] = {}
    _arrays: Mapping[str, F32] | None = None

    def encode(self, inputs: Mapping[str, Tensor], training: bool, seed: Tensor) -> Any:
        """Encodes the user and the context, once for a record; all scores share the result.

        Args:
            inputs: By name.
            training: Whether to apply dropout; if not, the seed has no effect.
            seed: `[2]` int32.

        Returns:
            Tensors of B rows, in a structure that the ranker chooses.
        """
        raise NotImplementedError

    def score(self, encoded: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Computes logits. With fast weights, it is called for some rows at a time.

        Args:
            encoded: What `encode` returned.
            inputs: By name, of the same rows.

        Returns:
            - recent_logits `[B, L]`, popular_logits `[B, P]`, successor_logits `[B, S]`: of interest, MASKED where
              there is no candidate
            - engagement_logit `[B]`: of the user with the item
            - vector `[B, width]`: the profile
            - other_logit `[B]` and negative_logit `[B]`, if the inputs of training are given
        """
        raise NotImplementedError

    def item_query(self, encoded: Any) -> Tensor | None:
        """The query for items, `[B, E]`: engagement_logit = item_query . item_row + cross + terms of user and category.

        Serving then uses it to search the index of all items and to score many of them cheaply. None if the ranker's
        engagement is no such sum.
        """
        return None

    def losses(self, encoded: Any, inputs: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """`[B]` float32: each row's contribution to the loss of its record, which training differentiates."""
        raise NotImplementedError

    def predict(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores without dropout, and item_query if there is one: what the serving program computes."""
        encoded = self.encode(inputs, False, tf.constant([0, 0], tf.int32))
        query = self.item_query(encoded)
        return self.score(encoded, inputs) | ({} if query is None else {"item_query": query})

    def specs(self, training: bool = False) -> dict[str, Any]:
        """The `tf.TensorSpec` of each input of serving, or of training, by name."""
        return specs(
            tuple(input_ for input_ in self.inputs if training or not input_.training), self.sizes, self.tables
        )

    def hold(self, arrays: Mapping[str, F32]) -> None:
        """Hands the weights over to an engine, which trains `arrays` (by name) in place.

        `weights` reads these arrays and `set_weights` also sets them. The variables are stale until `sync_variables`.
        """
        # Bypasses tf.Module, which would track the mapping and save it with the model.
        object.__setattr__(self, "_arrays", arrays)

    def sync_variables(self) -> None:
        """Copies the weights from an engine's arrays to the variables. Call it before a graph of the ranker runs."""
        for name, array in (self._arrays or {}).items():
            self.dense[name].assign(array)

    def weights(self) -> dict[str, F32]:
        """A host copy of every dense weight by name."""
        if self._arrays is not None:
            return {name: array.copy() for name, array in self._arrays.items()}
        return {name: np.array(variable.numpy()) for name, variable in self.dense.items()}

    def set_weights(self, weights: Mapping[str, F32]) -> None:
        """Sets every dense weight.

        Raises:
            SettingsError: A weight is missing or has another shape: the version is of another model.
        """
        for name, variable in self.dense.items():
            if name not in weights or weights[name].shape != tuple(variable.shape):
                present = f"shape {weights[name].shape}" if name in weights else "none"
                raise SettingsError(
                    f"dense weight {name}: expected shape {tuple(variable.shape)}, the version has {present}",
                    "put the [model] settings back, or go on from it: `springtide upgrade --reason TEXT`",
                )
            variable.assign(weights[name])
            if self._arrays is not None:
                self._arrays[name][...] = weights[name]
