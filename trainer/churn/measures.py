"""How good the probabilities of churn are: each example is scored before it is learned.

Sums are kept twice, since the beginning and with the half-life of
`trainer/measures/evaluation.py`; AUC comes from histograms of logits as there.
Calibration is looked at by tenths of the probability.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.measures.evaluation import BINS, LOGIT_RANGE, SOME, area_under_curve, fade

F64 = npt.NDArray[np.float64]

SUMS = ("rows", "log_loss", "predicted", "left")
TENTHS = 10
_LEAST = 1e-12


class ChurnMeasures:
    """The running measures."""

    def __init__(self) -> None:
        # [total and recent, sum]; [total and recent, stayed and left, bin]; [tenth, rows and predicted and left].
        self._sums: F64 = np.zeros((2, len(SUMS)))
        self._bins: F64 = np.zeros((2, 2, BINS))
        self._tenths: F64 = np.zeros((TENTHS, 3))

    def update(self, probability: F64, left: npt.NDArray[np.bool_]) -> None:
        """Adds examples.

        Args:
            probability: `[n]` float64, before they were learned.
            left: `[n]` bool.
        """
        for sums in (self._sums[1], self._bins[1], self._tenths):
            fade(sums, left.size)
        likely = np.clip(probability, _LEAST, 1.0 - _LEAST)
        losses = -np.log(np.where(left, likely, 1.0 - likely))
        self._sums += (left.size, losses.sum(), probability.sum(), left.sum())
        logits = np.log(likely) - np.log1p(-likely)
        placed = np.clip((logits + LOGIT_RANGE) * (BINS / (2 * LOGIT_RANGE)), 0, BINS - 1).astype(np.int64)
        for outcome in (0, 1):
            self._bins[:, outcome] += np.bincount(placed[left == bool(outcome)], minlength=BINS)
        tenth = np.minimum((probability * TENTHS).astype(np.int64), TENTHS - 1)
        for place, weights in enumerate((np.ones(left.size), probability, left)):
            self._tenths[:, place] += np.bincount(tenth, weights, TENTHS)

    @property
    def seen(self) -> tuple[int, int]:
        """How many stayed and how many left, since the beginning."""
        return int(self._sums[0, 0] - self._sums[0, 3]), int(self._sums[0, 3])

    def values(self) -> dict[str, float]:
        """The measures by name, `churn.` before it: recent ones plain, those since the beginning under `churn.total.`.

        rows; log_loss; left, the share that left; auc; calibration, predicted over observed; and, of recent ones,
        calibration_error, how far predicted and observed lie apart in the mean over tenths of the probability. A measure
        without rows is absent.
        """
        found: dict[str, float] = {}
        for when, prefix in ((1, "churn."), (0, "churn.total.")):
            rows, log_loss, predicted, left = self._sums[when].tolist()
            found[f"{prefix}rows"] = rows
            if rows >= SOME:
                found |= {f"{prefix}log_loss": log_loss / rows, f"{prefix}left": left / rows}
            if left >= SOME:
                found[f"{prefix}calibration"] = predicted / left
            area = area_under_curve(self._bins[when, 0], self._bins[when, 1])
            if area is not None:
                found[f"{prefix}auc"] = area
        if (rows := float(self._tenths[:, 0].sum())) >= SOME:
            found["churn.calibration_error"] = float(np.abs(self._tenths[:, 1] - self._tenths[:, 2]).sum()) / rows
        return found

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """All sums, for a version."""
        return {"sums": self._sums.copy(), "bins": self._bins.copy(), "tenths": self._tenths.copy()}

    def load(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Sets what `state` returned."""
        self._sums, self._bins, self._tenths = (np.array(state[name]) for name in ("sums", "bins", "tenths"))
