"""The crosses of a private update, on the host: context crosses get noise, a user's own are learned exactly.

A cross that contains the user is read only for that user's requests, as the user's
own row is. It reveals nothing to anybody else, so it gets no noise. It is learned
one row after another, as usual (`trainer/engine/optimizers/crosses.py`). The weight
of a context value, or of an attribute of users, moves by the sum of its derivatives
with noise. All other crosses are left out. Shares are not learned, because all
later rows would see the effect of each row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from state.ranking.crosses import FIRST_SHARES
from trainer.engine.engine import F32, I32
from trainer.engine.optimizers.crosses import Crossed, crosses
from trainer.engine.record import Record
from trainer.tables.table import Table

F64 = npt.NDArray[np.float64]
Normal = Callable[[str, int], F64]
"""Returns standard normal numbers of an update, by the name of their purpose and their count."""

SHARE = FIRST_SHARES[0]
"""The factor of a cross's weight in the logit."""

RATE = 0.3
"""Step size of released weights (Adagrad); they start at 0."""

NEVER = np.inf
"""The precision of a value that is not learned."""


class CrossesToTell:
    """The crosses of records. The first columns are released with noise; the others are users' own.

    Args:
        table: The table of crosses.
        told: The number of columns that are released.
        precision: `[T + O]` float32, the prior precision of each weight.
    """

    def __init__(self, table: Table, told: int, precision: F32) -> None:
        self._table, self._told, self._precision = table, told, precision

    def logits(self, record: Record) -> F32:
        """What crosses add to the logits of a record, `[B]` float32, each row before it was learned from."""
        at, own = self._own(record)
        found: F32 = own.logits + np.float32(SHARE) * own.rows[at[:, : self._told], 0].sum(1)
        return found

    def counts(self, record: Record) -> F32:
        """How many released weights each row has, `[B]` float32."""
        found: F32 = (self._own(record)[0][:, : self._told] != 0).sum(1).astype(np.float32)
        return found

    def derivatives(self, record: Record, logits: F32) -> tuple[I32, F64]:
        """The released weights, as indices of the record's cross rows, and the derivatives of its losses by them.

        Args:
            record: The record, with the factors of its losses.
            logits: `[B]` float32, of the rows' own pairs, without dropout. Logits with dropout need not be known: a
                derivative by either is at most the factor of its loss, and the bound counts that.
        """
        targets, at = record.targets, self._own(record)[0][:, : self._told]
        shifted = logits.astype(np.float64) + targets.label_shift
        error = np.where(targets.label_weight > 0, 1.0 / (1.0 + np.exp(-shifted)) - targets.label, 0.0)
        by_row = np.repeat(SHARE * targets.label_weight * error, at.shape[1])
        found: F64 = np.bincount(at.reshape(-1), by_row, minlength=1).astype(np.float64)
        places = np.setdiff1d(at, [0]).astype(np.int32)
        return places, found[places]

    def moved(
        self, record: Record, logits: F32, normal: Normal, deviation: float, floor: float
    ) -> tuple[F32, F32, float]:
        """All crosses of the record after the update.

        Args:
            record: The record, with the factors of its losses.
            logits: See `derivatives`.
            normal: Makes the noise.
            deviation: Standard deviation of the noise.
            floor: Added to the root of the sum of squares.

        Returns:
            Rows and precision, `[w, 2]` float32 each, and the squared norm of the released derivatives.
        """
        places, found = self.derivatives(record, logits)
        found = found + normal("cross", places.size) * deviation
        _, (_, rows, precision) = self._own(record)
        precision[places, 0] += np.square(found)
        rows[places, 0] -= RATE * found / (np.sqrt(precision[places, 0]) + floor)
        return rows, precision, float(np.square(found).sum())

    def _own(self, record: Record) -> tuple[I32, Crossed]:
        """The index of each cross among the record's cross rows, `[B, T + O]`, and what is learned of users' own."""
        ids, shares = record.ids["cross"], record.ids["cross_share"]
        uses = np.concatenate([ids.reshape(-1), shares])
        distinct, at = self._table.distinct(self._table.find(uses))
        at = at[: ids.size].reshape(ids.shape)
        rows, precision = self._table.gather(distinct), self._table.gather_accum(distinct)
        none = np.zeros(max(ids.shape[1] - self._told, 0), np.int32)
        mine, prior = np.ascontiguousarray(at[:, self._told :]), self._precision[self._told : ids.shape[1]]
        return at, crosses(mine, none, prior, record.targets.label, rows, precision, share_precision=NEVER)
