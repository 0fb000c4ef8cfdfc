"""Engagement: the logit of a (user, item) pair, its log loss, and their derivatives."""

from __future__ import annotations

import math

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32, Facts, FastWeights, Gradients, HeadInputs
from trainer.engine.compiled.rows import add, dot
from trainer.engine.engine import Scores

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


@part_of_sums
def engage(
    b: int,
    lane: int,
    facts: Facts,
    inputs: HeadInputs,
    weights: FastWeights,
    biases: tuple[F32, F32],
    crossed: F32,
    logits: F32,
    normaliser: np.float32,
    scores: Scores,
    gradients: Gradients,
) -> None:
    """Scores row `b`'s pair and its negative pair without dropout, and computes their gradients with dropout.

    logits: interest logits without dropout. biases: of items and categories, `[1, dim]` each. One call handles both
    pairs, because each array that a call unpacks costs time.
    """
    plain, queries, prior = inputs.plain_queries, inputs.queries, inputs.prior
    item, category, dim = inputs.item, inputs.category, inputs.category.shape[1]
    item_bias, category_bias = biases
    of_items, of_categories = lane * item.shape[0], lane * category.shape[0]
    rows = facts.target.shape[0]
    for at in range(b, 2 * rows, rows):
        category_at, item_at = facts.pair_category_at[at], facts.pair_item_at[at]
        known = -1
        if category_at != 0:
            for j in range(facts.recent_mask.shape[1]):
                if facts.recent_at[b, j] == category_at and facts.recent_mask[b, j] != _ZERO:
                    known = j
        if known >= 0:
            likely = logits[known] - normaliser
            fixed = prior[0] + prior[1] * likely
        else:
            likely = weights.other[0] + dot(plain, b, 0, category, category_at) - normaliser
            fixed = prior[2] * likely
        fixed += dot(item_bias, 0, 0, item, item_at) + dot(category_bias, 0, 0, category, category_at)
        if at == b:
            fixed += crossed[b]
        score = fixed + plain[b, 2 * dim] + dot(plain, b, dim, item, item_at)
        shifted = score + facts.engaged_shift[at]
        scores.engagement[at] = score
        scores.engagement_loss[at] = (
            max(shifted, _ZERO) - shifted * facts.engaged[at] + np.float32(math.log1p(math.exp(-abs(shifted))))
        )
        if facts.engaged_weight[at] == _ZERO:
            continue
        shifted = fixed + queries[b, 2 * dim] + dot(queries, b, dim, item, item_at) + facts.engaged_shift[at]
        g = (_ONE / (_ONE + np.float32(math.exp(-shifted))) - facts.engaged[at]) * facts.engaged_weight[at]
        if known >= 0:
            gradients.prior[lane, 0] += g
            gradients.prior[lane, 1] += g * likely
        else:
            gradients.prior[lane, 2] += g * likely
        gradients.queries[b, 2 * dim] += g
        # A loop that writes two arrays would not be vectorized.
        add(gradients.queries, b, dim, g, item, item_at, 0, dim)
        add(gradients.item_bias, lane, 0, g, item, item_at, 0, dim)
        add(gradients.category_bias, lane, 0, g, category, category_at, 0, dim)
        add(gradients.item, of_items + item_at, 0, g, queries, b, dim, dim)
        add(gradients.item, of_items + item_at, 0, g, item_bias, 0, 0, dim)
        add(gradients.category, of_categories + category_at, 0, g, category_bias, 0, 0, dim)
