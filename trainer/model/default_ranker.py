"""The default ranker: a user tower, interest over candidates, and engagement of pairs with interest as its prior.

For a user u with recent categories c_1 .. c_L (newest first), a candidate c, an item i of category c_i:

    x(u)  = [ prepare(features), e_u, mean of e_{c_1..c_3}, mean of context rows ]
    v(u)  = tower(x)                                              the profile vector, `vector`
    [ q(u) | r(u) | bias(u) ] = W v(u) + w + [ e_u | e_u | 0 ]    queries of interest and of engagement, the user's bias
    z(u)  = clip(prepared features), without those of single categories

    interest:    p(c) = softmax over the candidates of s(c)
      recent     s(c_j) = q . e_{c_j} + m . windows_j + net(windows_j, windows_1, z(u)) + b_j
      popular    s(c)   = q . e_c + m_pop . next(c) + net_next(next(c), z(u)) + b_pop[rank of c]
      successor  s(c)   = q . e_c + m_suc . next(c) + net_next(next(c), z(u)) + b_suc[rank of c]
      any other  s(c)   = q . e_c + b_other

    engagement:  y(i) = sigmoid( k (prior(c_i) + r . e_i + d_item . e_i + d_cat . e_{c_i} + bias(u)) + sum of crosses )
      prior(c)   = a_1 + a_2 log p(c) for a recent category of the user, a_3 log p(c) for any other

In `prior`, p(c) has one more candidate with s = 0. `next(c)` are logarithms of how often c came next after the user's
newest category, over all users. Both nets have one hidden layer with ReLU and share the kernel of `z(u)`. Interest is
scored over rows of categories, never over a fixed vocabulary: a category first seen a minute ago is a candidate like
any other. Engagement reads the interest logits without dropout and changes none of their weights. In a log with
labels, the initial prior of engagement ignores interest, because what was clicked is not what was shown. The ranker
computes and learns engagement with k = 1; the learned share k of its part is multiplied in later
(`state/ranking/crosses.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from state.config.sections import Model as ModelSettings
from state.features.spec import FeatureSpec
from state.ranking.transitions import COLUMNS
from trainer.model.default_model import NET_HIDDEN, NEXT_HIDDEN, DefaultModel
from trainer.model.hyperparameters import HYPERPARAMETERS
from trainer.model.losses import log_losses
from trainer.model.model import MASKED, Preprocessing, Targets, Tensor
from trainer.model.preprocessing import WindowScaling, graph_of
from trainer.model.ranker import Ranker
from trainer.model.tower import DenseTower, load_builder, named, width_in


class Encoded(NamedTuple):
    """The encoding of the users that all scores share.

    Attributes:
        queries: `[B, 2 dim + 1]` float32: of interest, of engagement, the bias; with dropout in training.
        plain_queries: The same without dropout.
        user_features: `[B, U]` float32, the user's input of both nets.
        vector: `[B, width]` float32, the profile, without dropout.
    """

    queries: Tensor
    plain_queries: Tensor
    user_features: Tensor
    vector: Tensor


class DefaultRanker(Ranker):
    """The ranker of the settings `[model]`.

    Args:
        spec: Names the D features and the F windows of each of the L categories.
        preprocessing: `[B, D]` float32 raw integers to `[B, D']` float32; None takes logarithms.
        labelled: Whether engagement is learned from labels. All parts of it but the crosses then start at zero, and the
            network learns the residual of the crosses.
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
        self.preprocessing = graph_of(preprocessing, spec.names)
        into_tower = width_in(settings, spec, self.preprocessing)
        self.tower = load_builder(settings.tower)(into_tower, settings)
        of_tower = named(self.tower)
        model = DefaultModel(
            settings,
            spec,
            into_tower - 3 * settings.dim,
            labelled,
            {name: weight.numpy() for name, weight in of_tower.items()},
            type(self.tower) is DenseTower,
        )
        self.window_scaling = WindowScaling(model.window_names)
        self.tables, self.sizes, self.inputs = model.tables, model.sizes, model.inputs
        self.user_width, self.drops = model.user_width, model.drops
        self.learning_rates, self.fast_weights = model.learning_rates, model.fast_weights
        self.fast_learning_rates = model.fast_learning_rates
        self.dense: dict[str, Any] = {
            name: of_tower[name.removeprefix("tower.")] if name.startswith("tower.") else tf.Variable(first, name=name)
            for name, first in model.dense.items()
        }

    def encode(self, inputs: Mapping[str, Tensor], training: bool, seed: Tensor) -> Encoded:
        """See `Ranker`; without context fields `context_row` may be omitted."""
        prepared = self.preprocessing(inputs["features"])
        latest = tf.reduce_mean(inputs["recent_rows"][:, : HYPERPARAMETERS.latest, :], 1)
        rows = [inputs["user_row"], latest, *([inputs["context_row"]] if "context_row" in inputs else [])]
        vectors = self._vectors(prepared, rows, training, seed, inputs)
        queries = [self._queries(vector, inputs["user_row"]) for vector in vectors]
        limit = HYPERPARAMETERS.user_limit
        user_features = tf.clip_by_value(prepared[:, : self.user_width], -limit, limit)
        return Encoded(queries[-1], queries[0], user_features, vectors[0])

    def score(self, encoded: Encoded, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Ranker`."""
        # The user's part of the hidden units of both nets.
        hidden = tf.matmul(encoded.user_features, self.dense["interest.user_kernel"])
        hidden = tf.nn.bias_add(hidden, self.dense["interest.bias"])
        interest = self._interest(encoded.queries, hidden, inputs)
        plain = interest
        if encoded.plain_queries is not encoded.queries:
            plain = self._interest(encoded.plain_queries, hidden, inputs)
        engagement = self._engagement(encoded, plain, inputs, inputs["item_row"], inputs["category_row"])
        scores = interest | {"engagement_logit": engagement + inputs["cross"], "vector": encoded.vector}
        if "negative_item_row" in inputs:
            rows = inputs["negative_item_row"], inputs["negative_category_row"]
            scores["negative_logit"] = self._engagement(encoded, plain, inputs, *rows)
        return scores

    def item_query(self, encoded: Encoded) -> Tensor:
        """See `Ranker`: r + d_item."""
        dim = self.settings.dim
        return tf.nn.bias_add(encoded.queries[:, dim : 2 * dim], self.dense["engagement.item"])

    def losses(self, encoded: Encoded, inputs: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """See `Ranker`."""
        return log_losses(self.score(encoded, inputs), targets)

    def popular_logits(self, queries: Tensor, popular_rows: Tensor) -> Tensor:
        """Logits q . e_c + b_pop of the popular categories, not masked, `[B, P]`."""
        # Zeros for the rest of the queries, because the derivative of a slice would copy all of them.
        rows = tf.pad(popular_rows, [[0, 0], [0, self.settings.dim + 1]])
        return tf.nn.bias_add(tf.matmul(queries, rows, transpose_b=True), self.dense["interest.popular"])

    def _vectors(
        self, prepared: Tensor, rows: list[Tensor], training: bool, seed: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The vectors v(u), `[B, width]`: without dropout and, in training with dropout, also with it."""
        if training and type(self.tower) is DenseTower:
            return self.tower.both(prepared, tf.concat(rows, 1), inputs.get("tower_kept"))
        if len(rows) == 2:
            rows = [*rows, tf.zeros_like(rows[0])]
        x = tf.concat([prepared, *rows], 1)
        vector = self.tower(x, False, seed)
        return (vector, self.tower(x, True, seed)) if training else (vector,)

    def _queries(self, vector: Tensor, user_row: Tensor) -> Tensor:
        """q, r and the bias, concatenated, `[B, 2 dim + 1]`."""
        user = tf.concat([user_row, user_row, tf.zeros_like(user_row[:, :1])], 1)
        return tf.nn.bias_add(tf.matmul(vector, self.dense["query.kernel"]), self.dense["query.bias"]) + user

    def _window_logits(self, user_hidden: Tensor, category_windows: Tensor) -> Tensor:
        """Logits m . windows_j + net(windows_j, windows_1, z) + b_j of the recent categories, `[B, L]`."""
        slots, width, kernel = self.sizes["L"], category_windows.shape[2], self.dense["interest.kernel_0"]
        flat = self.window_scaling(tf.reshape(category_windows, [-1, width]))
        newest = tf.reshape(flat, [-1, slots, width])[:, 0]
        shared = user_hidden[:, :NET_HIDDEN] + tf.matmul(newest, kernel[width:])
        hidden = tf.reshape(tf.matmul(flat, kernel[:width]), [-1, slots, NET_HIDDEN])
        hidden = tf.reshape(tf.nn.relu(hidden + tf.expand_dims(shared, 1)), [-1, NET_HIDDEN])
        logits = tf.matmul(flat, tf.expand_dims(self.dense["interest.linear"], 1))
        logits += tf.matmul(hidden, tf.expand_dims(self.dense["interest.kernel_1"], 1))
        return tf.nn.bias_add(tf.reshape(logits, [-1, slots]), self.dense["interest.position"])

    def _transition_logits(self, user_hidden: Tensor, counts: Tensor, kind: int) -> Tensor:
        """Logits m . next(c) + net_next(next(c), z) of `[B, k, N]` integers, `[B, k]`; `kind`: 0 popular, 1 successors."""
        candidates, columns = counts.shape[1], len(COLUMNS)
        logs = tf.reshape(tf.math.log(counts + 1.0), [-1, columns]) * self.window_scaling.log_scale[-columns:]
        hidden = tf.reshape(tf.matmul(logs, self.dense["interest.next_0"]), [-1, candidates, NEXT_HIDDEN])
        hidden = tf.nn.relu(hidden + tf.expand_dims(user_hidden[:, NET_HIDDEN:], 1))
        logits = tf.matmul(logs, tf.expand_dims(self.dense["interest.next"][kind], 1))
        logits += tf.matmul(tf.reshape(hidden, [-1, NEXT_HIDDEN]), tf.expand_dims(self.dense["interest.next_1"], 1))
        return tf.reshape(logits, [-1, candidates])

    def _interest(self, queries: Tensor, user_hidden: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        query = queries[:, : self.settings.dim]
        windows = tf.concat([inputs["category_windows"], inputs["recent_next"]], 2)
        recent = _dots(inputs["recent_rows"], query) + self._window_logits(user_hidden, windows)
        popular = self.popular_logits(queries, inputs["popular_rows"])
        popular += self._transition_logits(user_hidden, inputs["popular_next"], 0)
        successors = _dots(inputs["successor_rows"], query)
        successors += self._transition_logits(user_hidden, inputs["successor_next"], 1)
        successors = tf.nn.bias_add(successors, self.dense["interest.successor"])
        logits = {
            "recent_logits": _masked(recent, inputs["recent_mask"]),
            "popular_logits": _masked(popular, inputs["popular_mask"]),
            "successor_logits": _masked(successors, inputs["successor_mask"]),
        }
        if "other_row" in inputs:
            other = tf.reduce_sum(query * inputs["other_row"], 1) + self.dense["interest.other"]
            logits["other_logit"] = _masked(other, inputs["other_mask"])
        return logits

    def _engagement(
        self, encoded: Encoded, interest: Mapping[str, Tensor], inputs: Mapping[str, Tensor], item: Tensor, category: Tensor
    ) -> Tensor:  # fmt: skip
        """The engagement logit `[B]` without crosses, with the interest logits of the item's category as its prior.

        Their gradient is stopped. The sum leaves out the last slot, which depends on the row's own event.
        """
        dim, queries = self.settings.dim, encoded.queries
        recent, popular, successors = (
            tf.stop_gradient(interest[f"{kind}_logits"]) for kind in ("recent", "popular", "successor")
        )
        # An extra candidate of logit 0 keeps the sum positive if there is no other.
        logits = tf.concat([recent, popular, successors, tf.zeros_like(recent[:, :1])], 1)
        highest = tf.reduce_max(logits, 1)
        normaliser = highest + tf.math.log(tf.reduce_sum(tf.exp(logits - tf.expand_dims(highest, 1)), 1))
        # Two categories never have equal rows. The missing row, all zero, matches no category.
        distance = tf.reduce_sum(tf.abs(inputs["recent_rows"] - tf.expand_dims(category, 1)), 2)
        same = tf.where(distance > 0.0, 0.0, 1.0) * inputs["recent_mask"]
        known = tf.reduce_max(same, 1) * tf.where(tf.reduce_sum(tf.abs(category), 1) > 0.0, 1.0, 0.0)
        likely = tf.reduce_max(_masked(recent, same), 1) - normaliser
        other = tf.reduce_sum(encoded.plain_queries[:, :dim] * category, 1) + self.dense["interest.other"]
        other = tf.stop_gradient(other) - normaliser
        prior = self.dense["engagement.prior"]
        score = tf.where(known > 0.0, prior[0] + prior[1] * likely, prior[2] * other)
        score += tf.reduce_sum(item * self.dense["engagement.item"] + category * self.dense["engagement.category"], 1)
        return score + tf.reduce_sum(queries[:, dim : 2 * dim] * item, 1) + queries[:, 2 * dim]


def _dots(rows: Tensor, query: Tensor) -> Tensor:
    """Dot products: `[B, k, dim]` and `[B, dim]` to `[B, k]`."""
    return tf.squeeze(tf.matmul(rows, tf.expand_dims(query, 2)), 2)


def _masked(logits: Tensor, mask: Tensor) -> Tensor:
    return logits * mask + (1.0 - mask) * MASKED
