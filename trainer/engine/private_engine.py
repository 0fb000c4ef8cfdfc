"""The TensorFlow engine of a private update: bounds the gradient of each row, and adds noise to the shared sum.

An update releases gradients by the dense weights other than the tower's, by the rows of the popular categories, and by
some crosses. Each of these gets noise in each update, whatever was clicked. The tower and all other shared rows keep
their initial values. A user's own row and crosses are used only for that user, so they get no noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.ranking.crosses import FIRST_SHARES
from trainer.engine.crosses import Crossed, CrossLearner, crosses
from trainer.engine.engine import F32, I32, I64, Measured
from trainer.engine.record import Record
from trainer.engine.tensorflow_engine import Adam, TensorflowEngine, TensorsFound, place_of
from trainer.model.model import Targets
from trainer.model.ranker import Ranker
from trainer.tables.table import Table

Tensor = Any
F64 = npt.NDArray[np.float64]
Normal = Callable[[str, int], F64]
"""Returns standard normal numbers of an update, by the name of their purpose and their count."""

ROWS_AT_ONCE = 64
"""Rows whose gradients are in memory at the same time: 0.2 MB each at the default widths."""

LISTED, USER = "category", "user"

FROZEN = "tower."
"""Weights with this prefix keep their initial values: the tower is a random map of the features. Each released number
carries noise, so few weights on features that need no learning do better than many (Tramer and Boneh 2021)."""

LOSSES: Mapping[str, tuple[str, ...]] = {"interest": ("weight",), "engagement": ("label_weight", "negative_weight")}
"""The losses of a row, each with its factors in `Targets`; a loss is linear in its factors."""

SHARE = FIRST_SHARES[0]
"""The factor of a cross's weight in the logit."""

RATE = 0.3
"""Step size of released crosses (Adagrad); they start at 0."""


class ReleasedCrosses(CrossLearner):
    """The crosses of private records. The first columns are released with noise; the others are users' own.

    A user's own crosses are learned exactly, one row after another. A released weight moves by the sum of its
    derivatives with noise. Shares are not learned, because all later rows would see the effect of each row.

    Args:
        released: The number of columns that are released.
        prior: `[T + O]` float32, the prior precision of each weight.
    """

    def __init__(self, table: Table, released: int, prior: F32) -> None:
        super().__init__(table, prior)
        self._released = released

    def measure(self, record: Record) -> tuple[I32, Crossed]:
        """See `CrossLearner`; rows and precision of released crosses are unchanged."""
        rows, at, _ = self._places(record)
        own_at, prior = np.ascontiguousarray(at[:, self._released :]), self._prior[self._released : at.shape[1]]
        none, values, precision = (
            np.zeros_like(prior, np.int32),
            self._table.gather(rows),
            self._table.gather_accum(rows),
        )
        crossed = crosses(own_at, none, prior, record.targets.label, values, precision, share_precision=np.inf)
        logits: F32 = crossed.logits + np.float32(SHARE) * crossed.rows[at[:, : self._released], 0].sum(1)
        return rows, crossed._replace(logits=logits)

    def counts(self, record: Record) -> F32:
        """How many released weights each row has, `[B]` float32."""
        counts: F32 = (self._at(record) != 0).sum(1).astype(np.float32)
        return counts

    def derivatives(self, record: Record, logits: F32) -> tuple[I32, F64]:
        """The released weights, as indices of the record's cross rows, and the derivatives of its losses by them.

        Args:
            record: The record, with the factors of its losses.
            logits: `[B]` float32, of the rows' own pairs, without dropout. Logits with dropout need not be known: a
                derivative by either is at most the factor of its loss, and the bound counts that.
        """
        targets, at = record.targets, self._at(record)
        shifted = logits.astype(np.float64) + targets.label_shift
        error = np.where(targets.label_weight > 0, 1.0 / (1.0 + np.exp(-shifted)) - targets.label, 0.0)
        by_row = np.repeat(SHARE * targets.label_weight * error, at.shape[1])
        derivatives: F64 = np.bincount(at.reshape(-1), by_row, minlength=1).astype(np.float64)
        indices = np.setdiff1d(at, [0]).astype(np.int32)
        return indices, derivatives[indices]

    def _at(self, record: Record) -> I32:
        return self._places(record)[1][:, : self._released]


class PrivateEngine(TensorflowEngine):
    """A `TensorflowEngine` of the default ranker, in which a row's loss reads only its own row and weights.

    Args:
        ranker, optimizer, tables, learning_rate, device: See `TensorflowEngine`.
        crosses: Scores and learns crosses.
    """

    def __init__(
        self,
        ranker: Ranker,
        optimizer: Adam,
        tables: Mapping[str, Table],
        learning_rate: float,
        crosses: ReleasedCrosses,
        device: str,
    ) -> None:
        super().__init__(ranker, optimizer, tables, learning_rate, crosses, device)
        self.crosses = crosses
        self._lengths: dict[tuple[str, ...], Any] = {}

    def measure(self, record: Record, move: bool = True, own: I64 | None = None) -> Measured:
        """See `Engine`.

        Raises:
            ValueError: `move` is set: weights would move before anything is clipped.
        """
        if move:
            raise ValueError(
                "a private record is measured with fast weights that do not move: make trainers by trainer_of"
            )
        return super().measure(record, move, own)

    def lengths(self, record: Record, losses: Sequence[str]) -> F32:
        """An upper bound of the norm of each row's gradient, per loss, over all that an update releases.

        Returns `[B, len(losses)]` float32, not finite where a gradient is not. Several inputs may look up the same category
        row, so the bound sums the norms over these inputs.
        """
        values = {**record.values, "cross": self.crosses.measure(record)[1].logits}
        rows, at = self._rows(record)
        inputs = [input_ for input_ in self._ranker.inputs if input_.table]
        whole_record = {place_of(input_) for input_ in inputs if not input_.shape.startswith("B")}
        listed = {
            input_.name: np.isin(record.ids[input_.ids], self._listed(record)).astype(np.float32)
            for input_ in inputs
            if input_.table == LISTED and place_of(input_) not in whole_record
        }
        by_row = {
            "at": {name: indices for name, indices in at.items() if name not in whole_record},
            "values": {input_.name: values[input_.name] for input_ in self._ranker.inputs if not input_.table},
            "listed": listed,
            "crosses": self.crosses.counts(record),
            "targets": record.targets,
        }
        shared = {
            "rows": {name: tf.constant(indices) for name, indices in rows.items()},
            "whole": {name: tf.constant(at[name]) for name in whole_record},
            "seed": tf.constant(record.seed, tf.int32),
        }
        lengths = []
        for begin in range(0, len(record), ROWS_AT_ONCE):
            part = tf.nest.map_structure(lambda tensor, b=begin: tf.constant(tensor[b : b + ROWS_AT_ONCE]), by_row)
            with tf.device(self._device):
                lengths.append(self._traced_lengths(part, shared, tuple(losses))(part, shared).numpy())
        return np.concatenate(lengths)

    def noised(
        self, measured: Measured, record: Record, normal: Normal, deviation: float, own_rows: bool = True
    ) -> Measured:
        """The private version of an update without moves: noise on all that is shared, and zero for all else.

        With `own_rows`, users' own rows are learned exactly. A user's later rows then depend on the user's row.
        """
        tensors: TensorsFound = measured.found
        by_weight = dict(zip(self._ranker.dense, tensors.dense, strict=True))
        learned = [name for name in by_weight if not name.startswith(FROZEN)]
        ends = np.cumsum([int(np.prod(by_weight[name].shape)) for name in learned])
        parts = dict(zip(learned, np.split(normal("dense", int(ends[-1])) * deviation, ends[:-1]), strict=True))
        dense = {
            name: gradient.numpy() + parts[name].reshape(gradient.shape).astype(np.float32)
            if name in parts
            else np.zeros(gradient.shape, np.float32)
            for name, gradient in by_weight.items()
        }
        gradients = {name: gradient.numpy() for name, gradient in zip(self._embeddings, tensors.sparse, strict=True)}
        sparse = {
            name: gradient if name == USER and own_rows else np.zeros_like(gradient)
            for name, gradient in gradients.items()
        }
        category = gradients[LISTED]
        listed = self._tables[LISTED].find(self._listed(record))
        noise = normal(LISTED, listed.size * category.shape[1]).reshape(listed.size, category.shape[1]) * deviation
        order = {row: index for index, row in enumerate(measured.rows[LISTED].tolist())}
        for row, part in zip(listed.tolist(), noise, strict=True):
            if row:
                sparse[LISTED][order[row]] = category[order[row]] + part.astype(np.float32)
        logits, floor = measured.scores.engagement[: len(record)], float(self._optimizer.epsilon)
        assert measured.crossed is not None, "the default ranker reads crosses"
        indices, slopes = self.crosses.derivatives(record, logits)
        slopes = slopes + normal("cross", indices.size) * deviation
        before = measured.crossed
        crossed = before._replace(rows=before.rows.copy(), precision=before.precision.copy())
        crossed.precision[indices, 0] += np.square(slopes)
        crossed.rows[indices, 0] -= RATE * slopes / (np.sqrt(crossed.precision[indices, 0]) + floor)
        squared = float(np.square(slopes).sum())
        squared += sum(
            float(np.square(gradient, dtype=np.float64).sum()) for gradient in (*dense.values(), sparse[LISTED])
        )
        moved = self._moved({name: dense[name] for name in self._ranker.fast_weights})
        by_dense, by_row = (
            tuple(tf.constant(gradient) for gradient in parts) for parts in (dense.values(), sparse.values())
        )
        released = tensors._replace(dense=by_dense, sparse=by_row, squared_norm=tf.constant(squared), fast=moved)
        return replace(measured, squared_norm=squared, crossed=crossed, found=released)

    def _moved(self, gradients: Mapping[str, F32]) -> tuple[Tensor, ...]:
        """The slots of the fast weights after one move."""
        flat = np.concatenate([gradient.reshape(-1) for gradient in gradients.values()])
        with tf.device(self._device):
            return self._blocks.moved(tf.constant(flat), [tf.constant(slot) for slot in self._optimizer.fast[1:]])

    def _listed(self, record: Record) -> npt.NDArray[np.uint64]:
        popular = record.ids["popular"]
        categories: npt.NDArray[np.uint64] = popular[popular != 0]
        return categories

    def _traced_lengths(self, part: Mapping[str, Any], shared: Mapping[str, Any], losses: tuple[str, ...]) -> Any:
        if losses not in self._lengths:

            def spec(length: int | None) -> Callable[[Tensor], Any]:
                return lambda tensor: tf.TensorSpec([length, *tensor.shape[1:]], tensor.dtype)

            any_length = {
                "rows": tf.nest.map_structure(spec(None), shared["rows"]),
                "whole": {name: tf.TensorSpec(tensor.shape, tensor.dtype) for name, tensor in shared["whole"].items()},
                "seed": tf.TensorSpec([2], tf.int32),
            }
            graph = tf.function(lambda part, shared: self._lengths_graph(part, shared, losses), autograph=False)
            self._lengths[losses] = graph.get_concrete_function(tf.nest.map_structure(spec(None), part), any_length)
        return self._lengths[losses]

    def _lengths_graph(self, part: Mapping[str, Any], shared: Mapping[str, Any], losses: tuple[str, ...]) -> Tensor:
        distinct = {
            name: tf.raw_ops.ResourceGather(resource=self._tables[name].rows.handle, indices=rows, dtype=tf.float32)
            for name, rows in shared["rows"].items()
        }
        inputs = [input_ for input_ in self._ranker.inputs if input_.table]
        rows = {input_.name: self._gather(input_, distinct, part["at"] | shared["whole"]) for input_ in inputs}
        whole_record = {input_.name: rows.pop(input_.name) for input_ in inputs if place_of(input_) in shared["whole"]}
        values = {name: tf.cast(value, tf.float32) for name, value in part["values"].items()}
        weights = [weight for name, weight in self._ranker.dense.items() if not name.startswith(FROZEN)]

        def of_row(row: Mapping[str, Any]) -> Tensor:
            # The batch dimension of a record with one row is added.
            own = {name: value[None] for name, value in row["rows"].items()} | whole_record
            inputs = own | {name: value[None] for name, value in row["values"].items()}
            targets = Targets(*(target[None] for target in row["targets"]))
            watched = {name: own[name] for name in (*row["listed"], *whole_record)}
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(list(watched.values()))
                encoded = self._ranker.encode(inputs, True, shared["seed"])
                loss_sums = [
                    tf.reduce_sum(self._ranker.losses(encoded, inputs, only(targets, name))) for name in losses
                ]

            def length(name: str, loss: Tensor) -> Tensor:
                by_dense, by_rows = tape.gradient(
                    loss, [weights, list(watched.values())], unconnected_gradients=tf.UnconnectedGradients.ZERO
                )
                lengths = [
                    tf.norm(by_row * tf.expand_dims(row["listed"][name], -1) if name in row["listed"] else by_row)
                    for name, by_row in zip(watched, by_rows, strict=True)
                ]
                squared = tf.add_n([tf.reduce_sum(tf.square(tf.convert_to_tensor(gradient))) for gradient in by_dense])
                if name == "engagement":
                    # The derivative by a logit is at most the factor of its loss.
                    squared += row["crosses"] * tf.square(SHARE * row["targets"].label_weight)
                return tf.sqrt(squared + tf.square(tf.add_n(lengths)))

            return tf.stack([length(name, loss) for name, loss in zip(losses, loss_sums, strict=True)])

        by_row = {name: part[name] for name in ("listed", "crosses", "targets")}
        return tf.vectorized_map(of_row, {"rows": rows, "values": values, **by_row})


def only(targets: Targets, loss: str) -> Targets:
    """The targets with only one loss of `LOSSES`; the factors of the others are 0."""
    other_factors = [factor for name, factors in LOSSES.items() if name != loss for factor in factors]
    return targets._replace(**{name: tf.zeros_like(getattr(targets, name)) for name in other_factors})
