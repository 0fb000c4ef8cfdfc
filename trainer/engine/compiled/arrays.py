"""Inputs and outputs of the compiled heads (`heads.py`), as named arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.compiled import layout
from trainer.model.default_model import NET_HIDDEN, NEXT_HIDDEN
from trainer.model.hyperparameters import HYPERPARAMETERS

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U16 = npt.NDArray[np.uint16]


@layout(
    "const(u2[:, :, ::1]), u2[:, :, ::1], f4[::1], f4[::1], f4[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], u2[:, :, ::1], u2[:, :, ::1], i4[:, ::1], i4[:, ::1], i4[::1], i4[::1], i4[::1], i4[::1], f4[::1], f4[::1], f4[::1], f4[::1]"
)
class Facts(NamedTuple):
    """The host's data of a step. A row index counts the distinct rows of a table; index 0 is the missing row.

    Attributes:
        windows: `[B, L, F - 2]` uint16, the windows of each category, read-only.
        recent_next: `[B, L, 2]` uint16, how often each category came next (`state/ranking/transitions.py`).
        log_scale: `[F]` float32, factors of the logarithm: of each window, then of the counts in `recent_next`.
        scale: `[F]` float32, factors of the value itself.
        shift: `[F]` float32, added to the sum of both.
        recent_mask: `[B, L]` float32.
        popular_mask: `[B, P]` float32.
        successor_mask: `[B, S]` float32.
        other_mask: `[B]` float32.
        popular_next: `[B, P, 2]` uint16, how often the popular categories came next.
        successor_next: `[B, S, 2]` uint16, the same of the successors.
        recent_at: `[B, L]` int32 category rows of the recent categories.
        successor_at: `[B, S]` int32 category rows of the successors.
        other_at: `[B]` int32 category row of the last slot.
        pair_category_at: `[2 B]` int32, first of the rows, then of their negatives.
        pair_item_at: `[2 B]` int32.
        target: `[B]` int32, the slot of the target candidate, -1 for none.
        weight: `[B]` float32, factor of a row's interest loss.
        engaged: `[2 B]` float32 outcomes.
        engaged_shift: `[2 B]` float32, added to the score of a pair before its loss.
        engaged_weight: `[2 B]` float32, factor of a pair's loss; 0 leaves the pair out.
    """

    windows: U16
    recent_next: U16
    log_scale: F32
    scale: F32
    shift: F32
    recent_mask: F32
    popular_mask: F32
    successor_mask: F32
    other_mask: F32
    popular_next: U16
    successor_next: U16
    recent_at: I32
    successor_at: I32
    other_at: I32
    pair_category_at: I32
    pair_item_at: I32
    target: I32
    weight: F32
    engaged: F32
    engaged_shift: F32
    engaged_weight: F32


@layout("f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], f4[::1], f4[::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[::1], f4[::1]")
class FastWeights(NamedTuple):
    """The weights that change within a step, or the derivatives by them, float32.

    Attributes:
        user: `[U, H + K]`, user features to the hidden units of both nets.
        linear: `[F]`, weights of a category's windows.
        bias: `[H + K]`, of both nets.
        net_0: `[2 F, H]`, first layer of the window net: a category's windows, then the newest category's.
        net_1: `[H]`
        position: `[L]`
        next: `[2, 2]`, weights of the next-counts of popular categories, then of successors.
        next_0: `[2, K]`, first layer of the net over next-counts.
        next_1: `[K]`
        successor: `[S]`, of a successor's rank.
        other: `[1]`
    """

    user: F32
    linear: F32
    bias: F32
    net_0: F32
    net_1: F32
    position: F32
    next: F32
    next_0: F32
    next_1: F32
    successor: F32
    other: F32

    def flat(self) -> F32:
        """A flat copy, `[m]`."""
        return np.concatenate([part.reshape(-1) for part in self])

    @classmethod
    def of(cls, flat: F32, like: FastWeights) -> FastWeights:
        """Views into `flat` `[m]`, which holds the parts concatenated, in the shapes of `like`."""
        parts, begin = [], 0
        for part in like:
            parts.append(flat[begin : begin + part.size].reshape(part.shape))
            begin += part.size
        return cls(*parts)


FAST = FastWeights._fields


FROM_HEADS = {
    "interest.user_kernel": "user",
    "interest.linear": "linear",
    "interest.bias": "bias",
    "interest.kernel_0": "net_0",
    "interest.kernel_1": "net_1",
    "interest.position": "position",
    "interest.next": "next",
    "interest.next_0": "next_0",
    "interest.next_1": "next_1",
    "interest.successor": "successor",
    "interest.other": "other",
    "engagement.prior": "prior",
    "engagement.item": "item_bias",
    "engagement.category": "category_bias",
}
"""The dense weights that only the heads use, and their names in the heads' structures."""


@layout(
    "f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1], f4[::1], FastWeights"
)
class HeadInputs(NamedTuple):
    """The inputs of the heads from the tower, the tables and the dense weights, float32.

    Attributes:
        plain_queries: `[B, 2 dim + 1]` without dropout: the query, the engagement query, the user's engagement.
        queries: The same with dropout.
        plain_popular: `[B, P]` popular logits without dropout, not masked.
        popular_logits: The same with dropout.
        user_features: `[B, U]`, the input of both nets.
        category: `[u, dim]` distinct category rows.
        item: `[v, dim]` distinct item rows.
        prior: `[3]` factors: of a known label, of its log probability, of the log probability of another label.
        item_bias: `[1, dim]`
        category_bias: `[1, dim]`
        crossed: `[B]` logit of the crosses of each row's own pair.
        fast: The weights that change within the step.
    """

    plain_queries: F32
    queries: F32
    plain_popular: F32
    popular_logits: F32
    user_features: F32
    category: F32
    item: F32
    prior: F32
    item_bias: F32
    category_bias: F32
    crossed: F32
    fast: FastWeights


@layout("f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1], FastWeights")
class Gradients(NamedTuple):
    """Derivatives of the loss by the learned arrays of `HeadInputs`, in their shapes.

    Attributes:
        fast: By the weights that change within the step, summed over the step.
    """

    queries: F32
    popular_logits: F32
    category: F32
    item: F32
    prior: F32
    item_bias: F32
    category_bias: F32
    fast: FastWeights


BLOCK = HYPERPARAMETERS.fast_rows
"""Rows whose candidates pass through the nets together. After each block the fast weights move."""


@layout(
    "i4[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[::1], f4[:, ::1], f4[:, ::1], f4[:, ::1], f4[::1], f4[::1]"
)
class Workspace(NamedTuple):
    """Scratch arrays for a block of n rows.

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

    @classmethod
    def of(cls, facts: Facts) -> Workspace:
        """Scratch arrays for blocks of `BLOCK` rows of `facts`."""
        recent_categories, width = facts.windows.shape[1], facts.log_scale.size
        rows, hidden, most = BLOCK, NET_HIDDEN + NEXT_HIDDEN, BLOCK * recent_categories
        candidates, columns = facts.popular_mask.shape[1] + facts.successor_mask.shape[1], facts.popular_next.shape[2]
        shapes = [(rows, width), (most, width), (most, NET_HIDDEN), (most,), (rows, hidden), (most,), (rows, hidden)]
        shapes += [(columns, candidates * rows), (NEXT_HIDDEN, candidates * rows)]
        shapes += [(candidates * rows,), (candidates * rows,)]
        return cls(np.zeros(rows + 1, np.int32), *(np.zeros(shape, np.float32) for shape in shapes))
