"""How trials compare, on /metrics: read from their documents when somebody asks, so that nobody has to run for it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from state.errors import SpringtideError
from state.metrics import TrialMetrics
from state.trials.comparison import figures_in
from state.trials.trial import Trials

ENDS = {"mean": "difference", "low": "low", "high": "high"}


class TrialCollector(Collector):
    """Tells of the trials that run.

    Args:
        state: The state directory.
    """

    def __init__(self, state: Path) -> None:
        self._trials = Trials(state)

    def collect(self) -> Iterable[Metric]:
        """The metrics of now."""
        registry = CollectorRegistry()
        metrics = TrialMetrics(registry)
        with suppress(SpringtideError, OSError):
            for trial in self._trials.all():
                if trial.runs and (found := figures_in(self._trials.folder(trial.name))) is not None:
                    metrics.rows.labels(trial.name).set(found["rows"])
                    metrics.unpaired_records.labels(trial.name).set(found["alone"] + found["unlike"])
                    for side in ("trial", "live"):
                        if (loss := found[f"{side}_log_loss"]) is not None:
                            metrics.log_loss.labels(trial.name, side).set(loss)
                    for end, name in ENDS.items():
                        if found[name] is not None:
                            metrics.difference.labels(trial.name, end).set(found[name])
        return registry.collect()


def offer(registry: CollectorRegistry, state: Path) -> None:
    """Adds them to what a process offers."""
    registry.register(TrialCollector(state))
