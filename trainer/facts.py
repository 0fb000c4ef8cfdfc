"""What the heads are given of a step and what they find: plain arrays, by name.

The compiled loops of `trainer/heads.py` read and write them; the host makes
the facts, the graph computes the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U16 = npt.NDArray[np.uint16]


class Facts(NamedTuple):
    """What the host knows of a step; rows are positions in the distinct rows of a table, 0 the missing one.

    Attributes:
        windows: `[B, L, F]` uint16.
        log_scale: `[F]` float32, the factor of a window's logarithm.
        scale: `[F]` float32, the factor of the window itself.
        label_mask: `[B, L]` float32.
        popular_mask: `[B, P]` float32.
        other_mask: `[B]` float32.
        label_at: `[B, L]` int32 category rows of the labels.
        other_at: `[B]` int32 category row of the last slot.
        pair_category_at: `[2 B]` int32, of the rows and then of their negatives.
        pair_item_at: `[2 B]` int32.
        target: `[B]` int32, a candidate's slot, -1 for none.
        weight: `[B]` float32, factor of a row's interest loss.
        engaged: `[2 B]` float32 outcomes.
        engaged_shift: `[2 B]` float32, added to the score of a pair before its loss.
        engaged_weight: `[2 B]` float32, factor of a pair's loss; 0 leaves it out.
        cross_at: `[B, C]` int32 cross rows of each row's own pair; the missing one where it is not learned from.
        share_at: `[C]` int32 cross rows in which the shares of each cross are.
        cross_prior: `[C]` float32, the precision of each weight of a cross before anything was learned.
    """

    windows: U16
    log_scale: F32
    scale: F32
    label_mask: F32
    popular_mask: F32
    other_mask: F32
    label_at: I32
    other_at: I32
    pair_category_at: I32
    pair_item_at: I32
    target: I32
    weight: F32
    engaged: F32
    engaged_shift: F32
    engaged_weight: F32
    cross_at: I32
    share_at: I32
    cross_prior: F32


class Given(NamedTuple):
    """What the graph computed of a step, float32.

    Attributes:
        scoring: `[B, 2 dim + 1]` without dropout: the query, the engagement query, the user's engagement.
        learning: The same with dropout.
        scoring_popular: `[B, P]` popular logits without dropout, not masked.
        learning_popular: The same with dropout.
        personal: `[B, 2 F + 16]`: the weights of windows and differences, and the net's first layer of this user.
        category: `[u, dim]` distinct category rows.
        item: `[v, dim]` distinct item rows.
        net_0: `[2 F, 16]` the net over windows and differences.
        net_1: `[16]`
        position: `[L]`
        other: `[1]`
        prior: `[3]` of a known label, of its log probability, of that of another.
        item_bias: `[dim]`
        category_bias: `[dim]`
        linear: `[2 F + 16]`, the part of `personal` that all users share.
        cross: `[w, 2]` distinct weights and margins of crosses, and their shares.
        cross_precision: `[w, 2]`, how much was learned of each.
    """

    scoring: F32
    learning: F32
    scoring_popular: F32
    learning_popular: F32
    personal: F32
    category: F32
    item: F32
    net_0: F32
    net_1: F32
    position: F32
    other: F32
    prior: F32
    item_bias: F32
    category_bias: F32
    linear: F32
    cross: F32
    cross_precision: F32


class Slopes(NamedTuple):
    """Derivatives of the loss by what of `Given` is learned, in its shapes."""

    learning: F32
    learning_popular: F32
    personal: F32
    category: F32
    item: F32
    net_0: F32
    net_1: F32
    position: F32
    other: F32
    prior: F32
    item_bias: F32
    category_bias: F32


MOVING = ("linear", "net_0", "net_1", "position", "other")
"""What of `Given` moves within a step."""


class Moved(NamedTuple):
    """The weights that move within a step, one behind another in the order of `MOVING`, and their Adam slots.

    Attributes:
        weights: `[m]` float32.
        first: `[m]` float32, the mean of their derivatives.
        second: `[m]` float32, the mean of the squares.
        powers: `[2]` float32, both betas to the power of the moves so far.
    """

    weights: F32
    first: F32
    second: F32
    powers: F32

    @classmethod
    def of(cls, weights: F32) -> Moved:
        """Before the first move."""
        return cls(weights, np.zeros_like(weights), np.zeros_like(weights), np.ones(2, np.float32))


class Learned(NamedTuple):
    """What the heads have learned themselves, for when the guard accepts the step.

    Attributes:
        cross: That of `Given` after the step.
        cross_precision: Likewise.
        moved: The weights that moved within it.
    """

    cross: F32
    cross_precision: F32
    moved: Moved


class Scores(NamedTuple):
    """The measures of a step, without dropout.

    Attributes:
        label_logits: `[B, L]` float32, MASKED where there is no label.
        popular_logits: `[B, P]` float32.
        interest_loss: `[B]` float32, 0 without a target.
        rank: `[B]` int32, labels and popular ones before the target; all of them where it is neither.
        engagement: `[2 B]` float32 logits.
        engagement_loss: `[2 B]` float32.
    """

    label_logits: F32
    popular_logits: F32
    interest_loss: F32
    rank: I32
    engagement: F32
    engagement_loss: F32
