"""Metrics of trials and retrains, read from their documents at each scrape, so that no process must run for them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from state.config.settings import Settings
from state.config.spans import span_ms
from state.errors import SpringtideError
from state.metrics import RetrainMetrics, TrialMetrics
from state.trials.comparison import figures_in
from state.trials.retraining import OUTCOMES, Retrainings
from state.trials.trial import Trials

ENDS = {"mean": "difference", "low": "low", "high": "high"}


class TrialCollector(Collector):
    """Exports the comparison of the running trials.

    Args:
        settings: Settings of the loop.
    """

    def __init__(self, settings: Settings) -> None:
        self._trials = Trials(settings.state_dir)

    def collect(self) -> Iterable[Metric]:
        """Returns the current metrics."""
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


class RetrainCollector(Collector):
    """Exports the state of the scheduled retrain.

    Args:
        settings: Settings of the loop, with a schedule.
    """

    def __init__(self, settings: Settings) -> None:
        self._known, self._every_ms = Retrainings(settings.state_dir), span_ms(settings.retrain.every) or 0.0

    def collect(self) -> Iterable[Metric]:
        """Returns the current metrics; none before the schedule was first evaluated."""
        registry = CollectorRegistry()
        with suppress(SpringtideError):
            if (known := self._known.read()) is not None:
                metrics = RetrainMetrics(registry)
                metrics.under_way.set(known.under_way)
                due_ms = 0 if known.under_way else known.due_ms(self._every_ms)
                for gauge, at_ms in ((metrics.due, due_ms), (metrics.judged, known.judged_at_ms or known.since_ms)):
                    gauge.set(at_ms / 1000)
                for outcome in OUTCOMES:
                    metrics.outcome.labels(outcome).set(known.outcome == outcome)
        return registry.collect()


def offer(registry: CollectorRegistry, settings: Settings) -> None:
    """Registers the collectors with a process's metrics."""
    registry.register(TrialCollector(settings))
    if settings.retrain.every:
        registry.register(RetrainCollector(settings))
