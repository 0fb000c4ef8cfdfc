"""Interest: the logits of a row's candidates, what is measured of them, and the derivatives of their log loss."""

from __future__ import annotations

import math

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32, Facts, FastWeights, Gradients, HeadInputs
from trainer.engine.compiled.rows import add, dot
from trainer.engine.compiled.softmax import rank_of
from trainer.engine.compiled.workspace import Workspace
from trainer.engine.engine import Scores
from trainer.model import ranker

MASKED = np.float32(ranker.MASKED)
"""The logit of a candidate that is not there."""

_ZERO = np.float32(0.0)


@part_of_sums
def score_candidates(
    b: int,
    row: int,
    facts: Facts,
    weights: FastWeights,
    queries: F32,
    popular: F32,
    category: F32,
    workspace: Workspace,
    out: F32,
) -> None:
    """The logits of categories, popular ones, successors and the last slot of row `b`, row `row` of its block, masked, `[L + P + S + 1]`."""
    transition_logits, window_logits, m = workspace.transition_logits, workspace.window_logits, workspace.firsts[row]
    recent_categories, ranks, successors = (
        facts.recent_mask.shape[1],
        facts.popular_mask.shape[1],
        facts.successor_mask.shape[1],
    )
    for j in range(recent_categories):
        out[j] = MASKED
        if facts.recent_mask[b, j] != _ZERO:
            out[j] = window_logits[m] + dot(queries, b, 0, category, facts.recent_at[b, j])
            m += 1
    transition_at = row * (ranks + successors)
    for p in range(ranks):
        out[recent_categories + p] = (
            popular[b, p] + transition_logits[transition_at + p] if facts.popular_mask[b, p] != _ZERO else MASKED
        )
    for j in range(successors):
        at = recent_categories + ranks + j
        out[at] = MASKED
        if facts.successor_mask[b, j] != _ZERO:
            out[at] = (
                weights.successor[j]
                + transition_logits[transition_at + ranks + j]
                + dot(queries, b, 0, category, facts.successor_at[b, j])
            )
    last = recent_categories + ranks + successors
    out[last] = MASKED
    if facts.other_mask[b] != _ZERO:
        out[last] = weights.other[0] + dot(queries, b, 0, category, facts.other_at[b])


@part_of_sums
def measure_interest(b: int, facts: Facts, logits: F32, total: np.float32, highest: np.float32, scores: Scores) -> None:
    """Loss and rank of row `b`, and a copy of its logits; `total` is the sum of exp(logit - highest)."""
    recent_categories, ranks = facts.recent_mask.shape[1], facts.popular_mask.shape[1]
    aim = facts.target[b]
    if aim >= 0:
        scores.interest_loss[b] = np.float32(math.log(total)) + highest - logits[aim]
        scores.rank[b] = rank_of(logits, aim)
    for j in range(recent_categories):
        scores.recent_logits[b, j] = logits[j]
    for p in range(ranks):
        scores.popular_logits[b, p] = logits[recent_categories + p]
    for j in range(facts.successor_mask.shape[1]):
        scores.successor_logits[b, j] = logits[recent_categories + ranks + j]


@part_of_sums
def learn_interest(
    b: int,
    row: int,
    lane: int,
    facts: Facts,
    inputs: HeadInputs,
    workspace: Workspace,
    shares: F32,
    total: np.float32,
    slope: F32,
    gradients: Gradients,
    fast_gradient: FastWeights,
) -> None:
    """The derivatives of row `b`, row `row` of its block.

    shares: `[L + P + S + 1]` unnormalised softmax of the row's candidates; total: their sum; slope: working memory.
    """
    recent_mask, successor_mask = facts.recent_mask, facts.successor_mask
    recent_at, successor_at, other_at = facts.recent_at, facts.successor_at, facts.other_at
    queries, category = inputs.queries, inputs.category
    to_queries, to_category = gradients.queries, gradients.category
    recent_categories, ranks, successors = recent_mask.shape[1], facts.popular_mask.shape[1], successor_mask.shape[1]
    dim, places, slots = category.shape[1], ranks + successors, slope.shape[0]
    factor, of_lane = facts.weight[b] / total, lane * category.shape[0]
    for i in range(slots):
        slope[i] = shares[i] * factor
    slope[facts.target[b]] -= facts.weight[b]
    m = workspace.firsts[row]
    for j in range(recent_categories):
        if recent_mask[b, j] != _ZERO:
            workspace.window_gradient[m] = slope[j]
            m += 1
            add(to_queries, b, 0, slope[j], category, recent_at[b, j], 0, dim)
            add(to_category, of_lane + recent_at[b, j], 0, slope[j], queries, b, 0, dim)
    for i in range(places):
        workspace.transition_gradient[row * places + i] = slope[recent_categories + i]
    for p in range(ranks):
        gradients.popular_logits[b, p] = slope[recent_categories + p]
    for j in range(successors):
        g = slope[recent_categories + ranks + j]
        if successor_mask[b, j] != _ZERO:
            fast_gradient.successor[j] += g
            add(to_queries, b, 0, g, category, successor_at[b, j], 0, dim)
            add(to_category, of_lane + successor_at[b, j], 0, g, queries, b, 0, dim)
    if facts.other_mask[b] != _ZERO:
        fast_gradient.other[0] += slope[slots - 1]
        add(to_queries, b, 0, slope[slots - 1], category, other_at[b], 0, dim)
        add(to_category, of_lane + other_at[b], 0, slope[slots - 1], queries, b, 0, dim)
