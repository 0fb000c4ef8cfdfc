"""The network: preprocessing, tower, the interest head over open labels, the engagement head.

`Model.forward` is a pure TensorFlow function of its inputs and the dense
weights, made of operations that LiteRT has built in. Training, the serving
program and the tests call the same one.

    features ─ preprocessing ─┐
    user row, 3 latest labels ├─ tower ─ vector ─┬─ query ── interest logits of labels, popular ones, any other
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

from state.errors import SettingsError
from state.features import FeatureSpec
from state.sections import Model as ModelSettings
from trainer.index import hashed_uniform

Tensor = Any
"""A `tf.Tensor`; TensorFlow ships no types."""

F32 = npt.NDArray[np.float32]
Preprocessing = Callable[[Tensor], Tensor]

LATEST = 3
"""Labels of the user whose rows go into the tower."""

MASKED = -1e9
"""The logit of a candidate that is not there."""

NET_HIDDEN = 16
USER_HIDDEN = 32
ENGAGEMENT_HIDDEN = 64


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

    def both(self, x: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors without and with dropout; the first layer, half the work, is computed once."""
        first = self._first(x)
        return self._rest(first), self._rest(_dropped(first, self._dropout, seed))

    def _first(self, x: Tensor) -> Tensor:
        return tf.nn.relu(tf.matmul(x, self.kernels[0]) + self.biases[0])

    def _rest(self, x: Tensor) -> Tensor:
        for kernel, bias in zip(self.kernels[1:], self.biases[1:], strict=True):
            x = tf.nn.relu(tf.matmul(x, kernel) + bias)
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
        spec: Names the D features and the F windows of each of the L labels.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']` float32; None
            takes logarithms.

    Attributes:
        dense: Every dense weight by name, in a fixed order. A version carries
            them under these names.
    """

    def __init__(
        self,
        settings: ModelSettings,
        spec: FeatureSpec,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__(name="model")
        self.settings = settings
        self.features = len(spec.names)
        self.labels = spec.labels
        self.label_width = len(spec.label_names)
        self.preprocessing = preprocessing if preprocessing is not None else Logarithms(spec.names)
        self._prepare_windows = Logarithms(spec.label_names)
        dim, width, evidence = settings.dim, settings.hidden[-1], 2 * len(spec.label_names)
        prepared = int(self.preprocessing(tf.zeros([1, self.features])).shape[-1])
        self.tower = _load_builder(settings.tower)(prepared + (2 + LATEST) * dim, settings)
        own = {
            "query.kernel": _weight("query.kernel", (width, dim), 0.0),
            "query.bias": _weight("query.bias", (dim,), 0.0),
            "interest.linear": tf.Variable(recency_prior(spec.label_names), name="interest.linear"),
            "interest.position": _weight("interest.position", (spec.labels,), 0.0),
            "interest.user_kernel": _weight("interest.user_kernel", (prepared, USER_HIDDEN), 0.3),
            "interest.user_bias": _weight("interest.user_bias", (USER_HIDDEN,), 0.0),
            "interest.personal": _weight("interest.personal", (USER_HIDDEN, evidence), 0.0),
            "interest.bend": _weight("interest.bend", (USER_HIDDEN, NET_HIDDEN), 0.0),
            "interest.kernel_0": _weight("interest.kernel_0", (evidence, NET_HIDDEN), 0.5),
            "interest.bias_0": _weight("interest.bias_0", (NET_HIDDEN,), 0.0),
            "interest.kernel_1": _weight("interest.kernel_1", (NET_HIDDEN,), 0.0),
            "interest.popular": tf.Variable(_popular_prior(settings.popular), name="interest.popular"),
            "interest.other": tf.Variable(np.ones(1, np.float32), name="interest.other"),
            "engagement.vector": _weight("engagement.vector", (width, ENGAGEMENT_HIDDEN), 0.15),
            "engagement.rows": _weight("engagement.rows", (3 * dim, ENGAGEMENT_HIDDEN), 0.15),
            "engagement.bias_0": _weight("engagement.bias_0", (ENGAGEMENT_HIDDEN,), 0.0),
            "engagement.kernel_1": _weight("engagement.kernel_1", (ENGAGEMENT_HIDDEN,), 0.15),
            "engagement.bias_1": _weight("engagement.bias_1", (1,), 0.0),
        }
        self.dense: dict[str, Any] = {f"tower.{name}": weight for name, weight in _named(self.tower).items()} | own

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores without dropout.

        Args:
            inputs: By name, all float32:
                features `[B, D]` raw integers; user_row, context_row, item_row,
                category_row `[B, dim]`; label_rows `[B, L, dim]`, newest label
                first; label_windows `[B, L, F]` raw integers; label_mask
                `[B, L]`, 1 where there is a label; popular_rows `[P, dim]`;
                popular_mask `[B, P]`, 1 where the label is a candidate of its own.

        Returns:
            label_logits `[B, L]`, popular_logits `[B, P]` (candidates that are
            not there have MASKED), engagement_logit `[B]`, vector `[B, width]`.
        """
        vector = self.tower(self.tower_input(inputs), False, tf.constant([0, 0], tf.int32))
        label_logits, popular_logits, _ = self.interest(vector, inputs, self.label_evidence(inputs))
        return {
            "label_logits": label_logits,
            "popular_logits": popular_logits,
            "engagement_logit": self.engagement(vector, inputs["user_row"], inputs["item_row"], inputs["category_row"]),
            "vector": vector,
        }

    def vectors(self, inputs: Mapping[str, Tensor], seed: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors without and with dropout, each `[B, width]`.

        Args:
            inputs: As for `forward`.
            seed: `[2]` int32.
        """
        x = self.tower_input(inputs)
        if isinstance(self.tower, DenseTower):
            return self.tower.both(x, seed)
        return self.tower(x, False, seed), self.tower(x, True, seed)

    def tower_input(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the tower is given, `[B, width_in]`."""
        # The training graph gathers these rows apart: the gradient of a slice is a copy of all label rows.
        latest = inputs["latest_rows"] if "latest_rows" in inputs else inputs["label_rows"][:, :LATEST, :]
        latest = tf.reshape(latest, [-1, LATEST * self.settings.dim])
        return tf.concat([self.preprocessing(inputs["features"]), inputs["user_row"], latest, inputs["context_row"]], 1)

    def label_evidence(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a user's windows say about each of the labels, `[B, L]`: a logit without embedding rows.

        Each label is described by its windows and by how they differ from the
        newest label's. How much these count is partly shared and partly the
        user's own, by the features: somebody who comes back to things is not
        somebody who goes on to new ones.
        """
        flat = self._prepare_windows(tf.reshape(inputs["label_windows"], [-1, self.label_width]))
        windows = tf.reshape(flat, [-1, self.labels, self.label_width])
        windows = tf.concat([windows, windows - windows[:, :1]], 2)
        user = tf.matmul(self.preprocessing(inputs["features"]), self.dense["interest.user_kernel"])
        user = tf.nn.relu(user + self.dense["interest.user_bias"])
        flat = tf.reshape(windows, [-1, 2 * self.label_width])
        bent = tf.reshape(tf.matmul(flat, self.dense["interest.kernel_0"]), [-1, self.labels, NET_HIDDEN])
        own = tf.matmul(user, self.dense["interest.bend"]) + self.dense["interest.bias_0"]
        hidden = tf.reshape(tf.nn.relu(bent + tf.expand_dims(own, 1)), [-1, NET_HIDDEN])
        bent = tf.reshape(tf.matmul(hidden, tf.expand_dims(self.dense["interest.kernel_1"], 1)), [-1, self.labels])
        weights = tf.matmul(user, self.dense["interest.personal"]) + self.dense["interest.linear"]
        return tf.squeeze(tf.matmul(windows, tf.expand_dims(weights, 2)), 2) + bent + self.dense["interest.position"]

    def interest(self, vector: Tensor, inputs: Mapping[str, Tensor], evidence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Interest logits of the labels `[B, L]` and the popular ones `[B, P]`, and the query `[B, dim]`."""
        query = tf.matmul(vector, self.dense["query.kernel"]) + self.dense["query.bias"] + inputs["user_row"]
        label_logits = tf.squeeze(tf.matmul(inputs["label_rows"], tf.expand_dims(query, 2)), 2) + evidence
        popular_logits = tf.matmul(query, inputs["popular_rows"], transpose_b=True) + self.dense["interest.popular"]
        return (
            _masked(label_logits, inputs["label_mask"]),
            _masked(popular_logits, inputs["popular_mask"]),
            query,
        )

    def other(self, query: Tensor, row: Tensor, mask: Tensor) -> Tensor:
        """The logit `[B, 1]` of one more candidate, by its category's row `[B, dim]` and mask `[B, 1]`."""
        return _masked(tf.reduce_sum(query * row, 1, keepdims=True) + self.dense["interest.other"], mask)

    def engagement(self, vector: Tensor, user_row: Tensor, item_row: Tensor, category_row: Tensor) -> Tensor:
        """The engagement logit `[B]` of a user with an item."""
        return self.engagement_of(tf.matmul(vector, self.dense["engagement.vector"]), user_row, item_row, category_row)

    def engagement_of(self, projected: Tensor, user_row: Tensor, item_row: Tensor, category_row: Tensor) -> Tensor:
        """As `engagement`, from the vector's projection `[B, 64]`, which several items can share."""
        pair = tf.concat([item_row, category_row, user_row * item_row], 1)
        hidden = tf.nn.relu(
            projected + tf.matmul(pair, self.dense["engagement.rows"]) + self.dense["engagement.bias_0"]
        )
        scores = tf.matmul(hidden, tf.stack([self.dense["engagement.kernel_1"]], 1))
        return tf.squeeze(scores, 1) + self.dense["engagement.bias_1"]

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
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        recency = np.array(["recency" in name or name.startswith("gap.") for name in names])
        self._recency = np.where(recency, 1 / 128, 0.0).astype(np.float32)
        self._count = np.where(recency, 0.0, 1 / 4).astype(np.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, k]` float32 to `[n, k]` float32."""
        return tf.math.log(x + 1.0) * self._count + x * self._recency


def recency_prior(label_names: tuple[str, ...]) -> F32:
    """First weights of a label's evidence: recent and frequent labels come first.

    Before a click is learned from, the latest category wins, and among the
    others those of the last hour: already a fair guess of the next click.

    Args:
        label_names: Names of a label's windows, such as `count_1h`.

    Returns:
        `[2 F]` float32; the second half weighs the differences from the newest label.
    """
    weights = np.zeros(2 * len(label_names), np.float32)
    decays = 0
    for position, name in enumerate(label_names):
        if "last" in name:
            weights[position] = 6.0
        elif "recency" in name:
            weights[position] = -1.2
        elif "decay" in name:
            # Shortest half-life first.
            weights[position] = (0.6, 0.3, 0.3)[min(decays, 2)]
            decays += 1
    return weights


def _popular_prior(popular: int) -> F32:
    """First logits of the popular candidates by rank: far below a label that the user has clicked."""
    ranks = np.arange(1, popular + 1)
    return (-1.5 - 0.5 * np.log(ranks)).astype(np.float32)


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


def _load_builder(path: str) -> Callable[[int, ModelSettings], Tower]:
    module, _, name = path.partition(":")
    try:
        found: Callable[[int, ModelSettings], Tower] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SettingsError(
            f"model.tower {path!r} cannot be loaded ({error}); name a function as `module:name`"
        ) from error
    return found


def _named(tower: Tower) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for variable in tower.trainable_variables:
        name = variable.name.removesuffix(":0")
        if name in names:
            raise SettingsError(f"two weights of the tower are named {name!r}; give each tf.Variable a name of its own")
        names[name] = variable
    return names
