"""Embedding tables: one learned row per id, with an Adagrad accumulator."""

from __future__ import annotations

from typing import Any

import numpy as np

from trainer.tables.id_table import IdTable
from trainer.tables.index import F32, I32, U64, hashed_uniform

INITIAL_ACCUMULATOR = 1e-6
"""A new row of an embedding is uniform in plus and minus this."""


class Table(IdTable):
    """The rows of one kind of id, in host arrays.

    Args:
        initial_accumulator: Initial value of each Adagrad accumulator.
        initial_range: A new row is uniform in plus and minus this, by a hash of its id and the table's name.

    Attributes:
        rows: `[capacity, dim]` float32; row 0, the missing one, is zero.
        accum: `[capacity, dim]` float32, the sums of squared gradients.
    """

    rows: Any
    accum: Any

    def __init__(
        self,
        name: str,
        dim: int,
        capacity: int,
        initial_accumulator: float,
        admit_after: int,
        initial_range: float,
        max_rows: int,
    ) -> None:
        super().__init__(name, dim, capacity, admit_after, max_rows)
        self._initial_accumulator = np.float32(initial_accumulator)
        self._initial_range = np.float32(initial_range)
        self._allocate()

    def gather(self, rows: I32) -> F32:
        """A copy of the rows with these indices (`[k]` int32), `[k, dim]` float32."""
        return self._read(self.rows, rows)

    def gather_accum(self, rows: I32) -> F32:
        """A copy of the accumulators of the rows with these indices (`[k]` int32), `[k, dim]` float32."""
        return self._read(self.accum, rows)

    def put(self, rows: I32, values: F32, accum: F32) -> None:
        """Sets rows (`[n]` int32) and their accumulators; `touch` marks them as changed."""
        self.rows[rows], self.accum[rows] = values, accum

    def _allocate(self) -> None:
        self.rows = np.zeros((self.capacity, self.dim), np.float32)
        self.accum = np.full((self.capacity, self.dim), self._initial_accumulator, np.float32)

    def _read(self, array: Any, rows: I32) -> F32:
        return np.take(array, rows, 0)

    def _held(self, rows: I32) -> tuple[F32, F32]:
        return self.gather(rows), self.gather_accum(rows)

    def _served(self, rows: I32) -> F32:
        return self.gather(rows)

    def _begin(self, ids: U64, rows: I32) -> None:
        first = hashed_uniform(ids, self.dim, self.name) * self._initial_range
        self.put(rows, first, np.full((ids.size, self.dim), self._initial_accumulator, np.float32))

    def _use(self) -> F32:
        # The sum of a row's squared gradients: evicting a row that has learned nothing loses nothing.
        learned: F32 = self.accum.mean(1)
        return learned

    def _resize(self, capacity: int, former: I32 | None = None) -> None:
        def resized(array: F32) -> F32:
            values = array if former is None else array[former]
            return np.concatenate([values, np.zeros((capacity - len(values), self.dim), np.float32)])

        self.rows, self.accum = resized(self.rows), resized(self.accum)
