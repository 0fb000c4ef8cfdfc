"""Figures over time, kept in memory: one point each few seconds, the newest hour."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from deploy.watch.figures import Figures
from deploy.watch.quantiles import Spread

EVERY_S = 5.0
KEEP_S = 3600.0

CURVES = (
    "events_per_s",
    "microbatches_per_s",
    "rows_per_s",
    "steps_per_s",
    "answers_per_s",
    "failed_per_s",
    "dead_per_s",
    "lag_events",
    "trainer_lag",
    "serving_lag",
    "features_s",
    "weights_s",
    "log_loss",
    "auc",
    "top1",
    "version",
    "newest_version",
)
"""The figures that are kept; each is a name of `Figures`."""
QUANTILES: Mapping[str, tuple[str, str]] = {
    "answer_p50_s": ("answer", "p50"),
    "answer_p99_s": ("answer", "p99"),
    "step_p50_s": ("step", "p50"),
}
"""Curve -> what is distributed, and which of its quantiles."""
LIFT = "lift_top1"
"""The curve of how much more often the model is right than the best of what is simple."""


class Curves:
    """The newest points. One thread adds, others read.

    Args:
        every_s: The least time between two points.
        keep_s: The time that they span.
    """

    def __init__(self, every_s: float = EVERY_S, keep_s: float = KEEP_S) -> None:
        self._every_ms = round(every_s * 1000)
        self._points: deque[tuple[int, tuple[float | None, ...]]] = deque(maxlen=int(keep_s / every_s))

    def add(self, at_ms: int, figures: Figures, lift: float | None = None) -> bool:
        """Adds a point where one is due; whether it did.

        Args:
            at_ms: Wall clock.
            figures: Of that moment.
            lift: Of that moment, 0 to 1 more or less.
        """
        if self._points and 0 <= at_ms - self._points[-1][0] < self._every_ms:
            return False
        found = [_rounded(getattr(figures, name)) for name in CURVES]
        for spread, quantile in QUANTILES.values():
            found.append(_rounded(getattr(figures.spreads.get(spread, Spread()), quantile)))
        self._points.append((at_ms, (*found, _rounded(lift))))
        return True

    def document(self, after_ms: int = 0) -> dict[str, Any]:
        """The points behind a moment as JSON values: `at_ms`, and as many values of each curve.

        Args:
            after_ms: Wall clock.

        >>> kept = Curves(1.0)
        >>> kept.add(1000, Figures(lag_events=7.0)), kept.add(1200, Figures()), kept.add(2000, Figures())
        (True, False, True)
        >>> kept.document(1500)["at_ms"], kept.document()["curves"]["lag_events"]
        ([2000], [7.0, None])
        """
        points = [one for one in list(self._points) if one[0] > after_ms]
        names = (*CURVES, *QUANTILES, LIFT)
        return {
            "at_ms": [at_ms for at_ms, _ in points],
            "curves": {name: [values[place] for _, values in points] for place, name in enumerate(names)},
        }


def _rounded(value: float | None) -> float | None:
    """Six digits, which is more than a curve shows."""
    return None if value is None else float(f"{value:.6g}")
