"""Scratch arrays of the compiled heads: what a block of rows needs, small enough for the CPU's cache."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from state.compiled import layout
from trainer.engine.compiled.arrays import F32, I32, Facts
from trainer.model.default_ranker import NET_HIDDEN, NEXT_HIDDEN

BLOCK = 16
"""Rows whose candidates pass through the nets together, so that loops cover several hundred of them in cache."""


@layout(
    "i4[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], f4[:, ::1]"
)
class Workspace(NamedTuple):
    """Scratch arrays for a block of `n` rows.

    Attributes:
        firsts: `[n + 1]` int32, the index of each row's first category among the categories of the block.
        newest: `[n, F]` float32, the scaled windows of each row's newest category.
        windows: `[n * L, F]`, the scaled windows of all categories.
        hidden: `[n * L, H]`, the hidden units of the window net.
        window_logits: `[n * L]`, the logit of each category from its windows.
        user_hidden: `[n, H + K]`, the users' part of the hidden units of both nets.
        window_gradient: `[n * L]`, the derivative by `window_logits`.
        user_gradient: `[n, H + K]`, the derivative by `user_hidden`.
        next_logs: `[2, n * (P + S)]`, logarithms of how often popular categories and successors came next.
        next_hidden: `[K, n * (P + S)]`, the hidden units of the net over `next_logs`.
        transition_logits: `[n * (P + S)]`, the logit of each candidate from how often it came next.
        transition_gradient: `[n * (P + S)]`, the derivative by `transition_logits`.
        net_gradient: `[F, H]`, the derivative by the first layer of the window net.
        features_gradient: `[U, H + K]`, the derivative by the weights of the users' features.
    """

    firsts: I32
    newest: F32
    windows: F32
    hidden: F32
    window_logits: F32
    user_hidden: F32
    window_gradient: F32
    user_gradient: F32
    next_logs: F32
    next_hidden: F32
    transition_logits: F32
    transition_gradient: F32
    net_gradient: F32
    features_gradient: F32

    @classmethod
    def of(cls, facts: Facts, user_width: int) -> Workspace:
        """Scratch arrays for blocks of `BLOCK` rows of `facts`."""
        recent_categories, width = facts.windows.shape[1], facts.log_scale.size
        rows, both, most = BLOCK, NET_HIDDEN + NEXT_HIDDEN, BLOCK * recent_categories
        places = rows * (facts.popular_mask.shape[1] + facts.successor_mask.shape[1])
        columns = facts.popular_next.shape[2]
        shapes = [(rows, width), (most, width), (most, NET_HIDDEN), (most,), (rows, both), (most,), (rows, both)]
        shapes += [(columns, places), (NEXT_HIDDEN, places), (places,), (places,)]
        shapes += [(width, NET_HIDDEN), (user_width, both)]
        return cls(np.zeros(rows + 1, np.int32), *(np.zeros(shape, np.float32) for shape in shapes))
