"""The part of a step that TensorFlow computes: rows gathered, tower forwards and backwards, weights applied.

One graph measures. In its middle, between the vectors and their derivatives,
stand the compiled loops of `trainer/engine/heads.py`: they read what the host knows
of the step from memory, so that it passes no border.

    rows, features ─ preprocessing, tower ─ vectors, queries ─┐
                                                              heads
    derivatives of dense weights and rows ─ tower backwards ──┘

A second graph applies, after the guard's verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.engine.facts import MOVING, Facts, Given, Learned, Moved, Moving, Scores, Slopes
from trainer.engine.heads import heads
from trainer.engine.optimizers import Adam, adagrad
from trainer.model.default_ranker import DefaultRanker
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.tower import DenseTower
from trainer.tables.table import Table

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]

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

MOVING_WEIGHTS = tuple(weight for moving in MOVING for weight, name in FROM_HEADS.items() if name == moving)
"""Those that the heads move within a step, in the order of `MOVING`."""

TO_HEADS = (*Given._fields[:-1], *MOVING)
"""The names of the arrays that the heads are given, in their order."""

CROSS = "cross"
"""The table whose rows are learned in the heads, pair after pair, and need no derivative."""

INPUTS = {
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
"""What the first graph is given: distinct rows of each table, and where each use is in them."""

OF_ITEMS = {"item_at": tf.int32, "item_attributes_at": tf.int32}
"""And, where items have attributes: for each combination of item and attributes the item's row and its attributes' rows."""


class Measured(NamedTuple):
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


class Graph:
    """Both graphs over the tables and dense weights.

    Args:
        model: The dense weights and functions.
        optimizer: Of the dense weights.
        tables: By name.
        fields: K, context fields of a row.
        attributes: Of an item.
    """

    def __init__(
        self, model: DefaultRanker, optimizer: Adam, tables: Mapping[str, Table], fields: int, attributes: int = 0
    ) -> None:
        self._model, self._optimizer, self._tables, self._fields = model, optimizer, tables, fields
        self._attributes, self._inputs = attributes, INPUTS | (OF_ITEMS if attributes else {})
        self._facts: Facts
        self._slots: Moved | None = None
        self._found: tuple[Scores, Slopes, Learned]
        shapes: dict[str, list[int | None]] = {"features": [None, model.sizes["D"]], "seed": [2]}
        shapes["kept"] = [None, model.settings.hidden[0] if self.drops else 0]
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
            lambda moved, *slopes: optimizer.apply(slopes, moved),
            autograph=False,
            input_signature=[
                tf.TensorSpec(optimizer.moving.weights.shape, tf.float32),
                *(tf.TensorSpec(weight.shape, tf.float32) for weight in model.dense.values()),
            ],
        ).get_concrete_function()

    @property
    def drops(self) -> bool:
        """Whether the dropout of the tower is drawn on the host; a tower of the user's own draws its own."""
        return self._model.drops

    @property
    def scores_apart(self) -> bool:
        """Whether what learns is not what scores: without dropout both are one pass."""
        return self.drops or type(self._model.tower) is not DenseTower

    def measure(
        self, facts: Facts, inputs: Mapping[str, Any], move: bool = True
    ) -> tuple[Measured, Scores, Slopes, Learned]:
        """Scores a step and finds its derivatives; changes nothing. One thread.

        Args:
            facts: What the heads need to know.
            inputs: The arrays named in `INPUTS` and, with attributes, in `OF_ITEMS`.
            move: Whether weights move within the step, as they do in training; else all rows see the same.
        """
        self._facts, self._slots = facts, self._optimizer.moving if move else None
        measured = self._concrete(*(tf.constant(inputs[name]) for name in self._inputs))
        return Measured(*measured), *self._found

    def apply(self, at: Mapping[str, I32], sparse: Mapping[str, F32], measured: Measured, learned: Learned) -> None:
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
                    adagrad(*updated, sparse[name][1:], self._model.settings.learning_rate)
                for variable, values in zip((table.rows, table.accum), updated, strict=True):
                    tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=at[name][1:], updates=values)
        self._apply(tf.constant(learned.moved.weights), *measured.dense)
        self._optimizer.moving = learned.moved

    def _measure_graph(self, *arrays: Any) -> Any:
        given = dict(zip(self._inputs, arrays, strict=True))
        model = self._model
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
        names = [name for name in model.dense if name not in FROM_HEADS]
        watched = [model.dense[name] for name in names]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([user, latest, popular_rows, context, *watched])
            encoded = model.encode(self._inputs_of_encode(user, latest, context, given), True, given["seed"])
            queries = [encoded.plain_queries, encoded.queries]
            popular = [
                model.popular_logits(each, popular_rows) for each in (queries if self.scores_apart else queries[:1])
            ]
        known = {
            "scoring": queries[0],
            "learning": queries[-1],
            "scoring_popular": popular[0],
            "learning_popular": popular[-1],
            "prepared": encoded.user_features,
            "category": distinct["category"],
            "item": self._items(distinct, given),
            "cross": distinct[CROSS],
            "cross_precision": accum[CROSS],
        }
        known |= {name: model.dense[weight].read_value() for weight, name in FROM_HEADS.items()}
        kept = ("learning", "learning_popular", *FROM_HEADS.values())
        slopes = dict(
            zip(
                kept,
                tf.numpy_function(self._run_heads, [known[name] for name in TO_HEADS], [tf.float32] * len(kept)),
                strict=True,
            )
        )
        for name, slope in slopes.items():
            slope.set_shape(known[name].shape)
        sources = (dict(zip(names, watched, strict=True)), user, latest, context, popular_rows)
        found, *rows = tape.gradient(
            [queries[-1], popular[-1]],
            sources,
            output_gradients=[slopes["learning"], slopes["learning_popular"]],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        found |= {weight: slopes[name] for weight, name in FROM_HEADS.items()}
        dense = [tf.convert_to_tensor(found[name]) for name in model.dense]
        norm = tf.add_n([tf.nn.l2_loss(slope) for slope in dense]) * 2.0
        return dense, norm, *rows, list(distinct.values()), list(accum.values())

    def _items(self, distinct: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        """The rows of items that pairs name; with attributes the item's own plus the mean of theirs."""
        if not self._attributes:
            return distinct["item"]
        rows = tf.gather(distinct["context"], given["item_attributes_at"])
        rows = tf.reshape(rows, [-1, self._attributes, self._model.settings.dim])
        return tf.gather(distinct["item"], given["item_at"]) + tf.reduce_mean(rows, 1)

    def _inputs_of_encode(self, user: Any, latest: Any, context: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        dim = self._model.settings.dim
        inputs = {"features": tf.cast(given["features"], tf.float32), "user_row": user}
        inputs["recent_rows"] = tf.reshape(latest, [-1, HYPERPARAMETERS.latest, dim])
        if self._fields:
            inputs["context_row"] = tf.reduce_mean(tf.reshape(context, [-1, self._fields, dim]), 1)
        return inputs | ({"tower_kept": given["kept"]} if self.drops else {})

    def _run_heads(self, *arrays: F32) -> list[F32]:
        given = dict(zip(TO_HEADS, arrays, strict=True))
        moving = Moving(*(given.pop(name) for name in MOVING))
        self._found = heads(
            self._facts, Given(**given, moving=moving), self._slots, self._optimizer.moving_rate, self.scores_apart
        )
        slopes = self._found[1]
        return [
            slopes.learning,
            slopes.learning_popular,
            *(getattr(slopes.moving if name in MOVING else slopes, name) for name in FROM_HEADS.values()),
        ]
