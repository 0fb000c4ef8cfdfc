"""Forward and backward pass of the net over a category's windows, and of the users' part of both nets' hidden units."""

from __future__ import annotations

import numpy as np

from state.compiled import allocating_part_of_sums, part_of_sums
from trainer.engine.compiled.arrays import F32, Facts, FastWeights, Workspace
from trainer.model.default_model import NET_HIDDEN, NEXT_HIDDEN

USER_HIDDEN = NET_HIDDEN + NEXT_HIDDEN

LOGARITHMS: F32 = np.log(np.arange(65536, dtype=np.float32) + np.float32(1.0))
"""log(1 + x) of every uint16 x."""

_ZERO = np.float32(0.0)


@allocating_part_of_sums
def user_hidden_of(begin: int, end: int, user_features: F32, weights: FastWeights, workspace: Workspace) -> None:
    """Computes the users' part of the hidden units of both nets, for rows `begin` to `end`: `[BLOCK, H + K]`."""
    hidden = workspace.user_hidden
    np.dot(user_features[begin:end], weights.user, hidden[: end - begin])
    for row in range(end - begin):
        for k in range(USER_HIDDEN):
            hidden[row, k] += weights.bias[k]


@part_of_sums
def _scale_newest(b: int, row: int, facts: Facts, logarithms: F32, newest: F32) -> None:
    """Scales the windows of the first slot, which has no category."""
    user_columns = facts.windows.shape[2]
    for f in range(facts.log_scale.shape[0]):
        window = facts.windows[b, 0, f] if f < user_columns else facts.recent_next[b, 0, f - user_columns]
        newest[row, f] = logarithms[window] * facts.log_scale[f] + np.float32(window) * facts.scale[f] + facts.shift[f]


@part_of_sums
def _scaled_windows(
    begin: int, end: int, facts: Facts, weights: FastWeights, logarithms: F32, workspace: Workspace
) -> int:
    """Scales the windows, and completes `user_hidden`; returns the number of categories."""
    firsts, newest, windows = workspace.firsts, workspace.newest, workspace.windows
    window_logits, user_hidden = workspace.window_logits, workspace.user_hidden
    recent_categories, width, user_columns = facts.windows.shape[1], facts.log_scale.shape[0], facts.windows.shape[2]
    count = 0
    for b in range(begin, end):
        row = b - begin
        firsts[row] = count
        for j in range(recent_categories):
            if facts.recent_mask[b, j] == _ZERO:
                continue
            window_logits[count] = weights.position[j]
            for f in range(user_columns):
                window = facts.windows[b, j, f]
                scaled = logarithms[window] * facts.log_scale[f] + np.float32(window) * facts.scale[f]
                windows[count, f] = scaled + facts.shift[f]
            for f in range(user_columns, width):
                window = facts.recent_next[b, j, f - user_columns]
                scaled = logarithms[window] * facts.log_scale[f] + np.float32(window) * facts.scale[f]
                windows[count, f] = scaled + facts.shift[f]
            count += 1
        # Records fill the first slots without gaps; only probes have a category without a newest one.
        if count > firsts[row] and facts.recent_mask[b, 0] == _ZERO:
            _scale_newest(b, row, facts, logarithms, newest)
        else:
            for f in range(width):
                newest[row, f] = windows[firsts[row], f] if count > firsts[row] else _ZERO
        for f in range(width):
            x = newest[row, f]
            for k in range(NET_HIDDEN):
                user_hidden[row, k] += x * weights.net_0[width + f, k]
    firsts[end - begin] = count
    return count


@part_of_sums
def _window_logits(rows: int, weights: FastWeights, workspace: Workspace) -> None:
    firsts, windows, hidden = workspace.firsts, workspace.windows, workspace.hidden
    window_logits, user_hidden, width = workspace.window_logits, workspace.user_hidden, windows.shape[1]
    for row in range(rows):
        for m in range(firsts[row], firsts[row + 1]):
            total = _ZERO
            for f in range(width):
                total += windows[m, f] * weights.linear[f]
            for k in range(NET_HIDDEN):
                unit = max(hidden[m, k] + user_hidden[row, k], _ZERO)
                hidden[m, k] = unit
                total += unit * weights.net_1[k]
            window_logits[m] += total


@allocating_part_of_sums
def window_net(begin: int, end: int, facts: Facts, weights: FastWeights, logarithms: F32, workspace: Workspace) -> None:
    """Computes the logits without embeddings of the categories of rows `begin` to `end`, concatenated.

    Adds the newest category's windows to `user_hidden`, which is complete afterwards.
    """
    windows, hidden, width = workspace.windows, workspace.hidden, workspace.windows.shape[1]
    count = _scaled_windows(begin, end, facts, weights, logarithms, workspace)
    np.dot(windows[:count], weights.net_0[:width], hidden[:count])
    _window_logits(end - begin, weights, workspace)


@part_of_sums
def _hidden_gradients(
    begin: int, end: int, facts: Facts, weights: FastWeights, workspace: Workspace, fast_gradient: FastWeights
) -> None:
    """The derivatives by the hidden units, in `hidden`, and by all weights but `net_0`'s first part and `user`."""
    firsts, newest, windows, hidden = workspace.firsts, workspace.newest, workspace.windows, workspace.hidden
    gradient, user_gradient = workspace.window_gradient, workspace.user_gradient
    recent_categories, width, rows = facts.recent_mask.shape[1], windows.shape[1], end - begin
    for row in range(rows):
        for k in range(NET_HIDDEN):
            user_gradient[row, k] = _ZERO
        for m in range(firsts[row], firsts[row + 1]):
            slope = gradient[m]
            for f in range(width):
                fast_gradient.linear[f] += slope * windows[m, f]
            for k in range(NET_HIDDEN):
                fast_gradient.net_1[k] += slope * hidden[m, k]
            for k in range(NET_HIDDEN):
                hidden[m, k] = slope * weights.net_1[k] if hidden[m, k] > _ZERO else _ZERO
            for k in range(NET_HIDDEN):
                user_gradient[row, k] += hidden[m, k]
        m = firsts[row]
        for j in range(recent_categories):
            if facts.recent_mask[begin + row, j] != _ZERO:
                fast_gradient.position[j] += gradient[m]
                m += 1
        for k in range(USER_HIDDEN):
            fast_gradient.bias[k] += user_gradient[row, k]
        for f in range(width):
            x = newest[row, f]
            for k in range(NET_HIDDEN):
                fast_gradient.net_0[width + f, k] += x * user_gradient[row, k]


@allocating_part_of_sums
def window_net_gradients(
    begin: int,
    end: int,
    facts: Facts,
    user_features: F32,
    weights: FastWeights,
    workspace: Workspace,
    fast_gradient: FastWeights,
) -> None:
    """Backward pass of `window_net` and `user_hidden_of`. Overwrites `hidden`.

    The other net's part of `user_gradient` has to be filled before.
    """
    windows, user_gradient, rows = workspace.windows, workspace.user_gradient, end - begin
    _hidden_gradients(begin, end, facts, weights, workspace, fast_gradient)
    count = workspace.firsts[rows]
    np.dot(windows[:count].T, workspace.hidden[:count], fast_gradient.net_0[: windows.shape[1]])
    np.dot(user_features[begin:end].T, user_gradient[:rows], fast_gradient.user)
