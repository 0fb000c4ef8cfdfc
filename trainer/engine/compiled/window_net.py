"""The net over a category's windows, and the user's part of the hidden units of both nets: forwards and backwards."""

from __future__ import annotations

import numpy as np

from state.compiled import part_of_sums
from trainer.engine.compiled.arrays import F32, Facts, FastWeights
from trainer.engine.compiled.workspace import LANES, Workspace
from trainer.model.default_ranker import NET_HIDDEN, NEXT_HIDDEN

USER_HIDDEN = NET_HIDDEN + NEXT_HIDDEN

LOGARITHMS: F32 = np.log(np.arange(65536, dtype=np.float32) + np.float32(1.0))
"""log(1 + x) of every uint16."""

_ZERO = np.float32(0.0)


@part_of_sums
def user_hidden_of(begin: int, end: int, user_features: F32, weights: FastWeights, workspace: Workspace) -> None:
    """The users' part of the hidden units of both nets, of rows `begin` to `end`: `[BLOCK, H + K]`."""
    hidden = workspace.user_hidden
    for b in range(begin, end):
        row = b - begin
        for k in range(USER_HIDDEN):
            hidden[row, k] = weights.bias[k]
        for d in range(user_features.shape[1]):
            x = user_features[b, d]
            for k in range(USER_HIDDEN):
                hidden[row, k] += x * weights.user[d, k]


@part_of_sums
def window_net(begin: int, end: int, facts: Facts, weights: FastWeights, logarithms: F32, workspace: Workspace) -> None:
    """The logits without embeddings of the categories of rows `begin` to `end`, one after another.

    Adds the newest category's windows to `user_hidden`, which is whole then.
    """
    firsts, newest, across, hidden, window_logits, user_hidden = workspace[:6]
    recent_categories, width = facts.windows.shape[1], facts.windows.shape[2]
    count = 0
    for b in range(begin, end):
        row = b - begin
        firsts[row] = count
        for j in range(recent_categories):
            if facts.recent_mask[b, j] == _ZERO:
                continue
            window_logits[count] = weights.position[j]
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
                user_hidden[row, k] += x * weights.net_0[width + f, k]
        for k in range(NET_HIDDEN):
            for m in range(firsts[row], count):
                hidden[k, m] = user_hidden[row, k]
    firsts[end - begin] = count
    # Loops over whole vectors: what lies behind the categories counts as nothing.
    padded = -(-count // LANES) * LANES
    across[:, count:padded] = _ZERO
    hidden[:, count:padded] = _ZERO
    count = padded
    for f in range(width):
        for m in range(count):
            window_logits[m] += weights.linear[f] * across[f, m]
    for k in range(NET_HIDDEN):
        for f in range(width):
            for m in range(count):
                hidden[k, m] += weights.net_0[f, k] * across[f, m]
        for m in range(count):
            hidden[k, m] = max(hidden[k, m], _ZERO)
        for m in range(count):
            window_logits[m] += hidden[k, m] * weights.net_1[k]


@part_of_sums
def window_net_gradients(
    begin: int,
    end: int,
    facts: Facts,
    user_features: F32,
    weights: FastWeights,
    workspace: Workspace,
    fast_gradient: FastWeights,
) -> None:
    """Backwards through `window_net` and `user_hidden_of`, once `user_gradient` has the part of the other net; spoils `hidden`."""
    firsts, newest, across, hidden = workspace[:4]
    gradient, user_gradient = workspace.window_gradient, workspace.user_gradient
    recent_categories, width = facts.recent_mask.shape[1], across.shape[0]
    count = -(-firsts[end - begin] // LANES) * LANES
    for f in range(width):
        total = _ZERO
        for m in range(count):
            total += gradient[m] * across[f, m]
        fast_gradient.linear[f] += total
    for k in range(NET_HIDDEN):
        total = _ZERO
        for m in range(count):
            total += gradient[m] * hidden[k, m]
        fast_gradient.net_1[k] += total
        for m in range(count):
            hidden[k, m] = gradient[m] * weights.net_1[k] if hidden[k, m] > _ZERO else _ZERO
        for f in range(width):
            total = _ZERO
            for m in range(count):
                total += across[f, m] * hidden[k, m]
            fast_gradient.net_0[f, k] += total
    for b in range(begin, end):
        row = b - begin
        m = firsts[row]
        for j in range(recent_categories):
            if facts.recent_mask[b, j] != _ZERO:
                fast_gradient.position[j] += gradient[m]
                m += 1
        for k in range(NET_HIDDEN):
            total = _ZERO
            for m in range(firsts[row], firsts[row + 1]):
                total += hidden[k, m]
            user_gradient[row, k] = total
        for k in range(USER_HIDDEN):
            fast_gradient.bias[k] += user_gradient[row, k]
        for f in range(width):
            x = newest[row, f]
            for k in range(NET_HIDDEN):
                fast_gradient.net_0[width + f, k] += x * user_gradient[row, k]
        for d in range(user_features.shape[1]):
            x = user_features[b, d]
            for k in range(USER_HIDDEN):
                fast_gradient.user[d, k] += x * user_gradient[row, k]
