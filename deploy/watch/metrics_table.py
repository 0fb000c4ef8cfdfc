"""Generates the table of all metrics: `python -m deploy.watch.metrics_table > deploy/prometheus/METRICS.md`."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from state import metrics

OFFERED = {
    metrics.KernelMetrics: "Each of them that uses compiled kernels: stream, trainer, applier, worker, validation, segments.",
    metrics.StreamMetrics: "The stream, on `stream.metrics_port`.",
    metrics.TrainerMetrics: "The trainer, on `trainer.metrics_port`.",
    metrics.ApplierMetrics: "The applier of a serving host, on `serving.metrics_port`.",
    metrics.WorkerMetrics: "A worker of a serving host, on `serving.port`; of several workers each says the sums of all.",
    metrics.ValidationMetrics: "The validation of live clicks, on `validation.metrics_port`.",
    metrics.SegmentMetrics: "The keeper of segments, on `segments.metrics_port`.",
    metrics.SupervisorMetrics: "`springtide up`, on `up.metrics_port`.",
    metrics.ConsoleMetrics: "The page, on `console.port`.",
    metrics.ProbeMetrics: "`springtide probe --continuously`, on `probe.metrics_port`.",
    metrics.TrialMetrics: "`springtide up`, on `up.metrics_port`, or who runs trials without it, on `trials.metrics_port`, while one runs.",
    metrics.RolloutMetrics: "`springtide up`, on `up.metrics_port`, while there is a rollout.",
    metrics.RetrainMetrics: "`springtide up`, on `up.metrics_port`, where `retrain.every` is set.",
    metrics.StorageMetrics: "Each of them that keeps something on a disk.",
    metrics.SharedMetrics: "The trainer and the applier, where `paths.shared_registry` names a place.",
    metrics.BuildMetrics: "Each of them.",
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
        "Made by `python -m deploy.watch.metrics_table` from `state/metrics.py`. A counter's series ends in `_total`; a "
        "histogram has `_bucket`, `_sum` and `_count`. No label carries an id, and the values of each are few.",
    ]
    for process in (*metrics.PROCESSES, *metrics.OF_EACH_PROCESS):
        told = OFFERED[process]
        lines += ["", f"## {process.__name__.removesuffix('Metrics')}", "", told, "", *_rows(process)]
    lines += ["", "## Any process", "", "Each of them, under the names that are the same everywhere.", ""]
    lines += ["| name | what it says |", "|---|---|"]
    lines += [f"| `{name}` | {told} |" for name, told in metrics.OF_ANY_PROCESS.items()]
    return "\n".join(lines) + "\n"


def _rows(process: type[metrics.Metrics]) -> Sequence[str]:
    registry = CollectorRegistry()
    made = process(registry)
    labels = {one._name: one._labelnames for one in vars(made).values() if hasattr(one, "_labelnames")}
    found = ["| name | kind | labels | what it says |", "|---|---|---|---|"]
    for family in registry.collect():
        named = ", ".join(f"`{label}`" for label in labels[family.name])
        told = family.documentation.replace("|", "\\|")
        found.append(f"| `{family.name}` | {family.type} | {named} | {told} |")
    return found


if __name__ == "__main__":
    print(as_markdown(), end="")
