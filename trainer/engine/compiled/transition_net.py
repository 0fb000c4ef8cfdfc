"""The net over how often a candidate came next after the user's newest category: forwards and backwards."""

from __future__ import annotations

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32, Facts, FastWeights
from trainer.engine.compiled.workspace import Workspace
from trainer.model.default_ranker import NET_HIDDEN, NEXT_HIDDEN

_ZERO = np.float32(0.0)


@part_of_sums
def transition_net(
    begin: int, end: int, facts: Facts, weights: FastWeights, logarithms: F32, workspace: Workspace
) -> None:
    """The logits of popular categories and successors of rows `begin` to `end`, of how often they came next."""
    user_hidden, logs = workspace.user_hidden, workspace.next_logs
    hidden, logits = workspace.next_hidden, workspace.transition_logits
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
            logits[row * places + i] = _ZERO
            for c in range(columns):
                logits[row * places + i] += logs[c, row * places + i] * weights.next[0 if i < ranks else 1, c]
        for k in range(NEXT_HIDDEN):
            own = user_hidden[row, NET_HIDDEN + k]
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
            logits[i] += hidden[k, i] * weight


@part_of_sums
def transition_net_gradients(
    begin: int, end: int, facts: Facts, weights: FastWeights, workspace: Workspace, fast_gradient: FastWeights
) -> None:
    """Backwards through `transition_net`; spoils `next_hidden`."""
    logs, hidden = workspace.next_logs, workspace.next_hidden
    gradient, user_gradient = workspace.transition_gradient, workspace.user_gradient
    ranks, columns = facts.popular_next.shape[1], facts.popular_next.shape[2]
    places = ranks + facts.successor_next.shape[1]
    count = (end - begin) * places
    for c in range(columns):
        for row in range(end - begin):
            of_popular, of_successors = _ZERO, _ZERO
            for i in range(row * places, row * places + ranks):
                of_popular += gradient[i] * logs[c, i]
            for i in range(row * places + ranks, (row + 1) * places):
                of_successors += gradient[i] * logs[c, i]
            fast_gradient.next[0, c] += of_popular
            fast_gradient.next[1, c] += of_successors
    for k in range(NEXT_HIDDEN):
        total, weight = _ZERO, weights.next_1[k]
        for i in range(count):
            total += gradient[i] * hidden[k, i]
        fast_gradient.next_1[k] += total
        for i in range(count):
            hidden[k, i] = gradient[i] * weight if hidden[k, i] > _ZERO else _ZERO
        for c in range(columns):
            total = _ZERO
            for i in range(count):
                total += logs[c, i] * hidden[k, i]
            fast_gradient.next_0[c, k] += total
        for row in range(end - begin):
            total = _ZERO
            for i in range(row * places, (row + 1) * places):
                total += hidden[k, i]
            user_gradient[row, NET_HIDDEN + k] = total
