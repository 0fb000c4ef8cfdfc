"""The losses: softmax cross-entropy over a row's candidates, and log loss of (user, item) pairs."""

from __future__ import annotations

from collections.abc import Mapping

import tensorflow as tf

from trainer.model.model import Targets, Tensor


def interest_logits(scores: Mapping[str, Tensor]) -> Tensor:
    """`[B, C]` float32, the logits of a row's candidates in slot order: recent, popular, successor, last slot."""
    last = tf.expand_dims(scores["other_logit"], 1)
    return tf.concat([scores["recent_logits"], scores["popular_logits"], scores["successor_logits"], last], 1)


def rank(scores: Mapping[str, Tensor], slot: Tensor) -> Tensor:
    """`[B]` int32: candidates ranked before the clicked one, without the last slot. On a tie the lower slot is first.

    All of them if the clicked one is in the last slot, or if there is none.
    """
    logits = interest_logits(scores)[:, :-1]
    slots = logits.shape[1]
    clicked = tf.clip_by_value(slot, 0, slots - 1)
    clicked_logit = tf.gather(logits, tf.expand_dims(clicked, 1), batch_dims=1)
    lower = tf.range(slots) < tf.expand_dims(clicked, 1)
    before = tf.reduce_sum(tf.cast((logits > clicked_logit) | ((logits == clicked_logit) & lower), tf.int32), 1)
    return tf.where((slot >= 0) & (slot < slots), before, slots)


def interest_loss(scores: Mapping[str, Tensor], slot: Tensor) -> Tensor:
    """`[B]` float32: -log p of the clicked candidate; 0 in rows without one (slot -1)."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(slot, 0), interest_logits(scores))
    return tf.where(slot >= 0, losses, 0.0)


def engagement_losses(scores: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
    """`[B]` float32 each: the log loss of the row's own pair and of the drawn negative, before their weights."""
    logit = scores["engagement_logit"] + targets.label_shift
    drawn = scores["negative_logit"] + targets.negative_shift
    return (
        tf.nn.sigmoid_cross_entropy_with_logits(targets.label, logit),
        tf.nn.sigmoid_cross_entropy_with_logits(tf.zeros_like(drawn), drawn),
    )


def log_losses(scores: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """`[B]` float32: the weighted sum of each row's losses."""
    pair_loss, drawn = engagement_losses(scores, targets)
    interest = interest_loss(scores, targets.slot) * targets.weight
    return interest + pair_loss * targets.label_weight + drawn * targets.negative_weight
