"""Learns the probability that a user leaves from the rows of the trainer's steps, whatever becomes of the steps.

A row says that its user was there, also where the guard skips its step: that is
a fact of the log. A row whose label came later stands for its impression, or,
where an outcome made the label, for the outcome, for then the user was there. Of
an outcome that no impression waited for the training log has no row to learn from.

What is learned is two regressions in a row: one from inputs to a logit, and one
with two weights from logits, as they were before their examples were learned,
to calibrated probabilities (Platt 1999).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from state.churn.inputs import CODE, ChurnInputs
from state.churn.moments import Horizon
from state.churn.weights import STEEPEST_LOGIT, ChurnWeights, calibrated, tensors_of
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.microbatch.row_kinds import Kind
from trainer.churn.measures import ChurnMeasures
from trainer.churn.regression import OnlineRegression
from trainer.churn.waiting import ChurnWaiting, KnownExamples
from trainer.tables.index import U64

DAY_S = 86_400
FEW = 50
"""So many must have left and so many have stayed before anybody is answered."""

_VARIANCE, _DRIFT = 1.0, 1e-8
_CALIBRATION_VARIANCE, _CALIBRATION_DRIFT = 0.05, 1e-7

F64 = npt.NDArray[np.float64]
logger = logging.getLogger(__name__)


class ChurnLearner:
    """Everything of churn that a trainer has. One thread.

    Args:
        spec: The feature spec of the micro-batches.
        span_ms: The time in which no event comes.
        late_ms: How much later than its own time a row may come.
        most: Rows that wait, at most.

    Attributes:
        waiting: The rows that wait.
        measures: Of examples before they were learned.
    """

    def __init__(self, spec: FeatureSpec, span_ms: int, late_ms: int, most: int) -> None:
        self._horizon = Horizon.of(span_ms, spec)
        self._inputs = ChurnInputs(spec, self._horizon)
        self._about = np.array([CODE, span_ms, self._inputs.digest, late_ms, most], np.int64)
        self.waiting = ChurnWaiting(self._horizon, late_ms, most, self._inputs.columns)
        self._regression = OnlineRegression(np.zeros(self._inputs.width), _VARIANCE, _DRIFT)
        self._calibration = OnlineRegression(np.array([1.0, 0.0]), _CALIBRATION_VARIANCE, _CALIBRATION_DRIFT)
        self.measures = ChurnMeasures()

    @classmethod
    def of(cls, settings: Settings, spec: FeatureSpec) -> ChurnLearner | None:
        """That of the settings; None where `churn.days` is 0."""
        wanted, labels = settings.churn, settings.labels
        if not wanted.days:
            return None
        late_s = labels.wait_s if labels.impressions else 0.0
        return cls(spec, max(1, round(wanted.days * DAY_S * 1000)), round(late_s * 1000), wanted.examples)

    def clear(self) -> None:
        """Nothing is learned, and nothing waits."""
        self.waiting.clear()
        self._regression.clear()
        self._calibration.clear()
        self.measures = ChurnMeasures()

    def take(self, batch: MicroBatch, log_ms: int) -> None:
        """Takes the rows of a step, and learns from the examples whose label is known by now.

        Args:
            batch: In log time.
            log_ms: The newest log time seen, that of the batch included.
        """
        self.observe(batch)
        known = self.waiting.known(log_ms)
        if known.left.size:
            self.learn(known)

    def observe(self, batch: MicroBatch) -> None:
        """Takes rows, in log time, that say that their users were there."""
        # Clicks that ask how long the loop takes name nothing, and are nobody's.
        user = np.where((batch.item != 0) | (batch.category != 0), batch.user, np.uint64(0))
        after_ms = np.where(batch.kind == Kind.JOINED, np.maximum(batch.delay_ms, 0), 0)
        self.waiting.observe(user, batch.at_ms + after_ms, batch.features, batch.action)

    def learn(self, known: KnownExamples) -> F64:
        """Scores examples and learns them, one after another; returns their calibrated probabilities before that, `[m]` float64."""
        logits = self._regression.learn(self._inputs.of(known.windows, known.action, known.age_ms), known.left)
        logits = np.clip(logits, -STEEPEST_LOGIT, STEEPEST_LOGIT)
        told = calibrated(self._calibration.learn(np.stack([logits, np.ones(logits.size)], 1), known.left), 1.0, 0.0)
        self.measures.update(told, known.left)
        return told

    def weights(self) -> ChurnWeights | None:
        """What answers need; None before enough was learned."""
        if min(self.measures.seen) < FEW:
            return None
        slope, intercept = self._calibration.mean.tolist()
        return ChurnWeights(self._horizon, self._inputs, slope, intercept, self._regression.mean)

    def served(self) -> dict[str, npt.NDArray[Any]]:
        """The tensors that answers need, none before enough was learned."""
        weights = self.weights()
        return {} if weights is None else tensors_of(weights)

    def values(self) -> dict[str, float]:
        """The measures by name, for a version."""
        counted = {"churn.waiting": float(len(self.waiting)), "churn.dropped": float(self.waiting.dropped)}
        return self.measures.values() | counted

    def forget(self, users: U64) -> int:
        """Removes the waiting rows of users (`[n]` uint64); returns how many. What was learned of all of them stays."""
        return self.waiting.forget(users)

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All of it by name, for a version."""
        parts = {
            "waiting": self.waiting.state(),
            "regression": self._regression.state(),
            "calibration": self._calibration.state(),
            "measures": self.measures.state(),
        }
        held = {f"{part}.{name}": value for part, found in parts.items() for name, value in found.items()}
        return {"about": self._about.copy(), **held}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned; begins anew where a version has none, or one of another span, spec or code."""
        self.clear()
        if not state:
            return
        if not np.array_equal(state["about"], self._about):
            logger.info("churn begins anew: the version learned it of another span, spec or release")
            return

        def part(name: str) -> dict[str, npt.NDArray[Any]]:
            return {key.removeprefix(f"{name}."): one for key, one in state.items() if key.startswith(f"{name}.")}

        self.waiting.load(part("waiting"))
        self._regression.load(part("regression"))
        self._calibration.load(part("calibration"))
        self.measures.load(part("measures"))
