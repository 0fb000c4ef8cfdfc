"""Every metric's name, help, labels and buckets: one class per process.

A process makes its class on a `CollectorRegistry` of its own and offers it
with `serve`. Dashboards and alerts are checked against this file. Label values
are bounded, and no label carries an id.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from state.errors import PortTaken

SHORT_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FRESHNESS_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


class StreamMetrics:
    """What the Beam job counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "springtide_stream_"
        self.events = Counter(
            prefix + "events",
            "Positions of the clicks topic taken up, by outcome: rows, dead, filtered, absent, opened, feedback.",
            ["outcome"],
            registry=registry,
        )
        self.dead_letters = Counter(
            prefix + "dead_letters", "Records refused, by reason.", ["reason"], registry=registry
        )
        self.lag_events = Gauge(prefix + "lag_events", "Positions of the clicks topic not yet read.", registry=registry)
        self.lag_seconds = Gauge(
            prefix + "lag_seconds",
            "Wall time since the newest committed click was appended to Kafka; 0 when none wait.",
            registry=registry,
        )
        self.microbatches = Counter(prefix + "microbatches", "Micro-batches written.", registry=registry)
        self.microbatch_rows = Histogram(
            prefix + "microbatch_rows", "Rows of a micro-batch.", buckets=ROWS, registry=registry
        )
        self.commit_seconds = Histogram(
            prefix + "commit_seconds",
            "Time to write and commit one micro-batch.",
            buckets=SHORT_SECONDS,
            registry=registry,
        )
        self.truncated_histories = Counter(
            prefix + "truncated_histories",
            "Rows whose longest window began before the oldest remembered event.",
            registry=registry,
        )
        self.cached_users = Gauge(prefix + "cached_users", "Users whose histories are in memory.", registry=registry)
        self.attribute_records = Gauge(
            prefix + "attribute_records",
            "Positions of the topics of attributes read since the store began, by side (user, item) and outcome: value, "
            "removed, dead, absent.",
            ["side", "outcome"],
            registry=registry,
        )
        self.attributes_known = Gauge(
            prefix + "attributes_known", "Users and items that have attributes, by side.", ["side"], registry=registry
        )
        self.accounting_positions = Gauge(
            "springtide_accounting_positions",
            "Positions of the clicks topic since the store began, by outcome: positions (all), rows, dead, filtered, absent, gap, "
            "opened (impressions whose label comes later), feedback (outcomes).",
            ["outcome"],
            registry=registry,
        )
        self.accounting_labels = Gauge(
            "springtide_accounting_labels",
            "Impressions whose label comes later since the store began, by outcome: opened (all), joined, expired (negative), "
            "dropped, waiting; unmatched counts outcomes without an impression.",
            ["outcome"],
            registry=registry,
        )
        self.accounting_faults = Gauge(
            "springtide_accounting_stream_faults",
            "Accounts of the stream that do not balance; 0 when each position has one outcome.",
            registry=registry,
        )
        self.gaps_accepted = Counter(
            prefix + "gaps_accepted",
            "Gaps in the clicks topic that operators accepted since the store began.",
            registry=registry,
        )


class TrainerMetrics:
    """What the trainer counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "springtide_trainer_"
        self.rows = Counter(
            prefix + "rows",
            "Rows of the training log, by outcome: trained, skipped, duplicate, masked.",
            ["outcome"],
            registry=registry,
        )
        self.steps = Counter(prefix + "steps", "Training steps done.", registry=registry)
        self.step_seconds = Histogram(
            prefix + "step_seconds", "Time of one training step.", buckets=SHORT_SECONDS, registry=registry
        )
        self.log_loss = Gauge(
            prefix + "log_loss", "Log loss of the interests, scored before learning.", registry=registry
        )
        self.auc = Gauge(
            prefix + "auc", "Area under the curve of the engagement, scored before learning.", registry=registry
        )
        self.top1_ratio = Gauge(
            prefix + "top1_ratio", "Share of rows whose category led, scored before learning.", registry=registry
        )
        by_value = ["attribute", "value"]
        self.slice_rows = Gauge(
            prefix + "slice_rows",
            "Recent rows, by the value of an attribute of `attributes.slices`.",
            by_value,
            registry=registry,
        )
        self.slice_log_loss = Gauge(
            prefix + "slice_log_loss",
            "Log loss of the interests of those rows, scored before learning.",
            by_value,
            registry=registry,
        )
        self.slice_auc = Gauge(
            prefix + "slice_auc",
            "Area under the curve of the engagement of those rows, scored before learning.",
            by_value,
            registry=registry,
        )
        self.version = Gauge(prefix + "version", "Newest version published.", registry=registry)
        self.epoch = Gauge(prefix + "epoch", "Epoch the trainer works in.", registry=registry)
        self.publish_seconds = Histogram(
            prefix + "publish_seconds", "Time until a version is durable.", buckets=SHORT_SECONDS, registry=registry
        )
        self.publish_stall_seconds = Histogram(
            prefix + "publish_stall_seconds",
            "Time a publication kept the steps waiting.",
            buckets=SHORT_SECONDS,
            registry=registry,
        )
        self.lag_records = Gauge(
            prefix + "lag_records", "Positions of the training log not yet read.", registry=registry
        )
        self.caught_up = Gauge(
            prefix + "caught_up", "1 once this epoch has read the training log to its end.", registry=registry
        )
        self.table_rows = Gauge(prefix + "table_rows", "Rows in use, by table.", ["table"], registry=registry)
        self.guard = Counter(
            prefix + "guard", "The guard's verdicts: accept, skip, hold.", ["verdict"], registry=registry
        )
        self.held = Gauge(prefix + "held", "1 while the guard holds training.", registry=registry)
        self.accounting_rows = Gauge(
            "springtide_accounting_rows",
            "Rows of the training log since this line began, by outcome: rows (all), trained, skipped, duplicate, masked; "
            "gap counts positions that no record held.",
            ["outcome"],
            registry=registry,
        )
        self.accounting_faults = Gauge(
            "springtide_accounting_trainer_faults",
            "Accounts of the trainer that do not balance; 0 when each row has one outcome.",
            registry=registry,
        )
        self.gaps_accepted = Counter(
            prefix + "gaps_accepted", "Gaps that operators accepted since the registry began.", registry=registry
        )


class ApplierMetrics:
    """What serving's applier counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "springtide_serving_"
        self.version = Gauge(prefix + "version", "Version that answers use.", registry=registry)
        self.epoch = Gauge(prefix + "epoch", "Epoch of that version.", registry=registry)
        self.pinned = Gauge(prefix + "pinned", "1 while an operator pins the version.", registry=registry)
        self.applied_versions = Counter(
            prefix + "applied_versions", "Versions whose rows were applied.", registry=registry
        )
        self.apply_seconds = Histogram(
            prefix + "apply_seconds", "Time to apply one version's rows.", buckets=SHORT_SECONDS, registry=registry
        )
        self.feature_freshness_seconds = Gauge(
            prefix + "feature_freshness_seconds",
            "Age of the newest click in the histories that answers use.",
            registry=registry,
        )
        self.weight_freshness_seconds = Gauge(
            prefix + "weight_freshness_seconds",
            "Age of the newest click trained into the version that answers use.",
            registry=registry,
        )
        self.attributes_known = Gauge(
            prefix + "attributes_known",
            "Users and items whose attributes answers use, by side (user, item).",
            ["side"],
            registry=registry,
        )
        self.history_rows = Counter(prefix + "history_rows", "Rows taken into serving's histories.", registry=registry)
        self.microbatch_lag_records = Gauge(
            prefix + "microbatch_lag_records",
            "Positions of the micro-batch topic not yet taken into the histories.",
            registry=registry,
        )
        self.control_generation = Gauge(
            prefix + "control_generation", "Control generation that serving has seen.", registry=registry
        )
        self.corrupt_versions = Counter(
            prefix + "corrupt_versions", "Versions refused because a file fails its digest.", registry=registry
        )
        self.swept_versions = Counter(prefix + "swept_versions", "Old versions forgotten.", registry=registry)
        self.history_duplicates = Counter(
            prefix + "history_duplicates", "Rows of the micro-batch topic that the histories had.", registry=registry
        )
        self.gap_positions = Counter(
            prefix + "gap_positions",
            "Positions that no micro-batch covered, or that were deleted unread.",
            registry=registry,
        )
        self.unreadable_microbatches = Counter(
            prefix + "unreadable_microbatches",
            "Records of the micro-batch topic that are no micro-batch.",
            registry=registry,
        )
        self.log_failures = Counter(
            prefix + "log_failures", "Times that the micro-batch topic could not be read.", registry=registry
        )
        self.feature_age_seconds = Histogram(
            prefix + "feature_age_seconds",
            "Age of the newest click in the histories, sampled ten times a second.",
            buckets=FRESHNESS_SECONDS,
            registry=registry,
        )
        self.weight_age_seconds = Histogram(
            prefix + "weight_age_seconds",
            "Age of the newest click trained into the served version, sampled ten times a second.",
            buckets=FRESHNESS_SECONDS,
            registry=registry,
        )


class WorkerMetrics:
    """What a serving worker counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "springtide_requests", "Requests, by route and status code.", ["route", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "springtide_request_seconds",
            "Time of a request, by route.",
            ["route"],
            buckets=SHORT_SECONDS,
            registry=registry,
        )
        self.cold_starts = Counter("springtide_cold_starts", "Answers for users without a history.", registry=registry)


PROCESSES = (StreamMetrics, TrainerMetrics, ApplierMetrics, WorkerMetrics)


def names() -> frozenset[str]:
    """Every series name that some process offers, with the suffixes that Prometheus adds.

    >>> "springtide_stream_events_total" in names(), "springtide_trainer_step_seconds_bucket" in names()
    (True, True)
    """
    registry = CollectorRegistry()
    for process in PROCESSES:
        process(registry)
    suffixes = {
        "counter": ("_total", "_created"),
        "histogram": ("_bucket", "_count", "_sum", "_created"),
        "gauge": ("",),
    }
    return frozenset(family.name + suffix for family in registry.collect() for suffix in suffixes[family.type])


def serve(registry: CollectorRegistry, port: int, host: str = "127.0.0.1") -> Callable[[], None]:
    """Offers `registry` on http://host:port/metrics from a daemon thread; returns the function that stops it.

    Raises:
        PortTaken: The port is in use.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(
            f"port {port} for /metrics is in use; stop its owner or set this process's metrics_port"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
