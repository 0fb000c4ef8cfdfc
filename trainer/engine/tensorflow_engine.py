"""The TensorFlow engine: gathers a ranker's inputs, differentiates its losses, and moves weights and rows on the device.

One graph measures a record:

1. Distinct rows of each table are gathered, and the ranker's inputs are taken from them. The logits of crosses are an
   input (`trainer/engine/crosses.py`).
2. `encode` runs once without dropout and once with it.
3. `score` and `losses` run over blocks of rows (`Blocks`). After each block the fast weights move, before the next one
   is scored; without fast weights all rows are one block. Derivatives by the encoded and gathered values are collected.
4. The derivatives go back through `encode` to dense weights and rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.engine.adam import BETA_1, BETA_2, EPSILON, SLOTS, FastSlots, misfit, moving_slots, step_sizes
from trainer.engine.compiled.threads import Threads
from trainer.engine.crosses import CrossLearner
from trainer.engine.engine import CROSS, F32, I32, I64, Gradient, Measured, Scores
from trainer.engine.record import Record
from trainer.model import losses
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.inputs import Input
from trainer.model.model import Targets
from trainer.model.ranker import Ranker
from trainer.tables.table import Table

Tensor = Any


class Learning(NamedTuple):
    """The inputs of the blocks of a record.

    Attributes:
        encoded: With dropout.
        plain: Without.
        slots: Of the fast weights before the record: fast, slow, second, moves.
    """

    values: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    encoded: Any
    plain: Any
    targets: Targets
    slots: tuple[Tensor, ...]


class Blocks:
    """Learns records block by block, with the optimizer's step size of the fast weights and epsilon."""

    def __init__(self, ranker: Ranker, optimizer: Adam) -> None:
        self._ranker, self._optimizer, self._rate = ranker, optimizer, np.float32(optimizer.fast_rate)
        self._fast = [ranker.dense[name] for name in ranker.fast_weights]
        # In the shape of the flat weights: factors of the step size, chosen by the longest matching prefix.
        known = sorted(ranker.fast_learning_rates.items(), key=lambda entry: len(entry[0]))
        factors = [next((f for p, f in reversed(known) if name.startswith(p)), 1.0) for name in ranker.fast_weights]
        sizes = [int(np.prod(weight.shape)) for weight in self._fast]
        self._sizes, self._factors = sizes, np.repeat(np.array(factors, np.float32), sizes)
        self._by_row = {input_.name for input_ in ranker.inputs if input_.shape.startswith("B")}

    def learn(self, learning: Learning, move: Tensor) -> tuple[Any, ...]:
        """Computes scores and derivatives of a record; the fast weights move within it if `move` is true.

        Returns:
            1. The scores in the order of `Scores`.
            2. The derivatives by each tensor of `learning.encoded`, by each of `learning.rows`, and by each dense weight.
            3. The slots of the fast weights after the record; the first slot is the weights.
        """
        count, size = tf.shape(learning.targets.slot)[0], HYPERPARAMETERS.fast_rows
        if not self._fast:
            scores, by_encoded, by_rows, by_dense = self._block(learning, 0, count)
            return _joined(scores), by_encoded, by_rows, by_dense, (tf.zeros([0]), *learning.slots)
        blocks, before = (count + size - 1) // size, self._flat(self._fast)
        # Derivatives by rows that the whole record shares are summed; all others are concatenated by block.
        shared = [name not in self._by_row for name in learning.rows]
        rows = [
            tf.zeros_like(rows_of_input) if is_shared else _array(rows_of_input, blocks)
            for rows_of_input, is_shared in zip(learning.rows.values(), shared, strict=True)
        ]
        kinds = [_array(kind, blocks) for kind in self._kinds(learning)]
        encoded = [_array(tensor, blocks) for tensor in distinct_tensors(learning.encoded)]
        totals = [tf.zeros(weight.shape) for weight in self._ranker.dense.values()]

        def body(number: Tensor, *state: Any) -> tuple[Any, ...]:
            kinds, encoded, rows, totals, weights, slots = state
            self._assign(weights)
            begin = number * size
            scores, by_encoded, by_rows, by_dense = self._block(learning, begin, tf.minimum(begin + size, count))
            kinds = [array.write(number, part) for array, part in zip(kinds, scores, strict=True)]
            encoded = [array.write(number, part) for array, part in zip(encoded, by_encoded, strict=True)]
            rows = [
                array + part if is_shared else array.write(number, part)
                for array, part, is_shared in zip(rows, by_rows, shared, strict=True)
            ]
            totals = [total + part for total, part in zip(totals, by_dense, strict=True)]
            named = dict(zip(self._ranker.dense, by_dense, strict=True))
            gradient = self._flat([named[name] for name in self._ranker.fast_weights])
            weights, *slots = tf.cond(move, lambda: self.moved(gradient, slots), lambda: (weights, *slots))
            return number + 1, kinds, encoded, rows, totals, weights, slots

        state = (0, kinds, encoded, rows, totals, before, list(learning.slots))
        _, kinds, encoded, rows, totals, weights, slots = tf.while_loop(lambda n, *_: n < blocks, body, state)
        self._assign(before)
        by_rows = [array if is_shared else array.concat() for array, is_shared in zip(rows, shared, strict=True)]
        scores = _joined([array.concat() for array in kinds])
        return scores, [array.concat() for array in encoded], by_rows, totals, (weights, *slots)

    def _kinds(self, learning: Learning) -> list[Tensor]:
        """Tensors with the types and row shapes of the scores of `_block`."""
        row = learning.targets.weight
        sizes = [self._ranker.sizes[letter] for letter in "LPS"]
        logits = [tf.zeros([0, size]) for size in sizes]
        return [*logits, row, tf.zeros([0], tf.int32), row, row, row, row]

    def _block(self, learning: Learning, begin: Tensor, end: Tensor) -> tuple[Any, ...]:
        """Scores and losses of rows `begin` to `end`, and derivatives by encoded values, rows and dense weights."""
        values, rows = (
            {name: part[begin:end] if name in self._by_row else part for name, part in parts.items()}
            for parts in (learning.values, learning.rows)
        )
        targets, encoded, plain = (
            _cut(part, begin, end) for part in (learning.targets, learning.encoded, learning.plain)
        )
        flat = distinct_tensors(encoded)
        with tf.GradientTape() as tape:
            tape.watch([flat, list(rows.values())])
            loss = tf.reduce_sum(self._ranker.losses(encoded, values | rows, targets))
        by_encoded, by_rows, by_dense = tape.gradient(
            loss,
            [flat, list(rows.values()), list(self._ranker.dense.values())],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        by_dense = [tf.convert_to_tensor(gradient) for gradient in by_dense]
        scores = self._ranker.score(plain, values | rows)
        own, drawn = losses.engagement_losses(scores, targets)
        tensors = [scores[name] for name in ("recent_logits", "popular_logits", "successor_logits")]
        tensors += [losses.interest_loss(scores, targets.slot), losses.rank(scores, targets.slot)]
        tensors += [scores["engagement_logit"], scores["negative_logit"], own, drawn]
        return tensors, by_encoded, by_rows, by_dense

    def moved(self, gradient: Tensor, slots: list[Tensor]) -> tuple[Tensor, ...]:
        """One update of the fast weights, as `move` in `trainer/engine/adam.py`."""
        numbers, (fast, slow, second, moves) = HYPERPARAMETERS, slots
        count, power = moves[0] + 1.0, moves[1] * numbers.beta_2
        share = tf.maximum(1.0 / numbers.average_moves, numbers.first_moves / (count + numbers.first_moves))
        second += (gradient * gradient - second) * (1.0 - numbers.beta_2)
        step = self._rate * tf.sqrt(1.0 - power) * self._factors
        fast -= step * gradient / (tf.sqrt(second) + self._optimizer.epsilon)
        slow += share * (fast - slow)
        return fast + numbers.average_share * (slow - fast), fast, slow, second, tf.stack([count, power])

    def _flat(self, parts: list[Tensor]) -> Tensor:
        return tf.concat([tf.reshape(part, [-1]) for part in parts], 0)

    def _assign(self, flat: Tensor) -> None:
        for weight, part in zip(self._fast, tf.split(flat, self._sizes), strict=True):
            weight.assign(tf.reshape(part, weight.shape))


def distinct_tensors(structure: Any) -> list[Tensor]:
    """Each tensor of a structure once, in the order of the structure."""
    return list({id(tensor): tensor for tensor in tf.nest.flatten(structure)}.values())


def _cut(structure: Any, begin: Tensor, end: Tensor) -> Any:
    """The structure of rows `begin` to `end`; a tensor that occurs twice still does so."""
    cut = {id(tensor): tensor[begin:end] for tensor in tf.nest.flatten(structure)}
    return tf.nest.map_structure(lambda tensor: cut[id(tensor)], structure)


def _array(like: Tensor, blocks: Tensor) -> Any:
    """An array of blocks of rows of the type and shape of those of `like`."""
    return tf.TensorArray(like.dtype, blocks, element_shape=[None, *like.shape[1:]], infer_shape=False)


def _joined(scores: list[Tensor]) -> tuple[Tensor, ...]:
    """In the order of `Scores`: the rows' own pairs and then their negatives."""
    *logits, loss, rank, own, drawn, own_loss, drawn_loss = scores
    return *logits, loss, rank, tf.concat([own, drawn], 0), tf.concat([own_loss, drawn_loss], 0)


class TensorsFound(NamedTuple):
    """The outputs of the first graph; tensors stay on the device.

    Attributes:
        scores: Without dropout, in the order of `Scores`.
        dense: Derivatives by the dense weights, in their order.
        sparse: By the distinct rows of each embedding table, in the order of the tables.
        fast: The slots of the fast weights after it.
    """

    scores: tuple[Tensor, ...]
    dense: tuple[Tensor, ...]
    sparse: tuple[Tensor, ...]
    squared_norm: Tensor
    fast: tuple[Tensor, ...]


class TensorflowEngine:
    """See `trainer/engine/engine.py`."""

    name, threads = "tensorflow", Threads(1)

    def __init__(
        self,
        ranker: Ranker,
        optimizer: Adam,
        tables: Mapping[str, Table],
        learning_rate: float,
        crosses: CrossLearner,
        device: str,
    ) -> None:
        self._ranker, self._optimizer, self._tables, self._device = ranker, optimizer, tables, device
        self._learning_rate, self._crosses = learning_rate, crosses
        self._embeddings = tuple(name for name in tables if name in ranker.tables)
        self._crossed = any(input_.name == "cross" for input_ in ranker.inputs)
        self._blocks = Blocks(ranker, optimizer)
        self._measure = tf.function(self._measure_graph, autograph=False)
        rows = {name: tf.TensorSpec([None], tf.int32) for name in tables}
        dense = tuple(tf.TensorSpec(weight.shape, tf.float32) for weight in ranker.dense.values())
        sparse = tuple(tf.TensorSpec([None, tables[name].dim], tf.float32) for name in self._embeddings)
        fast = tf.TensorSpec([None], tf.float32)
        self._apply = tf.function(self._apply_graph, [rows, dense, sparse, fast], autograph=False)
        self._trace: Any = None
        self._predict = tf.function(ranker.predict, autograph=False)

    def measure(self, record: Record, move: bool = True, own: I64 | None = None) -> Measured:
        """See `Engine`."""
        crossed, crosses = None, np.zeros(1, np.int32)
        if self._crossed:
            crosses, crossed = self._crosses.measure(record)
        if own is not None:
            record = record.take(own)
        rows, at = self._rows(record)
        values = record.values
        if crossed is not None:
            values = {**values, "cross": crossed.logits if own is None else crossed.logits[own]}
        inputs = {
            "rows": {name: tf.constant(indices) for name, indices in rows.items()},
            "at": {name: tf.constant(indices) for name, indices in at.items()},
            "values": {
                input_.name: tf.constant(values[input_.name]) for input_ in self._ranker.inputs if not input_.table
            },
            "targets": Targets(*(tf.constant(part) for part in record.targets)),
            "seed": tf.constant(record.seed, tf.int32),
            "fast": tuple(tf.constant(slot) for slot in self._optimizer.fast[1:]),
        }
        with tf.device(self._device):
            tensors: TensorsFound = self._traced(inputs)(inputs, tf.constant(move))
        scores = Scores(*(tensor.numpy() for tensor in tensors.scores))
        return Measured(scores, float(tensors.squared_norm.numpy()), rows | {CROSS: crosses}, crossed, tensors)

    def apply(self, measured: Measured) -> None:
        """See `Engine`."""
        tensors: TensorsFound = measured.found
        with tf.device(self._device):
            at = {name: tf.constant(measured.rows[name]) for name in self._tables}
            self._apply(at, tensors.dense, tensors.sparse, tensors.fast[0])
        if measured.crossed is not None:
            self._crosses.apply(measured.rows[CROSS], measured.crossed)
        self._optimizer.fast = FastSlots(*(np.array(slot.numpy()) for slot in tensors.fast))

    def rows(self, record: Record) -> dict[str, I32]:
        """See `Engine`."""
        return self._rows(record)[0]

    def gradient(self, measured: Measured) -> Gradient:
        """See `Engine`."""
        tensors: TensorsFound = measured.found
        dense = {name: np.asarray(gradient) for name, gradient in zip(self._ranker.dense, tensors.dense, strict=True)}
        sparse = {name: np.asarray(gradient) for name, gradient in zip(self._embeddings, tensors.sparse, strict=True)}
        return Gradient(dense, sparse, FastSlots(*(np.asarray(slot) for slot in tensors.fast)))

    def with_gradient(self, measured: Measured, gradient: Gradient) -> Measured:
        """See `Engine`."""
        with tf.device(self._device):
            tensors = TensorsFound(
                scores=(),
                dense=tuple(tf.constant(gradient.dense[name]) for name in self._ranker.dense),
                sparse=tuple(tf.constant(gradient.sparse[name]) for name in self._embeddings),
                squared_norm=None,
                fast=tuple(tf.constant(slot) for slot in gradient.fast),
            )
        return replace(measured, found=tensors)

    def predict(self, inputs: Mapping[str, F32]) -> dict[str, F32]:
        """See `Engine`."""
        # On the CPU, because serving runs there and an accelerator may round differently.
        with tf.device("/CPU:0"):
            outputs = self._predict({name: tf.constant(value) for name, value in inputs.items()})
        return {name: np.array(value.numpy()) for name, value in outputs.items()}

    def _traced(self, inputs: Mapping[str, Any]) -> Any:
        if self._trace is None:
            fixed = {
                place_of(input_) if input_.table else input_.name
                for input_ in self._ranker.inputs
                if not input_.shape.startswith("B")
            }

            def spec(tensor: Tensor, length: int | None = None) -> Any:
                return tf.TensorSpec([length, *tensor.shape[1:]], tensor.dtype)

            named = {
                part: {
                    name: spec(tensor, tensor.shape[0] if name in fixed and part != "rows" else None)
                    for name, tensor in inputs[part].items()
                }
                for part in ("rows", "at", "values")
            }
            fixed_specs = {
                "seed": spec(inputs["seed"], 2),
                "fast": tuple(spec(slot, slot.shape[0]) for slot in inputs["fast"]),
            }
            specs = named | fixed_specs | {"targets": Targets(*(spec(part) for part in inputs["targets"]))}
            self._trace = self._measure.get_concrete_function(specs, tf.TensorSpec([], tf.bool))
        return self._trace

    def _rows(self, record: Record) -> tuple[dict[str, I32], dict[str, I32]]:
        """Distinct rows of each table, the missing one first, and where in them each use of an id is, by `<table>.<ids>`."""
        uses: dict[str, dict[str, Any]] = {name: {} for name in self._tables}
        for input_ in self._ranker.inputs:
            if input_.table:
                uses[input_.table][input_.ids] = record.ids[input_.ids]
            if input_.attributes and record.ids[input_.attributes].size:
                uses["context"][input_.attributes] = record.ids[input_.attributes]
        rows: dict[str, I32] = {}
        at: dict[str, I32] = {}
        for name, parts in uses.items():
            ids = np.concatenate([np.zeros(0, np.uint64), *(part.reshape(-1) for part in parts.values())])
            rows[name], indices = self._tables[name].distinct(self._tables[name].find(ids))
            ends = np.cumsum([part.size for part in parts.values()])
            by_ids = zip(parts, np.split(indices, ends[:-1]), strict=True) if parts else ()
            at |= {f"{name}.{ids}": indices.reshape(parts[ids].shape) for ids, indices in by_ids}
        return rows, at

    def _gather(self, input_: Input, distinct: Mapping[str, Tensor], at: Mapping[str, Tensor]) -> Tensor:
        indices = at[place_of(input_)]
        rows = tf.gather(distinct[input_.table], indices)
        if input_.mean:
            # Without any ids the mean is the missing row.
            rows = tf.reduce_mean(rows, -2) if indices.shape[-1] else tf.reduce_sum(rows, -2)
        if (attributes := f"context.{input_.attributes}") in at:
            rows += tf.reduce_mean(tf.gather(distinct["context"], at[attributes]), -2)
        return rows

    def _measure_graph(self, inputs: Mapping[str, Any], move: Tensor) -> TensorsFound:
        # 1.
        distinct = {
            name: tf.raw_ops.ResourceGather(resource=table.rows.handle, indices=inputs["rows"][name], dtype=tf.float32)
            for name, table in self._tables.items()
        }
        targets: Targets = inputs["targets"]
        values = {name: tf.cast(value, tf.float32) for name, value in inputs["values"].items()}
        # 2.
        embeddings = [distinct[name] for name in self._embeddings]
        with tf.GradientTape() as tape:
            tape.watch(embeddings)
            rows = {
                input_.name: self._gather(input_, distinct, inputs["at"])
                for input_ in self._ranker.inputs
                if input_.table
            }
            encoded = self._ranker.encode(values | rows, True, inputs["seed"])
        plain = self._ranker.encode(values | rows, False, inputs["seed"])
        # 3.
        learning = Learning(values, rows, encoded, plain, targets, inputs["fast"])
        scores, by_encoded, by_rows, by_dense, fast = self._blocks.learn(learning, move)
        # 4.
        weights = list(self._ranker.dense.values())
        through, sparse = tape.gradient(
            [*distinct_tensors(encoded), *rows.values()],
            [weights, embeddings],
            output_gradients=[*by_encoded, *by_rows],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        dense = tuple(tf.convert_to_tensor(gradient) + other for gradient, other in zip(through, by_dense, strict=True))
        sparse = tuple(tf.convert_to_tensor(gradient) for gradient in sparse)
        parts = [*dense, *(gradient[1:] for gradient in sparse)]
        squared = 2.0 * tf.add_n([tf.nn.l2_loss(part) for part in parts])
        return TensorsFound(scores, dense, sparse, squared, fast)

    def _apply_graph(
        self, at: Mapping[str, Tensor], dense: tuple[Tensor, ...], sparse: tuple[Tensor, ...], fast: Tensor
    ) -> None:
        self._optimizer.apply(dense, fast)
        for name, gradient in zip(self._embeddings, sparse, strict=True):
            # The missing row is never trained.
            table, rows, gradient = self._tables[name], at[name][1:], gradient[1:]
            gather = {part: getattr(table, part).handle for part in ("rows", "accum")}
            present = {
                part: tf.raw_ops.ResourceGather(resource=handle, indices=rows, dtype=tf.float32)
                for part, handle in gather.items()
            }
            accum = present["accum"] + gradient * gradient
            moved = present["rows"] - self._learning_rate * gradient / (tf.sqrt(accum) + HYPERPARAMETERS.epsilon)
            tf.raw_ops.ResourceScatterUpdate(resource=gather["rows"], indices=rows, updates=moved)
            tf.raw_ops.ResourceScatterUpdate(resource=gather["accum"], indices=rows, updates=accum)


def place_of(input_: Input) -> str:
    """The name of the positions of an input's rows; several tables may be read by the same ids."""
    return f"{input_.table}.{input_.ids}"


class Adam:
    """`HostAdam` over named dense weights in TensorFlow variables; `apply` assigns the fast weights.

    Attributes:
        fast, fast_rate: See `HostAdam`.
        epsilon: Added to the root of the mean squared derivative. Read at the first step.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        learning_rate: float,
        rates: Mapping[str, float] | None = None,
        fast_weights: Sequence[str] = (),
        fast_rate: float = 0.0,
    ) -> None:
        self._weights = dict(weights)
        self.fast = FastSlots.of(
            np.concatenate([weights[name].numpy().reshape(-1) for name in fast_weights] or [np.zeros(0, np.float32)])
        )
        self.fast_rate, self._fast = learning_rate * fast_rate, {name: weights[name] for name in fast_weights}
        self._rates = step_sizes(weights, learning_rate, rates)
        slow_weights = {name: weight for name, weight in weights.items() if name not in fast_weights}
        self._first = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in slow_weights.items()}
        self._second = {name: tf.Variable(tf.zeros_like(w), trainable=False) for name, w in slow_weights.items()}
        self._powers = tf.Variable(np.array([BETA_1, BETA_2]), trainable=False)
        self.epsilon = EPSILON

    def apply(self, gradients: Sequence[Any], moved: Any) -> None:
        """One step, inside a tf.function. Gradients of fast weights are not read; `moved` are the new ones, `[m]`."""
        sizes = np.array([int(np.prod(weight.shape)) for weight in self._fast.values()], np.int32)
        parts = tf.split(moved, sizes) if sizes.size else ()
        for weight, part in zip(self._fast.values(), parts, strict=True):
            weight.assign(tf.reshape(part, weight.shape))
        powers = self._powers.read_value()
        for (name, weight), gradient in zip(self._weights.items(), gradients, strict=True):
            if name in self._fast:
                continue
            tf.raw_ops.ResourceApplyAdam(
                var=weight.handle,
                m=self._first[name].handle,
                v=self._second[name].handle,
                beta1_power=powers[0],
                beta2_power=powers[1],
                lr=self._rates[name],
                beta1=BETA_1,
                beta2=BETA_2,
                epsilon=self.epsilon,
                grad=gradient,
                use_locking=True,
            )
        self._powers.assign(powers * np.array([BETA_1, BETA_2]))

    def slots(self) -> dict[str, F32]:
        """See `HostAdam`."""
        slots = {f"{name}.m": slot for name, slot in self._first.items()}
        slots |= {f"{name}.v": slot for name, slot in self._second.items()}
        state = {name: np.array(slot.numpy()) for name, slot in (slots | {"powers": self._powers}).items()}
        return state | {f"moving.{name}": getattr(self.fast, name) for name in SLOTS}

    def set_slots(self, slots: Mapping[str, F32]) -> None:
        """See `HostAdam`."""
        try:
            self.fast = moving_slots(slots, self.fast)
            for name in self._first:
                self._first[name].assign(slots[f"{name}.m"])
                self._second[name].assign(slots[f"{name}.v"])
            self._powers.assign(slots["powers"])
        except (KeyError, ValueError) as error:
            raise misfit(error) from error
