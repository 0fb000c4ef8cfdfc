"""The part of a step that TensorFlow computes: rows gathered, tower forwards and backwards, weights applied.

One graph measures. In its middle, between the vectors and their derivatives,
stand the compiled loops of `heads.py`: they read what the host knows
of the step from memory, so that it passes no border; the graph carries the number of the call.

    rows, features ─ preprocessing, tower ─ vectors, queries ─┐
                                                              heads
    derivatives of dense weights and rows ─ tower backwards ──┘

A second graph applies, after the guard's verdict.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.engine.compiled.arrays import F32, FAST, I32, Facts, FastWeights, Gradients, HeadInputs, Learned
from trainer.engine.compiled.heads import heads
from trainer.engine.engine import CROSS, Scores
from trainer.engine.optimizers.adagrad import adagrad
from trainer.engine.optimizers.adam import Adam
from trainer.model.default_ranker import DefaultRanker
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.tower import DenseTower
from trainer.tables.table import Table

FROM_HEADS = {
    "interest.user_kernel": "user",
    "interest.linear": "linear",
    "interest.bias": "bias",
    "interest.kernel_0": "net_0",
    "interest.kernel_1": "net_1",
    "interest.position": "position",
    "interest.next": "next",
    "interest.next_0": "next_0",
    "interest.next_1": "next_1",
    "interest.successor": "successor",
    "interest.other": "other",
    "engagement.prior": "prior",
    "engagement.item": "item_bias",
    "engagement.category": "category_bias",
}
"""The dense weights that only the heads use, and their names there."""

TO_HEADS = (*HeadInputs._fields[:-1], *FAST)
"""The names of the arrays that the heads are given, in their order."""

INPUTS = {
    "call": tf.int64,
    "features": tf.uint16,
    "user_rows": tf.int32,
    "user_at": tf.int32,
    "category_rows": tf.int32,
    "latest_at": tf.int32,
    "popular_at": tf.int32,
    "item_rows": tf.int32,
    "context_rows": tf.int32,
    "context_at": tf.int32,
    "cross_rows": tf.int32,
    "kept": tf.float32,
    "seed": tf.int32,
}
"""What the first graph is given: the number of the call, distinct rows of each table, and where each use is in them."""

OF_ITEMS = {"item_at": tf.int32, "item_attributes_at": tf.int32}
"""And, where items have attributes: for each combination of item and attributes the item's row and its attributes' rows."""


class GraphFound(NamedTuple):
    """What the first graph found.

    Attributes:
        dense: Derivatives by the dense weights, in their order; they stay on the device.
        norm: The square of their norm.
        user: `[B, dim]` float32 derivatives by each row's user row.
        latest: `[B * 3, dim]`, by the rows of its latest labels.
        context: `[B * K, dim]`, by its context rows.
        popular: `[P, dim]`, by the popular rows.
        rows: `[u, width]` of each table, its distinct rows in the order of the tables.
        accum: `[u, width]` of each table, their accumulators.
    """

    dense: list[Any]
    norm: Any
    user: Any
    latest: Any
    context: Any
    popular: Any
    rows: list[Any]
    accum: list[Any]


@dataclass
class _Call:
    """One call of the first graph: what its heads read beside tensors, and what they leave.

    Attributes:
        facts: What the host knows.
        move: Whether fast weights move.
        found: Of the heads, once they have run.
    """

    facts: Facts
    move: bool
    found: tuple[Scores, Gradients, Learned] | None = None


class Graph:
    """Both graphs over the tables and dense weights.

    Args:
        ranker: The dense weights and functions.
        optimizer: Of the dense weights.
        tables: By name.
        fields: K, context fields of a row.
        attributes: Of an item.
    """

    def __init__(
        self, ranker: DefaultRanker, optimizer: Adam, tables: Mapping[str, Table], fields: int, attributes: int = 0
    ) -> None:
        self._ranker, self._optimizer, self._tables, self._fields = ranker, optimizer, tables, fields
        self._attributes, self._inputs = attributes, INPUTS | (OF_ITEMS if attributes else {})
        self._calls: dict[int, _Call] = {}
        self._numbers = itertools.count()
        shapes: dict[str, list[int | None]] = {"features": [None, ranker.sizes["D"]], "seed": [2], "call": []}
        shapes["kept"] = [None, ranker.settings.hidden[0] if ranker.drops else 0]
        self._measure = tf.function(
            self._measure_graph,
            autograph=False,
            input_signature=[
                tf.TensorSpec(shapes.get(name, [None]), kind, name) for name, kind in self._inputs.items()
            ],
        )
        # Called without the checks of a tf.function, which cost 15 us an argument.
        self._concrete = self._measure.get_concrete_function()
        self._apply = tf.function(
            lambda fast, *gradients: optimizer.apply(gradients, fast),
            autograph=False,
            input_signature=[
                tf.TensorSpec(optimizer.fast.weights.shape, tf.float32),
                *(tf.TensorSpec(weight.shape, tf.float32) for weight in ranker.dense.values()),
            ],
        ).get_concrete_function()

    @property
    def scores_apart(self) -> bool:
        """Whether what learns is not what scores: without dropout both are one pass."""
        return self._ranker.drops or type(self._ranker.tower) is not DenseTower

    def measure(
        self, facts: Facts, inputs: dict[str, Any], move: bool = True
    ) -> tuple[GraphFound, Scores, Gradients, Learned]:
        """Scores a step and finds its derivatives; changes nothing. One thread.

        Args:
            facts: What the heads need to know.
            inputs: The arrays named in `INPUTS`, but for the call, and, with attributes, in `OF_ITEMS`.
            move: Whether weights move within the step, as they do in training; else all rows see the same.
        """
        number, call = next(self._numbers), _Call(facts, move)
        self._calls[number] = call
        try:
            given = inputs | {"call": np.int64(number)}
            measured = self._concrete(*(tf.constant(given[name]) for name in self._inputs))
        finally:
            del self._calls[number]
        if call.found is None:
            raise RuntimeError("the graph ran without its heads")
        return GraphFound(*measured), *call.found

    def apply(self, at: Mapping[str, I32], sparse: Mapping[str, F32], measured: GraphFound, learned: Learned) -> None:
        """Adagrad on distinct rows of each table, Adam on the dense weights; what the heads have learned as they left it.

        Args:
            at: `[u]` int32 distinct rows of each table, the missing one first.
            sparse: `[u, dim]` derivatives by them.
            measured: Of the same step.
            learned: Likewise.
        """
        for (name, table), rows, accum in zip(self._tables.items(), measured.rows, measured.accum, strict=True):
            # The missing row is never trained.
            if at[name].size > 1:
                if name == CROSS:
                    updated = learned.cross[1:], learned.cross_precision[1:]
                else:
                    updated = rows.numpy()[1:], accum.numpy()[1:]
                    adagrad(*updated, sparse[name][1:], self._ranker.settings.learning_rate)
                for variable, values in zip((table.rows, table.accum), updated, strict=True):
                    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=at[name][1:], updates=values)
        self._apply(tf.constant(learned.fast.weights), *measured.dense)
        self._optimizer.fast = learned.fast

    def _measure_graph(self, *arrays: Any) -> Any:
        given = dict(zip(self._inputs, arrays, strict=True))
        ranker = self._ranker
        distinct, accum = (
            {
                name: tf.raw_ops.ResourceGather(
                    resource=held[name].handle, indices=given[f"{name}_rows"], dtype=tf.float32
                )
                for name in self._tables
            }
            for held in (
                {name: table.rows for name, table in self._tables.items()},
                {name: table.accum for name, table in self._tables.items()},
            )
        )
        user = tf.gather(distinct["user"], given["user_at"])
        latest = tf.gather(distinct["category"], given["latest_at"])
        popular_rows = tf.gather(distinct["category"], given["popular_at"])
        context = tf.gather(distinct["context"], given["context_at"])
        names = [name for name in ranker.dense if name not in FROM_HEADS]
        watched = [ranker.dense[name] for name in names]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([user, latest, popular_rows, context, *watched])
            encoded = ranker.encode(self._inputs_of_encode(user, latest, context, given), True, given["seed"])
            queries = [encoded.plain_queries, encoded.queries]
            popular = [
                ranker.popular_logits(each, popular_rows) for each in (queries if self.scores_apart else queries[:1])
            ]
        known = {
            "plain_queries": queries[0],
            "queries": queries[-1],
            "plain_popular": popular[0],
            "popular_logits": popular[-1],
            "user_features": encoded.user_features,
            "category": distinct["category"],
            "item": self._items(distinct, given),
            "cross": distinct[CROSS],
            "cross_precision": accum[CROSS],
        }
        known |= {name: ranker.dense[weight].read_value() for weight, name in FROM_HEADS.items()}
        gradients = self._gradients_of_heads(given["call"], known)
        sources = (dict(zip(names, watched, strict=True)), user, latest, context, popular_rows)
        found, *rows = tape.gradient(
            [queries[-1], popular[-1]],
            sources,
            output_gradients=[gradients["queries"], gradients["popular_logits"]],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        found |= {weight: gradients[name] for weight, name in FROM_HEADS.items()}
        dense = [tf.convert_to_tensor(found[name]) for name in ranker.dense]
        norm = tf.add_n([tf.nn.l2_loss(slope) for slope in dense]) * 2.0
        return dense, norm, *rows, list(distinct.values()), list(accum.values())

    def _gradients_of_heads(self, call: Any, known: Mapping[str, Any]) -> dict[str, Any]:
        """The derivatives by queries, popular logits and the heads' own weights, from the compiled loops."""
        kept = ("queries", "popular_logits", *FROM_HEADS.values())
        arrays = [call, *(known[name] for name in TO_HEADS)]
        gradients = dict(zip(kept, tf.numpy_function(self._run_heads, arrays, [tf.float32] * len(kept)), strict=True))
        for name, gradient in gradients.items():
            gradient.set_shape(known[name].shape)
        return gradients

    def _items(self, distinct: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """The rows of items that pairs name; with attributes the item's own plus the mean of theirs."""
        if not self._attributes:
            return distinct["item"]
        rows = tf.gather(distinct["context"], given["item_attributes_at"])
        rows = tf.reshape(rows, [-1, self._attributes, self._ranker.settings.dim])
        return tf.gather(distinct["item"], given["item_at"]) + tf.reduce_mean(rows, 1)

    def _inputs_of_encode(self, user: Any, latest: Any, context: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        dim = self._ranker.settings.dim
        inputs = {"features": tf.cast(given["features"], tf.float32), "user_row": user}
        inputs["recent_rows"] = tf.reshape(latest, [-1, HYPERPARAMETERS.latest, dim])
        if self._fields:
            inputs["context_row"] = tf.reduce_mean(tf.reshape(context, [-1, self._fields, dim]), 1)
        return inputs | ({"tower_kept": given["kept"]} if self._ranker.drops else {})

    def _run_heads(self, number: Any, *arrays: F32) -> list[F32]:
        call, given = self._calls[int(number)], dict(zip(TO_HEADS, arrays, strict=True))
        inputs = HeadInputs(
            **{name: given[name] for name in HeadInputs._fields[:-1]}, fast=FastWeights(*(given[name] for name in FAST))
        )
        slots = self._optimizer.fast if call.move else None
        call.found = heads(call.facts, inputs, slots, self._optimizer.fast_rate, self.scores_apart)
        gradients = call.found[1]
        return [
            gradients.queries,
            gradients.popular_logits,
            *(getattr(gradients.fast if name in FAST else gradients, name) for name in FROM_HEADS.values()),
        ]
