"""Initial values of the dense weights: the same in every process, and already a fair guess of the next click."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from state.ranking.transitions import SUCCESSORS
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.tables.index import hashed_uniform

F32 = npt.NDArray[np.float32]


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
