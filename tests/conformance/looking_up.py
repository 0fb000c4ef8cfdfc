"""A ranker that looks up a table of its own by all ids there are, for tests: what it scores tells which rows it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from state.config.sections import Model
from state.features.spec import FeatureSpec
from state.rows.tables import SERVED_IDS
from trainer.model import losses
from trainer.model.inputs import IDS, own_rows, pick, sizes
from trainer.model.ranker import MASKED, Ranker, Targets

WIDTH, NARROW = 3, 2
KINDS = ("recent", "popular", "successor")
ROWS = (*(f"every_of_{ids}" for ids in SERVED_IDS if ids != "popular"), "narrow_of_sequence_items")
"""What the vector consists of, in this order: rows of several ids one behind another."""


class LookingUp(Ranker):
    """Its vector is the rows themselves; a candidate's score is the sum of its row."""

    def __init__(self, settings: Model, spec: FeatureSpec) -> None:
        super().__init__(name="looking_up")
        self.tables = {"every": WIDTH, "narrow": NARROW}
        self.initial_ranges = {"every": 0.5}
        masks = pick(*(f"{kind}_mask" for kind in KINDS))
        self.inputs = (*masks, *own_rows("every", *IDS), *own_rows("narrow", "sequence_items"))
        self.sizes = sizes(settings, spec)
        width = sum(int(np.prod(spec.shape[1:])) for name, spec in self.specs().items() if name in ROWS)
        self.dense = {
            "shown": tf.Variable(np.linspace(-1, 1, width, dtype=np.float32), name="shown"),
            "scale": tf.Variable(np.ones(1, np.float32), name="scale"),
        }

    def encode(self, inputs: Mapping[str, Any], training: bool, seed: Any) -> Any:
        """`[B, width]`, all rows of a user and an item one behind another, but those of popular categories."""
        return tf.concat([tf.reshape(inputs[name], [-1, int(np.prod(inputs[name].shape[1:]))]) for name in ROWS], 1)

    def score(self, encoded: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Sums of rows."""
        scores = {}
        for kind in KINDS:
            logits = tf.reduce_sum(inputs[f"every_of_{kind}"], -1) * self.dense["scale"]
            mask = inputs[f"{kind}_mask"]
            scores[f"{kind}_logits"] = logits * mask + (1.0 - mask) * MASKED
        pair = tf.linalg.matvec(encoded, self.dense["shown"])
        scores |= {"engagement_logit": pair, "vector": encoded * self.dense["scale"]}
        if "every_of_other" in inputs:
            negative = ("negative_item", "negative_category", "negative_item_attributes")
            scores["other_logit"] = tf.reduce_sum(inputs["every_of_other"], -1)
            scores["negative_logit"] = tf.add_n([tf.reduce_sum(inputs[f"every_of_{name}"], -1) for name in negative])
        return scores

    def losses(self, encoded: Any, inputs: Mapping[str, Any], targets: Targets) -> Any:
        """Softmax over the candidates, and the log loss of pairs."""
        return losses.log_losses(self.score(encoded, inputs), targets)


def build(settings: Model, spec: FeatureSpec, preprocessing: Any) -> LookingUp:
    """Builds it."""
    return LookingUp(settings, spec)
