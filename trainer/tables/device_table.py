"""Embedding tables with their rows on a TensorFlow device."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from trainer.tables.index import F32, I32
from trainer.tables.table import Table

_SCATTER_ROWS = 1 << 18


class DeviceTable(Table):
    """A `Table` with `rows` and `accum` in TensorFlow variables on `device`; the other arguments are those of `Table`."""

    def __init__(self, device: str, *arguments: Any) -> None:
        self.device = device
        super().__init__(*arguments)

    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """See `Table`."""
        with tf.device(self.device):
            for start in range(0, rows.size, _SCATTER_ROWS):
                part = slice(start, start + _SCATTER_ROWS)
                for variable, updates in ((self.rows, values), (self.accum, accum)):
                    tf.raw_ops.ResourceScatterUpdate(
                        resource=variable.handle, indices=rows[part], updates=updates[part]
                    )

    def _allocate(self) -> None:
        with tf.device(self.device):
            # With an unknown first dimension the variables can grow without a new trace of the step.
            shape = tf.TensorShape([None, self.dim])
            first = tf.zeros([self.capacity, self.dim])
            self.rows = tf.Variable(first, shape=shape, trainable=False, name=f"{self.name}.rows")
            first = tf.fill([self.capacity, self.dim], self._initial_accumulator)
            self.accum = tf.Variable(first, shape=shape, trainable=False, name=f"{self.name}.accum")

    def _read(self, array: Any, rows: I32) -> F32:
        with tf.device(self.device):
            values: F32 = tf.raw_ops.ResourceGather(resource=array.handle, indices=rows, dtype=tf.float32).numpy()
        return values

    def _use(self) -> F32:
        with tf.device(self.device):
            learned: F32 = tf.reduce_mean(self.accum, 1).numpy()
        return learned

    def _resize(self, capacity: int, former: I32 | None = None) -> None:
        with tf.device(self.device):
            for variable in (self.rows, self.accum):
                values = variable.read_value() if former is None else tf.gather(variable, former)
                variable.assign(tf.concat([values, tf.zeros([capacity - len(values), self.dim])], 0))
