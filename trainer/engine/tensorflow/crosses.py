"""The Kalman filter of crosses in a graph, on any device: what `trainer/engine/optimizers/crosses.py` says, row after row."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from state.ranking.crosses import FIRST_SHARES
from trainer.model.hyperparameters import HYPERPARAMETERS

Tensor = Any


def learn_crosses(
    at: Tensor, share_at: Tensor, prior: Tensor, labels: Tensor, rows: Tensor, precision: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores the crosses of a record and learns from its labels.

    Args:
        at: `[B, C]` int32 places in `rows`, 0 where there is no cross; all 0 in rows without a label.
        share_at: `[C]` int32, the places of shares.
        prior: `[C]` float32, the precision of each weight before anything was learned.
        labels: `[B]` float32.
        rows: `[w, 2]` float32, distinct rows of the table.
        precision: `[w, 2]` float32, how much was learned of each.

    Returns:
        `[B]` float32 logits, each before its row was learned from; rows and precision after the record.
    """
    first = tf.constant(FIRST_SHARES, tf.float32)
    shares, known = tf.gather(rows, share_at) + first, tf.gather(precision, share_at)

    def body(b: Tensor, state: tuple[Tensor, ...], logits: Any) -> tuple[Any, ...]:
        rows, precision, shares, known = state
        places = at[b]
        numbers, learned = tf.gather(rows, places), tf.gather(precision, places)
        live = tf.cast(places != 0, tf.float32)
        logit = tf.reduce_sum(shares * numbers)

        def learn() -> tuple[Tensor, ...]:
            to_rows, to_precision = _weights_and_marginals(numbers, learned, live, prior, labels[b])
            more_shares, more_known = _shares(logit, labels[b], numbers, known)
            at_rows = tf.expand_dims(places, 1)
            return (
                tf.tensor_scatter_nd_add(rows, at_rows, to_rows),
                tf.tensor_scatter_nd_add(precision, at_rows, to_precision),
                shares + more_shares,
                known + more_known,
            )

        state = tf.cond(tf.reduce_any(places != 0), learn, lambda: (rows, precision, shares, known))
        return b + 1, state, logits.write(b, logit)

    count = tf.shape(at)[0]
    logits = tf.TensorArray(tf.float32, count, element_shape=[])
    _, (rows, precision, shares, known), logits = tf.while_loop(
        lambda b, *_: b < count, body, (0, (rows, precision, shares, known), logits)
    )
    places = tf.expand_dims(share_at, 1)
    rows = tf.tensor_scatter_nd_update(rows, places, shares - first)
    return logits.stack(), rows, tf.tensor_scatter_nd_update(precision, places, known)


def _weights_and_marginals(
    numbers: Tensor, learned: Tensor, live: Tensor, prior: Tensor, label: Tensor
) -> tuple[Tensor, Tensor]:
    """What is added to the `[C, 2]` weights and marginal logits of a row's crosses, and to their precision."""
    weight, marginal = numbers[:, 0], numbers[:, 1]
    # The first cross, which every row has, learns the logit of all labels; the others what theirs add to it.
    likely = tf.sigmoid(tf.concat([marginal[:1], marginal[1:] + marginal[0]], 0))
    gained = likely * (1.0 - likely) * live
    to_marginal = live * (label - likely) / (HYPERPARAMETERS.marginal_precision + learned[:, 1] + gained)
    variance = live / (prior + learned[:, 0])
    variances, likely = tf.reduce_sum(variance), tf.sigmoid(tf.reduce_sum(weight))
    information = likely * (1.0 - likely)
    error = (label - likely) / (1.0 + information * variances)
    to_precision = live * information / (1.0 + information * (variances - variance))
    return tf.stack([variance * error, to_marginal], 1), tf.stack([to_precision, gained], 1)


def _shares(logit: Tensor, label: Tensor, numbers: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the `[C, 2]` shares, and to their precision."""
    likely = tf.sigmoid(logit)
    information = likely * (1.0 - likely)
    precision = HYPERPARAMETERS.share_precision + known
    error = (label - likely) / (1.0 + information * tf.reduce_sum(numbers * numbers / precision))
    return numbers * error / precision, information * numbers * numbers
