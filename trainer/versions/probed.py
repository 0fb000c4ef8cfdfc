"""The trainer's own answers to a version's probe, see `state/probe.py`: who serves the version compares its answers with them."""

from __future__ import annotations

import numpy as np
import tensorflow as tf

from state import probe
from trainer.model.ranker import Ranker
from trainer.versions.content import Array


class ProbedRanker:
    """Answers the probe with the weights of now; only the step thread may ask.

    Args:
        ranker: The model.
    """

    def __init__(self, ranker: Ranker) -> None:
        # Where a processor and an accelerator round differently, serving has the processor.
        with tf.device("/CPU:0"):
            shapes = {name: tuple(spec.shape) for name, spec in ranker.specs().items()}
            given = {name: tf.constant(value) for name, value in probe.inputs(shapes).items()}
        self._ranker, self._predict = ranker, tf.function(lambda: ranker.predict(given), autograph=False)

    def answers(self) -> dict[str, Array]:
        """The tensors `probe.<output>` of a version with these weights."""
        with tf.device("/CPU:0"):
            self._ranker.sync_variables()
            outputs = self._predict()
        return {f"{probe.PREFIX}{name}": np.array(value.numpy()) for name, value in outputs.items()}
