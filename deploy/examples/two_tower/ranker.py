"""Two towers and a sampled softmax with log-Q correction, after Yi et al. 2019 ("Sampling-Bias-Corrected Neural Modeling").

    u     = latest categories + user tower([ prepared features | e_u | mean context | latest items | latest categories ])
    v(c)  = e_c + candidate tower(e_c),   v(i) = e_i + e_c + candidate tower(e_i + e_c)
    s(c)  = u . v(c) / temperature, both of unit length,   engagement: a s(i) + b

The latest items and categories are weighted means, the newest event first: 1, 1/2, 1/3 and so on. The last layer of
both towers starts at zero, so candidates similar to the latest categories rank first in the beginning.

Interest is learned from the categories of the other rows of a record, by a softmax of row j over them. log Q(c) is
subtracted from each logit, where Q(c) is the share of rows with c. Without this correction, popular categories would be
pushed down, because they are sampled so often. A row of the same category is not a negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from state.config.sections import Model
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from trainer.model import losses
from trainer.model.inputs import pick, sizes
from trainer.model.preprocessing import Logarithms
from trainer.model.ranker import MASKED, Ranker, Targets

READ = (
    "features", "user_row", "context_row", "item_row", "category_row", "recent_rows", "recent_mask", "popular_rows",
    "popular_mask", "successor_rows", "successor_mask", "sequence_item_rows", "sequence_category_rows", "sequence_mask",
    "other_row", "negative_item_row", "negative_category_row",
)  # fmt: skip
SAME = 1e-5  # rows are of one category if their squared distance is at most this share of their summed squared norms


class TwoTower(Ranker):
    """The ranker of the module's formula.

    Args:
        settings: The section `[model]`; the option `temperature` divides every score.
        spec: The feature spec, which defines the length of sequences.
        preprocessing: Maps `[B, D]` float32 raw integers to `[B, D']`; None takes logarithms.
    """

    def __init__(self, settings: Model, spec: FeatureSpec, preprocessing: Any = None) -> None:
        super().__init__(name="two_tower")
        dim, hidden = settings.dim, settings.hidden
        self.temperature = settings.option("temperature", 0.1)
        self.tables = dict.fromkeys(("user", "item", "category", "context"), dim)
        self.inputs, self.sizes = pick(*READ), sizes(settings, spec)
        self.prepare = preprocessing if preprocessing is not None else Logarithms(spec.names)
        into = int(self.prepare(tf.zeros([1, len(spec.names)])).shape[-1]) + 4 * dim
        drawn = np.random.default_rng(7)
        self.dense = {}
        if hidden[-1] != dim:
            raise SettingsError(f"model.hidden must end with model.dim {dim}: both towers add to rows of that width")
        for tower, widths in (("user", (into, *hidden)), ("candidate", (dim, *hidden))):
            for layer, (width, out) in enumerate(itertools.pairwise(widths)):
                name = f"{tower}.kernel_{layer}"
                first = drawn.normal(0.0, width**-0.5, (width, out)).astype(np.float32) * (layer + 1 < len(hidden))
                self.dense[name] = tf.Variable(first, name=name)
                name = f"{tower}.bias_{layer}"
                self.dense[name] = tf.Variable(np.zeros(out, np.float32), name=name)
        self.dense["pair"] = tf.Variable(np.array([1.0, 0.0], np.float32), name="pair")
        self.layers = len(hidden)

    def _tower(self, name: str, x: Any, begin: Any) -> Any:
        """Adds the layers' output for `[n, width]` to `begin`, `[n, dim]`; returns `[n, dim]` of unit length."""
        for layer in range(self.layers):
            x = tf.matmul(x, self.dense[f"{name}.kernel_{layer}"]) + self.dense[f"{name}.bias_{layer}"]
            x = tf.nn.relu(x) if layer + 1 < self.layers else x
        x += begin
        return x / tf.sqrt(tf.reduce_sum(x * x, 1, keepdims=True) + 1e-6)

    def encode(self, inputs: Mapping[str, Any], training: bool, seed: Any) -> Any:
        """Returns the user's vector, `[B, hidden[-1]]`."""
        shares = inputs["sequence_mask"] / np.arange(1, inputs["sequence_mask"].shape[1] + 1, dtype=np.float32)
        shares = tf.expand_dims(shares, 2)
        total = tf.reduce_sum(shares, 1) + 1e-6
        latest = [tf.reduce_sum(inputs[f"sequence_{kind}_rows"] * shares, 1) / total for kind in ("item", "category")]
        rows = [self.prepare(inputs["features"]), inputs["user_row"], inputs["context_row"], *latest]
        return self._tower("user", tf.concat(rows, 1), latest[1])

    def _scores(self, user: Any, rows: Any) -> Any:
        """Returns scores `[B, C]` of the users for candidates with rows `[B, C, dim]`."""
        count = rows.shape[1]
        flat = tf.reshape(rows, [-1, rows.shape[2]])
        candidates = self._tower("candidate", flat, flat)
        candidates = tf.reshape(candidates, [-1, count, user.shape[1]])
        return tf.squeeze(tf.matmul(candidates, tf.expand_dims(user, 2)), 2) / self.temperature

    def _pair(self, user: Any, item: Any, category: Any) -> Any:
        logits = self._scores(user, tf.expand_dims(item + category, 1))[:, 0]
        return self.dense["pair"][0] * logits + self.dense["pair"][1]

    def score(self, encoded: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Scores every candidate with the candidate tower; popular candidates are encoded once for all users."""
        popular = tf.matmul(
            encoded, self._tower("candidate", inputs["popular_rows"], inputs["popular_rows"]), transpose_b=True
        )
        logits = {
            "recent": self._scores(encoded, inputs["recent_rows"]),
            "popular": popular / self.temperature,
            "successor": self._scores(encoded, inputs["successor_rows"]),
        }
        masks = {kind: inputs[f"{kind}_mask"] for kind in logits}
        scores = {
            f"{kind}_logits": values * masks[kind] + (1.0 - masks[kind]) * MASKED for kind, values in logits.items()
        }
        scores |= {
            "engagement_logit": self._pair(encoded, inputs["item_row"], inputs["category_row"]),
            "vector": encoded,
        }
        if "other_row" in inputs:
            negative = self._pair(encoded, inputs["negative_item_row"], inputs["negative_category_row"])
            other = self._scores(encoded, tf.expand_dims(inputs["other_row"], 1))[:, 0]
            scores |= {"other_logit": other, "negative_logit": negative}
        return scores

    def losses(self, encoded: Any, inputs: Mapping[str, Any], targets: Targets) -> Any:
        """Returns the sampled softmax loss over the record's own categories, plus the log loss of pairs."""
        rows = inputs["category_row"]
        logits = tf.matmul(encoded, self._tower("candidate", rows, rows), transpose_b=True) / self.temperature  # [B, B]
        square = tf.reduce_sum(rows * rows, 1)
        squares = tf.expand_dims(square, 1) + tf.expand_dims(square, 0)
        distances = squares - 2.0 * tf.matmul(rows, rows, transpose_b=True)
        same = tf.stop_gradient(tf.cast(distances <= SAME * squares, tf.float32))
        count = tf.reduce_sum(same, 1)
        corrected = logits - tf.math.log(tf.expand_dims(count, 0) / tf.reduce_sum(tf.ones_like(count)))
        own = tf.linalg.diag_part(corrected)
        others = corrected + same * MASKED
        interest = tf.reduce_logsumexp(tf.concat([tf.expand_dims(own, 1), others], 1), 1) - own
        scores = {name: value for name, value in self.score(encoded, inputs).items() if name.endswith("_logit")}
        pair, drawn = losses.engagement_losses(scores, targets)
        return interest * targets.weight + pair * targets.label_weight + drawn * targets.negative_weight


def build(settings: Model, spec: FeatureSpec, preprocessing: Any) -> TwoTower:
    """Builds the ranker of the setting `model.ranker`."""
    return TwoTower(settings, spec, preprocessing)
