"""The ranker interface: scores of candidates and pairs as a function of inputs and weights, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from state.ranking.crosses import with_network_share
from trainer.model.inputs import Input, shapes
from trainer.model.model import F32, MASKED, Targets, Tensor, require_shapes

# Custom rankers import these from here.
__all__ = ["MASKED", "Ranker", "Targets"]


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
        network_share: The factor of its part of the engagement in `predict`, see `state/ranking/crosses.py`. Serving
            multiplies by itself, so only a ranker that is exported has a version's share.
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
    network_share: float = 1.0

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
        outputs = self.score(encoded, inputs) | ({} if query is None else {"item_query": query})
        return with_network_share(outputs, inputs, self.network_share)

    def shapes(self, training: bool = False) -> dict[str, tuple[int | None, ...]]:
        """The shape of each input of serving, or of training, by name."""
        return shapes(self.inputs, self.sizes, self.tables, training)

    def specs(self, training: bool = False) -> dict[str, Any]:
        """The `tf.TensorSpec` of each input of serving, or of training, by name."""
        return {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in self.shapes(training).items()}

    def weights(self) -> dict[str, F32]:
        """A host copy of every dense weight by name."""
        return {name: np.array(variable.numpy()) for name, variable in self.dense.items()}

    def set_weights(self, weights: Mapping[str, F32]) -> None:
        """Sets every dense weight.

        Raises:
            SettingsError: A weight is missing or has another shape: the version is of another model.
        """
        require_shapes(self.dense, weights)
        for name, variable in self.dense.items():
            variable.assign(weights[name])
