"""All tuned constants of the trainer that are not settings, in one frozen record that each version stores.

Two versions are comparable only if these are equal. `docs/model/experiments.md` has the measurements. For a
change of the formula itself, raise `MODEL_CODE`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

MODEL_CODE = 2
"""Version of the formulas of `trainer/model` and of both engines. Raise it if a step with the same numbers changes."""


@dataclass(frozen=True)
class Hyperparameters:
    """The tuned numbers.

    Attributes:
        latest: The number of newest categories of the user whose mean row is an input of the tower.
        net_hidden: Hidden units of the net over a category's windows.
        next_hidden: Hidden units of the net over how often a candidate came next.
        user_limit: Clipping limit of a user's features in both nets, in both directions. Without it, a burst of events
            would move the user's logits by a multiple in each early step of Adam.
        window_scaling: By prefix of a window's name: factor of its logarithm, factor of the integer, shift.
        recency_prior: Initial weights of a category's windows, by prefix of their names.
        first_query: Range of the initial weights of the engagement query.
        first_engagement: Range of the initial weights of item and category in engagement.
        first_prior: Initial weights of interest as a prior of engagement: of a known category, of its log probability,
            of the log probability of another category.
        first_user_kernel: Range of the initial weights of the user's features.
        first_net: Range of the initial weights of both nets.
        first_other: Initial logit of a category that is no other candidate.
        first_popular: Initial logit of the most popular category, and its decrease for each factor e of the rank.
        first_successor: The same of the successors, until their counts are learned.
        first_row: A new embedding row is uniform in plus and minus this.
        loss_scale: The loss of a step is the sum over its rows, divided by this.
        engagement_share: Weight of the engagement loss relative to the interest loss.
        assumed_click_rate: Clicks per impression in a log without impressions.
        learning_rates: Factors of Adam's step size by prefix of a weight's name, in a log without labels.
        labelled_learning_rates: The same in a log with labels, where crosses explain most.
        beta_1: Of Adam.
        beta_2: Of Adam, and of the fast weights.
        epsilon: Of Adam, of the fast weights and of Adagrad.
        fast_rows: Rows of a record after which the fast weights move.
        fast_learning_rate: Factor of their step size.
        user_lr_scale: Factor of it for the weights of the user's features, of which there are many more.
        average_share: Weight of the mean over the latest moves in the scoring weights; the rest is the last iterate.
        average_moves: Moves over which that mean is taken.
        first_moves: Reduces the weight of the first moves in that mean.
        cross_precision: Prior precision of a cross's weight (1 / variance of a logit), by the kind of its values. Four
            labels add at most one unit of precision.
        marginal_precision: Prior precision of a marginal logit: four labels, if half of all are positive.
        share_precision: Prior precision of what is added to an initial share.
        guard_warm_up: Accepted steps before the guard compares.
        guard_memory: Weight of the newest accepted step in the guard's running values.
        guard_factor: Multiple of the expected loss or gradient above which the guard skips an update.
        guard_patience: Consecutive skipped updates after which training is held.
    """

    latest: int = 3
    net_hidden: int = 64
    next_hidden: int = 16
    user_limit: float = 3.0
    # A decayed count is in units of 1/256 events, a recency in eighths of an octave: 80 is an hour.
    window_scaling: Mapping[str, tuple[float, float, float]] = field(
        default_factory=lambda: {
            "count": (1.5, 0.0, -1.05),
            "decayed": (0.6, 0.0, -3.3),
            "recency": (0.0, 1 / 32, -2.5),
            "next_share": (0.6, 0.0, 0.0),
            "": (1.5, 0.0, 0.0),
        }
    )
    recency_prior: Mapping[str, float] = field(
        default_factory=lambda: {
            "is_last": 1.0,
            "next_count": 0.2,
            "recency": -0.3,
            "decayed": 0.25,
            "of_latest_5": 0.33,
            "of_latest_20": 0.17,
            "follows": 0.33,
        }
    )
    first_query: float = 0.15
    first_engagement: float = 0.3
    first_prior: tuple[float, float, float] = (3.0, 1.0, 1.0)
    first_user_kernel: float = 0.05
    first_net: float = 0.5
    first_other: float = 1.0
    first_popular: tuple[float, float] = (-1.5, 0.5)
    first_successor: tuple[float, float] = (-2.0, 0.5)
    first_row: float = 0.05
    loss_scale: float = 1024.0
    engagement_share: float = 0.2
    assumed_click_rate: float = 0.05
    learning_rates: Mapping[str, float] = field(
        default_factory=lambda: {"interest.popular": 100.0, "engagement.": 20.0}
    )
    labelled_learning_rates: Mapping[str, float] = field(
        default_factory=lambda: {"interest.popular": 100.0, "engagement.": 1.0}
    )
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-7
    fast_rows: int = 32
    fast_learning_rate: float = 6.0
    user_lr_scale: float = 0.5
    average_share: float = 0.7
    average_moves: float = 200.0
    first_moves: float = 10.0
    cross_precision: Mapping[str, float] = field(
        default_factory=lambda: {
            "every": 1.0,
            "user": 8.0,
            "item": 30.0,
            "category": 15.0,
            "context": 0.05,
            "user attribute": 300.0,
            "item attribute": 40.0,
            "share": 2.0,
            "share by weight": 48.0,
            "positive of labelled": 300.0,
            "labelled": 300.0,
            "pause": 6.0,
            "pause before": 15.0,
            "session": 15.0,
            "days": 15.0,
            "latest item": 30.0,
            "user*item": 0.3,
            "user*category": 20.0,
            "user*context": 8.0,
            "user*item attribute": 30.0,
            "context*category": 75.0,
            "context*item attribute": 30.0,
        }
    )
    marginal_precision: float = 1.0
    share_precision: float = 30.0
    guard_warm_up: int = 20
    guard_memory: float = 0.05
    guard_factor: float = 8.0
    guard_patience: int = 20

    def texts(self) -> dict[str, str]:
        """Every number as JSON by name, for a version's manifest."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}


HYPERPARAMETERS = Hyperparameters()
"""The values that the trainer uses."""
