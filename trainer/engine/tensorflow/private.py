"""The TensorFlow engine of a private update: how far each row would move what is shared, and the noise on what all of them move.

A row's gradient is needed for its length alone. Once that is known the row's
losses are scaled so that none is too long, and the ordinary graph sums them.
What is told of an update is the gradient by the dense weights and by the rows of
the popular categories, which are a told list themselves: each of them gets noise
in each update, whoever clicked what. Rows of other categories, of items and of
context stay as they are. A user's own row is told to nobody else, and gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from trainer.engine.engine import F32, Measured
from trainer.engine.record import Record
from trainer.engine.tensorflow.engine import TensorflowEngine, TensorsFound, place_of
from trainer.model.ranker import Targets

Tensor = Any
Normal = Callable[[str, int], npt.NDArray[np.float64]]
"""Standard normal numbers of an update, by the name of what they are for."""

ROWS_AT_ONCE = 64
"""Rows whose gradients are in memory at once: 0.4 MB each at the default widths."""

LISTED, USER = "category", "user"


class PrivateEngine(TensorflowEngine):
    """See `TensorflowEngine`, of the default ranker, whose row's loss reads its own row and weights only."""

    def measure(self, record: Record, move: bool = True) -> Measured:
        """See `Engine`.

        Raises:
            ValueError: Weights are to move before anything is clipped.
        """
        if move:
            raise ValueError(
                "a private record is measured with fast weights that do not move: make trainers by trainer_of"
            )
        return super().measure(record, move)

    def lengths(self, record: Record) -> F32:
        """How long the gradient of each row is at most, by all that an update tells.

        A category's row may be looked up by several inputs, so that what they
        say adds up: its part is the sum of their lengths.

        Returns:
            `[B]` float32; not finite where a gradient is not.
        """
        rows, at = self._rows(record)
        inputs = [one for one in self._ranker.inputs if one.table]
        whole = {place_of(one) for one in inputs if not one.shape.startswith("B")}
        listed = {
            one.name: np.isin(record.ids[one.ids], self._listed(record)).astype(np.float32)
            for one in inputs
            if one.table == LISTED and place_of(one) not in whole
        }
        by_row = {
            "at": {name: places for name, places in at.items() if name not in whole and not name.startswith("cross.")},
            "values": {one.name: record.values[one.name] for one in self._ranker.inputs if self._is_value(one)},
            "listed": listed,
            "targets": record.targets,
        }
        shared = {
            "rows": {name: tf.constant(found) for name, found in rows.items()},
            "whole": {name: tf.constant(at[name]) for name in whole},
            "seed": tf.constant(record.seed, tf.int32),
        }
        found = []
        for begin in range(0, len(record), ROWS_AT_ONCE):
            part = tf.nest.map_structure(lambda one, b=begin: tf.constant(one[b : b + ROWS_AT_ONCE]), by_row)
            with tf.device(self._device):
                found.append(self._traced_lengths(part, shared)(part, shared).numpy())
        return np.concatenate(found)

    def told(self, measured: Measured, record: Record, normal: Normal, deviation: float) -> Measured:
        """What an update may tell of what was measured: noise on all that is shared, and nothing of what gets none.

        Args:
            measured: With fast weights that do not move.
            record: That was measured.
            normal: Makes the noise.
            deviation: Its standard deviation.
        """
        found: TensorsFound = measured.found
        weights = self._ranker.dense
        ends = np.cumsum([int(np.prod(weight.shape)) for weight in weights.values()])
        parts = np.split(normal("dense", int(ends[-1])) * deviation, ends[:-1])
        dense = {
            name: gradient.numpy() + part.reshape(gradient.shape).astype(np.float32)
            for name, gradient, part in zip(weights, found.dense, parts, strict=True)
        }
        given = {name: one.numpy() for name, one in zip(self._embeddings, found.sparse, strict=True)}
        sparse = {name: one if name == USER else np.zeros_like(one) for name, one in given.items()}
        category = given[LISTED]
        places = self._tables[LISTED].find(self._listed(record))
        noise = normal(LISTED, places.size * category.shape[1]).reshape(places.size, category.shape[1]) * deviation
        order = {row: place for place, row in enumerate(measured.rows[LISTED].tolist())}
        for row, part in zip(places.tolist(), noise, strict=True):
            if row:
                sparse[LISTED][order[row]] = category[order[row]] + part.astype(np.float32)
        squared = sum(float(np.square(one, dtype=np.float64).sum()) for one in (*dense.values(), sparse[LISTED]))
        moved = self._moved({name: dense[name] for name in self._ranker.fast_weights})
        tensors = tuple(tf.constant(one) for one in dense.values()), tuple(tf.constant(one) for one in sparse.values())
        return Measured(
            measured.scores,
            squared,
            measured.rows,
            found._replace(dense=tensors[0], sparse=tensors[1], squared_norm=tf.constant(squared), fast=moved),
        )

    def _moved(self, gradients: Mapping[str, F32]) -> tuple[Tensor, ...]:
        """The slots of the fast weights after one move of an update."""
        flat = np.concatenate([one.reshape(-1) for one in gradients.values()])
        with tf.device(self._device):
            return self._blocks.moved(tf.constant(flat), [tf.constant(slot) for slot in self._optimizer.fast[1:]])

    def _listed(self, record: Record) -> npt.NDArray[np.uint64]:
        """The popular categories that there are."""
        popular = record.ids["popular"]
        found: npt.NDArray[np.uint64] = popular[popular != 0]
        return found

    def _traced_lengths(self, part: Mapping[str, Any], shared: Mapping[str, Any]) -> Any:
        """The graph for parts of any length."""
        if self._lengths is None:

            def spec(length: int | None) -> Callable[[Tensor], Any]:
                return lambda one: tf.TensorSpec([length, *one.shape[1:]], one.dtype)

            any_length = {
                "rows": tf.nest.map_structure(spec(None), shared["rows"]),
                "whole": {name: tf.TensorSpec(one.shape, one.dtype) for name, one in shared["whole"].items()},
                "seed": tf.TensorSpec([2], tf.int32),
            }
            graph = tf.function(self._lengths_graph, autograph=False)
            self._lengths = graph.get_concrete_function(tf.nest.map_structure(spec(None), part), any_length)
        return self._lengths

    _lengths: Any = None

    def _lengths_graph(self, part: Mapping[str, Any], shared: Mapping[str, Any]) -> Tensor:
        distinct = {
            name: tf.raw_ops.ResourceGather(resource=self._tables[name].rows.handle, indices=rows, dtype=tf.float32)
            for name, rows in shared["rows"].items()
        }
        inputs = [one for one in self._ranker.inputs if one.table]
        rows = {one.name: self._gather(one, distinct, part["at"] | shared["whole"]) for one in inputs}
        whole = {one.name: rows.pop(one.name) for one in inputs if place_of(one) in shared["whole"]}
        values = {name: tf.cast(one, tf.float32) for name, one in part["values"].items()}
        values["cross"] = tf.zeros_like(part["targets"].weight)
        weights = list(self._ranker.dense.values())

        def of_row(row: Mapping[str, Any]) -> Tensor:
            # A record of one row.
            mine, targets = ({name: one[None] for name, one in row["rows"].items()} | whole), row["targets"]
            given = mine | {name: one[None] for name, one in row["values"].items()}
            watched = {name: mine[name] for name in (*row["listed"], *whole)}
            with tf.GradientTape() as tape:
                tape.watch(list(watched.values()))
                encoded = self._ranker.encode(given, True, shared["seed"])
                loss = tf.reduce_sum(self._ranker.losses(encoded, given, Targets(*(one[None] for one in targets))))
            by_dense, by_rows = tape.gradient(
                loss, [weights, list(watched.values())], unconnected_gradients=tf.UnconnectedGradients.ZERO
            )
            lengths = [
                tf.norm(by_row * tf.expand_dims(row["listed"][name], -1) if name in row["listed"] else by_row)
                for name, by_row in zip(watched, by_rows, strict=True)
            ]
            squared = tf.add_n([tf.reduce_sum(tf.square(tf.convert_to_tensor(one))) for one in by_dense])
            return tf.sqrt(squared + tf.square(tf.add_n(lengths)))

        listed, targets = part["listed"], tuple(part["targets"])
        return tf.vectorized_map(of_row, {"rows": rows, "values": values, "listed": listed, "targets": targets})
