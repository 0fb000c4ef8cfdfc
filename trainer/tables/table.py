"""Embedding tables: one row per id, learned, with an Adagrad accumulator.

Rows and accumulators are TensorFlow variables on the trainer's device; which id
has which row is `id_table.py`. A row starts from a hash of its id and the
table's name.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from trainer.tables.id_table import NO_CAP, IdTable
from trainer.tables.index import F32, I32, U64, hashed_uniform
from trainer.tables.rows_used import gathered

INITIAL_RANGE = 0.05
"""A new row of an embedding is uniform in plus and minus this."""

_SCATTER_ROWS = 1 << 18


class Table(IdTable):
    """The rows of one kind of id.

    Args:
        name: Part of the hash a new row starts from.
        dim: Width of a row.
        capacity: Rows the variables hold at first; they double when full, and shrink when few are left.
        initial_accumulator: Where each Adagrad accumulator starts.
        admit_after: Sightings an id needs before it gets a row.
        device: TensorFlow device of the variables.
        initial_range: A new row is uniform in plus and minus this.
        max_rows: Ids that have a row at most.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        capacity: int = 65536,
        initial_accumulator: float = 1e-6,
        admit_after: int = 1,
        device: str = "/CPU:0",
        initial_range: float = INITIAL_RANGE,
        max_rows: int = NO_CAP,
    ) -> None:
        super().__init__(name, dim, capacity, admit_after, max_rows)
        self.device = device
        self._initial_accumulator = initial_accumulator
        self._initial_range = np.float32(initial_range)
        with tf.device(device):
            # The unknown first dimension lets the variables grow without a new trace of the step.
            shape = tf.TensorShape([None, dim])
            first = tf.zeros([self.capacity, dim])
            self.rows = tf.Variable(first, shape=shape, trainable=False, name=f"{name}.rows")
            first = tf.fill([self.capacity, dim], np.float32(initial_accumulator))
            self.accum = tf.Variable(first, shape=shape, trainable=False, name=f"{name}.accum")

    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """Sets rows (`[n]` int32) and their accumulators; `touch` lists them as changed."""
        with tf.device(self.device):
            for start in range(0, rows.size, _SCATTER_ROWS):
                part = slice(start, start + _SCATTER_ROWS)
                for variable, updates in ((self.rows, values), (self.accum, accum)):
                    tf.raw_ops.ResourceScatterUpdate(
                        resource=variable.handle, indices=rows[part], updates=updates[part]
                    )

    def _held(self, rows: I32) -> tuple[F32, F32]:
        return gathered(self.rows, rows), gathered(self.accum, rows)

    def _served(self, rows: I32) -> F32:
        return gathered(self.rows, rows)

    def _begin(self, ids: U64, rows: I32) -> None:
        first = hashed_uniform(ids, self.dim, self.name) * self._initial_range
        self.put(rows, first, np.full((ids.size, self.dim), self._initial_accumulator, np.float32))

    def _use(self) -> F32:
        # What its squared gradients add up to: what learned nothing loses nothing.
        with tf.device(self.device):
            learned: F32 = tf.reduce_mean(self.accum, 1).numpy()
        return learned

    def _resize(self, capacity: int, former: I32 | None = None) -> None:
        with tf.device(self.device):
            for variable in (self.rows, self.accum):
                kept = variable.read_value() if former is None else tf.gather(variable, former)
                variable.assign(tf.concat([kept, tf.zeros([capacity - len(kept), self.dim])], 0))
