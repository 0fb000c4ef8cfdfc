"""The default ranker without its graph: names, shapes and first values of its weights, its inputs and learning rates.

The compiled engine trains it without TensorFlow. `DefaultRanker` has the formulas, as the graph that serving's program
is lowered from.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from state.config.sections import Model as ModelSettings
from state.features.spec import FeatureSpec
from state.ranking.transitions import COLUMNS, SUCCESSORS
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.inputs import INPUTS, Input, shapes, sizes
from trainer.model.model import F32, require_shapes
from trainer.tables.index import hashed_uniform

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


class Scaling(NamedTuple):
    """The factors of n columns, `[n]` float32 each."""

    log_scale: F32
    scale: F32
    shift: F32


def feature_scaling(names: tuple[str, ...]) -> Scaling:
    """The scaling of features without an analysis of past clicks, to about [0, 2].

    Counts become log(1 + x) / 4. A recency is a logarithm already (eight steps
    an octave, 255 for never) and is only scaled.
    """
    recency = np.array(["recency" in name or name.startswith("gap.") for name in names])
    scale = np.where(recency, 1 / 128, 0.0).astype(np.float32)
    return Scaling(np.where(recency, 0.0, 1 / 4).astype(np.float32), scale, np.zeros_like(scale))


def window_scaling(names: tuple[str, ...]) -> Scaling:
    """The scaling of the windows of categories, to about [-2, 4]: log(1 + x), centred by their kind.

    The kinds differ more than the categories of one user do.
    """
    by_kind = HYPERPARAMETERS.window_scaling
    rows = [by_kind[next((kind for kind in by_kind if name.startswith(kind)), "")] for name in names]
    return Scaling(*np.array(rows, np.float32).T.copy())


def uniform(name: str, shape: tuple[int, ...], reach: float) -> F32:
    """Initial values of the weight `name`: uniform in plus and minus `reach`, by a hash of its name."""
    numbers = np.arange(1, shape[0] + 1, dtype=np.uint64)
    first = hashed_uniform(numbers, int(np.prod(shape[1:])), name) * np.float32(reach)
    return first.reshape(shape)


def dense_layers(width_in: int, hidden: tuple[int, ...]) -> dict[str, F32]:
    """Initial weights of dense layers behind an input of width `width_in`: `bias_<i>` of all layers, then `kernel_<i>`.

    The order, that of the variables of a `tf.Module`, decides the bits of the gradient's norm.
    """
    widths = (width_in, *hidden)
    biases = {f"bias_{number}": uniform(f"bias_{number}", (width,), 0.0) for number, width in enumerate(hidden)}
    kernels = {
        f"kernel_{number}": uniform(f"kernel_{number}", (before, width), (6.0 / (before + width)) ** 0.5)
        for number, (before, width) in enumerate(itertools.pairwise(widths))
    }
    return biases | kernels


def recency_prior(window_names: tuple[str, ...]) -> F32:
    """Initial weights of a category's windows, `[F]` float32, by their names: recent and frequent categories come first.

    The prior assumes that a category's probability is proportional to how often it was clicked. The exponents of all counts
    therefore add up to about one, half of it for the latest events. How often it came next after the newest one counts as
    much again.
    """
    weights = np.zeros(len(window_names), np.float32)
    halved = 1.0
    for position, name in enumerate(window_names):
        prior = HYPERPARAMETERS.recency_prior.items()
        weights[position] = next((weight for kind, weight in prior if name.startswith(kind)), 0.0)
        if name.startswith("decayed"):
            # The shortest half-life comes first.
            weights[position] *= halved
            halved = 0.5
    return weights


def query_kernel(width: int, dim: int, reach: float) -> F32:
    """Initial weights of the queries, `[width, 2 dim + 1]`: zero for interest, up to `reach` for engagement."""
    engagement = hashed_uniform(np.arange(1, width + 1, dtype=np.uint64), dim + 1, "query.engagement")
    return np.concatenate([np.zeros((width, dim), np.float32), engagement * np.float32(reach)], 1)


def popular_prior(popular: int) -> F32:
    """Initial logits of the popular candidates by rank: far below a category that the user has clicked."""
    return _by_rank(HYPERPARAMETERS.first_popular, popular)


def successor_prior() -> F32:
    """Initial logits of the successors by rank: below the popular ones."""
    return _by_rank(HYPERPARAMETERS.first_successor, SUCCESSORS)


def _by_rank(prior: tuple[float, float], count: int) -> F32:
    first, less = prior
    return (first - less * np.log(np.arange(1, count + 1))).astype(np.float32)
