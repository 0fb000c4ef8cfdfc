"""The TensorFlow engine: gathers what a ranker reads, differentiates its losses, and moves weights and rows on the device.

One graph measures a record:

1. Distinct rows of each table are gathered, and the ranker's inputs out of them.
2. Crosses are scored and learned, row after row (`crosses.py`).
3. `encode` runs once without dropout and once with it.
4. `score` and `losses` run over blocks of rows. After each block the fast
   weights move, before the next one is scored; without fast weights all rows
   are one block. Derivatives by what was encoded and gathered are collected.
5. They go back through `encode` to dense weights and rows.

A second graph applies: Adam to the dense weights, Adagrad to the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.engine.engine import CROSS, F32, I32, Measured, Scores
from trainer.engine.optimizers.adam import Adam
from trainer.engine.optimizers.fast_weights import FastSlots
from trainer.engine.record import Record
from trainer.engine.tensorflow.blocks import Blocks, Learning, distinct_tensors
from trainer.engine.tensorflow.crosses import learn_crosses
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.inputs import Input
from trainer.model.ranker import Ranker, Targets
from trainer.tables.table import Table

Tensor = Any


class TensorsFound(NamedTuple):
    """What the first graph found; tensors stay on the device.

    Attributes:
        scores: Without dropout, in the order of `Scores`.
        dense: Derivatives by the dense weights, in their order.
        sparse: By the distinct rows of each embedding table, in the order of the tables.
        squared_norm: Of all derivatives.
        cross: `[w, 2]` rows and `[w, 2]` precision of crosses after the record.
        fast: The slots of the fast weights after it.
    """

    scores: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    sparse: tuple[Tensor, ...]
    squared_norm: Tensor
    cross: tuple[Tensor, ...]
    fast: tuple[Tensor, ...]


class TensorflowEngine:
    """See `trainer/engine/engine.py`.

    Args:
        ranker: Any.
        optimizer: Of its dense weights.
        tables: Of embedding rows and of crosses, by name.
        learning_rate: Step size of rows.
        cross_precision: `[C]` float32, the precision of each cross's weight before anything was learned.
        device: Of the variables.
    """

    name = "tensorflow"

    def __init__(
        self,
        ranker: Ranker,
        optimizer: Adam,
        tables: Mapping[str, Table],
        learning_rate: float,
        cross_precision: F32,
        device: str,
    ) -> None:
        self._ranker, self._optimizer, self._tables, self._device = ranker, optimizer, tables, device
        self._learning_rate, self._cross_precision = learning_rate, cross_precision
        self._embeddings = tuple(name for name in tables if name in ranker.tables)
        self._crossed = any(one.name == "cross" for one in ranker.inputs)
        self._blocks = Blocks(ranker, optimizer)
        self._measure = tf.function(self._measure_graph, autograph=False)
        rows = {name: tf.TensorSpec([None], tf.int32) for name in tables}
        dense = tuple(tf.TensorSpec(weight.shape, tf.float32) for weight in ranker.dense.values())
        sparse = tuple(tf.TensorSpec([None, tables[name].dim], tf.float32) for name in self._embeddings)
        cross = (tf.TensorSpec([None, tables[CROSS].dim], tf.float32),) * 2
        fast = tf.TensorSpec([None], tf.float32)
        self._apply = tf.function(self._apply_graph, [rows, dense, sparse, cross, fast], autograph=False)
        # Records of any length share a trace; those with and without labels, and so crosses, do not.
        self._traces: dict[int, Any] = {}

    def measure(self, record: Record, move: bool = True) -> Measured:
        """See `Engine`."""
        rows, at = self._rows(record)
        given = {
            "rows": {name: tf.constant(found) for name, found in rows.items()},
            "at": {name: tf.constant(places) for name, places in at.items()},
            "values": {one.name: tf.constant(record.values[one.name]) for one in self._ranker.inputs if self._is_value(one)},
            "targets": Targets(*(tf.constant(part) for part in record.targets)),
            "seed": tf.constant(record.seed, tf.int32),
            "fast": tuple(tf.constant(slot) for slot in self._optimizer.fast[1:]),
        }  # fmt: skip
        with tf.device(self._device):
            found: TensorsFound = self._traced(given, record.ids["cross"].shape[1])(given, tf.constant(move))
        scores = Scores(*(tensor.numpy() for tensor in found.scores))
        return Measured(scores, float(found.squared_norm.numpy()), rows, found)

    def apply(self, measured: Measured) -> None:
        """See `Engine`."""
        found: TensorsFound = measured.found
        with tf.device(self._device):
            at = {name: tf.constant(rows) for name, rows in measured.rows.items()}
            self._apply(at, found.dense, found.sparse, found.cross, found.fast[0])
        self._optimizer.fast = FastSlots(*(np.array(slot.numpy()) for slot in found.fast))

    def _traced(self, given: Mapping[str, Any], crosses: int) -> Any:
        """The graph for records of any length, as one with so many crosses asks for."""
        if crosses not in self._traces:
            fixed = {
                place_of(one) if one.table else one.name for one in self._ranker.inputs if not one.shape.startswith("B")
            }
            fixed.add(f"{CROSS}.cross_share")

            def spec(tensor: Tensor, length: int | None = None) -> Any:
                return tf.TensorSpec([length, *tensor.shape[1:]], tensor.dtype)

            named = {
                part: {
                    name: spec(tensor, tensor.shape[0] if name in fixed and part != "rows" else None)
                    for name, tensor in given[part].items()
                }
                for part in ("rows", "at", "values")
            }
            whole = {"seed": spec(given["seed"], 2), "fast": tuple(spec(slot, slot.shape[0]) for slot in given["fast"])}
            specs = named | whole | {"targets": Targets(*(spec(part) for part in given["targets"]))}
            self._traces[crosses] = self._measure.get_concrete_function(specs, tf.TensorSpec([], tf.bool))
        return self._traces[crosses]

    def _is_value(self, one: Input) -> bool:
        return not one.table and one.name != "cross"

    def _rows(self, record: Record) -> tuple[dict[str, I32], dict[str, I32]]:
        """Distinct rows of each table, the missing one first, and where in them each use of an id is, by `<table>.<ids>`."""
        uses: dict[str, dict[str, Any]] = {name: {} for name in self._tables}
        for one in self._ranker.inputs:
            if one.table:
                uses[one.table][one.ids] = record.ids[one.ids]
            if one.attributes and record.ids[one.attributes].size:
                uses["context"][one.attributes] = record.ids[one.attributes]
        if self._crossed:
            uses[CROSS] = {name: record.ids[name] for name in ("cross", "cross_share")}
        rows: dict[str, I32] = {}
        at: dict[str, I32] = {}
        for name, parts in uses.items():
            ids = np.concatenate([np.zeros(0, np.uint64), *(part.reshape(-1) for part in parts.values())])
            rows[name], places = self._tables[name].distinct(self._tables[name].find(ids))
            ends = np.cumsum([part.size for part in parts.values()])
            found = np.split(places, ends[:-1]) if parts else []
            at |= {f"{name}.{ids}": each.reshape(parts[ids].shape) for ids, each in zip(parts, found, strict=True)}
        return rows, at

    def _gather(self, one: Input, distinct: Mapping[str, Tensor], at: Mapping[str, Tensor]) -> Tensor:
        """The rows of one input."""
        places = at[place_of(one)]
        rows = tf.gather(distinct[one.table], places)
        if one.mean:
            # Without any ids the mean is the missing row.
            rows = tf.reduce_mean(rows, -2) if places.shape[-1] else tf.reduce_sum(rows, -2)
        if (attributes := f"context.{one.attributes}") in at:
            rows += tf.reduce_mean(tf.gather(distinct["context"], at[attributes]), -2)
        return rows

    def _measure_graph(self, given: Mapping[str, Any], move: Tensor) -> TensorsFound:
        # 1.
        distinct, accum = (
            {
                name: tf.raw_ops.ResourceGather(resource=held, indices=given["rows"][name], dtype=tf.float32)
                for name, held in ((name, getattr(table, part).handle) for name, table in self._tables.items())
            }
            for part in ("rows", "accum")
        )
        # 2.
        targets: Targets = given["targets"]
        values = {name: tf.cast(value, tf.float32) for name, value in given["values"].items()}
        cross = distinct[CROSS], accum[CROSS]
        if self._crossed and "cross" not in values:
            at, shares = given["at"][f"{CROSS}.cross"], given["at"][f"{CROSS}.cross_share"]
            if at.shape[-1]:
                prior = tf.constant(self._cross_precision)
                values["cross"], *learned = learn_crosses(at, shares, prior, targets.label, *cross)
                cross = tuple(learned)
            else:
                values["cross"] = tf.zeros_like(targets.weight)
        # 3.
        embeddings = [distinct[name] for name in self._embeddings]
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            rows = {one.name: self._gather(one, distinct, given["at"]) for one in self._ranker.inputs if one.table}
            encoded = self._ranker.encode(values | rows, True, given["seed"])
        plain = self._ranker.encode(values | rows, False, given["seed"])
        # 4.
        learning = Learning(values, rows, encoded, plain, targets, given["fast"])
        scores, by_encoded, by_rows, by_dense, fast = self._blocks.learn(learning, move)
        # 5.
        weights = list(self._ranker.dense.values())
        through, sparse = tape.gradient(
            [*distinct_tensors(encoded), *rows.values()],
            [weights, embeddings],
            output_gradients=[*by_encoded, *by_rows],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        dense = tuple(tf.convert_to_tensor(one) + other for one, other in zip(through, by_dense, strict=True))
        sparse = tuple(tf.convert_to_tensor(one) for one in sparse)
        parts = [*dense, *(one[1:] for one in sparse)]
        squared = 2.0 * tf.add_n([tf.nn.l2_loss(one) for one in parts])
        return TensorsFound(scores, dense, sparse, squared, tuple(cross), fast)

    def _apply_graph(
        self,
        at: Mapping[str, Tensor],
        dense: tuple[Tensor, ...],
        sparse: tuple[Tensor, ...],
        cross: tuple[Tensor, ...],
        fast: Tensor,
    ) -> None:
        self._optimizer.apply(dense, fast)
        for name, gradient in zip(self._embeddings, sparse, strict=True):
            # The missing row is never trained.
            table, rows, gradient = self._tables[name], at[name][1:], gradient[1:]
            gather = {part: getattr(table, part).handle for part in ("rows", "accum")}
            held = {
                part: tf.raw_ops.ResourceGather(resource=handle, indices=rows, dtype=tf.float32)
                for part, handle in gather.items()
            }
            accum = held["accum"] + gradient * gradient
            moved = held["rows"] - self._learning_rate * gradient / (tf.sqrt(accum) + HYPERPARAMETERS.epsilon)
            tf.raw_ops.ResourceScatterUpdate(resource=gather["rows"], indices=rows, updates=moved)
            tf.raw_ops.ResourceScatterUpdate(resource=gather["accum"], indices=rows, updates=accum)
        if self._crossed:
            table = self._tables[CROSS]
            for variable, values in zip((table.rows, table.accum), cross, strict=True):
                tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=at[CROSS][1:], updates=values[1:])


def place_of(one: Input) -> str:
    """What the places of an input's rows are called: tables may be looked up by the same ids."""
    return f"{one.table}.{one.ids}"
