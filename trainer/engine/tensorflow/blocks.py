"""Scores and derivatives of a record block by block, so that fast weights move between blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from trainer.engine.optimizers.adam import Adam
from trainer.model import losses
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.ranker import Ranker, Targets

Tensor = Any


class Learning(NamedTuple):
    """What the blocks of a record read.

    Attributes:
        values: Inputs that are values, by name.
        rows: Inputs of embedding rows.
        encoded: With dropout.
        plain: Without.
        targets: What is learned.
        slots: Of the fast weights before the record: fast, slow, second, moves.
    """

    values: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    encoded: Any
    plain: Any
    targets: Targets
    slots: tuple[Tensor, ...]


class Blocks:
    """Learns records block by block.

    Args:
        ranker: Any.
        optimizer: Has the step size of the fast weights, and their epsilon.
    """

    def __init__(self, ranker: Ranker, optimizer: Adam) -> None:
        self._ranker, self._optimizer, self._rate = ranker, optimizer, np.float32(optimizer.fast_rate)
        self._fast = [ranker.dense[name] for name in ranker.fast_weights]
        # In the shape of the flat weights: factors of the step size, the longest prefix says it.
        known = sorted(ranker.fast_learning_rates.items(), key=lambda each: len(each[0]))
        factors = [next((f for p, f in reversed(known) if name.startswith(p)), 1.0) for name in ranker.fast_weights]
        sizes = [int(np.prod(weight.shape)) for weight in self._fast]
        self._sizes, self._factors = sizes, np.repeat(np.array(factors, np.float32), sizes)
        self._by_row = {one.name for one in ranker.inputs if one.shape.startswith("B")}

    def learn(self, of: Learning, move: Tensor) -> tuple[Any, ...]:
        """Scores and derivatives of a record.

        Args:
            of: The record.
            move: bool, whether the fast weights move.

        Returns:
            The scores in the order of `Scores`; the derivatives by each tensor of `of.encoded`, by each of `of.rows`,
            by each dense weight; and the slots of the fast weights after the record, themselves first.
        """
        count, size = tf.shape(of.targets.slot)[0], HYPERPARAMETERS.fast_rows
        if not self._fast:
            scores, by_encoded, by_rows, by_dense = self._block(of, 0, count)
            return _joined(scores), by_encoded, by_rows, by_dense, (tf.zeros([0]), *of.slots)
        blocks, before = (count + size - 1) // size, self._flat(self._fast)
        # Derivatives by rows that the whole record shares add up; all others come one block behind another.
        shared = [name not in self._by_row for name in of.rows]
        rows = [
            tf.zeros_like(each) if whole else _array(each, blocks)
            for each, whole in zip(of.rows.values(), shared, strict=True)
        ]
        kinds = [_array(each, blocks) for each in self._kinds(of)]
        encoded = [_array(each, blocks) for each in distinct_tensors(of.encoded)]
        totals = [tf.zeros(weight.shape) for weight in self._ranker.dense.values()]

        def body(number: Tensor, *state: Any) -> tuple[Any, ...]:
            kinds, encoded, rows, totals, weights, slots = state
            self._assign(weights)
            begin = number * size
            scores, by_encoded, by_rows, by_dense = self._block(of, begin, tf.minimum(begin + size, count))
            kinds = [array.write(number, part) for array, part in zip(kinds, scores, strict=True)]
            encoded = [array.write(number, part) for array, part in zip(encoded, by_encoded, strict=True)]
            rows = [
                held + part if whole else held.write(number, part)
                for held, part, whole in zip(rows, by_rows, shared, strict=True)
            ]
            totals = [total + part for total, part in zip(totals, by_dense, strict=True)]
            named = dict(zip(self._ranker.dense, by_dense, strict=True))
            gradient = self._flat([named[name] for name in self._ranker.fast_weights])
            weights, *slots = tf.cond(move, lambda: self.moved(gradient, slots), lambda: (weights, *slots))
            return number + 1, kinds, encoded, rows, totals, weights, slots

        state = (0, kinds, encoded, rows, totals, before, list(of.slots))
        _, kinds, encoded, rows, totals, weights, slots = tf.while_loop(lambda n, *_: n < blocks, body, state)
        self._assign(before)
        by_rows = [held if whole else held.concat() for held, whole in zip(rows, shared, strict=True)]
        scores = _joined([array.concat() for array in kinds])
        return scores, [array.concat() for array in encoded], by_rows, totals, (weights, *slots)

    def _kinds(self, of: Learning) -> list[Tensor]:
        """Tensors of the types and row shapes of what `_block` says of scores."""
        row = of.targets.weight
        sizes = [self._ranker.sizes[letter] for letter in "LPS"]
        logits = [tf.zeros([0, size]) for size in sizes]
        return [*logits, row, tf.zeros([0], tf.int32), row, row, row, row]

    def _block(self, of: Learning, begin: Tensor, end: Tensor) -> tuple[Any, ...]:
        """Of rows `begin` to `end`: scores and losses, derivatives by what was encoded, by rows, by dense weights."""
        values, rows = (
            {name: part[begin:end] if name in self._by_row else part for name, part in parts.items()}
            for parts in (of.values, of.rows)
        )
        targets, encoded, plain = (_cut(part, begin, end) for part in (of.targets, of.encoded, of.plain))
        flat = distinct_tensors(encoded)
        with tf.GradientTape() as tape:
            tape.watch([flat, list(rows.values())])
            loss = tf.reduce_sum(self._ranker.losses(encoded, values | rows, targets))
        by_encoded, by_rows, by_dense = tape.gradient(
            loss,
            [flat, list(rows.values()), list(self._ranker.dense.values())],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        by_dense = [tf.convert_to_tensor(each) for each in by_dense]
        scores = self._ranker.score(plain, values | rows)
        own, drawn = losses.engagement_losses(scores, targets)
        found = [scores[name] for name in ("recent_logits", "popular_logits", "successor_logits")]
        found += [losses.interest_loss(scores, targets.slot), losses.rank(scores, targets.slot)]
        found += [scores["engagement_logit"], scores["negative_logit"], own, drawn]
        return found, by_encoded, by_rows, by_dense

    def moved(self, gradient: Tensor, slots: list[Tensor]) -> tuple[Tensor, ...]:
        """One move, as `trainer/engine/optimizers/fast_weights.py` says it."""
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
    """Each tensor of a structure once, in their order."""
    return list({id(tensor): tensor for tensor in tf.nest.flatten(structure)}.values())


def _cut(structure: Any, begin: Tensor, end: Tensor) -> Any:
    """The structure of rows `begin` to `end`; a tensor that is in it twice is so afterwards."""
    cut = {id(tensor): tensor[begin:end] for tensor in tf.nest.flatten(structure)}
    return tf.nest.map_structure(lambda tensor: cut[id(tensor)], structure)


def _array(like: Tensor, blocks: Tensor) -> Any:
    """An array of blocks of rows of the type and shape of those of `like`."""
    return tf.TensorArray(like.dtype, blocks, element_shape=[None, *like.shape[1:]], infer_shape=False)


def _joined(scores: list[Tensor]) -> tuple[Tensor, ...]:
    """In the order of `Scores`: the rows' own pairs and then their negatives."""
    *logits, loss, rank, own, drawn, own_loss, drawn_loss = scores
    return *logits, loss, rank, tf.concat([own, drawn], 0), tf.concat([own_loss, drawn_loss], 0)
