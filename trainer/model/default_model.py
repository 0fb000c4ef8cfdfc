"""The default ranker without its graph: names, shapes and first values of its weights, its inputs and learning rates.

The compiled engine trains it without TensorFlow. `DefaultRanker` has the formulas, as the graph that serving's program
is lowered from.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from state.config.sections import Model as ModelSettings
from state.features.spec import FeatureSpec
from state.ranking.transitions import COLUMNS
from trainer.model.first_values import (
    dense_layers,
    popular_prior,
    query_kernel,
    recency_prior,
    successor_prior,
    uniform,
)
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.inputs import INPUTS, Input, shapes, sizes
from trainer.model.model import F32, require_shapes
from trainer.model.scaling import window_scaling

NET_HIDDEN, NEXT_HIDDEN = HYPERPARAMETERS.net_hidden, HYPERPARAMETERS.next_hidden

FAST_WEIGHTS = (
    "interest.user_kernel",
    "interest.linear",
    "interest.bias",
    "interest.kernel_0",
    "interest.kernel_1",
    "interest.position",
    "interest.next",
    "interest.next_0",
    "interest.next_1",
    "interest.successor",
    "interest.other",
)
"""The weights that change within a record, in the order in which a version stores their slots."""


class DefaultModel:
    """See `Model`; with the weights in host arrays.

    Args:
        settings: The section `[model]`.
        spec: Names the D features and the F windows of each of the L categories.
        prepared: D', the number of columns of the preprocessing.
        labelled: Whether engagement is learned from labels. All parts of it but the crosses then start at zero, and the
            network learns the residual of the crosses.
        tower: First values of a custom tower's weights by name; None: the default tower's.
        is_dense: Whether the tower is a `DenseTower`, whose dropout is an input. A custom tower draws its own.

    Attributes:
        drops: Whether the tower's dropout is an input, `tower_kept`.
        user_width: U, the columns of the preprocessing that both nets read.
        window_names: The columns of a category's windows, the counts of transitions last.
        window_scaling: Their scaling.
    """

    def __init__(
        self,
        settings: ModelSettings,
        spec: FeatureSpec,
        prepared: int,
        labelled: bool = False,
        tower: Mapping[str, F32] | None = None,
        is_dense: bool = True,
    ) -> None:
        numbers, dim, width = HYPERPARAMETERS, settings.dim, settings.hidden[-1]
        self.settings = settings
        self.window_names = names = (*spec.window_names, *COLUMNS)
        self.window_scaling = window_scaling(names)
        self.tables: Mapping[str, int] = dict.fromkeys(("user", "item", "category", "context"), dim)
        self.sizes: Mapping[str, int | None] = sizes(settings, spec)
        # A custom preprocessing need not keep a column for each feature.
        of_user = sum(not name.startswith("label.") for name in spec.names)
        self.user_width = of_user if prepared == len(spec.names) else prepared
        self.drops = is_dense and settings.dropout > 0.0
        self.inputs: tuple[Input, ...] = tuple(input_ for input_ in INPUTS if input_.name != "tower_kept" or self.drops)
        self.initial_ranges: Mapping[str, float] = {}
        self.learning_rates: Mapping[str, float] = (
            numbers.labelled_learning_rates if labelled else numbers.learning_rates
        )
        self.fast_weights: tuple[str, ...] = FAST_WEIGHTS
        self.fast_learning_rates: Mapping[str, float] = {"interest.user_kernel": numbers.user_lr_scale}
        query, engagement = (0.0, 0.0) if labelled else (numbers.first_query, numbers.first_engagement)

        def drawn(name: str, shape: tuple[int, ...], reach: float) -> dict[str, F32]:
            return {name: uniform(name, shape, reach)}

        if tower is None:
            tower = dense_layers(prepared + 3 * dim, settings.hidden)
        prior = [0.0, 0.0, 0.0] if labelled else numbers.first_prior
        self.dense: Mapping[str, F32] = (
            {f"tower.{name}": weight for name, weight in tower.items()}
            | {"query.kernel": query_kernel(width, dim, query)}
            | drawn("query.bias", (2 * dim + 1,), 0.0)
            | {"interest.linear": recency_prior(names)}
            | drawn("interest.position", (spec.recent_categories,), 0.0)
            | drawn("interest.user_kernel", (self.user_width, NET_HIDDEN + NEXT_HIDDEN), numbers.first_user_kernel)
            | drawn("interest.kernel_0", (2 * len(names), NET_HIDDEN), numbers.first_net)
            | drawn("interest.bias", (NET_HIDDEN + NEXT_HIDDEN,), 0.0)
            | drawn("interest.kernel_1", (NET_HIDDEN,), 0.0)
            | drawn("interest.next", (2, len(COLUMNS)), 0.0)
            | drawn("interest.next_0", (len(COLUMNS), NEXT_HIDDEN), numbers.first_net)
            | drawn("interest.next_1", (NEXT_HIDDEN,), 0.0)
            | {"interest.successor": successor_prior()}
            | {"interest.popular": popular_prior(settings.popular)}
            | {"interest.other": np.array([numbers.first_other], np.float32)}
            | {"engagement.prior": np.array(prior, np.float32)}
            | drawn("engagement.item", (dim,), engagement)
            | drawn("engagement.category", (dim,), engagement)
        )

    def hold(self, arrays: Mapping[str, F32]) -> None:
        """Takes over an optimizer's arrays, by name, which are trained in place."""
        self.dense = arrays

    def shapes(self, training: bool = False) -> dict[str, tuple[int | None, ...]]:
        """See `Model`."""
        return shapes(self.inputs, self.sizes, self.tables, training)

    def weights(self) -> dict[str, F32]:
        """See `Model`."""
        return {name: array.copy() for name, array in self.dense.items()}

    def set_weights(self, weights: Mapping[str, F32]) -> None:
        """See `Model`."""
        require_shapes(self.dense, weights)
        for name, array in self.dense.items():
            array[...] = weights[name]
