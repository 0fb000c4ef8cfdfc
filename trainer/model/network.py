"""The network: preprocessing, tower, the interest head over open categories, the engagement head.

`Model.forward` is a pure TensorFlow function of its inputs and the dense
weights, made of operations that LiteRT has built in. Training, the serving
program and the tests call the same one.

    features ─ preprocessing ─┐
    user row, latest rows     ├─ tower ─ vector ─┬─ query ── interest logits of categories, popular ones, any other
    mean context row ─────────┘                  └─ with item and category ── engagement logit

Interest is scored over rows of categories, never over an index: a category
first seen a minute ago is a candidate like any other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.ranking.transitions import COLUMNS, SUCCESSORS
from trainer.engine.heads import NET_HIDDEN, NEXT_HIDDEN
from trainer.tables.index import hashed_uniform

Tensor = Any
"""A `tf.Tensor`; TensorFlow ships no types."""

F32 = npt.NDArray[np.float32]
Preprocessing = Callable[[Tensor], Tensor]

LATEST = 3
"""Categories of the user the mean of whose rows goes into the tower."""

MASKED = -1e9
"""The logit of a candidate that is not there."""

PRIORS = {
    "is_last": 1.0,
    "next_count": 0.2,
    "recency": -0.3,
    "decayed": 0.25,
    "of_latest_5": 0.33,
    "of_latest_20": 0.17,
    "follows": 0.33,
}
"""First weights of the windows whose names begin so, in the evidence."""

USER_MOST = 3.0
"""Highest value of a user's feature in the evidence, either side of 0: somebody with extreme windows is as others are at most.

Without it twenty purchases in a minute made that user's part some ten times as
large as those the weights had learned from, and each early step of Adam moved
that user's logits by the same factor.
"""


class Tower(Protocol):
    """What `build` returns: a `tf.Module` whose variables have names of their own."""

    @property
    def trainable_variables(self) -> tuple[Any, ...]:
        """Its weights, in a fixed order."""

    def __call__(self, x: Tensor, training: bool, seed: Tensor) -> Tensor:
        """`[B, width_in]` float32 and a `[2]` int32 dropout seed to `[B, width]` float32."""


class DenseTower(tf.Module):
    """Dense layers with ReLU and dropout after the first: the tower unless another is plugged in."""

    def __init__(self, width_in: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__(name="tower")
        self._dropout = dropout
        self.kernels = []
        self.biases = []
        for number, width in enumerate(hidden):
            self.kernels.append(_weight(f"kernel_{number}", (width_in, width), (6.0 / (width_in + width)) ** 0.5))
            self.biases.append(_weight(f"bias_{number}", (width,), 0.0))
            width_in = width

    def __call__(self, x: Tensor, training: bool, seed: Tensor) -> Tensor:
        """See `Tower`."""
        first = self._first(x)
        return self._rest(_dropped(first, self._dropout, seed) if training else first)

    def both(self, prepared: Tensor, rows: Tensor, kept: Tensor | None) -> tuple[Tensor, ...]:
        """The vectors without and with dropout; the first layer, half the work, is computed once.

        Args:
            prepared: `[B, D']`, which no weight stands before: it gets no derivative.
            rows: `[B, k]`, the embedding rows; what follows them in the input is zero.
            kept: `[B, hidden]` float32, 0 for a dropped unit, else the factor that makes up for it; None drops
                nothing, and only one vector is returned.
        """
        kernel = self.kernels[0]
        parts = tf.split(
            kernel, [prepared.shape[1], rows.shape[1], kernel.shape[0] - prepared.shape[1] - rows.shape[1]]
        )
        first = tf.matmul(prepared, parts[0]) + tf.matmul(rows, parts[1])
        first = tf.nn.relu(tf.nn.bias_add(first, self.biases[0]))
        return (self._rest(first),) if kept is None else (self._rest(first), self._rest(first * kept))

    def _first(self, x: Tensor) -> Tensor:
        return tf.nn.relu(tf.nn.bias_add(tf.matmul(x, self.kernels[0]), self.biases[0]))

    def _rest(self, x: Tensor) -> Tensor:
        for kernel, bias in zip(self.kernels[1:], self.biases[1:], strict=True):
            x = tf.nn.relu(tf.nn.bias_add(tf.matmul(x, kernel), bias))
        return x


def build(width_in: int, settings: ModelSettings) -> Tower:
    """Builds the tower of the setting `model.tower`; a user's own has this signature.

    Args:
        width_in: Width of what the tower is given.
        settings: The section `[model]`; the last of `hidden` is the width of the vector.
    """
    tower: Tower = DenseTower(width_in, settings.hidden, settings.dropout)
    return tower


class Model(tf.Module):
    """The dense weights and the function over them.

    Args:
        settings: The section `[model]`.
        spec: Names the D features and the F windows of each of the L categories.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']` float32; None
            takes logarithms.
        labelled: Whether engagement is learned from labels. All but the crosses
            then begins at nothing: what was clicked is not what was shown, so
            that interest is no prior, and what the network adds is what
            crosses leave over.

    Attributes:
        dense: Every dense weight by name, in a fixed order. A version carries
            them under these names.
    """

    def __init__(
        self,
        settings: ModelSettings,
        spec: FeatureSpec,
        preprocessing: Preprocessing | None = None,
        labelled: bool = False,
    ) -> None:
        super().__init__(name="model")
        self.settings = settings
        self.features = len(spec.names)
        self.recent_categories = spec.recent_categories
        self.window_width = len(spec.window_names)
        self.preprocessing = preprocessing if preprocessing is not None else Logarithms(spec.names)
        self.prepare_windows = Windows((*spec.window_names, *COLUMNS))
        dim, width, windows = settings.dim, settings.hidden[-1], len(spec.window_names) + len(COLUMNS)
        into_tower = width_in(settings, spec, self.preprocessing)
        prepared = into_tower - 3 * dim
        # A preprocessing of the user's own need not keep a column for each feature.
        of_user = sum(not name.startswith("label.") for name in spec.names)
        self.person_width = of_user if prepared == len(spec.names) else prepared
        self.tower = load_builder(settings.tower)(into_tower, settings)
        own = {
            "query.kernel": tf.Variable(_query_kernel(width, dim, 0.0 if labelled else 0.15), name="query.kernel"),
            "query.bias": _weight("query.bias", (2 * dim + 1,), 0.0),
            "interest.linear": tf.Variable(recency_prior((*spec.window_names, *COLUMNS)), name="interest.linear"),
            "interest.position": _weight("interest.position", (spec.recent_categories,), 0.0),
            "interest.user_kernel": _weight(
                "interest.user_kernel", (self.person_width, NET_HIDDEN + NEXT_HIDDEN), 0.05
            ),
            "interest.kernel_0": _weight("interest.kernel_0", (2 * windows, NET_HIDDEN), 0.5),
            "interest.bias": _weight("interest.bias", (NET_HIDDEN + NEXT_HIDDEN,), 0.0),
            "interest.kernel_1": _weight("interest.kernel_1", (NET_HIDDEN,), 0.0),
            "interest.next": _weight("interest.next", (2, len(COLUMNS)), 0.0),
            "interest.next_0": _weight("interest.next_0", (len(COLUMNS), NEXT_HIDDEN), 0.5),
            "interest.next_1": _weight("interest.next_1", (NEXT_HIDDEN,), 0.0),
            "interest.successor": tf.Variable(_successor_prior(), name="interest.successor"),
            "interest.popular": tf.Variable(_popular_prior(settings.popular), name="interest.popular"),
            "interest.other": tf.Variable(np.ones(1, np.float32), name="interest.other"),
            "engagement.prior": tf.Variable(
                np.array([0.0, 0.0, 0.0] if labelled else [3.0, 1.0, 1.0], np.float32), name="engagement.prior"
            ),
            "engagement.item": _weight("engagement.item", (dim,), 0.0 if labelled else 0.3),
            "engagement.category": _weight("engagement.category", (dim,), 0.0 if labelled else 0.3),
        }
        self.dense: dict[str, Any] = {f"tower.{name}": weight for name, weight in named(self.tower).items()} | own

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores without dropout.

        Args:
            inputs: By name, all float32:
                features `[B, D]` raw integers; user_row, context_row, item_row,
                category_row `[B, dim]`; recent_rows `[B, L, dim]`, newest category
                first; category_windows `[B, L, F]` raw integers; recent_mask
                `[B, L]`, 1 where there is a category; popular_rows `[P, dim]`;
                popular_mask `[B, P]`, 1 where the category is a candidate of its own;
                successor_rows `[B, S, dim]`, successor_mask `[B, S]`; and, raw
                integers, recent_next `[B, L, 2]`, popular_next `[B, P, 2]` and
                successor_next `[B, S, 2]`: how often each came next.

        Returns:
            recent_logits `[B, L]`, popular_logits `[B, P]`, successor_logits
            `[B, S]` (candidates that are not there have MASKED),
            engagement_logit `[B]`, vector `[B, width]`.
        """
        prepared = self.preprocessing(inputs["features"])
        latest = tf.reduce_mean(inputs["recent_rows"][:, :LATEST, :], 1)
        x = tf.concat([prepared, inputs["user_row"], latest, inputs["context_row"]], 1)
        vector = self.tower(x, False, tf.constant([0, 0], tf.int32))
        queries = self.queries(vector, inputs["user_row"])
        logits = self.interest(queries, self.personal(prepared), inputs)
        return {
            "recent_logits": logits[0],
            "popular_logits": logits[1],
            "successor_logits": logits[2],
            "engagement_logit": self.engagement(queries, logits, inputs),
            "vector": vector,
        }

    def queries(self, vector: Tensor, user_row: Tensor) -> Tensor:
        """`[B, 2 dim + 1]`: what interest compares with a category, engagement with an item, and the user's engagement."""
        user = tf.concat([user_row, user_row, tf.zeros_like(user_row[:, :1])], 1)
        return tf.nn.bias_add(tf.matmul(vector, self.dense["query.kernel"]), self.dense["query.bias"]) + user

    def person(self, prepared: Tensor) -> Tensor:
        """The user's features as the evidence takes them, `[B, U]`: without those of single categories, which it has itself."""
        return tf.clip_by_value(prepared[:, : self.person_width], -USER_MOST, USER_MOST)

    def personal(self, prepared: Tensor) -> Tensor:
        """The user's part of the hidden units of both nets, `[B, H + K]`.

        How much evidence counts depends on the user: somebody who comes back
        to things is not somebody who goes on to new ones.
        """
        user = tf.matmul(self.person(prepared), self.dense["interest.user_kernel"])
        return tf.nn.bias_add(user, self.dense["interest.bias"])

    def evidence(self, personal: Tensor, category_windows: Tensor) -> Tensor:
        """What a user's windows say about each of the categories, `[B, L]`: a logit without embedding rows.

        A linear part and a net of one layer over a category's windows; the net
        also sees the newest category's windows and the user's part.
        """
        width, net_0 = category_windows.shape[2], self.dense["interest.kernel_0"]
        flat = self.prepare_windows(tf.reshape(category_windows, [-1, width]))
        newest = tf.reshape(flat, [-1, self.recent_categories, width])[:, 0]
        own = personal[:, :NET_HIDDEN] + tf.matmul(newest, net_0[width:])
        hidden = tf.reshape(tf.matmul(flat, net_0[:width]), [-1, self.recent_categories, NET_HIDDEN])
        hidden = tf.reshape(tf.nn.relu(hidden + tf.expand_dims(own, 1)), [-1, NET_HIDDEN])
        logits = tf.matmul(flat, tf.expand_dims(self.dense["interest.linear"], 1))
        logits += tf.matmul(hidden, tf.expand_dims(self.dense["interest.kernel_1"], 1))
        return tf.nn.bias_add(tf.reshape(logits, [-1, self.recent_categories]), self.dense["interest.position"])

    def popular(self, queries: Tensor, popular_rows: Tensor) -> Tensor:
        """The popular categories' logits, not masked, `[B, P]`."""
        # Zeros for the rest of the queries: the derivative of a slice would be a copy of all.
        rows = tf.pad(popular_rows, [[0, 0], [0, self.settings.dim + 1]])
        return tf.nn.bias_add(tf.matmul(queries, rows, transpose_b=True), self.dense["interest.popular"])

    def interest(self, queries: Tensor, personal: Tensor, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Interest logits of the categories `[B, L]`, the popular ones `[B, P]` and the successors `[B, S]`."""
        query = tf.expand_dims(queries[:, : self.settings.dim], 2)
        windows = tf.concat([inputs["category_windows"], inputs["recent_next"]], 2)
        recent_categories = tf.squeeze(tf.matmul(inputs["recent_rows"], query), 2) + self.evidence(personal, windows)
        popular = self.popular(queries, inputs["popular_rows"]) + self._came_next(personal, inputs["popular_next"], 0)
        successors = tf.squeeze(tf.matmul(inputs["successor_rows"], query), 2)
        successors += self._came_next(personal, inputs["successor_next"], 1)
        successors = tf.nn.bias_add(successors, self.dense["interest.successor"])
        return (
            _masked(recent_categories, inputs["recent_mask"]),
            _masked(popular, inputs["popular_mask"]),
            _masked(successors, inputs["successor_mask"]),
        )

    def _came_next(self, personal: Tensor, counts: Tensor, kind: int) -> Tensor:
        """What it says of candidates, `[B, k]`, how often they came next, `[B, k, 2]` raw integers."""
        places = counts.shape[1]
        logs = (
            tf.reshape(tf.math.log(counts + 1.0), [-1, len(COLUMNS)]) * self.prepare_windows.log_scale[-len(COLUMNS) :]
        )
        hidden = tf.reshape(tf.matmul(logs, self.dense["interest.next_0"]), [-1, places, NEXT_HIDDEN])
        hidden = tf.nn.relu(hidden + tf.expand_dims(personal[:, NET_HIDDEN:], 1))
        logits = tf.matmul(logs, tf.expand_dims(self.dense["interest.next"][kind], 1))
        logits += tf.matmul(tf.reshape(hidden, [-1, NEXT_HIDDEN]), tf.expand_dims(self.dense["interest.next_1"], 1))
        return tf.reshape(logits, [-1, places])

    def engagement(self, queries: Tensor, interest: tuple[Tensor, ...], inputs: Mapping[str, Tensor]) -> Tensor:
        """The engagement logit `[B]` of a user with an item.

        What the interest head says about the item's category is its prior;
        it is read, not pushed: engagement changes no weight of that head.
        """
        dim, item, category = self.settings.dim, inputs["item_row"], inputs["category_row"]
        interest = tuple(tf.stop_gradient(logits) for logits in interest)
        recent_logits = interest[0]
        # A candidate of logit 0 keeps the sum away from nothing where there is no other.
        logits = tf.concat([*interest, tf.zeros_like(recent_logits[:, :1])], 1)
        highest = tf.reduce_max(logits, 1)
        normaliser = highest + tf.math.log(tf.reduce_sum(tf.exp(logits - tf.expand_dims(highest, 1)), 1))
        # Rows of two categories are never equal; the missing row, all zero, is nobody's.
        apart = tf.reduce_sum(tf.abs(inputs["recent_rows"] - tf.expand_dims(category, 1)), 2)
        same = tf.where(apart > 0.0, 0.0, 1.0) * inputs["recent_mask"]
        known = tf.reduce_max(same, 1) * tf.where(tf.reduce_sum(tf.abs(category), 1) > 0.0, 1.0, 0.0)
        likely = tf.reduce_max(_masked(recent_logits, same), 1) - normaliser
        other = tf.reduce_sum(queries[:, :dim] * category, 1) + self.dense["interest.other"]
        other = tf.stop_gradient(other) - normaliser
        prior = self.dense["engagement.prior"]
        score = tf.where(known > 0.0, prior[0] + prior[1] * likely, prior[2] * other)
        score += tf.reduce_sum(item * self.dense["engagement.item"] + category * self.dense["engagement.category"], 1)
        return score + tf.reduce_sum(queries[:, dim : 2 * dim] * item, 1) + queries[:, 2 * dim] + inputs["cross"]

    def weights(self) -> dict[str, F32]:
        """A host copy of every dense weight by name."""
        return {name: np.array(variable.numpy()) for name, variable in self.dense.items()}

    def set_weights(self, weights: Mapping[str, F32]) -> None:
        """Sets every dense weight.

        Raises:
            SettingsError: A weight is missing or has another shape: the version is of another model.
        """
        for name, variable in self.dense.items():
            if name not in weights or weights[name].shape != tuple(variable.shape):
                found = f"shape {weights[name].shape}" if name in weights else "none"
                raise SettingsError(
                    f"dense weight {name}: expected shape {tuple(variable.shape)}, the version has {found}; "
                    "put the [model] settings back, or start a new epoch from nothing"
                )
            variable.assign(weights[name])


class Logarithms:
    """The preprocessing without an analysis of past clicks: `[n, k]` raw integers to about [0, 2].

    Counts become log(1 + x) / 4. A recency is a logarithm already (eight steps
    an octave, 255 for never) and is only scaled.

    Args:
        names: Names of the k columns.

    Attributes:
        log_scale: `[k]` float32, the factor of the logarithm.
        scale: `[k]` float32, the factor of the integer itself.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        recency = np.array(["recency" in name or name.startswith("gap.") for name in names])
        self.scale = np.where(recency, 1 / 128, 0.0).astype(np.float32)
        self.log_scale = np.where(recency, 0.0, 1 / 4).astype(np.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, k]` float32 to `[n, k]` float32."""
        return tf.math.log(x + 1.0) * self.log_scale + x * self.scale


class Windows:
    """The windows of categories, `[n, F]` raw integers to about [-2, 4]: log(1 + x), centred and scaled by their kind.

    The kinds differ by more than the categories of one user do; without it Adam
    learned three points of top-5 later on Taobao's clicks.

    Args:
        names: Names of the F windows.

    Attributes:
        log_scale: `[F]` float32, the factor of the logarithm.
        scale: `[F]` float32, the factor of the integer itself.
        shift: `[F]` float32, added.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        # A decayed count is in 1/256 events, a recency in eighths of an octave: 80 is an hour.
        kinds = [_KINDS[next((kind for kind in _KINDS if name.startswith(kind)), "")] for name in names]
        self.log_scale, self.scale, self.shift = np.array(kinds, np.float32).T.copy()

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, F]` float32 to `[n, F]` float32."""
        return tf.math.log(x + 1.0) * self.log_scale + x * self.scale + self.shift


_KINDS = {
    "count": (1.5, 0.0, -1.05),
    "decayed": (0.6, 0.0, -3.3),
    "recency": (0.0, 1 / 32, -2.5),
    "next_share": (0.6, 0.0, 0.0),
    "": (1.5, 0.0, 0.0),
}
"""Factor of the logarithm, factor of the integer and shift of windows whose names begin so."""


def recency_prior(window_names: tuple[str, ...]) -> F32:
    """First weights of a category's evidence, `[F]`: recent and frequent categories come first.

    Before a click is learned from, the latest category wins, and among the
    others those of the last hour: already a fair guess of the next click.
    A category's chance is taken as proportional to how often it was clicked, so
    that the exponents of all counts add up to about one; half of it goes to
    the latest events. How often the category came next to the newest one tells as
    much again.

    Args:
        window_names: Names of a category's windows, such as `count_1h`.
    """
    weights = np.zeros(len(window_names), np.float32)
    halved = 1.0
    for position, name in enumerate(window_names):
        weights[position] = next((weight for kind, weight in PRIORS.items() if name.startswith(kind)), 0.0)
        if name.startswith("decayed"):
            # Shortest half-life first.
            weights[position] *= halved
            halved = 0.5
    return weights


def _query_kernel(width: int, dim: int, reach: float) -> F32:
    """First weights of the queries, `[width, 2 dim + 1]`: none for interest, up to `reach` for engagement."""
    engagement = hashed_uniform(np.arange(1, width + 1, dtype=np.uint64), dim + 1, "query.engagement")
    return np.concatenate([np.zeros((width, dim), np.float32), engagement * np.float32(reach)], 1)


def _popular_prior(popular: int) -> F32:
    """First logits of the popular candidates by rank: far below a category that the user has clicked."""
    ranks = np.arange(1, popular + 1)
    return (-1.5 - 0.5 * np.log(ranks)).astype(np.float32)


def _successor_prior() -> F32:
    """First logits of the successors by rank: below the popular ones until their counts are understood."""
    return (-2.0 - 0.5 * np.log(np.arange(1, SUCCESSORS + 1))).astype(np.float32)


def _weight(name: str, shape: tuple[int, ...], reach: float) -> Any:
    """A weight that starts uniform in plus and minus `reach`, the same in every process."""
    first = hashed_uniform(np.arange(1, shape[0] + 1, dtype=np.uint64), int(np.prod(shape[1:])), name) * np.float32(
        reach
    )
    return tf.Variable(first.reshape(shape), name=name)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits * mask + (1.0 - mask) * MASKED


def _dropped(x: Tensor, share: float, seed: Tensor) -> Tensor:
    """Dropout with one random byte for each unit: a quarter of the random words."""
    kept = 256 - round(256 * share)
    if kept == 256:
        return x
    width = x.shape[1]

    drawn = tf.random.stateless_uniform([tf.shape(x)[0], (width + 3) // 4], seed, None, None, tf.uint32, alg="philox")
    bytes_ = tf.reshape(tf.bitcast(drawn, tf.uint8), [tf.shape(x)[0], -1])[:, :width]
    return x * (tf.cast(bytes_ < kept, tf.float32) * (256.0 / kept))


def width_in(settings: ModelSettings, spec: FeatureSpec, preprocessing: Preprocessing | None) -> int:
    """Width of what the tower is given: prepared features, the user's row, the mean latest category's and context's."""
    prepared = preprocessing if preprocessing is not None else Logarithms(spec.names)
    return int(prepared(tf.zeros([1, len(spec.names)])).shape[-1]) + 3 * settings.dim


def load_builder(path: str) -> Callable[[int, ModelSettings], Tower]:
    """The function that `model.tower` names.

    Raises:
        SettingsError: There is none.
    """
    module, _, name = path.partition(":")
    try:
        found: Callable[[int, ModelSettings], Tower] = getattr(importlib.import_module(module), name)
    # A module of the user's own may fail in any way.
    except Exception as error:
        raise SettingsError(
            f"model.tower {path!r} cannot be loaded ({type(error).__name__}: {error}); "
            "name a function as `module:name`, in a module that Python finds from here"
        ) from error
    return found


def named(tower: Tower) -> dict[str, Any]:
    """The weights of a tower by name, in their order.

    Raises:
        SettingsError: Two have the same name.
    """
    names: dict[str, Any] = {}
    for variable in tower.trainable_variables:
        name = variable.name.removesuffix(":0")
        if name in names:
            raise SettingsError(f"two weights of the tower are named {name!r}; give each tf.Variable a name of its own")
        names[name] = variable
    return names
