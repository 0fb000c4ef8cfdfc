"""The losses: softmax over a row's candidates, and the log loss of pairs of a user and an item.

How much each counts (`engagement_share`, `loss_scale`) is a number of `hyperparameters.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.preprocessing import Tensor
from trainer.model.ranker import Targets

NEGATIVE_SHIFT = float(np.log((1.0 - HYPERPARAMETERS.assumed_click_rate) / HYPERPARAMETERS.assumed_click_rate))
"""What a logit of a log without impressions gets added in training. One negative is drawn for each click, so that it
would stand for even odds: shifted by log((1 - r) / r) it stands for the click rate r (King and Zeng 2001)."""


def interest_logits(scores: Mapping[str, Tensor]) -> Tensor:
    """`[B, C]` float32, the logits of a row's candidates in the order of slots: recent, popular, successor, the last slot."""
    last = tf.expand_dims(scores["other_logit"], 1)
    return tf.concat([scores["recent_logits"], scores["popular_logits"], scores["successor_logits"], last], 1)


def rank(scores: Mapping[str, Tensor], slot: Tensor) -> Tensor:
    """`[B]` int32: candidates before the clicked one, but for the last slot; of equal ones the lower slot comes first.

    All of them where it is the last slot, or none.
    """
    logits = interest_logits(scores)[:, :-1]
    slots = logits.shape[1]
    place = tf.clip_by_value(slot, 0, slots - 1)
    own = tf.gather(logits, tf.expand_dims(place, 1), batch_dims=1)
    lower = tf.range(slots) < tf.expand_dims(place, 1)
    before = tf.reduce_sum(tf.cast((logits > own) | ((logits == own) & lower), tf.int32), 1)
    return tf.where((slot >= 0) & (slot < slots), before, slots)


def interest_loss(scores: Mapping[str, Tensor], slot: Tensor) -> Tensor:
    """`[B]` float32: -log p of the clicked candidate; 0 in rows without one (slot -1)."""
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(slot, 0), interest_logits(scores))
    return tf.where(slot >= 0, losses, 0.0)


def engagement_losses(scores: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
    """`[B]` float32 each: the log loss of the row's own pair and of the drawn negative, before their weights."""
    own = scores["engagement_logit"] + targets.label_shift
    drawn = scores["negative_logit"] + targets.negative_shift
    return (
        tf.nn.sigmoid_cross_entropy_with_logits(targets.label, own),
        tf.nn.sigmoid_cross_entropy_with_logits(tf.zeros_like(drawn), drawn),
    )


def log_losses(scores: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """`[B]` float32: both losses of each row, weighted."""
    own, drawn = engagement_losses(scores, targets)
    interest = interest_loss(scores, targets.slot) * targets.weight
    return interest + own * targets.label_weight + drawn * targets.negative_weight
