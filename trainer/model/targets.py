"""The training targets of rows, and the constants of logits that host code and graphs share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from trainer.model.hyperparameters import HYPERPARAMETERS

Tensor = Any
"""A `tf.Tensor`, or on the host a NumPy array; TensorFlow ships no types."""

MASKED = -1e9
"""The logit of a masked candidate."""

NEGATIVE_SHIFT = float(np.log((1.0 - HYPERPARAMETERS.assumed_click_rate) / HYPERPARAMETERS.assumed_click_rate))
"""Added in training to each engagement logit of a log without impressions. One negative is drawn for each click, which
alone would mean even odds. The shift log((1 - r) / r) corrects this for the click rate r (King and Zeng 2001)."""


class Targets(NamedTuple):
    """The training targets of B rows.

    Attributes:
        slot: `[B]` int32, the candidate that was clicked, in the order of the logits; -1 for none.
        weight: `[B]` float32, factor of a row's interest loss, 0 without a target.
        label: `[B]` float32, whether the user engaged with the row's own item.
        label_shift: `[B]` float32, added to its logit before the loss.
        label_weight: `[B]` float32, factor of its loss; 0 leaves it out.
        negative_shift: `[B]` float32, added to the logit of the drawn negative, whose label is 0.
        negative_weight: `[B]` float32, factor of its loss; 0 leaves it out.
    """

    slot: Tensor
    weight: Tensor
    label: Tensor
    label_shift: Tensor
    label_weight: Tensor
    negative_shift: Tensor
    negative_weight: Tensor
