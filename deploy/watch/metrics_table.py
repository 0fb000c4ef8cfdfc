"""Generates the table of all metrics: `python -m deploy.watch.metrics_table > docs/reference/metrics.md`."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from state import metrics

OFFERED = {
    metrics.KernelMetrics: "Each process that uses compiled kernels: stream, trainer, applier, worker, validation, segments.",
    metrics.StreamMetrics: "The stream, on `stream.metrics_port`.",
    metrics.TrainerMetrics: "The trainer, on `trainer.metrics_port`.",
    metrics.ApplierMetrics: "The applier of a serving host, on `serving.metrics_port`.",
    metrics.WorkerMetrics: "A worker of a serving host, on `serving.port`; each of several workers exports the sums of all.",
    metrics.ValidationMetrics: "The validation process, on `up.metrics_port` + 2.",
    metrics.SegmentMetrics: "`springtide segments run`, on `up.metrics_port` + 4.",
    metrics.SupervisorMetrics: "`springtide up`, on `up.metrics_port`.",
    metrics.ConsoleMetrics: "The console, on `console.port`.",
    metrics.ProbeMetrics: "`springtide probe --continuously`, on `up.metrics_port` + 1.",
    metrics.TrialMetrics: "`springtide up`, on `up.metrics_port`, or the process that runs experiments without it, on `up.metrics_port` + 5, while an experiment runs.",
    metrics.RolloutMetrics: "`springtide up`, on `up.metrics_port`, during a rollout.",
    metrics.RetrainMetrics: "`springtide up`, on `up.metrics_port`, if `retrain.every` is set.",
    metrics.StorageMetrics: "Each process that stores data on disk.",
    metrics.SharedMetrics: "The trainer, its workers on other machines and the applier, if `paths.shared_registry` is set.",
    metrics.BuildMetrics: "Each process.",
}
"""By metrics class, which process exports them, and on which port."""


def as_markdown() -> str:
    """Returns the page as Markdown.

    >>> as_markdown().splitlines()[0]
    '# Metrics'
    """
    lines = [
        "# Metrics",
        "",
        "Generated from `state/metrics.py`. The series of a counter ends in "
        "`_total`; a histogram has `_bucket`, `_sum` and `_count`. No label contains an id, and label values are bounded.",
    ]
    for process in (*metrics.PROCESSES, *metrics.OF_EACH_PROCESS):
        description = OFFERED[process]
        lines += ["", f"## {process.__name__.removesuffix('Metrics')}", "", description, "", *_rows(process)]
    lines += ["", "## Any process", "", "Each process, under the standard names of Prometheus clients.", ""]
    lines += ["| name | description |", "|---|---|"]
    lines += [f"| `{name}` | {description} |" for name, description in metrics.OF_ANY_PROCESS.items()]
    return "\n".join(lines) + "\n"


def _rows(process: type[metrics.Metrics]) -> Sequence[str]:
    registry = CollectorRegistry()
    instance = process(registry)
    labels = {metric._name: metric._labelnames for metric in vars(instance).values() if hasattr(metric, "_labelnames")}
    lines = ["| name | kind | labels | description |", "|---|---|---|---|"]
    for family in registry.collect():
        named = ", ".join(f"`{label}`" for label in labels[family.name])
        description = family.documentation.replace("|", "\\|")
        lines.append(f"| `{family.name}` | {family.type} | {named} | {description} |")
    return lines


if __name__ == "__main__":
    print(as_markdown(), end="")
