"""Attention over a user's latest events, after DIN (Zhou et al. 2018, "Deep Interest Network").

For a user with latest events k (item i_k, category c_k, action a_k, age t_k) and a candidate c with row e_c:

    h_k    = [ k_{i_k} | e_{c_k} | r_{a_k} | t_k / 32 ]
    w_k(c) = MLP([ K h_k | Q e_c | K h_k * Q e_c ])         no softmax: a user with more clicks has more interest
    a(c)   = mean over k of w_k(c) V h_k
    s(c)   = MLP([ x(u) | a(c) | e_c ]) + b_slot,           x(u) = tower([ prepared features | e_u | mean context ])

The ranker has two tables of its own: `attended` with rows k of items as events, and `action` with rows r of actions.
Rows e are those that every ranker has. So the ranker learns separately what a click on an item reveals about
the user, and what makes users click the item.

The engagement logit of an item i with category c_i is a s(c_i) + (P x(u)) . e_i + b.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from state.config.sections import Model
from state.features.spec import FeatureSpec
from trainer.model import losses
from trainer.model.inputs import own_rows, pick, sizes
from trainer.model.preprocessing import Logarithms
from trainer.model.ranker import MASKED, Ranker, Targets

READ = (
    "features", "user_row", "context_row", "item_row", "category_row", "recent_rows", "recent_mask", "popular_rows",
    "popular_mask", "successor_rows", "successor_mask", "sequence_category_rows", "sequence_ages", "sequence_mask",
    "other_row", "negative_item_row", "negative_category_row",
)  # fmt: skip
OWN = (*own_rows("attended", "sequence_items"), *own_rows("action", "sequence_actions"))
ACTION_WIDTH = 4


class Din(Ranker):
    """The ranker of the module's formula.

    Args:
        settings: The section `[model]`; the option `attention` is the width of the attention.
        spec: The feature spec, which defines the length of sequences.
        preprocessing: Maps `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.
    """

    def __init__(self, settings: Model, spec: FeatureSpec, preprocessing: Any = None) -> None:
        super().__init__(name="din")
        dim, width, attention = settings.dim, settings.hidden[-1], settings.option("attention", 32)
        self.tables = dict.fromkeys(("user", "item", "category", "context", "attended"), dim) | {"action": ACTION_WIDTH}
        self.initial_ranges = {"action": 0.5}
        self.inputs, self.sizes = (*pick(*READ), *OWN), sizes(settings, spec)
        self.prepare = preprocessing if preprocessing is not None else Logarithms(spec.names)
        into = int(self.prepare(tf.zeros([1, len(spec.names)])).shape[-1]) + 2 * dim
        event = 2 * dim + ACTION_WIDTH + 1
        slots = spec.recent_categories + settings.popular + int(self.sizes["S"] or 0)
        drawn = np.random.default_rng(7)

        def kernel(name: str, *shape: int) -> Any:
            return tf.Variable(drawn.normal(0.0, shape[0] ** -0.5, shape).astype(np.float32), name=name)

        def zeros(name: str, size: int) -> Any:
            return tf.Variable(np.zeros(size, np.float32), name=name)

        self.dense = {
            "user.kernel": kernel("user.kernel", into, width),
            "user.bias": zeros("user.bias", width),
            "attend.key": kernel("attend.key", event, attention),
            "attend.value": kernel("attend.value", event, attention),
            "attend.query": kernel("attend.query", dim, attention),
            "attend.kernel": kernel("attend.kernel", 3 * attention, attention),
            "attend.bias": zeros("attend.bias", attention),
            "attend.out": kernel("attend.out", attention, 1),
            "score.user": kernel("score.user", width, width),
            "score.candidate": kernel("score.candidate", attention + dim, width),
            "score.bias": zeros("score.bias", width),
            "score.out": kernel("score.out", width, 1),
            # Initial order of slots: the newest category first, popular ones far below the user's own.
            "score.slot": tf.Variable(-0.5 * np.log(np.arange(1, slots + 1, dtype=np.float32)), name="score.slot"),
            "score.other": zeros("score.other", 1),
            "pair.scale": tf.Variable(np.array([1.0, 0.0], np.float32), name="pair.scale"),
            "pair.item": zeros("pair.item", width * dim),
        }
        self.learning_rates = {"score.slot": 10.0}

    def encode(self, inputs: Mapping[str, Any], training: bool, seed: Any) -> dict[str, Any]:
        """Returns the user's vector, and keys and values of the latest events."""
        rows = [self.prepare(inputs["features"]), inputs["user_row"], inputs["context_row"]]
        vector = tf.nn.relu(tf.matmul(tf.concat(rows, 1), self.dense["user.kernel"]) + self.dense["user.bias"])
        ages = tf.expand_dims(inputs["sequence_ages"] / 32.0, 2)
        rows = [inputs[name] for name in ("attended_of_sequence_items", "sequence_category_rows")]
        events = tf.concat([*rows, inputs["action_of_sequence_actions"], ages], 2)
        return {
            "vector": vector,
            "keys": _times(events, self.dense["attend.key"]),
            "values": _times(events, self.dense["attend.value"]),
        }

    def _candidates(self, encoded: Mapping[str, Any], mask: Any, rows: Any) -> Any:
        """Returns logits `[B, C]` of candidates with rows `[B, C, dim]`."""
        query = tf.expand_dims(_times(rows, self.dense["attend.query"]), 2)  # [B, C, 1, A]
        keys = tf.expand_dims(encoded["keys"], 1)  # [B, 1, T, A]
        products = keys * query
        joined = tf.concat([keys + tf.zeros_like(products), query + tf.zeros_like(products), products], 3)
        weights = tf.nn.relu(_times(joined, self.dense["attend.kernel"]) + self.dense["attend.bias"])
        weights = tf.squeeze(_times(weights, self.dense["attend.out"]), 3) * tf.expand_dims(mask, 1)  # [B, C, T]
        attended = tf.matmul(weights, encoded["values"]) / float(mask.shape[1])
        hidden = _times(tf.concat([attended, rows], 2), self.dense["score.candidate"]) + self.dense["score.bias"]
        hidden += tf.expand_dims(tf.matmul(encoded["vector"], self.dense["score.user"]), 1)
        return tf.squeeze(_times(tf.nn.relu(hidden), self.dense["score.out"]), 2)

    def score(self, encoded: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Scores the candidates; each candidate attends to the events independently."""
        mask = inputs["sequence_mask"]
        # Popular rows are the same for all users: [P, dim] to [B, P, dim].
        popular = tf.expand_dims(inputs["popular_rows"], 0) + 0.0 * inputs["recent_rows"][:, :1, :]
        parts = [inputs["recent_rows"], popular, inputs["successor_rows"]]
        pairs = [inputs["category_row"]]
        if "other_row" in inputs:
            pairs += [inputs["other_row"], inputs["negative_category_row"]]
        parts += [tf.stack(pairs, 1)]
        counts = [part.shape[1] for part in parts]
        recent, popular, successor, pair = tf.split(self._candidates(encoded, mask, tf.concat(parts, 1)), counts, 1)
        slots = tf.split(self.dense["score.slot"], counts[:3])
        scores = {
            f"{kind}_logits": _masked(logits + slot, inputs[f"{kind}_mask"])
            for kind, logits, slot in zip(
                ("recent", "popular", "successor"), (recent, popular, successor), slots, strict=True
            )
        }
        scores |= {"engagement_logit": self._pair(encoded, pair[:, 0], inputs["item_row"]), "vector": encoded["vector"]}
        if "other_row" in inputs:
            scores |= {
                "other_logit": pair[:, 1] + self.dense["score.other"],
                "negative_logit": self._pair(encoded, pair[:, 2], inputs["negative_item_row"]),
            }
        return scores

    def _pair(self, encoded: Mapping[str, Any], category: Any, item: Any) -> Any:
        """Returns engagement logits `[B]` from items' rows `[B, dim]` and their categories' logits `[B]`."""
        vector = encoded["vector"]
        query = tf.matmul(vector, tf.reshape(self.dense["pair.item"], [vector.shape[1], item.shape[1]]))
        scale = self.dense["pair.scale"]
        return scale[0] * category + tf.reduce_sum(query * item, 1) + scale[1]

    def losses(self, encoded: Any, inputs: Mapping[str, Any], targets: Targets) -> Any:
        """Returns the softmax loss over the candidates and the log loss of pairs."""
        return losses.log_losses(self.score(encoded, inputs), targets)


def _times(x: Any, kernel: Any) -> Any:
    """Multiplies `[..., n]` by `[n, m]` as one product of two matrices, the only form that LiteRT supports."""
    shape = tf.concat([tf.shape(x)[:-1], [kernel.shape[1]]], 0)
    product = tf.reshape(tf.matmul(tf.reshape(x, [-1, kernel.shape[0]]), kernel), shape)
    product.set_shape([*x.shape[:-1], kernel.shape[1]])
    return product


def _masked(logits: Any, mask: Any) -> Any:
    return logits * mask + (1.0 - mask) * MASKED


def build(settings: Model, spec: FeatureSpec, preprocessing: Any) -> Din:
    """Builds the ranker of the setting `model.ranker`."""
    return Din(settings, spec, preprocessing)
