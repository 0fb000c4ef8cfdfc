"""Every tuned number of the trainer that is no setting, in one frozen record: each version carries it whole.

Two versions are comparable only where these are equal. Where each number comes
from is in `trainer/MODEL.md`. Changing one changes what a click teaches:
raise `MODEL_CODE` for a change of the formula itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

MODEL_CODE = 2
"""Number of the formulas of `trainer/model` and of both engines: raised when a step with the same numbers does something else."""


@dataclass(frozen=True)
class Hyperparameters:
    """The tuned numbers.

    Attributes:
        latest: Categories of the user the mean of whose rows goes into the tower.
        net_hidden: Hidden units of the net over a category's windows.
        next_hidden: Hidden units of the net over how often a candidate came next.
        user_limit: Highest value of a user's feature in both nets, either side of 0: somebody with extreme windows is
            as others are at most. Else twenty purchases in a minute make that part ten times as large as those the
            weights learned from, and each early step of Adam moves that user's logits by the same factor.
        window_scaling: By the beginning of a window's name: factor of its logarithm, factor of the integer, shift.
        recency_prior: First weights of a category's windows, by the beginning of their names.
        first_query: Reach of the first weights of the engagement query.
        first_engagement: Reach of the first weights of item and category in engagement.
        first_prior: First weights of interest as a prior of engagement: of a known category, of its log probability,
            of that of another.
        first_user_kernel: Reach of the first weights by the user's features.
        first_net: Reach of the first weights of both nets.
        first_other: First logit of a category that is no other candidate.
        first_popular: First logit of the most popular category, and what each octave of rank (natural) takes off.
        first_successor: The same of the successors, until their counts are understood.
        first_row: A new embedding row is uniform in plus and minus this.
        loss_scale: The loss of a step is its sum over rows, divided by this.
        engagement_share: Weight of the engagement loss against the interest loss.
        assumed_click_rate: Clicks per impression in a log without impressions.
        learning_rates: Factors of Adam's step size by the beginning of a weight's name, in a log without labels: the few
            weights of the popular ranks see every row, those of engagement every pair.
        labelled_learning_rates: The same in a log with labels, where crosses know most of it: what is left is mostly chance.
        beta_1: Of Adam.
        beta_2: Of Adam, and of the fast weights.
        epsilon: Of Adam, of the fast weights and of Adagrad.
        fast_rows: Rows of a record after which the fast weights move: they are few, and one move a record is too slow for them.
        fast_learning_rate: Factor of their step size.
        user_lr_scale: Factor of it for the weights by the user's features, of which there are many more.
        average_share: What scores is this much of the mean over the latest moves, and for the rest where the last one led.
        average_moves: Moves over which that mean is taken.
        first_moves: Number that makes the first ones count less.
        cross_precision: Precision of a cross's weight before anything was learned (1 / variance of a logit), by the kind
            of its values. A context differs most from another, then somebody's taste for an item that comes again;
            what an age band has in common differs least. Four labels tell one of precision, at best.
        marginal_precision: The same of a marginal logit: four labels, where half of all are positive.
        share_precision: The same of what is added to a first share.
        guard_warm_up: Accepted steps before the guard compares.
        guard_memory: Share of the newest accepted step in the guard's running values.
    """

    latest: int = 3
    net_hidden: int = 64
    next_hidden: int = 16
    user_limit: float = 3.0
    # A decayed count is in 1/256 events, a recency in eighths of an octave: 80 is an hour.
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

    def texts(self) -> dict[str, str]:
        """Every number as JSON by name, as a manifest records it."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}


HYPERPARAMETERS = Hyperparameters()
"""The trainer's."""
