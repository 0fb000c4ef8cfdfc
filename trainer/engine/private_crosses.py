"""The crosses of a private update, on the host: those of context are told with noise, and a user's own are learned exactly.

A cross with the user in it is read in the answers of that user alone, as the
user's own row is: it tells nobody else anything, and gets no noise. It is learned
row after row, as everywhere (`trainer/engine/optimizers/crosses.py`). A weight of a
value of the context, or of an attribute of users, moves by the sum of its
derivatives with noise. All other crosses are left out, and no share is learned:
each row that taught one would be seen by all rows after it.
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
"""Standard normal numbers of an update, by the name of what they are for."""

SHARE = FIRST_SHARES[0]
"""How much of a weight is in the logit."""

RATE = 0.3
"""Step size of weights that are told (Adagrad); they begin at 0."""

NEVER = np.inf
"""The precision of what is not learned."""


class CrossesToTell:
    """The crosses of records, of which the first columns are told and the others are users' own.

    Args:
        table: Of crosses.
        told: The number of columns that are told.
        precision: `[T + O]` float32, of each weight before anything was learned.
    """

    def __init__(self, table: Table, told: int, precision: F32) -> None:
        self._table, self._told, self._precision = table, told, precision

    def logits(self, record: Record) -> F32:
        """What crosses add to the logits of a record, `[B]` float32; each row's before it was learned from."""
        at, own = self._own(record)
        found: F32 = own.logits + np.float32(SHARE) * own.rows[at[:, : self._told], 0].sum(1)
        return found

    def counts(self, record: Record) -> F32:
        """How many weights that are told each row has, `[B]` float32."""
        found: F32 = (self._own(record)[0][:, : self._told] != 0).sum(1).astype(np.float32)
        return found

    def derivatives(self, record: Record, logits: F32) -> tuple[I32, F64]:
        """The weights that are told, as places among the record's rows of crosses, and the derivatives of its losses by them.

        Args:
            record: Whose factors of losses count.
            logits: `[B]` float32, of the rows' own pairs. Without dropout they stand for those with it: no derivative by
                either is longer than the factor of its loss, which is what the bound counts.
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
        """Rows and precision of all crosses of the record after it, `[w, 2]` float32 each, and the squared length of what was told.

        Args:
            record: Whose factors of losses count.
            logits: See `derivatives`.
            normal: Makes the noise.
            deviation: Its standard deviation.
            floor: What is added to the root of the sum of squares.
        """
        places, found = self.derivatives(record, logits)
        found = found + normal("cross", places.size) * deviation
        _, (_, rows, precision) = self._own(record)
        precision[places, 0] += np.square(found)
        rows[places, 0] -= RATE * found / (np.sqrt(precision[places, 0]) + floor)
        return rows, precision, float(np.square(found).sum())

    def _own(self, record: Record) -> tuple[I32, Crossed]:
        """Where each cross is among the record's rows of crosses, `[B, T + O]`, and what is learned of users' own."""
        ids, shares = record.ids["cross"], record.ids["cross_share"]
        uses = np.concatenate([ids.reshape(-1), shares])
        distinct, at = self._table.distinct(self._table.find(uses))
        at = at[: ids.size].reshape(ids.shape)
        rows, precision = self._table.gather(distinct), self._table.gather_accum(distinct)
        none = np.zeros(max(ids.shape[1] - self._told, 0), np.int32)
        mine, prior = np.ascontiguousarray(at[:, self._told :]), self._precision[self._told : ids.shape[1]]
        return at, crosses(mine, none, prior, record.targets.label, rows, precision, share_precision=NEVER)
