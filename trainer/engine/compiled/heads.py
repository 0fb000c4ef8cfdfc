"""Loss and gradients of both heads for one step: compiled loops over rows, candidates and pairs.

For each row, in the order of the batch:

1. Windows and transitions become logits, a block of rows at a time (`window_net.py`, `transition_net`). The transition
   net reads how often a candidate came next after the user's newest category.
2. Candidates are scored without dropout for the measures: softmax, log loss, rank of the target (`measure_interest`).
3. Engagement: the row's own item, and its negative if one was drawn. The contribution of its crosses is an input.
4. The derivatives of interest, with dropout if there is any (`learn_interest`).
5. After each block of rows the fast weights move, before the next row is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from state.compiled import compiled_sums, layout, part_of_sums
from trainer.engine.adam import FastSlots, move
from trainer.engine.compiled.arrays import BLOCK, F32, I32, I64, Facts, FastWeights, Gradients, HeadInputs, Workspace
from trainer.engine.compiled.rows import add, divide, dot, exponentials, highest_of, normaliser_of, rank_of
from trainer.engine.compiled.threads import advance, wait_for
from trainer.engine.compiled.tower import FIRST, HEADS
from trainer.engine.compiled.window_net import LOGARITHMS, user_hidden_of, window_net, window_net_gradients
from trainer.engine.engine import Scores
from trainer.model.default_model import NET_HIDDEN, NEXT_HIDDEN
from trainer.model.model import MASKED as MASKED_LOGIT

MASKED = np.float32(MASKED_LOGIT)
"""The logit of a masked candidate."""

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


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
    """Computes the masked logits of row `b`, row `row` of its block: `[L + P + S + 1]`, in slot order."""
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
    of_popular, next_logits = out[recent_categories:], transition_logits[transition_at:]
    for p in range(ranks):
        of_popular[p] = popular[b, p] + next_logits[p] if facts.popular_mask[b, p] != _ZERO else MASKED
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
    aim = facts.target[b]
    if aim >= 0:
        scores.interest_loss[b] = np.float32(math.log(total)) + highest - logits[aim]
        scores.rank[b] = rank_of(logits, aim)
    divide(logits, b, scores.recent_logits, scores.popular_logits, scores.successor_logits)


@part_of_sums
def learn_interest(
    b: int,
    row: int,
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
    dim, candidates, slots = category.shape[1], ranks + successors, slope.shape[0]
    factor = facts.weight[b] / total
    for i in range(slots):
        slope[i] = shares[i] * factor
    slope[facts.target[b]] -= facts.weight[b]
    m = workspace.firsts[row]
    for j in range(recent_categories):
        if recent_mask[b, j] != _ZERO:
            workspace.window_gradient[m] = slope[j]
            m += 1
            add(to_queries, b, 0, slope[j], category, recent_at[b, j], 0, dim)
            add(to_category, recent_at[b, j], 0, slope[j], queries, b, 0, dim)
    by_next, to_next = slope[recent_categories:], workspace.transition_gradient[row * candidates :]
    for i in range(candidates):
        to_next[i] = by_next[i]
    for p in range(ranks):
        gradients.popular_logits[b, p] = by_next[p]
    for j in range(successors):
        g = slope[recent_categories + ranks + j]
        if successor_mask[b, j] != _ZERO:
            fast_gradient.successor[j] += g
            add(to_queries, b, 0, g, category, successor_at[b, j], 0, dim)
            add(to_category, successor_at[b, j], 0, g, queries, b, 0, dim)
    if facts.other_mask[b] != _ZERO:
        fast_gradient.other[0] += slope[slots - 1]
        add(to_queries, b, 0, slope[slots - 1], category, other_at[b], 0, dim)
        add(to_category, other_at[b], 0, slope[slots - 1], queries, b, 0, dim)


@part_of_sums
def engage(
    b: int,
    facts: Facts,
    inputs: HeadInputs,
    weights: FastWeights,
    logits: F32,
    normaliser: np.float32,
    scores: Scores,
    gradients: Gradients,
) -> None:
    """Scores row `b`'s pair and its negative pair without dropout, and computes their gradients with dropout.

    logits: interest logits without dropout. One call handles both pairs, because each array that a call unpacks costs time.
    """
    plain, queries, prior = inputs.plain_queries, inputs.queries, inputs.prior
    item, category, dim = inputs.item, inputs.category, inputs.category.shape[1]
    item_bias, category_bias = inputs.item_bias, inputs.category_bias
    rows = facts.target.shape[0]
    for at in range(b, 2 * rows, rows):
        category_at, item_at = facts.pair_category_at[at], facts.pair_item_at[at]
        slot = -1
        if category_at != 0:
            for j in range(facts.recent_mask.shape[1]):
                if facts.recent_at[b, j] == category_at and facts.recent_mask[b, j] != _ZERO:
                    slot = j
        if slot >= 0:
            likely = logits[slot] - normaliser
            fixed = prior[0] + prior[1] * likely
        else:
            likely = weights.other[0] + dot(plain, b, 0, category, category_at) - normaliser
            fixed = prior[2] * likely
        fixed += dot(item_bias, 0, 0, item, item_at) + dot(category_bias, 0, 0, category, category_at)
        if at == b:
            fixed += inputs.crossed[b]
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
        if slot >= 0:
            gradients.prior[0] += g
            gradients.prior[1] += g * likely
        else:
            gradients.prior[2] += g * likely
        gradients.queries[b, 2 * dim] += g
        # A loop that writes two arrays would not be vectorized.
        add(gradients.queries, b, dim, g, item, item_at, 0, dim)
        add(gradients.item_bias, 0, 0, g, item, item_at, 0, dim)
        add(gradients.category_bias, 0, 0, g, category, category_at, 0, dim)
        add(gradients.item, item_at, 0, g, queries, b, dim, dim)
        add(gradients.item, item_at, 0, g, item_bias, 0, 0, dim)
        add(gradients.category, category_at, 0, g, category_bias, 0, 0, dim)


@part_of_sums
def transition_net(
    begin: int, end: int, facts: Facts, weights: FastWeights, logarithms: F32, workspace: Workspace
) -> None:
    """The logits of popular categories and successors of rows `begin` to `end`, of how often they came next."""
    user_hidden, logs = workspace.user_hidden, workspace.next_logs
    hidden, logits = workspace.next_hidden, workspace.transition_logits
    ranks, columns = facts.popular_next.shape[1], facts.popular_next.shape[2]
    candidates, first = ranks + facts.successor_next.shape[1], facts.log_scale.shape[0] - columns
    count = (end - begin) * candidates
    for c in range(columns):
        scale = facts.log_scale[first + c]
        for b in range(begin, end):
            at = (b - begin) * candidates
            for p in range(ranks):
                logs[c, at + p] = logarithms[facts.popular_next[b, p, c]] * scale
            for j in range(candidates - ranks):
                logs[c, at + ranks + j] = logarithms[facts.successor_next[b, j, c]] * scale
    logits[:count] = _ZERO
    for row in range(end - begin):
        part = slice(row * candidates, (row + 1) * candidates)
        logits_of_row = logits[part]
        for c in range(columns):
            logs_of_row = logs[c, part]
            for i in range(candidates):
                logits_of_row[i] += logs_of_row[i] * weights.next[0 if i < ranks else 1, c]
        for k in range(NEXT_HIDDEN):
            units, value = hidden[k, part], user_hidden[row, NET_HIDDEN + k]
            for i in range(candidates):
                units[i] = value
    for k in range(NEXT_HIDDEN):
        of_count, of_share, weight = weights.next_0[0, k], weights.next_0[1, k], weights.next_1[k]
        for i in range(count):
            unit = max(hidden[k, i] + logs[0, i] * of_count + logs[1, i] * of_share, _ZERO)
            hidden[k, i] = unit
            logits[i] += unit * weight


@part_of_sums
def transition_net_gradients(
    begin: int, end: int, facts: Facts, weights: FastWeights, workspace: Workspace, fast_gradient: FastWeights
) -> None:
    """Backwards through `transition_net`; spoils `next_hidden`."""
    logs, hidden = workspace.next_logs, workspace.next_hidden
    gradient, user_gradient = workspace.transition_gradient, workspace.user_gradient
    ranks, columns = facts.popular_next.shape[1], facts.popular_next.shape[2]
    candidates = ranks + facts.successor_next.shape[1]
    count = (end - begin) * candidates
    for c in range(columns):
        for row in range(end - begin):
            part = slice(row * candidates, (row + 1) * candidates)
            slopes, logs_of_row = gradient[part], logs[c, part]
            of_all, of_popular = _ZERO, _ZERO
            for i in range(candidates):
                of_all += slopes[i] * logs_of_row[i]
            for i in range(ranks):
                of_popular += slopes[i] * logs_of_row[i]
            fast_gradient.next[0, c] += of_popular
            fast_gradient.next[1, c] += of_all - of_popular
    for k in range(NEXT_HIDDEN):
        total, weight = _ZERO, weights.next_1[k]
        for i in range(count):
            total += gradient[i] * hidden[k, i]
            hidden[k, i] = gradient[i] * weight if hidden[k, i] > _ZERO else _ZERO
        fast_gradient.next_1[k] += total
        for c in range(columns):
            total = _ZERO
            for i in range(count):
                total += logs[c, i] * hidden[k, i]
            fast_gradient.next_0[c, k] += total
        for row in range(end - begin):
            total, units = _ZERO, hidden[k, row * candidates : (row + 1) * candidates]
            for i in range(candidates):
                total += units[i]
            user_gradient[row, NET_HIDDEN + k] = total


@layout("Workspace, f4[::1], FastWeights, f4[:, ::1], i4[::1]")
class Own(NamedTuple):
    """Working memory.

    Attributes:
        workspace: Of a block of rows.
        flat: `[m]` float32 derivatives of a block by the fast weights; zeros before each block.
        fast: Views of it.
        candidates: `[3, L + P + S + 1]` float32: logits, shares and slopes of a row's candidates.
        bits: `[L + P + S + 1]` int32.
    """

    workspace: Workspace
    flat: F32
    fast: FastWeights
    candidates: F32
    bits: I32


@compiled_sums(
    "i8[::1], i8, Facts, HeadInputs, f4[::1], Scores, Gradients, Own, FastWeights, FastSlots, f4[::1], f4, bool"
)
def _heads(
    progress: I64,
    block: int,
    facts: Facts,
    inputs: HeadInputs,
    logarithms: F32,
    scores: Scores,
    gradients: Gradients,
    own: Own,
    weights: FastWeights,
    slots: FastSlots,
    total: F32,
    rate: np.float32,
    separate: bool,
) -> None:
    """Waits for the tower's blocks of `block` rows, and counts its own rows in `progress` (`Tower`).

    weights: views of what moves. total: gets the derivatives by it over the whole record.
    """
    rows, category, workspace, fast = facts.windows.shape[0], inputs.category, own.workspace, own.fast
    logits, shares, slope, bits = own.candidates[0], own.candidates[1], own.candidates[2], own.bits
    powers, count = bits.view(np.float32), bits.shape[0]
    for begin in range(0, rows, BLOCK):
        end = min(begin + BLOCK, rows)
        for number in range(begin // block, (end - 1) // block + 1):
            wait_for(progress, FIRST + number, 1)
        # 1.
        user_hidden_of(begin, end, inputs.user_features, weights, workspace)
        window_net(begin, end, facts, weights, logarithms, workspace)
        transition_net(begin, end, facts, weights, logarithms, workspace)
        workspace.window_gradient[:] = _ZERO
        workspace.transition_gradient[:] = _ZERO
        for b in range(begin, end):
            row = b - begin
            # 2.
            score_candidates(
                b, row, facts, weights, inputs.plain_queries, inputs.plain_popular, category, workspace, logits
            )
            highest = highest_of(logits)
            sum_of_shares = exponentials(logits, highest, shares, bits, powers)
            measure_interest(b, facts, logits, sum_of_shares, highest, scores)
            # 3. The last slot was chosen by the row's own event, which serving does not know.
            normaliser = normaliser_of(max(sum_of_shares - shares[count - 1], _ZERO), highest)
            engage(b, facts, inputs, weights, logits, normaliser, scores, gradients)
            # 4.
            if facts.target[b] >= 0 and facts.weight[b] != _ZERO:
                if separate:
                    score_candidates(
                        b, row, facts, weights, inputs.queries, inputs.popular_logits, category, workspace, logits
                    )
                    sum_of_shares = exponentials(logits, highest_of(logits), shares, bits, powers)
                learn_interest(b, row, facts, inputs, workspace, shares, sum_of_shares, slope, gradients, fast)
        transition_net_gradients(begin, end, facts, weights, workspace, fast)
        window_net_gradients(begin, end, facts, inputs.user_features, weights, workspace, fast)
        # 5.
        for i in range(total.shape[0]):
            total[i] += own.flat[i]
        move(slots, own.flat, rate, weights.user.size)
        advance(progress, HEADS, BLOCK)


def _own(facts: Facts, inputs: HeadInputs, candidates: int) -> Own:
    flat = np.zeros(sum(part.size for part in inputs.fast), np.float32)
    return Own(
        Workspace.of(facts),
        flat,
        FastWeights.of(flat, inputs.fast),
        np.zeros((3, candidates), np.float32),
        np.zeros(candidates, np.int32),
    )


class Heads:
    """The heads with their working memory. One caller at a time; gradients are valid until the next call."""

    def __init__(self) -> None:
        self._own: Own | None = None
        self._buffers = dict[str, F32]()

    def prepare(
        self, facts: Facts, inputs: HeadInputs, slots: FastSlots | None, rate: float, separate: bool
    ) -> tuple[Scores, Gradients, FastSlots, Callable[[I64, int], None]]:
        """Scores and gradients of a step, and the fast weights after it, once the returned function was called.

        The function takes the progress of a tower that runs forward meanwhile, and the rows of its blocks.

        Args:
            facts: Prepared by the host.
            inputs: Computed by the tower.
            slots: The slots of the fast weights before the step, not changed; its weights are not read. None moves nothing.
            rate: Step size of the fast weights.
            separate: Whether training inputs differ from scoring inputs, because of dropout.
        """
        flat = inputs.fast.flat()
        moved = FastSlots.of(flat) if slots is None else FastSlots(flat, *(slot.copy() for slot in slots[1:]))
        rows, recent_categories, _ = facts.windows.shape
        ranks, successors = facts.popular_mask.shape[1], facts.successor_mask.shape[1]
        candidates = recent_categories + ranks + successors
        scores = Scores(
            np.empty((rows, recent_categories), np.float32),
            np.empty((rows, ranks), np.float32),
            np.empty((rows, successors), np.float32),
            np.zeros(rows, np.float32),
            np.full(rows, candidates, np.int32),
            np.empty(2 * rows, np.float32),
            np.empty(2 * rows, np.float32),
        )
        total = np.zeros_like(flat)
        learned = ("queries", "popular_logits", "category", "item", "prior", "item_bias", "category_bias")
        zeros = {name: self._zeros(name, getattr(inputs, name).shape) for name in learned}
        gradients = Gradients(**zeros, fast=FastWeights.of(total, inputs.fast))
        own = self._own = self._own or _own(facts, inputs, candidates + 1)
        weights, step = FastWeights.of(moved.weights, inputs.fast), np.float32(rate if slots is not None else 0.0)

        def work(progress: I64, block: int) -> None:
            _heads(
                progress, block, facts, inputs, LOGARITHMS, scores, gradients, own, weights, moved, total, step, separate
            )  # fmt: skip

        return scores, gradients, moved, work

    def _zeros(self, name: str, shape: tuple[int, ...]) -> F32:
        """Working memory, kept from call to call: clearing it costs less than fresh pages."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, np.float32)
        buffer[:size] = _ZERO
        return buffer[:size].reshape(shape)
