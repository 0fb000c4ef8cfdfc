"""Loss and gradients of both heads for one step: compiled loops over rows, candidates and pairs.

`trainer/model/default_ranker.py` says what the heads are; here the same sums are taken with
their derivatives, some rows at a time, while all of theirs is in the processor's
nearest memory. As some three hundred operations of TensorFlow over
`[B * L, F]` they cost more than the tower. A test holds the two together:
logits and every derivative against TensorFlow's own.

For each row, in the order of the batch:

1. Windows and transitions become logits, a block of rows at a time (`window_net.py`, `transition_net.py`).
2. Candidates are scored, without dropout for the measures: softmax, log loss, rank of the target (`interest.py`).
3. Engagement: the row's own item, and its negative where one was drawn. What its
   crosses add is known before (`trainer/engine/optimizers/crosses.py`).
4. The derivatives of interest, with dropout where there is any.
5. After each `FAST_ROWS` rows the fast weights move, before the next row is scored.

Sums are taken in the order of the rows and land in the order of first
occurrence of an id, so that their bits do not depend on how a table lies.
"""

from __future__ import annotations

import numpy as np

from state.compiled import compiled_sums
from trainer.engine.compiled.arrays import F32, Facts, FastWeights, Gradients, HeadInputs, Learned
from trainer.engine.compiled.engagement import engage
from trainer.engine.compiled.interest import learn_interest, measure_interest, score_candidates
from trainer.engine.compiled.softmax import exponentials, highest_of, normaliser_of
from trainer.engine.compiled.transition_net import transition_net, transition_net_gradients
from trainer.engine.compiled.window_net import LOGARITHMS, user_hidden_of, window_net, window_net_gradients
from trainer.engine.compiled.workspace import BLOCK, Workspace
from trainer.engine.engine import Scores
from trainer.engine.optimizers.crosses import crosses
from trainer.engine.optimizers.fast_weights import FastSlots, move
from trainer.model.hyperparameters import HYPERPARAMETERS

FAST_ROWS = HYPERPARAMETERS.fast_rows
"""A multiple of `BLOCK`."""

_ZERO = np.float32(0.0)


@compiled_sums(
    "Facts, HeadInputs, (f4[:, ::1],) * 4, f4[::1], f4[::1], Scores, Gradients, FastSlots, FastWeights, f4[::1], FastWeights, f4[::1], Workspace, f4, bool"
)
def _heads(
    facts: Facts,
    inputs: HeadInputs,
    biases: tuple[F32, F32, F32, F32],
    logarithms: F32,
    crossed: F32,
    scores: Scores,
    gradients: Gradients,
    slots: FastSlots,
    weights: FastWeights,
    fast_gradient_flat: F32,
    fast_gradient: FastWeights,
    total_gradient: F32,
    workspace: Workspace,
    rate: np.float32,
    apart: bool,
) -> None:
    """`weights` are views of what moves, `fast_gradient` of `fast_gradient_flat`, the derivatives since the last move."""
    rows, category = facts.windows.shape[0], inputs.category
    count = facts.windows.shape[1] + facts.popular_mask.shape[1] + facts.successor_mask.shape[1] + 1
    logits, shares = np.empty(count, np.float32), np.empty(count, np.float32)
    slope, bits = np.empty(count, np.float32), np.empty(count, np.int32)
    powers = bits.view(np.float32)
    for b in range(rows):
        begin = b // BLOCK * BLOCK
        end = min(begin + BLOCK, rows)
        row = b - begin
        # 1.
        if row == 0:
            user_hidden_of(begin, end, inputs.user_features, weights, workspace)
            window_net(begin, end, facts, weights, logarithms, workspace)
            transition_net(begin, end, facts, weights, logarithms, workspace)
            workspace.window_gradient[:] = _ZERO
            workspace.transition_gradient[:] = _ZERO
        # 2.
        score_candidates(
            b, row, facts, weights, inputs.plain_queries, inputs.plain_popular, category, workspace, logits
        )
        highest = highest_of(logits)
        total = exponentials(logits, highest, shares, bits, powers)
        measure_interest(b, facts, logits, total, highest, scores)
        # 3. The last slot was chosen by the row's own event, which serving does not know.
        normaliser = normaliser_of(max(total - shares[count - 1], _ZERO), highest)
        engage(b, facts, inputs, weights, biases, crossed, logits, normaliser, scores, gradients)
        # 4.
        if facts.target[b] >= 0 and facts.weight[b] != _ZERO:
            if apart:
                score_candidates(
                    b, row, facts, weights, inputs.queries, inputs.popular_logits, category, workspace, logits
                )
                total = exponentials(logits, highest_of(logits), shares, bits, powers)
            learn_interest(b, row, facts, inputs, workspace, shares, total, slope, gradients, fast_gradient)
        if b == end - 1:
            transition_net_gradients(begin, end, facts, weights, workspace, fast_gradient)
            window_net_gradients(begin, end, facts, inputs.user_features, weights, workspace, fast_gradient)
        # 5.
        if b == end - 1 and (end == rows or end % FAST_ROWS == 0):
            for i in range(total_gradient.shape[0]):
                total_gradient[i] += fast_gradient_flat[i]
            move(slots, fast_gradient_flat, rate, weights.user.size)


def heads(
    facts: Facts, inputs: HeadInputs, slots: FastSlots | None = None, rate: float = 0.0, apart: bool = True
) -> tuple[Scores, Gradients, Learned]:
    """Scores and gradients of a step, and what was learned within it.

    Args:
        facts: What the host knows.
        inputs: What the graph computed.
        slots: The slots of the fast weights before the step, not changed; its weights are not read. None moves nothing.
        rate: Step size of the fast weights.
        apart: Whether what learns is not what scores.
    """
    flat = inputs.fast.flat()
    moved = FastSlots.of(flat) if slots is None else FastSlots(flat, *(slot.copy() for slot in slots[1:]))
    since_move, total = np.zeros_like(flat), np.zeros_like(flat)
    rows, recent_categories, _ = facts.windows.shape
    ranks, successors = facts.popular_mask.shape[1], facts.successor_mask.shape[1]
    scores = Scores(
        np.empty((rows, recent_categories), np.float32),
        np.empty((rows, ranks), np.float32),
        np.empty((rows, successors), np.float32),
        np.zeros(rows, np.float32),
        np.full(rows, recent_categories + ranks + successors, np.int32),
        np.empty(2 * rows, np.float32),
        np.empty(2 * rows, np.float32),
    )
    learned = {name: np.zeros_like(getattr(inputs, name)) for name in Gradients._fields if name != "fast"}
    gradients = Gradients(**learned, fast=FastWeights.of(total, inputs.fast))
    crossed = crosses(
        facts.cross_at, facts.share_at, facts.cross_prior, facts.engaged, inputs.cross, inputs.cross_precision
    )
    step = np.float32(rate if slots is not None else 0.0)
    item, category = inputs.item_bias[None], inputs.category_bias[None]
    biases = item, category, gradients.item_bias[None], gradients.category_bias[None]
    _heads(
        facts, inputs, biases, LOGARITHMS, crossed.logits, scores, gradients, moved, FastWeights.of(moved.weights, inputs.fast),
        since_move, FastWeights.of(since_move, inputs.fast), total, Workspace.of(facts), step, apart,
    )  # fmt: skip
    return scores, gradients, Learned(crossed.rows, crossed.precision, moved)
