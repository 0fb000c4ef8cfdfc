"""Loss and gradients of both heads for one step: compiled loops over rows, candidates and pairs.

`Model.forward` says what the heads are; here the same sums are taken with
their derivatives, some rows at a time, while all of theirs is in the processor's
nearest memory. As some three hundred operations of TensorFlow over
`[B * L, F]` they cost more than the tower. A test holds the two together:
logits and every derivative against TensorFlow's own.

For each row, in the order of the batch:

1. Windows become logarithms, and each label's evidence is summed, a block of rows at a time.
2. Candidates are scored twice: without dropout for the measures, with it to learn.
3. Interest: softmax over the candidates, log loss, rank of the target.
4. Engagement: the row's own item, and its negative where one was drawn. What its
   crosses say is known before (`trainer/crosses.py`).
5. After each 128 rows the weights of the evidence move, before the next row is scored.

Sums are taken in the order of the rows and land in the order of first
occurrence of an id, so that their bits do not depend on how a table lies.
"""

from __future__ import annotations

import math

import numpy as np

from state.native import compiled_sums, part_of_sums
from trainer.crosses import crosses
from trainer.facts import F32, I32, MOVING, U16, Facts, Given, Learned, Moved, Scores, Slopes

NET_HIDDEN = 16
"""Hidden units of the net over a label's windows."""

BLOCK = 32
"""Rows whose labels go through the net together: loops over some hundred labels, in the nearest memory."""

MOVE_ROWS = 4 * BLOCK
"""Rows of a step after which the weights of the evidence move: they are few, and one move a step is too slow for them."""

BETA_1, BETA_2, EPSILON = np.float32(0.9), np.float32(0.999), np.float32(1e-7)
"""Adam's, of these weights and of all others."""

MASKED = np.float32(-1e9)
"""The logit of a candidate that is not there."""

LOGARITHMS: F32 = np.log(np.arange(65536, dtype=np.float32) + np.float32(1.0))
"""log(1 + x) of every uint16."""

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_LOWEST = np.float32(-87.0)
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_HALF = np.float32(0.5)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)


# Rows are passed as a matrix and a number: each view of one would be counted in and out.


@part_of_sums
def _dot(a: F32, row: int, first: int, b: F32, at: int) -> np.float32:
    total: np.float32 = _ZERO
    for d in range(b.shape[1]):
        total += a[row, first + d] * b[at, d]
    return total


@part_of_sums
def _add(out: F32, at: int, to: int, factor: np.float32, a: F32, row: int, first: int, width: int) -> None:
    for d in range(width):
        out[at, to + d] += factor * a[row, first + d]


@part_of_sums
def _exponentials(x: F32, highest: np.float32, out: F32, bits: I32, scale: F32) -> np.float32:
    """exp(x - highest) (Cephes' expf) into `out`; returns the sum. `scale` is `bits` seen as float32."""
    for i in range(x.shape[0]):
        value = max(x[i] - highest, _LOWEST)
        n = np.floor(value * _LOG2_E + _HALF)
        r = value - n * _LN2_HIGH - n * _LN2_LOW
        poly = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
        out[i] = poly * r * r + r + _ONE
        bits[i] = (np.int32(n) + np.int32(127)) << np.int32(23)
    total = _ZERO
    for i in range(x.shape[0]):
        # exp(-87) stands for all that is smaller, and for what is no candidate: it is nothing.
        out[i] = out[i] * scale[i] if x[i] - highest > _LOWEST else _ZERO
        total += out[i]
    return total


@part_of_sums
def _highest(x: F32) -> np.float32:
    found: np.float32 = x[0]
    for i in range(1, x.shape[0]):
        found = max(found, x[i])
    return found


@part_of_sums
def _evidence(
    begin: int,
    end: int,
    windows: U16,
    log_scale: F32,
    scale: F32,
    label_mask: F32,
    personal: F32,
    drift: F32,
    net_0: F32,
    net_1: F32,
    position: F32,
    logarithms: F32,
    folded: F32,
    firsts: I32,
    own: F32,
    newest: F32,
    z: F32,
    across: F32,
    hidden: F32,
    evidence: F32,
) -> None:
    """1. The logits without embeddings of the labels of rows `begin` to `end`, one after another.

    `drift` is how far the weights that users share have moved since `personal`, and
    `own` `[2 F + 16]` is room for a row's. Found:
    in `firsts` `[BLOCK + 1]` where the labels of each row begin; in `newest`
    `[BLOCK, F]` the prepared windows of its newest label; in `z` `[BLOCK * L, F]`
    those of all labels, and in `across` the same the other way; in `hidden`
    `[16, BLOCK * L]` the net's hidden units; and the logits in `evidence` `[BLOCK * L]`.
    """
    labels, width = windows.shape[1], windows.shape[2]
    count = 0
    for b in range(begin, end):
        row = b - begin
        firsts[row] = count
        for k in range(personal.shape[1]):
            own[k] = personal[b, k] + drift[k]
        for f in range(width):
            own[f] += own[width + f]
            window = windows[b, 0, f]
            newest[row, f] = logarithms[window] * log_scale[f] + np.float32(window) * scale[f]
        base = _ZERO
        for f in range(width):
            base -= newest[row, f] * own[width + f]
        for j in range(labels):
            if label_mask[b, j] == _ZERO:
                continue
            total = base + position[j]
            for f in range(width):
                window = windows[b, j, f]
                z[count, f] = logarithms[window] * log_scale[f] + np.float32(window) * scale[f]
                across[f, count] = z[count, f]
            for f in range(width):
                total += z[count, f] * own[f]
            evidence[count] = total
            count += 1
        for k in range(NET_HIDDEN):
            # A difference from the newest label is two sums, of which one is the same for all labels.
            total = own[2 * width + k]
            for f in range(width):
                total -= newest[row, f] * net_0[width + f, k]
            for m in range(firsts[row], count):
                hidden[k, m] = total
    firsts[end - begin] = count
    for k in range(NET_HIDDEN):
        for f in range(width):
            for m in range(count):
                hidden[k, m] += folded[f, k] * across[f, m]
        for m in range(count):
            hidden[k, m] = max(hidden[k, m], _ZERO)
        for m in range(count):
            evidence[m] += hidden[k, m] * net_1[k]


@part_of_sums
def _evidence_slopes(
    begin: int,
    end: int,
    label_mask: F32,
    net_1: F32,
    firsts: I32,
    newest: F32,
    z: F32,
    across: F32,
    hidden: F32,
    slope: F32,
    to_personal: F32,
    to_net_0: F32,
    to_net_1: F32,
    to_position: F32,
) -> None:
    """Backwards through `_evidence`: `slope` `[BLOCK * L]` is the loss by each label's evidence. Spoils `hidden`."""
    labels, width = label_mask.shape[1], z.shape[1]
    count = firsts[end - begin]
    for k in range(NET_HIDDEN):
        total = _ZERO
        for m in range(count):
            total += slope[m] * hidden[k, m]
        to_net_1[k] += total
        for m in range(count):
            hidden[k, m] = slope[m] * net_1[k] if hidden[k, m] > _ZERO else _ZERO
        for f in range(width):
            total = _ZERO
            for m in range(count):
                total += across[f, m] * hidden[k, m]
            to_net_0[f, k] += total
    for b in range(begin, end):
        row = b - begin
        first, last = firsts[row], firsts[row + 1]
        if first == last:
            continue
        total = _ZERO
        m = first
        for j in range(labels):
            if label_mask[b, j] != _ZERO:
                to_position[j] += slope[m]
                total += slope[m]
                _add(to_personal, b, 0, slope[m], z, m, 0, width)
                m += 1
        for f in range(width):
            to_personal[b, width + f] = to_personal[b, f] - total * newest[row, f]
        for k in range(NET_HIDDEN):
            total = _ZERO
            for m in range(first, last):
                total += hidden[k, m]
            to_personal[b, 2 * width + k] = total
        for f in range(width):
            # The second half's slope is the first half's and this; the first is added at the end, once.
            _add(to_net_0, width + f, 0, -newest[row, f], to_personal, b, 2 * width, NET_HIDDEN)


@part_of_sums
def _move(weights: F32, first: F32, second: F32, powers: F32, slopes: F32, rate: np.float32) -> None:
    """5. One step of Adam (Kingma and Ba 2015) in place; `slopes` are taken up and cleared."""
    powers[0] *= BETA_1
    powers[1] *= BETA_2
    step = rate * np.sqrt(_ONE - powers[1]) / (_ONE - powers[0])
    for i in range(weights.shape[0]):
        first[i] += (slopes[i] - first[i]) * (_ONE - BETA_1)
        second[i] += (slopes[i] * slopes[i] - second[i]) * (_ONE - BETA_2)
        weights[i] -= step * first[i] / (np.sqrt(second[i]) + EPSILON)
        slopes[i] = _ZERO


@part_of_sums
def _candidates(
    b: int,
    label_mask: F32,
    popular_mask: F32,
    other_mask: F32,
    label_at: I32,
    other_at: I32,
    category: F32,
    other: F32,
    queries: F32,
    popular: F32,
    evidence: F32,
    first: int,
    out: F32,
) -> None:
    """2. The logits of labels, popular ones and the last slot of row `b`, masked, `[L + P + 1]`."""
    m = first
    labels, ranks = label_mask.shape[1], popular_mask.shape[1]
    for j in range(labels):
        out[j] = MASKED
        if label_mask[b, j] != _ZERO:
            out[j] = evidence[m] + _dot(queries, b, 0, category, label_at[b, j])
            m += 1
    for p in range(ranks):
        out[labels + p] = popular[b, p] if popular_mask[b, p] != _ZERO else MASKED
    out[labels + ranks] = MASKED
    if other_mask[b] != _ZERO:
        out[labels + ranks] = other[0] + _dot(queries, b, 0, category, other_at[b])


@part_of_sums
def _rank(logits: F32, target: int) -> int:
    """Labels and popular ones before the target; of equal ones the lower slot comes first."""
    slots: int = logits.shape[0] - 1
    if target >= slots:
        return slots
    own, before = logits[target], 0
    for i in range(slots):
        if logits[i] > own or (logits[i] == own and i < target):
            before += 1
    return before


@part_of_sums
def _normaliser(total: np.float32, highest: np.float32) -> np.float32:
    """log(1 + the sum of exp(logit)): 0 where there is no candidate."""
    if highest > _ZERO:
        return highest + np.float32(math.log(total + math.exp(-highest)))
    return np.float32(math.log1p(total * math.exp(highest)))


@part_of_sums
def _parts(flat: F32, width: int, labels: int) -> tuple[F32, F32, F32, F32, F32]:
    """Views of what is named in `MOVING`, in that order."""
    linear = 2 * width + NET_HIDDEN
    net_1 = linear + 2 * width * NET_HIDDEN
    position = net_1 + NET_HIDDEN
    other = position + labels
    net_0 = flat[linear:net_1].reshape(2 * width, NET_HIDDEN)
    return flat[:linear], net_0, flat[net_1:position], flat[position:other], flat[other:]


@compiled_sums
def _heads(
    facts: Facts,
    given: Given,
    logarithms: F32,
    crossed: F32,
    scores: Scores,
    slopes: Slopes,
    moved: Moved,
    rate: np.float32,
) -> None:
    (windows, log_scale, scale, label_mask, popular_mask, other_mask, label_at, other_at) = facts[:8]
    (pair_category_at, pair_item_at, target, weight, engaged, engaged_shift, engaged_weight) = facts[8:15]
    (scoring, learning, scoring_popular, learning_popular, personal, category, item) = given[:7]
    prior = given.prior
    item_bias, category_bias = given.item_bias.reshape(1, -1), given.category_bias.reshape(1, -1)
    (label_logits, popular_logits, interest_loss, rank, engagement, engagement_loss) = scores
    (to_learning, to_popular, to_personal, to_category, to_item, to_net_0) = slopes[:6]
    (to_net_1, to_position, to_other, to_prior) = slopes[6:10]
    to_item_bias, to_category_bias = slopes.item_bias.reshape(1, -1), slopes.category_bias.reshape(1, -1)
    rows, labels, width = windows.shape
    ranks, dim = popular_mask.shape[1], category.shape[1]
    slots = labels + ranks + 1
    most, own = BLOCK * labels, np.empty(personal.shape[1], np.float32)
    firsts, newest = np.empty(BLOCK + 1, np.int32), np.empty((BLOCK, width), np.float32)
    z, across = np.empty((most, width), np.float32), np.empty((width, most), np.float32)
    hidden, evidence = np.empty((NET_HIDDEN, most), np.float32), np.empty(most, np.float32)
    evidence_slope, slope = np.empty(most, np.float32), np.empty(slots, np.float32)
    logits, shares = np.empty(slots, np.float32), np.empty(slots, np.float32)
    bits = np.empty(slots, np.int32)
    powers = bits.view(np.float32)
    # What moves: views of one array, and of their derivatives since the last move.
    gained = np.zeros_like(moved.weights)
    linear, net_0, net_1, position, other = _parts(moved.weights, width, labels)
    gained_linear, gained_0, gained_1, gained_position, gained_other = _parts(gained, width, labels)
    drift, folded, unmoved = np.zeros_like(linear), net_0[:width] + net_0[width:], 0
    for b in range(rows):
        begin = b // BLOCK * BLOCK
        end = min(begin + BLOCK, rows)
        # 1.
        if b == begin:
            _evidence(
                begin, end, windows, log_scale, scale, label_mask, personal, drift, net_0, net_1, position,
                logarithms, folded, firsts, own, newest, z, across, hidden, evidence,
            )  # fmt: skip
            evidence_slope[:] = _ZERO
        first = firsts[b - begin]
        # 2. 3. With dropout, to learn.
        aim = target[b]
        if aim >= 0 and weight[b] != _ZERO:
            _candidates(
                b, label_mask, popular_mask, other_mask, label_at, other_at, category, other,
                learning, learning_popular, evidence, first, logits,
            )  # fmt: skip
            factor = weight[b] / _exponentials(logits, _highest(logits), slope, bits, powers)
            for i in range(slots):
                slope[i] *= factor
            slope[aim] -= weight[b]
            m = first
            for j in range(labels):
                if label_mask[b, j] != _ZERO:
                    evidence_slope[m] = slope[j]
                    m += 1
                    _add(to_learning, b, 0, slope[j], category, label_at[b, j], 0, dim)
                    _add(to_category, label_at[b, j], 0, slope[j], learning, b, 0, dim)
            for p in range(ranks):
                if popular_mask[b, p] != _ZERO:
                    to_popular[b, p] = slope[labels + p]
            if other_mask[b] != _ZERO:
                gained_other[0] += slope[slots - 1]
                _add(to_learning, b, 0, slope[slots - 1], category, other_at[b], 0, dim)
                _add(to_category, other_at[b], 0, slope[slots - 1], learning, b, 0, dim)
        # 2. 3. Without dropout, for the measures.
        _candidates(
            b, label_mask, popular_mask, other_mask, label_at, other_at, category, other,
            scoring, scoring_popular, evidence, first, logits,
        )  # fmt: skip
        highest = _highest(logits)
        total = _exponentials(logits, highest, shares, bits, powers)
        if aim >= 0:
            interest_loss[b] = np.float32(math.log(total)) + highest - logits[aim]
            rank[b] = _rank(logits, aim)
        for j in range(labels):
            label_logits[b, j] = logits[j]
        for p in range(ranks):
            popular_logits[b, p] = logits[labels + p]
        # 4. The last slot was chosen by the row's own event, which serving does not know.
        normaliser = _normaliser(max(total - shares[slots - 1], _ZERO), highest)
        for at in range(b, 2 * rows, rows):
            category_at, item_at = pair_category_at[at], pair_item_at[at]
            known = -1
            if category_at != 0:
                for j in range(labels):
                    if label_at[b, j] == category_at and label_mask[b, j] != _ZERO:
                        known = j
            if known >= 0:
                likely = logits[known] - normaliser
                fixed = prior[0] + prior[1] * likely
            else:
                likely = other[0] + _dot(scoring, b, 0, category, category_at) - normaliser
                fixed = prior[2] * likely
            fixed += _dot(item_bias, 0, 0, item, item_at) + _dot(category_bias, 0, 0, category, category_at)
            if at == b:
                fixed += crossed[b]
            score = fixed + scoring[b, 2 * dim] + _dot(scoring, b, dim, item, item_at)
            shifted = score + engaged_shift[at]
            engagement[at] = score
            engagement_loss[at] = (
                max(shifted, _ZERO) - shifted * engaged[at] + np.float32(math.log1p(math.exp(-abs(shifted))))
            )
            if engaged_weight[at] == _ZERO:
                continue
            shifted = fixed + learning[b, 2 * dim] + _dot(learning, b, dim, item, item_at) + engaged_shift[at]
            g = (_ONE / (_ONE + np.float32(math.exp(-shifted))) - engaged[at]) * engaged_weight[at]
            if known >= 0:
                to_prior[0] += g
                to_prior[1] += g * likely
            else:
                to_prior[2] += g * likely
            to_learning[b, 2 * dim] += g
            # A loop that writes two arrays would not be put into vectors.
            _add(to_learning, b, dim, g, item, item_at, 0, dim)
            _add(to_item_bias, 0, 0, g, item, item_at, 0, dim)
            _add(to_category_bias, 0, 0, g, category, category_at, 0, dim)
            _add(to_item, item_at, 0, g, learning, b, dim, dim)
            _add(to_item, item_at, 0, g, item_bias, 0, 0, dim)
            _add(to_category, category_at, 0, g, category_bias, 0, 0, dim)
        if b == end - 1:
            _evidence_slopes(
                begin, end, label_mask, net_1, firsts, newest, z, across, hidden, evidence_slope,
                to_personal, gained_0, gained_1, gained_position,
            )  # fmt: skip
        # 5.
        if b == end - 1 and (end == rows or end % MOVE_ROWS == 0):
            for f in range(width):
                for k in range(NET_HIDDEN):
                    gained_0[width + f, k] += gained_0[f, k]
            for row in range(unmoved, end):
                for k in range(personal.shape[1]):
                    gained_linear[k] += to_personal[row, k]
            for f in range(2 * width):
                _add(to_net_0, f, 0, _ONE, gained_0, f, 0, NET_HIDDEN)
            for k in range(NET_HIDDEN):
                to_net_1[k] += gained_1[k]
            for j in range(labels):
                to_position[j] += gained_position[j]
            to_other[0] += gained_other[0]
            _move(moved.weights, moved.first, moved.second, moved.powers, gained, rate)
            for k in range(linear.shape[0]):
                drift[k] = linear[k] - given.linear[k]
            for f in range(width):
                for k in range(NET_HIDDEN):
                    folded[f, k] = net_0[f, k] + net_0[width + f, k]
            unmoved = end


def heads(facts: Facts, given: Given, slots: Moved | None = None, rate: float = 0.0) -> tuple[Scores, Slopes, Learned]:
    """Scores and slopes of a step, and what was learned within it.

    Args:
        facts: What the host knows.
        given: What the graph computed.
        slots: The Adam slots before the step, not changed; its weights are not read. None moves nothing.
        rate: Step size of Adam.
    """
    weights = np.concatenate([getattr(given, name).reshape(-1) for name in MOVING])
    moved = Moved.of(weights) if slots is None else Moved(weights, *(slot.copy() for slot in slots[1:]))
    rows, labels, _ = facts.windows.shape
    ranks = facts.popular_mask.shape[1]
    scores = Scores(
        np.empty((rows, labels), np.float32),
        np.empty((rows, ranks), np.float32),
        np.zeros(rows, np.float32),
        np.full(rows, labels + ranks, np.int32),
        np.empty(2 * rows, np.float32),
        np.empty(2 * rows, np.float32),
    )
    slopes = Slopes(*(np.zeros_like(getattr(given, name)) for name in Slopes._fields))
    crossed = crosses(
        facts.cross_at, facts.share_at, facts.cross_prior, facts.engaged, given.cross, given.cross_precision
    )
    _heads(
        facts, given, LOGARITHMS, crossed.logits, scores, slopes, moved, np.float32(rate if slots is not None else 0)
    )
    return scores, slopes, Learned(crossed.rows, crossed.precision, moved)
