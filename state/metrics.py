"""Declares every metric with name, help, labels and buckets, one class per process."""

from __future__ import annotations

import errno
import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any, ClassVar, NamedTuple, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)

from state.errors import PortTaken

SHORT_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FRESHNESS_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0)
ANSWER_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 2.0)
ANSWERING_ROUTES = (
    *("profile", "batch", "explain", "rank", "recommendations", "similar", "predict"),
    *map("/springtide.v1.Profiles/{}".format, ("GetProfile", "BatchGetProfiles", "Rank", "Recommend", "Similar")),
    "/tensorflow.serving.PredictionService/Predict",
)
"""Routes and methods of a worker that a version answers."""
OTHER_ROUTES = "other"
BEGAN = "Time at which this process began to count, in seconds since 1970; with several workers, that of the first."
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


# Otherwise each counter and histogram would have an additional unused series.
disable_created_metrics()


class _Declared(NamedTuple):
    """A metric declaration; the metric is created when its process has a registry."""

    make: Callable[..., Any]
    name: str
    text: str
    labels: tuple[str, ...]
    options: Mapping[str, Any] = {}


def counter(text: str, *labels: str, name: str = "") -> Counter:
    """Declares a counter. Without `name`, its name is its class's prefix and the attribute's name; likewise below."""
    return cast(Counter, _Declared(Counter, name, text, labels))


def gauge(text: str, *labels: str, name: str = "", of_workers: str = "max") -> Gauge:
    """Declares a gauge. If several workers share their metrics, it shows the largest value, or the smallest (`min`)."""
    return cast(Gauge, _Declared(Gauge, name, text, labels, {"multiprocess_mode": of_workers}))


def unset_gauge(text: str) -> Gauge:
    """Declares a gauge of a single process that is NaN until it is first set."""

    def make(name: str, text: str, labels: tuple[str, ...], registry: CollectorRegistry) -> Gauge:
        gauge = Gauge(name, text, labels, registry=registry)
        gauge.set(math.nan)
        return gauge

    return cast(Gauge, _Declared(make, "", text, ()))


def histogram(text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    """Declares a histogram."""
    return cast(Histogram, _Declared(Histogram, "", text, labels, {"buckets": buckets}))


class Metrics:
    """The metrics of one process in a registry, as its class declares them; also sets `began`, if declared.

    `prefix` is the prefix of the names of its metrics.
    """

    prefix: ClassVar[str]

    def __init__(self, registry: CollectorRegistry) -> None:
        for attribute, declared in vars(type(self)).items():
            if isinstance(declared, _Declared):
                make, name, text, labels, options = declared
                name = name or f"{self.prefix}{attribute}"
                setattr(self, attribute, make(name, text, labels, registry=registry, **options))
        if isinstance(began := vars(self).get("began"), Gauge):
            began.set_to_current_time()


class StreamMetrics(Metrics):
    """Metrics of the Beam job."""

    prefix = "springtide_stream_"
    began = gauge(BEGAN, name="springtide_stream_began_seconds")
    events = counter(
        "Processed positions of the clicks topic, by outcome: rows (examples), dead, filtered, absent, opened, feedback, masked.",
        "outcome",
    )
    dead_letters = counter("Dead letters, by reason.", "reason")
    clocks_off = counter(
        "Clicks with a wrong clock, by direction: ahead, behind (or late), refused (reason implausible_time).",
        "direction",
    )
    clock_off_partition = gauge("Partition of the newest click with a wrong clock, by direction.", "direction")
    clock_off_offset = gauge("Offset of the newest click with a wrong clock, by direction.", "direction")
    clock_off_seconds = gauge(
        "Difference between the time of that click and the time of the clicks around it; 0 for a refused click.",
        "direction",
    )
    clock_off_time_seconds = gauge("Time at which that click was read, in seconds since 1970.", "direction")
    busy_seconds = counter("Time that the reader thread has spent on processing clicks, including waits for commits.")
    lag_events = unset_gauge("Positions of the clicks topic that are not yet read and committed; NaN while unknown.")
    lag_seconds = unset_gauge(
        "Wall time since the newest committed click was appended to Kafka; 0 if none waits, NaN while unknown."
    )
    microbatches = counter("Micro-batches written.")
    microbatch_rows = histogram("Number of examples of a micro-batch.", ROWS)
    commit_seconds = histogram("Time to write and commit a micro-batch.", SHORT_SECONDS)
    truncated_histories = counter("Examples whose longest window starts before the oldest event of the history.")
    history_users = gauge("Users with a stored history.")
    swept_events = counter("Stored events removed because no window covers them any more.")
    swept_users = counter(
        "Stored users removed, by reason: old (no window covers their events), too_many (least recently read).",
        "reason",
    )
    attribute_records = gauge(
        "Positions of the attribute topics that were read since the store was created, by side (user, item) and outcome: value, removed, dead, absent.",
        "side",
        "outcome",
    )
    attributes_known = gauge("Users and items with attributes, by side.", "side")
    accounting_positions = gauge(
        "Positions of the clicks topic since the store was created, by outcome: positions (all), rows (examples), dead, filtered, absent, gap, opened, feedback, masked. Opened: impressions that wait for a label. Feedback: outcomes. Masked: excluded by control.",
        "outcome",
        name="springtide_accounting_positions",
    )
    accounting_labels = gauge(
        "Impressions that wait for a label, counted since the store was created, by outcome: opened (all), joined, expired (negative), dropped, waiting. unmatched counts outcomes without an impression.",
        "outcome",
        name="springtide_accounting_labels",
    )
    accounting_faults = gauge(
        "Accounts of the stream that do not balance; 0 if every position has one outcome.",
        name="springtide_accounting_stream_faults",
    )
    gaps_accepted = counter("Gaps in the clicks topic that operators have accepted since the store was created.")


class TrainerMetrics(Metrics):
    """Metrics of the trainer."""

    prefix = "springtide_trainer_"
    began = gauge(BEGAN, name="springtide_trainer_began_seconds")
    rows = counter(
        "Examples of the training log, by outcome: trained, skipped, duplicate, masked, other_features (from an earlier feature spec).",
        "outcome",
    )
    steps = counter("Training steps, one for each record of the training log.")
    step_seconds = histogram("Time of a training step.", SHORT_SECONDS)
    log_loss = gauge(
        "Log loss of the user's next category over serving's candidates, including misses; computed before learning."
    )
    auc = gauge("AUC of engagement, computed before learning.")
    top1_ratio = gauge("Top-1 accuracy: share of examples whose category ranked first, computed before learning.")
    quality_log_loss = gauge(
        "Log loss of the next category, by predictor (the model and the baselines popular, previous, came_next) and users (all, new, known).",
        "predictor",
        "users",
    )
    quality_reciprocal_rank = gauge(
        "Mean reciprocal rank of the next category among the candidates; a miss counts as 0.", "predictor", "users"
    )
    quality_top1_ratio = gauge(
        "Share of examples whose category ranked first, for the model and the baselines.", "predictor", "users"
    )
    quality_top5_ratio = gauge("Share of examples whose category ranked in the top five.", "predictor", "users")
    quality_missed_ratio = gauge("Share of examples whose category was not among the candidates.", "predictor", "users")
    quality_skipped_ratio = gauge(
        "Share of recent examples that the guard skipped; they are measured but not learned from."
    )
    lift_log_loss = gauge("Log loss of the best baseline minus that of the model; negative if the model is worse.")
    lift_top1_ratio = gauge(
        "Top-1 accuracy of the model minus that of the best baseline; negative if the model is worse."
    )
    slice_rows = gauge(
        "Recent examples of a slice: by action, by users (new, known) and by the values of `attributes.slices`. Only the largest slices are exported.",
        "attribute",
        "value",
    )
    slice_log_loss = gauge(
        "Log loss of the next category in the slice, defined as for springtide_trainer_log_loss.", "attribute", "value"
    )
    slice_auc = gauge("AUC of engagement in the slice, computed before learning.", "attribute", "value")
    slice_calibration_ratio = gauge(
        "Predicted divided by observed engagement in the slice; 1 is ideal.", "attribute", "value"
    )
    slice_gap = gauge(
        "Difference between the best and the worst slice of an attribute, by measure (log_loss, auc).",
        "attribute",
        "measure",
    )
    slice_gap_sure = gauge(
        "The part of that difference outside the confidence intervals, corrected for the number of slices.",
        "attribute",
        "measure",
    )
    churn_examples = gauge("Churn examples (`churn.days`) learned from since the epoch began.")
    churn_waiting = gauge("Examples that wait for their churn label.")
    churn_dropped = gauge(
        "Waiting examples that were dropped, together with their users, since the epoch began, because 20,000 examples wait."
    )
    churn_left_ratio = gauge("Share of recent examples whose user churned.")
    churn_log_loss = gauge("Log loss of churn, computed before learning.")
    churn_auc = gauge("AUC of churn, computed before learning.")
    churn_calibration_ratio = gauge("Predicted divided by observed churn; 1 is ideal.")
    churn_calibration_error = gauge(
        "Mean absolute difference of predicted and observed churn over ten bins of the probability."
    )
    version = gauge("Newest published version.")
    epoch = gauge("Current epoch of the trainer.")
    durable_version = gauge("Newest durable version.")
    publish_seconds = histogram("Time until a version is available to its followers.", SHORT_SECONDS)
    save_seconds = histogram("Time from publication until a durable version is on disk.", SHORT_SECONDS)
    publish_stall_seconds = histogram("Time for which a publication blocked training.", SHORT_SECONDS)
    lag_records = unset_gauge("Positions of the training log that are not yet read; NaN while unknown.")
    lag_seconds = unset_gauge(
        "Wall time since the newest record that the trainer has processed was appended to Kafka; 0 if none waits, NaN while unknown."
    )
    standby = gauge(
        "1 while this process stands by, because another trainer has the registry; 0 for the trainer that learns."
    )
    phase = gauge(
        "1 for the current phase of the trainer, 0 for the others. In order: standing by, loading modules, loading TensorFlow, compiling kernels, waiting for workers, waiting for the bootstrap, building the model, lowering the program, loading the version, catching up, learning.",
        "phase",
    )
    caught_up = gauge("1 once this epoch has read the training log to its end.")
    device_memory_bytes = gauge(
        "GPU memory that TensorFlow has allocated, by kind: current, peak; absent on a CPU.", "kind"
    )
    table_rows = gauge("Embedding rows in use, by table.", "table")
    table_rows_limit = gauge("Maximum of embedding rows, by table; the least used are evicted first.", "table")
    worker_seconds = counter(
        "Time that a worker computed gradients, by worker; the others wait for the slowest. Only with `trainer.workers` above 1.",
        "worker",
    )
    worker_missing = gauge(
        "1 for a worker that the trainer waits for, by worker. Only with `trainer.workers` above 1.", "worker"
    )
    worker_users = gauge("Users whose embedding rows a worker holds. Only with `trainer.workers` above 1.", "worker")
    guard = counter("Verdicts of the guard: accept, skip, hold.", "verdict")
    held = gauge("1 while the guard holds training.")
    held_rule = gauge("1 for the rule by which the guard holds training, 0 for the others.", "rule")
    held_offset = gauge("First suspect offset of the training log in a held update; 0 if none.")
    hold_waits = gauge(
        "1 while a hold cannot be written, for example because the store of a shared registry is unreachable; nothing is published until it is."
    )
    guard_ratio = gauge("Score of each rule of the guard as a share of its hold threshold; 1 is a hold.", "rule")
    guard_windows = gauge("Windows in the guard's baseline; below 30 the guard judges nothing.")
    withheld = gauge(
        "1 while versions wait because the guard is unsure about an update: at most 30 s, unless it is held."
    )
    privacy_epsilon_spent = gauge("Spent privacy budget, as epsilon at privacy.delta.")
    privacy_epsilon_limit = gauge("Privacy budget, privacy.epsilon; 0 if there is none.")
    privacy_held = gauge("1 while training is held because the privacy budget is spent.")
    privacy_rows_left_out = gauge(
        "Examples of the current branch that were not learned from because their user had no update left in the period."
    )
    compactor_failures = gauge(
        "Consecutive failed runs of the compactor.", name="springtide_trainer_compactor_failures_in_a_row"
    )
    paused = gauge("1 while an operator has paused training.")
    publishing_held = gauge("1 while an operator holds the publishing of versions.")
    accounting_rows = gauge(
        "Examples of the training log since the current branch began, by outcome: rows (all), trained, skipped, duplicate, masked, other_features (from an earlier feature spec). gap counts positions without a record.",
        "outcome",
        name="springtide_accounting_rows",
    )
    accounting_faults = gauge(
        "Accounts of the trainer that do not balance; 0 if every example has one outcome.",
        name="springtide_accounting_trainer_faults",
    )
    gaps_accepted = counter("Gaps that operators have accepted since the registry was created.")
    records_left_out = counter(
        "Records of the training log that could not be learned from and that operators have skipped since the registry was created."
    )


class ApplierMetrics(Metrics):
    """Metrics of serving's applier."""

    prefix = "springtide_serving_"
    began = gauge(BEGAN, name="springtide_serving_began_seconds")
    version = gauge("Version that answers use.")
    epoch = gauge("Epoch of the version that answers use.")
    version_age_seconds = gauge("Time since the version that answers use was created.")
    pinned = gauge("1 while an operator has pinned the version.")
    masks = gauge("Masks in control that answers exclude.")
    applied_versions = counter("Versions whose embedding rows were applied.")
    apply_seconds = histogram("Time to apply the embedding rows of a version.", SHORT_SECONDS)
    rows_bytes = gauge("Size of serving's row store, by place: memory, disk (if memory has too little space).", "place")
    feature_freshness_seconds = gauge("Age of the newest click in the histories that answers use.")
    weight_freshness_seconds = gauge("Age of the newest click trained into the version that answers use.")
    attributes_known = gauge("Users and items whose attributes answers use, by side (user, item).", "side")
    history_rows = counter("Examples added to serving's histories.")
    history_users = gauge("Users with a history on this host.")
    snapshot_seconds = unset_gauge(
        "Unix time of the newest snapshot of histories, or of this host's start if there is none; NaN if none are written."
    )
    snapshot_every_seconds = gauge("Interval between snapshots of histories in the settings; 0: off.")
    microbatch_lag_records = unset_gauge(
        "Positions of the micro-batch topic that are not yet in the histories; NaN while unknown."
    )
    history_epoch = gauge("Epoch of the training log from which serving's histories are updated.")
    control_generation = gauge("Newest control generation that serving has read.")
    corrupt_versions = counter("Versions refused because the digest of a file does not match.")
    failed_probes = counter("Versions refused because their answers differ from those of their trainer.")
    refused_version = gauge(
        "Newest version that failed its probe and is newer than the version that answers use; 0 if none."
    )
    segments = gauge("Segments in the settings. `springtide segments run` must maintain them.")
    parity_rows = counter(
        "Sampled examples of the training log recomputed from serving's histories, by outcome: equal, differs, unknown (another feature spec or mask, or a history that began before this host's).",
        "outcome",
    )
    gap_positions = counter("Positions that no micro-batch covers or that were deleted before they were read.")
    unreadable_microbatches = counter("Records of the micro-batch topic that are not valid micro-batches.")
    log_failures = counter("Failed reads of the micro-batch topic.")
    degraded = gauge(
        "1 while a part of the answers gets no updates, by part: version (from the registry), histories (from Kafka). `/readyz` gives the reason.",
        "part",
    )
    log_away = gauge("1 while no broker of the micro-batch topic is reachable.")
    feature_age_seconds = histogram(
        "Age of the newest click in the histories, sampled ten times per second.", FRESHNESS_SECONDS
    )
    weight_age_seconds = histogram(
        "Age of the newest click trained into the served version, sampled ten times per second.", FRESHNESS_SECONDS
    )


class WorkerMetrics(Metrics):
    """Metrics of a serving worker."""

    prefix = "springtide_"
    began = gauge(BEGAN, name="springtide_worker_began_seconds")
    requests = counter("Requests, by route and status code.", "route", "code")
    request_seconds = histogram(
        "Duration of a request, by route; routes that no version answers share the label other.",
        ANSWER_SECONDS,
        "route",
    )
    cold_starts = counter("Answers for users without a history.")
    refused = counter(
        "Connections closed before a valid request, by reason: no_http, host (a Host other than an address or localhost, without tokens), head (too long), slow, connections (too many).",
        "reason",
        name="springtide_connections_refused",
    )
    worker_starts = counter("Starts of serving workers that have accepted connections.")
    unheld_shares = gauge(
        "Shares of users, of 64, that no live host holds; 0 if each host holds all users.",
        name="springtide_serving_unheld_shares",
    )
    forwarded = counter(
        "Requests that a worker forwarded to hosts that hold their users, by result: answered, failed (no host of a share answered).",
        "result",
        name="springtide_serving_forwarded",
    )


class ValidationMetrics(Metrics):
    """Metrics of the validation of live clicks; a window lasts `validation.window_s`."""

    prefix = "springtide_validation_"
    records = counter(
        "Records of the training log, by outcome: read, other_features (from an earlier feature spec), unreadable.",
        "outcome",
    )
    rows = counter("Examples of the training log that were read.")
    lag_records = gauge("Positions of the training log that are not yet read.")
    windows = counter(
        "Completed windows, by outcome: judged, few_rows (fewer than validation.min_rows), begun_before (their start was not observed), no_baseline.",
        "outcome",
    )
    window_rows = gauge("Events that count in the newest completed window; of many, some records count.")
    baseline = gauge("Number of the baseline that it was compared with; 0 is the baseline of the bootstrap.")
    distance = gauge(
        "Distance of a feature of the newest window, by feature and against (baseline, previous window): L-infinity distance of a categorical feature, Jensen-Shannon divergence of a numeric feature. A family of features shows its largest distance.",
        "feature",
        "against",
        name="springtide_validation_distance_ratio",
    )
    missing_ratio = gauge("Share of examples of the newest window without a value of the feature.", "feature")
    anomalies = gauge("Features of the newest window with an anomaly, by TensorFlow Data Validation type.", "type")


class SegmentMetrics(Metrics):
    """Metrics of the process that maintains the segments named in the settings."""

    prefix = "springtide_segments_"
    members = gauge("Users in a segment.", "segment")
    lag_records = gauge("Positions of the training log that are not yet processed.")
    waiting = gauge("Users who have clicked and wait to be evaluated.")
    sweep_seconds = gauge("Duration of the last pass over all users.")
    failures_in_a_row = gauge(
        "Consecutive failed rounds. Members stay unchanged, and the process retries every second."
    )


class SupervisorMetrics(Metrics):
    """Metrics of `springtide up` about the parts that it supervises."""

    prefix = "springtide_up_"
    starts = counter("Starts of a part by `springtide up`.", "part")
    deaths = counter("Unexpected exits of a part.", "part")
    deaths_in_a_row = gauge(
        "Exits of a part since it last ran for a minute. The restart delay starts at 0.25 s and doubles up to 30 s, or to 4 s if the part waits for Kafka, a disk or a store.",
        "part",
    )
    settled = gauge("1 once every part has started for the first time; 0 while `springtide up` starts them.")


class ConsoleMetrics(Metrics):
    """Metrics of the console page."""

    prefix = "springtide_console_"
    requests = counter(
        "Requests to the console, by outcome: answered, refused (unauthorised, not found or invalid), failed (also if the part that it asked did not answer).",
        "outcome",
    )


class ProbeMetrics(Metrics):
    """Latencies that `springtide probe --continuously` measures with clicks of probe users."""

    prefix = "springtide_probe_"
    feature_seconds = histogram(
        "Time from sending a probe user's click until the features of an answer include it.", FRESHNESS_SECONDS
    )
    weight_seconds = histogram(
        "Time from sending a probe user's click until the version of an answer has learned its position.",
        FRESHNESS_SECONDS,
    )
    failures = counter(
        "Failed probes, by reason: kafka (the click could not be sent), answers (serving does not answer), refused (no valid token), features, weights (not within 30 s).",
        "reason",
    )
    last_success = gauge(
        "Time of the last successful probe, in seconds since 1970; 0 before the first.",
        name="springtide_probe_last_success_timestamp_seconds",
    )


class TrialMetrics(Metrics):
    """Comparisons of the running experiments, at most four, with the live trainer."""

    prefix = "springtide_trial_"
    rows = gauge("Examples that both trainers scored before they learned from them.", "trial")
    log_loss = gauge("Mean log loss of these examples in nats, by side: trial, live.", "trial", "side")
    difference = gauge(
        "Log loss of the trial minus that of the live trainer, in nats per example, by end: mean, and low and high of the anytime-valid confidence interval. Negative if the trial is better.",
        "trial",
        "end",
    )


class RolloutMetrics(Metrics):
    """Metrics of the arms of the newest rollout, until it is over; the label `trial` is its experiment."""

    prefix = "springtide_rollout_"
    share_ratio = gauge("Share of users that the trial answers.", "trial")
    stopped = gauge(
        "1 if the gate has halted or rolled back the rollout and no operator has resumed or ended it; otherwise 0.",
        "trial",
    )
    users = gauge("Users that the arm has ever answered, by arm: trial, live.", "trial", "arm")
    answers = gauge("Answers of the arm.", "trial", "arm")
    engagements = gauge("Engagements that follow an answer of the arm.", "trial", "arm")
    failures = gauge("Failed answers of the arm in the current step.", "trial", "arm")
    difference = gauge(
        "Engagements per answer of the trial minus those of the live versions, by end: mean, and low and high of the anytime-valid confidence interval. Positive if the trial is better.",
        "trial",
        "end",
    )
    lift_ratio = gauge("The difference relative to the live versions, by end.", "trial", "end")
    finding = gauge(
        "1 for the current finding about the trial, 0 for the others: mismatch (sample ratio mismatch), too early, better, worse, equal, undecided.",
        "trial",
        "finding",
    )
    mismatch_p = gauge("Anytime-valid p-value of the sample ratio mismatch test.", "trial")
    judged_timestamp_seconds = gauge(
        "Time at which `springtide experiment rollout` last evaluated the running rollout, or at which its step began, in seconds since 1970.",
        "trial",
    )


class RetrainMetrics(Metrics):
    """Outcomes of scheduled retrains."""

    prefix = "springtide_retrain_"
    under_way = gauge("1 while a scheduled retrain runs.")
    due = gauge(
        "Time at which the next retrain is due, in seconds since 1970; 0 while one runs.",
        name="springtide_retrain_due_time_seconds",
    )
    judged = gauge(
        "Time at which a retrain was last promoted or dropped, or at which the schedule began, in seconds since 1970.",
        name="springtide_retrain_judged_time_seconds",
    )
    outcome = gauge(
        "1 for the outcome of the newest retrain: promoted, dropped, failed; 0 for the others, and for all while one runs.",
        "outcome",
    )


class StorageMetrics(Metrics):
    """Disk usage, as each process reports it for the parts of `storage.budget_gb` that it owns."""

    prefix = "springtide_storage_"
    used_bytes = gauge(
        "Bytes on disk, by part: kafka (a local one), registry, stream, serving, logs; measured at most every 5 s.",
        "part",
    )
    limit_bytes = gauge("Share of storage.budget_gb of the part.", "part")
    free_bytes = gauge("Free bytes on the disk of the part.", "part")
    disk_bytes = gauge("Size of the disk of the part in bytes.", "part")
    waiting = gauge(
        "Number of writers of the part that wait for space because its disk or its share is full; 0 if none waits.",
        "part",
    )
    waits = counter("Number of times that a writer of the part began to wait for space.", "part")


class SharedMetrics(Metrics):
    """Metrics of a process that syncs a shared registry: the trainer, and one process of each host."""

    prefix = "springtide_shared_"
    requests = counter(
        "Requests to the object store of the shared registry, by operation: get, put, list, delete.", "operation"
    )
    bytes = counter("Bytes sent to and received from the object store, by direction.", "direction")
    looked_seconds = gauge(
        "Time of this host's last successful poll of the shared registry, or of its first attempt, in seconds since 1970; 0 if another process of the host polls."
    )
    sent_seconds = gauge(
        "Time at which the shared registry last held all durable versions of the trainer, or at which the upload began, in seconds since 1970; 0 in other processes."
    )


class KernelMetrics(Metrics):
    """Progress of a process in compiling or loading its kernels before it is ready."""

    prefix = "springtide_kernels_"
    total = gauge("Kernels that this process prepares at startup.")
    ready = gauge("Prepared kernels; the process is ready only once all are.", of_workers="min")


PROCESSES = (
    KernelMetrics,
    StreamMetrics,
    TrainerMetrics,
    ApplierMetrics,
    WorkerMetrics,
    ValidationMetrics,
    SegmentMetrics,
    SupervisorMetrics,
    ConsoleMetrics,
    ProbeMetrics,
    TrialMetrics,
    RolloutMetrics,
    RetrainMetrics,
    StorageMetrics,
    SharedMetrics,
)


def names() -> frozenset[str]:
    """The names of all series that some process exposes, with the suffixes that Prometheus adds.

    >>> "springtide_stream_events_total" in names(), "springtide_trainer_step_seconds_bucket" in names()
    (True, True)
    """
    registry = CollectorRegistry()
    for process in (*PROCESSES, *OF_EACH_PROCESS):
        process(registry)
    suffixes = {
        "counter": ("_total",),
        "histogram": ("_bucket", "_count", "_sum"),
        "gauge": ("",),
    }
    series = {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}
    return frozenset(series | OF_ANY_PROCESS.keys())


class BuildMetrics(Metrics):
    """The versions of the software that a process runs."""

    prefix = "springtide_build_"
    info = gauge(
        "1, with the running release, Python, TensorFlow, Beam and Kafka client as labels (empty: not installed).",
        "version",
        "python",
        "tensorflow",
        "beam",
        "kafka",
    )


OF_EACH_PROCESS = (BuildMetrics,)
OF_ANY_PROCESS = {
    "process_cpu_seconds_total": "User and system CPU time.",
    "process_resident_memory_bytes": "Resident memory.",
    "process_virtual_memory_bytes": "Virtual memory.",
    "process_start_time_seconds": "Start time of the process, in seconds since 1970.",
    "process_open_fds": "Open file descriptors.",
    "process_max_fds": "Maximum number of open file descriptors.",
}
"""Standard process metrics, which every process exposes. For several workers they are sums, including the parent."""


PACKAGES = {"version": "springtide", "tensorflow": "tensorflow", "beam": "apache-beam", "kafka": "kafka-python"}
"""Label of `springtide_build_info` -> package. No package is imported to find its version."""


@cache
def build() -> dict[str, str]:
    """The labels of the build info: Python, and `PACKAGES`; empty for a package that is not installed."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    return {"python": platform.python_version(), **{label: version(name) for label, name in PACKAGES.items()}}


def add_process(registry: CollectorRegistry) -> None:
    """Adds the process metrics and the build info."""
    ProcessCollector(registry=registry)
    say_build(registry)


def say_build(registry: CollectorRegistry) -> None:
    """Adds the build info."""
    BuildMetrics(registry).info.labels(**build()).set(1)


def serve(registry: CollectorRegistry, port: int, host: str = "127.0.0.1") -> Callable[[], None]:
    """Adds the process metrics to `registry` and exposes it, as `offer` does; PortTaken if the port is in use."""
    add_process(registry)
    return offer(registry, port, host)


def offer(registry: CollectorRegistry, port: int, host: str) -> Callable[[], None]:
    """Exposes `registry` on http://host:port/metrics from a daemon thread; returns a function that stops it.

    Clients that request OpenMetrics get that format. Raises `PortTaken`.
    """
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise PortTaken(
            f"port {port} for /metrics is in use", "stop its owner or set this process's metrics_port"
        ) from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop


@contextmanager
def served(port: int, host: str = "127.0.0.1") -> Iterator[CollectorRegistry]:
    """A registry that is exposed on http://host:port/metrics within the block; PortTaken if the port is in use."""
    registry = CollectorRegistry()
    stop = serve(registry, port, host)
    try:
        yield registry
    finally:
        stop()
