"""What a ranker is: scores of candidates and pairs as a function of inputs and weights, and the loss it learns from.

The default one is `trainer/model/default_ranker.py`. An engine
(`trainer/engine`) gathers what `inputs` names, differentiates `losses`, and
moves weights and rows; a version carries `dense` and the rows of `tables`; the
program that serving runs is `predict`.
"""

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
"""The logit of a candidate that is not there."""


class Targets(NamedTuple):
    """What is learned of B rows.

    Attributes:
        slot: `[B]` int32, the candidate that was clicked, in the order of the logits; -1 for none.
        weight: `[B]` float32, factor of a row's interest loss, 0 without a target.
        label: `[B]` float32, whether somebody engaged with the row's own item.
        label_shift: `[B]` float32, added to its logit before the loss.
        label_weight: `[B]` float32, factor of its loss; 0 leaves it out.
        negative_shift: `[B]` float32, the same of the drawn negative, whose label is 0.
        negative_weight: `[B]` float32, likewise.
    """

    slot: Tensor
    weight: Tensor
    label: Tensor
    label_shift: Tensor
    label_weight: Tensor
    negative_shift: Tensor
    negative_weight: Tensor


class Ranker(tf.Module):
    """A ranker; subclass it and set the attributes before the first call.

    All it computes is a pure function of inputs and weights, made of operations
    that differentiate and that LiteRT has built in.

    Attributes:
        tables: Width of the embedding rows of each table it reads: user, item, category, context, and any of its own.
        inputs: What it reads: of `trainer.model.inputs.INPUTS` by `pick`, rows of its own tables by `own_rows`.
        sizes: The number behind each letter of their shapes.
        dense: Every dense weight by name, in a fixed order. A version carries them under these names.
        initial_ranges: A new row of a table is uniform in plus and minus this; 0.05 where it is not named.
        origin: What names it, for messages: the setting, of one of the user's own.
        learning_rates: Factors of Adam's step size by the beginning of a weight's name, the longest that fits; 1 elsewhere.
        fast_weights: Names of dense weights that only `score` reads and that move within a record, every some rows.
            They are averaged over their latest moves.
        fast_learning_rates: Factors of their step size by the beginning of a name, likewise.
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
        """What of the user and the context all scores share, computed once for a record.

        Args:
            inputs: By name.
            training: Whether to drop units; else the seed has no influence.
            seed: `[2]` int32.

        Returns:
            Tensors of B rows, in a structure of its own.
        """
        raise NotImplementedError

    def score(self, encoded: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Logits; of some rows at a time, if there are fast weights.

        Args:
            encoded: What `encode` returned.
            inputs: By name, of the same rows.

        Returns:
            recent_logits `[B, L]`, popular_logits `[B, P]`, successor_logits `[B, S]`, of interest (candidates
            that are not there have MASKED); engagement_logit `[B]` of the user with the item; vector `[B, width]`,
            the profile. Where the inputs of training are there, also other_logit `[B]` and negative_logit `[B]`.
        """
        raise NotImplementedError

    def item_query(self, encoded: Any) -> Tensor | None:
        """What items are near to, `[B, E]`, where engagement_logit is item_query . item_row + cross + what user and category say.

        Serving then finds items by it among all there are, and scores many of them at little cost. None of
        a ranker whose engagement is no such sum.

        Args:
            encoded: What `encode` returned.
        """
        return None

    def losses(self, encoded: Any, inputs: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """`[B]` float32: what each row adds to the loss of its record, whose derivative is learned from."""
        raise NotImplementedError

    def predict(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores without dropout, and item_query where there is one: what the program computes."""
        encoded = self.encode(inputs, False, tf.constant([0, 0], tf.int32))
        query = self.item_query(encoded)
        return self.score(encoded, inputs) | ({} if query is None else {"item_query": query})

    def specs(self, training: bool = False) -> dict[str, Any]:
        """The `tf.TensorSpec` of each input of serving, or of learning, by name."""
        return specs(tuple(one for one in self.inputs if training or not one.training), self.sizes, self.tables)

    def hold(self, arrays: Mapping[str, F32]) -> None:
        """From now on an engine trains `arrays` by name in place.

        `weights` returns them and `set_weights` sets them too. The variables lag behind until `sync_variables`.
        """
        # Past tf.Module, which would track the mapping and save it with the model.
        object.__setattr__(self, "_arrays", arrays)

    def sync_variables(self) -> None:
        """Gives the variables the weights that an engine trains in arrays; call it before a graph of the ranker runs."""
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
                found = f"shape {weights[name].shape}" if name in weights else "none"
                raise SettingsError(
                    f"dense weight {name}: expected shape {tuple(variable.shape)}, the version has {found}",
                    "put the [model] settings back, or go on from it: `springtide upgrade --reason TEXT`",
                )
            variable.assign(weights[name])
            if self._arrays is not None:
                self._arrays[name][...] = weights[name]
