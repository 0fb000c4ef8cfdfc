"""Metrics of the newest rollout, read from its documents at each scrape, so that no process must run for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from deploy.rollouts.telling import judged_ms
from state.errors import SpringtideError
from state.metrics import RolloutMetrics
from state.rollouts.report import Finding
from state.rollouts.rollouts import Rollouts

ENDS = {"mean": "value", "low": "low", "high": "high"}


class RolloutCollector(Collector):
    """Exports the newest rollout, unless it is over and the gate did not stop it.

    Args:
        registry: The registry's directory.
    """

    def __init__(self, registry: Path) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        """Returns the current metrics."""
        registry, rollouts = CollectorRegistry(), Rollouts(self._registry)
        metrics = RolloutMetrics(registry)
        try:
            newest = rollouts.newest()
        except SpringtideError:
            newest = None
        if newest is not None and newest.is_told:
            metrics.share_ratio.labels(newest.name).set(newest.share)
            metrics.stopped.labels(newest.name).set(newest.is_stopped)
            if (figures := rollouts.figures(newest)) is not None:
                _tell(metrics, newest.name, figures)
            if newest.phase == "running":
                metrics.judged_timestamp_seconds.labels(newest.name).set(judged_ms(newest, figures) / 1000)
        return registry.collect()


def _tell(metrics: RolloutMetrics, name: str, figures: Mapping[str, Any]) -> None:
    for arm, counted in figures["arms"].items():
        metrics.users.labels(name, arm).set(counted["users"])
        metrics.answers.labels(name, arm).set(counted["answers"])
        metrics.engagements.labels(name, arm).set(counted["engagements"])
        metrics.failures.labels(name, arm).set(counted["failures"])
    for end, key in ENDS.items():
        for told, found in ((metrics.difference, figures["difference"]), (metrics.lift_ratio, figures["lift"])):
            if found is not None and found[key] is not None:
                told.labels(name, end).set(found[key])
    for finding in get_args(Finding):
        metrics.finding.labels(name, finding).set(finding == figures["finding"])
    metrics.mismatch_p.labels(name).set(figures["mismatch_p"])


def offer(registry: CollectorRegistry, versions: Path) -> None:
    """Registers the collector with a process's metrics; `versions` is the registry's directory."""
    registry.register(RolloutCollector(versions))
