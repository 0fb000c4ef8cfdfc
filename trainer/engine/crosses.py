"""The Kalman filter of crosses, for every engine: scores a record's rows, and learns from each row in turn.

`state/ranking/crosses.py` defines a cross and its two numbers. A row is scored first. If its label is known, three
independent normal variables are updated before the next row is scored:

1. Marginal logits: each cross alone, against the labels of all rows.
2. Weights: all crosses of the row share the error of their sum.
3. Shares: how much the weight and the marginal logit of a cross count in the logit.

The second and third are steps of an extended Kalman filter with a diagonal covariance, without a learning rate.

The network learns as if its part of the logit counted in full. Once the engine has scored the record, the share of that
part is learned in the same way as the other shares, and the scores are those with the share (`share_network`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import compiled_sums, part_of_sums, read_only
from state.ranking.crosses import FIRST_SHARES
from trainer.engine.record import Record
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.tables.table import Table

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U64 = npt.NDArray[np.uint64]

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Crossed(NamedTuple):
    """The scores of a record's crosses, and what they learn from it.

    Attributes:
        logits: `[B]` float32, each before its row was learned from; 0 in rows without crosses.
        rows: `[w, 2]` float32, the crosses after the record.
        precision: `[w, 2]` float32, their precision after the record.
        network: The index in `rows` of the network's share; 0 if there is none to learn.
    """

    logits: F32
    rows: F32
    precision: F32
    network: int = 0


@part_of_sums
def _sigmoid(logit: np.float32) -> np.float32:
    return _ONE / (_ONE + np.float32(math.exp(-logit)))


@part_of_sums
def _learn_marginals(
    b: int, at: I32, label: np.float32, first: np.float32, marginal: F32, rows: F32, precision: F32
) -> None:
    """1. The first cross, which every row has, learns the logit of all labels; the others learn what they add to it."""
    for c in range(at.shape[1]):
        row = at[b, c]
        if row != 0:
            likely = _sigmoid(marginal[0] + marginal[c] if c > 0 else marginal[0])
            precision[row, 1] += likely * (_ONE - likely)
            rows[row, 1] += (label - likely) / (first + precision[row, 1])


@part_of_sums
def _learn_weights(b: int, at: I32, label: np.float32, variance: F32, weight: F32, rows: F32, precision: F32) -> None:
    """2. `variance` and `weight` are those of the row's crosses, 0 where there is none."""
    logit, variances = _ZERO, _ZERO
    for c in range(at.shape[1]):
        logit += weight[c]
        variances += variance[c]
    likely = _sigmoid(logit)
    information = likely * (_ONE - likely)
    error = (label - likely) / (_ONE + information * variances)
    for c in range(at.shape[1]):
        row = at[b, c]
        if row != 0:
            rows[row, 0] += variance[c] * error
            precision[row, 0] += information / (_ONE + information * (variances - variance[c]))


@part_of_sums
def _learn_shares(
    logit: np.float32, label: np.float32, numbers: F32, first: np.float32, shares: F32, known: F32
) -> None:
    """3. `numbers` `[2 C]`: weights, then marginal logits. `shares`: their factors. `known`: the factors' precision."""
    likely, variances = _sigmoid(logit), _ZERO
    information = likely * (_ONE - likely)
    for c in range(numbers.shape[0]):
        variances += numbers[c] * numbers[c] / (first + known[c])
    error = (label - likely) / (_ONE + information * variances)
    for c in range(numbers.shape[0]):
        shares[c] += numbers[c] * error / (first + known[c])
        known[c] += information * numbers[c] * numbers[c]


@compiled_sums("i4[:, ::1], i4[::1], f4[::1], f4[::1], f4[::1], f4[::1], f4[:, ::1], f4[:, ::1]")
def _crosses(
    at: I32, share_at: I32, prior: F32, firsts: F32, labels: F32, logits: F32, rows: F32, precision: F32
) -> None:
    """`firsts`: the initial shares of weight and marginal, then the prior precision of a marginal and of a share."""
    count = at.shape[1]
    numbers, variance = np.zeros(2 * count, np.float32), np.zeros(count, np.float32)
    weight, marginal = numbers[:count], numbers[count:]
    # Shares change with every row. One row of the table holds both shares of a cross.
    shares, known = np.zeros(2 * count, np.float32), np.zeros(2 * count, np.float32)
    for c in range(count):
        for k in range(2):
            shares[k * count + c] = firsts[k] + rows[share_at[c], k]
            known[k * count + c] = precision[share_at[c], k]
    for b in range(at.shape[0]):
        crosses = 0
        for c in range(count):
            row = at[b, c]
            weight[c], marginal[c] = rows[row, 0], rows[row, 1]
            variance[c] = _ONE / (prior[c] + precision[row, 0])
            if row == 0:
                variance[c] = _ZERO
            else:
                crosses += 1
        logit = _ZERO
        for c in range(2 * count):
            logit += shares[c] * numbers[c]
        logits[b] = logit
        if crosses > 0:
            _learn_marginals(b, at, labels[b], firsts[2], marginal, rows, precision)
            _learn_weights(b, at, labels[b], variance, weight, rows, precision)
            _learn_shares(logit, labels[b], numbers, firsts[3], shares, known)
    for c in range(count):
        if share_at[c] != 0:
            for k in range(2):
                rows[share_at[c], k] = shares[k * count + c] - firsts[k]
                precision[share_at[c], k] = known[k * count + c]


@compiled_sums("const(u8[:, ::1]), f4[::1], f4[::1], f4, f4[::1], f4[::1], f4[::1], f4[::1]")
def _share_network(
    ids: U64, crossed: F32, labels: F32, first: np.float32, share: F32, known: F32, engagement: F32, losses: F32
) -> None:
    network = np.zeros(1, np.float32)
    for b in range(ids.shape[0]):
        # Every row with a label has the first cross.
        if ids[b, 0] == 0:
            continue
        network[0] = engagement[b] - crossed[b]
        logit = crossed[b] + share[0] * network[0]
        engagement[b] = logit
        losses[b] = max(logit, _ZERO) - logit * labels[b] + np.float32(math.log1p(math.exp(-abs(logit))))
        _learn_shares(logit, labels[b], network, first, share, known)


def share_network(ids: U64, labels: F32, crossed: Crossed, engagement: F32, losses: F32) -> tuple[F32, F32]:
    """The engagement and its loss with the network's share, which learns from each row with a label, in turn.

    Args:
        ids: `[B, C]`, the crosses of a record; rows without a label have none, and keep their logits.
        labels: `[B]` float32.
        crossed: What the crosses learn from the record. The network's share in it is changed.
        engagement: `[B]` float32 or more, the logits in which the network's part counts in full; not changed.
        losses: Of the same shape, their losses; not changed.
    """
    at = crossed.network
    if not at:
        return engagement, losses
    engagement, losses = engagement.copy(), losses.copy()
    share, known = _ONE + crossed.rows[at, :1], crossed.precision[at, :1].copy()
    _share_network(
        read_only(ids),
        crossed.logits,
        labels,
        np.float32(HYPERPARAMETERS.share_precision),
        share,
        known,
        engagement,
        losses,
    )
    crossed.rows[at, 0], crossed.precision[at, 0] = share[0] - _ONE, known[0]
    return engagement, losses


def first_precision(kinds: Sequence[str]) -> F32:
    """`[C]` float32, the prior precision of the weights of crosses of these kinds."""
    return np.array([HYPERPARAMETERS.cross_precision[kind] for kind in kinds], np.float32)


class CrossLearner:
    """Scores and learns the crosses of records on the host, wherever the rows of the table are.

    Args:
        prior: `[C]` float32, the prior precision of each cross's weight.
    """

    def __init__(self, table: Table, prior: F32) -> None:
        self._table, self._prior = table, prior

    def measure(self, record: Record) -> tuple[I32, Crossed]:
        """Scores a record and learns from it, without side effects; also returns the `[w]` int32 rows that it learns."""
        rows, at, share_at = self._places(record)
        return rows, crosses(
            at,
            share_at,
            self._prior,
            record.targets.label,
            self._table.gather(rows),
            self._table.gather_accum(rows),
        )._replace(network=int(share_at[-1]) if share_at.size else 0)

    def apply(self, rows: I32, crossed: Crossed) -> None:
        """Stores what `measure` returned."""
        # The missing row is never trained.
        if rows.size > 1:
            self._table.put(rows[1:], crossed.rows[1:], crossed.precision[1:])

    def _places(self, record: Record) -> tuple[I32, I32, I32]:
        """The record's distinct rows of the table, and where in them its `[B, C]` crosses and `[C + 1]` shares are."""
        ids = record.ids["cross"]
        uses = np.concatenate([ids.reshape(-1), record.ids["cross_share"]])
        rows, at = self._table.distinct(self._table.find(uses))
        return rows, at[: ids.size].reshape(ids.shape), at[ids.size :]


def crosses(
    at: I32,
    share_at: I32,
    prior: F32,
    labels: F32,
    rows: F32,
    precision: F32,
    share_precision: float = HYPERPARAMETERS.share_precision,
) -> Crossed:
    """Scores the crosses of a record and learns from its labels.

    Args:
        at: `[B, C]` int32 indices into `rows`, 0 where there is no cross; all 0 in rows without a label.
        share_at: `[C]` int32 or more, indices of the crosses' shares in `rows`.
        prior: `[C]` float32, the prior precision of each weight.
        labels: `[B]` float32.
        rows: `[w, 2]` float32, distinct rows of the table, not changed.
        precision: `[w, 2]` float32, accumulated information of each number, not changed.
        share_precision: The prior precision of a share; infinite if shares are not learned.
    """
    crossed = Crossed(np.zeros(len(at), np.float32), rows.copy(), precision.copy())
    if at.shape[1]:
        firsts = np.array([*FIRST_SHARES, HYPERPARAMETERS.marginal_precision, share_precision], np.float32)
        _crosses(at, share_at, prior, firsts, labels, crossed.logits, crossed.rows, crossed.precision)
    return crossed
