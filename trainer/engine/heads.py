"""Loss and gradients of both heads for one step: compiled loops over rows, candidates and pairs.

`Model.forward` says what the heads are; here the same sums are taken with
their derivatives, some rows at a time, while all of theirs is in the processor's
nearest memory. As some three hundred operations of TensorFlow over
`[B * L, F]` they cost more than the tower. A test holds the two together:
logits and every derivative against TensorFlow's own.

For each row, in the order of the batch:

1. Windows become logarithms, and each category's evidence is summed, a block of rows at a time.
2. Candidates are scored: without dropout for the measures and, where there is any, with it to learn.
3. Interest: softmax over the candidates, log loss, rank of the target.
4. Engagement: the row's own item, and its negative where one was drawn. What its
   crosses say is known before (`trainer/engine/crosses.py`).
5. After each 32 rows the weights of the evidence move, before the next row is scored.

Sums are taken in the order of the rows and land in the order of first
occurrence of an id, so that their bits do not depend on how a table lies.
"""

from __future__ import annotations

import math

import numpy as np

from state.compiled import compiled_sums, part_of_sums
from trainer.engine.crosses import crosses
from trainer.engine.facts import F32, I32, Facts, Given, Learned, Moved, Moving, Room, Scores, Slopes
from trainer.model.hyperparameters import HYPERPARAMETERS

NET_HIDDEN = HYPERPARAMETERS.net_hidden
"""Hidden units of the net over a category's windows."""

BLOCK = 16
"""Rows whose candidates go through the nets together: loops over some hundred of them, in near memory."""

LANES = 32
"""Numbers that a loop over categories takes at once, on any processor."""

MOVE_ROWS = 2 * BLOCK
"""Rows of a step after which the weights of the evidence move: they are few, and one move a step is too slow for them."""

NEXT_HIDDEN = HYPERPARAMETERS.next_hidden
"""Hidden units of the net over how often a candidate came next."""

USER_HIDDEN = NET_HIDDEN + NEXT_HIDDEN

STILL = np.float32(0.7)
"""What scores and learns is this much of the mean over the latest moves, and for the rest where the last one led."""

USER_PACE = np.float32(0.5)
"""Factor of the step size of the weights by the user's features, of which there are many more."""

MEAN_MOVES, FIRST_MOVES = np.float32(200.0), np.float32(10.0)
"""Moves over which the mean is taken; the first ones count less."""

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
def _users(begin: int, end: int, prepared: F32, weights: Moving, room: Room) -> None:
    """1. The users' part of the hidden units of both nets, of rows `begin` to `end`: `[BLOCK, H + K]`."""
    users = room.users
    for b in range(begin, end):
        row = b - begin
        for k in range(USER_HIDDEN):
            users[row, k] = weights.bias[k]
        for d in range(prepared.shape[1]):
            x = prepared[b, d]
            for k in range(USER_HIDDEN):
                users[row, k] += x * weights.user[d, k]


@part_of_sums
def _evidence(begin: int, end: int, facts: Facts, weights: Moving, logarithms: F32, room: Room) -> None:
    """1. The logits without embeddings of the categories of rows `begin` to `end`, one after another.

    Adds the newest category's windows to `users`, which are whole then.
    """
    firsts, newest, across, hidden, evidence, users = room[:6]
    recent_categories, width = facts.windows.shape[1], facts.windows.shape[2]
    count = 0
    for b in range(begin, end):
        row = b - begin
        firsts[row] = count
        for j in range(recent_categories):
            if facts.recent_mask[b, j] == _ZERO:
                continue
            evidence[count] = weights.position[j]
            for f in range(width):
                window = facts.windows[b, j, f]
                scaled = logarithms[window] * facts.log_scale[f] + np.float32(window) * facts.scale[f]
                across[f, count] = scaled + facts.shift[f]
            count += 1
        # Categories come first and without gaps.
        for f in range(width):
            newest[row, f] = across[f, firsts[row]] if count > firsts[row] else _ZERO
        for f in range(width):
            x = newest[row, f]
            for k in range(NET_HIDDEN):
                users[row, k] += x * weights.net_0[width + f, k]
        for k in range(NET_HIDDEN):
            for m in range(firsts[row], count):
                hidden[k, m] = users[row, k]
    firsts[end - begin] = count
    # Loops over whole vectors: what lies behind the categories counts as nothing.
    padded = -(-count // LANES) * LANES
    across[:, count:padded] = _ZERO
    hidden[:, count:padded] = _ZERO
    count = padded
    for f in range(width):
        for m in range(count):
            evidence[m] += weights.linear[f] * across[f, m]
    for k in range(NET_HIDDEN):
        for f in range(width):
            for m in range(count):
                hidden[k, m] += weights.net_0[f, k] * across[f, m]
        for m in range(count):
            hidden[k, m] = max(hidden[k, m], _ZERO)
        for m in range(count):
            evidence[m] += hidden[k, m] * weights.net_1[k]


@part_of_sums
def _evidence_slopes(
    begin: int, end: int, facts: Facts, prepared: F32, weights: Moving, room: Room, gained: Moving
) -> None:
    """Backwards through `_evidence` and `_users`, once `to_users` has the part of the other net; spoils `hidden`."""
    firsts, newest, across, hidden = room[:4]
    slope, to_users = room.evidence_slope, room.to_users
    recent_categories, width = facts.recent_mask.shape[1], across.shape[0]
    count = -(-firsts[end - begin] // LANES) * LANES
    for f in range(width):
        total = _ZERO
        for m in range(count):
            total += slope[m] * across[f, m]
        gained.linear[f] += total
    for k in range(NET_HIDDEN):
        total = _ZERO
        for m in range(count):
            total += slope[m] * hidden[k, m]
        gained.net_1[k] += total
        for m in range(count):
            hidden[k, m] = slope[m] * weights.net_1[k] if hidden[k, m] > _ZERO else _ZERO
        for f in range(width):
            total = _ZERO
            for m in range(count):
                total += across[f, m] * hidden[k, m]
            gained.net_0[f, k] += total
    for b in range(begin, end):
        row = b - begin
        m = firsts[row]
        for j in range(recent_categories):
            if facts.recent_mask[b, j] != _ZERO:
                gained.position[j] += slope[m]
                m += 1
        for k in range(NET_HIDDEN):
            total = _ZERO
            for m in range(firsts[row], firsts[row + 1]):
                total += hidden[k, m]
            to_users[row, k] = total
        for k in range(USER_HIDDEN):
            gained.bias[k] += to_users[row, k]
        for f in range(width):
            x = newest[row, f]
            for k in range(NET_HIDDEN):
                gained.net_0[width + f, k] += x * to_users[row, k]
        for d in range(prepared.shape[1]):
            x = prepared[b, d]
            for k in range(USER_HIDDEN):
                gained.user[d, k] += x * to_users[row, k]


@part_of_sums
def _move(moved: Moved, slopes: F32, rate: np.float32, users: int) -> None:
    """5. One step of Adam without momentum, averaged (Defazio et al. 2024), in place; `slopes` are cleared."""
    moved.moves[0] += _ONE
    moved.moves[1] *= BETA_2
    step = rate * np.sqrt(_ONE - moved.moves[1])
    share = max(_ONE / MEAN_MOVES, FIRST_MOVES / (moved.moves[0] + FIRST_MOVES))
    for i in range(slopes.shape[0]):
        moved.second[i] += (slopes[i] * slopes[i] - moved.second[i]) * (_ONE - BETA_2)
        pace = step * USER_PACE if i < users else step
        moved.fast[i] -= pace * slopes[i] / (np.sqrt(moved.second[i]) + EPSILON)
        moved.slow[i] += share * (moved.fast[i] - moved.slow[i])
        moved.weights[i] = moved.fast[i] + STILL * (moved.slow[i] - moved.fast[i])
        slopes[i] = _ZERO


@part_of_sums
def _came_next(begin: int, end: int, facts: Facts, weights: Moving, logarithms: F32, room: Room) -> None:
    """1. What it says of popular categories and successors of rows `begin` to `end`, how often they came next."""
    users, logs, hidden, said = room.users, room.logs, room.next_hidden, room.said
    ranks, columns = facts.popular_next.shape[1], facts.popular_next.shape[2]
    places, first = ranks + facts.successor_next.shape[1], facts.log_scale.shape[0] - columns
    count = (end - begin) * places
    for c in range(columns):
        scale = facts.log_scale[first + c]
        for b in range(begin, end):
            at = (b - begin) * places
            for p in range(ranks):
                logs[c, at + p] = logarithms[facts.popular_next[b, p, c]] * scale
            for j in range(places - ranks):
                logs[c, at + ranks + j] = logarithms[facts.successor_next[b, j, c]] * scale
    for row in range(end - begin):
        for i in range(places):
            said[row * places + i] = _ZERO
            for c in range(columns):
                said[row * places + i] += logs[c, row * places + i] * weights.next[0 if i < ranks else 1, c]
        for k in range(NEXT_HIDDEN):
            own = users[row, NET_HIDDEN + k]
            for i in range(places):
                hidden[k, row * places + i] = own
    for k in range(NEXT_HIDDEN):
        for c in range(columns):
            weight = weights.next_0[c, k]
            for i in range(count):
                hidden[k, i] += logs[c, i] * weight
        weight = weights.next_1[k]
        for i in range(count):
            hidden[k, i] = max(hidden[k, i], _ZERO)
            said[i] += hidden[k, i] * weight


@part_of_sums
def _came_next_slopes(begin: int, end: int, facts: Facts, weights: Moving, room: Room, gained: Moving) -> None:
    """Backwards through `_came_next`; spoils `next_hidden`."""
    logs, hidden, slope, to_users = room.logs, room.next_hidden, room.said_slope, room.to_users
    ranks, columns = facts.popular_next.shape[1], facts.popular_next.shape[2]
    places = ranks + facts.successor_next.shape[1]
    count = (end - begin) * places
    for c in range(columns):
        for row in range(end - begin):
            of_popular, of_successors = _ZERO, _ZERO
            for i in range(row * places, row * places + ranks):
                of_popular += slope[i] * logs[c, i]
            for i in range(row * places + ranks, (row + 1) * places):
                of_successors += slope[i] * logs[c, i]
            gained.next[0, c] += of_popular
            gained.next[1, c] += of_successors
    for k in range(NEXT_HIDDEN):
        total, weight = _ZERO, weights.next_1[k]
        for i in range(count):
            total += slope[i] * hidden[k, i]
        gained.next_1[k] += total
        for i in range(count):
            hidden[k, i] = slope[i] * weight if hidden[k, i] > _ZERO else _ZERO
        for c in range(columns):
            total = _ZERO
            for i in range(count):
                total += logs[c, i] * hidden[k, i]
            gained.next_0[c, k] += total
        for row in range(end - begin):
            total = _ZERO
            for i in range(row * places, (row + 1) * places):
                total += hidden[k, i]
            to_users[row, NET_HIDDEN + k] = total


@part_of_sums
def _candidates(
    b: int, facts: Facts, category: F32, weights: Moving, queries: F32, popular: F32, room: Room, row: int, out: F32
) -> None:
    """2. The logits of categories, popular ones, successors and the last slot of row `b`, masked, `[L + P + S + 1]`."""
    said, evidence, m = room.said, room.evidence, room.firsts[row]
    recent_categories, ranks, successors = (
        facts.recent_mask.shape[1],
        facts.popular_mask.shape[1],
        facts.successor_mask.shape[1],
    )
    for j in range(recent_categories):
        out[j] = MASKED
        if facts.recent_mask[b, j] != _ZERO:
            out[j] = evidence[m] + _dot(queries, b, 0, category, facts.recent_at[b, j])
            m += 1
    said_at = row * (ranks + successors)
    for p in range(ranks):
        out[recent_categories + p] = popular[b, p] + said[said_at + p] if facts.popular_mask[b, p] != _ZERO else MASKED
    for j in range(successors):
        at = recent_categories + ranks + j
        out[at] = MASKED
        if facts.successor_mask[b, j] != _ZERO:
            out[at] = (
                weights.successor[j]
                + said[said_at + ranks + j]
                + _dot(queries, b, 0, category, facts.successor_at[b, j])
            )
    last = recent_categories + ranks + successors
    out[last] = MASKED
    if facts.other_mask[b] != _ZERO:
        out[last] = weights.other[0] + _dot(queries, b, 0, category, facts.other_at[b])


@part_of_sums
def _rank(logits: F32, target: int) -> int:
    """Candidates before the target, but for the last slot; of equal ones the lower slot comes first."""
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


@compiled_sums
def _heads(
    facts: Facts,
    given: Given,
    logarithms: F32,
    crossed: F32,
    scores: Scores,
    slopes: Slopes,
    moved: Moved,
    weights: Moving,
    gained_flat: F32,
    gained: Moving,
    total_flat: F32,
    room: Room,
    rate: np.float32,
    apart: bool,
) -> None:
    """`weights` are views of what moves, `gained` of `gained_flat`, the derivatives since the last move."""
    recent_mask, popular_mask, successor_mask = facts.recent_mask, facts.popular_mask, facts.successor_mask
    recent_at, successor_at, other_at = facts.recent_at, facts.successor_at, facts.other_at
    engaged, engaged_shift, engaged_weight = facts.engaged, facts.engaged_shift, facts.engaged_weight
    scoring, learning, category, item, prior = given.scoring, given.learning, given.category, given.item, given.prior
    item_bias, category_bias = given.item_bias.reshape(1, -1), given.category_bias.reshape(1, -1)
    to_learning, to_category, to_item, to_prior = slopes.learning, slopes.category, slopes.item, slopes.prior
    to_item_bias, to_category_bias = slopes.item_bias.reshape(1, -1), slopes.category_bias.reshape(1, -1)
    rows, recent_categories, _ = facts.windows.shape
    ranks, dim = popular_mask.shape[1], category.shape[1]
    successors = successor_mask.shape[1]
    slots = recent_categories + ranks + successors + 1
    logits, shares = np.empty(slots, np.float32), np.empty(slots, np.float32)
    slope, bits = np.empty(slots, np.float32), np.empty(slots, np.int32)
    powers, places = bits.view(np.float32), ranks + successors
    for b in range(rows):
        begin = b // BLOCK * BLOCK
        end = min(begin + BLOCK, rows)
        # 1.
        if b == begin:
            _users(begin, end, given.prepared, weights, room)
            _evidence(begin, end, facts, weights, logarithms, room)
            _came_next(begin, end, facts, weights, logarithms, room)
            room.evidence_slope[:] = _ZERO
            room.said_slope[:] = _ZERO
        row = b - begin
        # 2. 3. Without dropout, for the measures.
        _candidates(b, facts, category, weights, scoring, given.scoring_popular, room, row, logits)
        highest = _highest(logits)
        total = _exponentials(logits, highest, shares, bits, powers)
        aim = facts.target[b]
        if aim >= 0:
            scores.interest_loss[b] = np.float32(math.log(total)) + highest - logits[aim]
            scores.rank[b] = _rank(logits, aim)
        for j in range(recent_categories):
            scores.recent_logits[b, j] = logits[j]
        for p in range(ranks):
            scores.popular_logits[b, p] = logits[recent_categories + p]
        for j in range(successors):
            scores.successor_logits[b, j] = logits[recent_categories + ranks + j]
        # 4. The last slot was chosen by the row's own event, which serving does not know.
        normaliser = _normaliser(max(total - shares[slots - 1], _ZERO), highest)
        for at in range(b, 2 * rows, rows):
            category_at, item_at = facts.pair_category_at[at], facts.pair_item_at[at]
            known = -1
            if category_at != 0:
                for j in range(recent_categories):
                    if recent_at[b, j] == category_at and recent_mask[b, j] != _ZERO:
                        known = j
            if known >= 0:
                likely = logits[known] - normaliser
                fixed = prior[0] + prior[1] * likely
            else:
                likely = weights.other[0] + _dot(scoring, b, 0, category, category_at) - normaliser
                fixed = prior[2] * likely
            fixed += _dot(item_bias, 0, 0, item, item_at) + _dot(category_bias, 0, 0, category, category_at)
            if at == b:
                fixed += crossed[b]
            score = fixed + scoring[b, 2 * dim] + _dot(scoring, b, dim, item, item_at)
            shifted = score + engaged_shift[at]
            scores.engagement[at] = score
            scores.engagement_loss[at] = (
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
        # 2. 3. With dropout, to learn.
        if aim >= 0 and facts.weight[b] != _ZERO:
            if apart:
                _candidates(b, facts, category, weights, learning, given.learning_popular, room, row, logits)
                total = _exponentials(logits, _highest(logits), shares, bits, powers)
            factor = facts.weight[b] / total
            for i in range(slots):
                slope[i] = shares[i] * factor
            slope[aim] -= facts.weight[b]
            m = room.firsts[row]
            for j in range(recent_categories):
                if recent_mask[b, j] != _ZERO:
                    room.evidence_slope[m] = slope[j]
                    m += 1
                    _add(to_learning, b, 0, slope[j], category, recent_at[b, j], 0, dim)
                    _add(to_category, recent_at[b, j], 0, slope[j], learning, b, 0, dim)
            for i in range(places):
                room.said_slope[row * places + i] = slope[recent_categories + i]
            for p in range(ranks):
                slopes.learning_popular[b, p] = slope[recent_categories + p]
            for j in range(successors):
                g = slope[recent_categories + ranks + j]
                if successor_mask[b, j] != _ZERO:
                    gained.successor[j] += g
                    _add(to_learning, b, 0, g, category, successor_at[b, j], 0, dim)
                    _add(to_category, successor_at[b, j], 0, g, learning, b, 0, dim)
            if facts.other_mask[b] != _ZERO:
                gained.other[0] += slope[slots - 1]
                _add(to_learning, b, 0, slope[slots - 1], category, other_at[b], 0, dim)
                _add(to_category, other_at[b], 0, slope[slots - 1], learning, b, 0, dim)
        if b == end - 1:
            _came_next_slopes(begin, end, facts, weights, room, gained)
            _evidence_slopes(begin, end, facts, given.prepared, weights, room, gained)
        # 5.
        if b == end - 1 and (end == rows or end % MOVE_ROWS == 0):
            for i in range(total_flat.shape[0]):
                total_flat[i] += gained_flat[i]
            _move(moved, gained_flat, rate, weights.user.size)


def heads(
    facts: Facts, given: Given, slots: Moved | None = None, rate: float = 0.0, apart: bool = True
) -> tuple[Scores, Slopes, Learned]:
    """Scores and slopes of a step, and what was learned within it.

    Args:
        facts: What the host knows.
        given: What the graph computed.
        slots: The Adam slots before the step, not changed; its weights are not read. None moves nothing.
        rate: Step size of Adam.
        apart: Whether what learns is not what scores.
    """
    flat = given.moving.flat()
    moved = Moved.of(flat) if slots is None else Moved(flat, *(slot.copy() for slot in slots[1:]))
    gained, total = np.zeros_like(flat), np.zeros_like(flat)
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
    learned = {name: np.zeros_like(getattr(given, name)) for name in Slopes._fields if name != "moving"}
    slopes = Slopes(**learned, moving=Moving.of(total, given.moving))
    crossed = crosses(
        facts.cross_at, facts.share_at, facts.cross_prior, facts.engaged, given.cross, given.cross_precision
    )
    room = Room.of(BLOCK, facts, NET_HIDDEN, NEXT_HIDDEN, LANES)
    step = np.float32(rate if slots is not None else 0.0)
    _heads(
        facts, given, LOGARITHMS, crossed.logits, scores, slopes, moved, Moving.of(moved.weights, given.moving), gained,
        Moving.of(gained, given.moving), total, room, step, apart,
    )  # fmt: skip
    return scores, slopes, Learned(crossed.rows, crossed.precision, moved)
