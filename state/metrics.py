"""Declares every metric with name, help, labels and buckets, one class per process.

A process creates its class on its own `CollectorRegistry` and exposes it with
`serve`. Tests check dashboards and alerts against this file. Label values are
bounded, and no label contains an id.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

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
from state.process.build import build

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
BEGAN = "When this process began to count, seconds since 1970; the first of several workers."
ROWS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096)


# Each counter and histogram would have one more series, which is not used.
disable_created_metrics()


class _Declared(partial[Any]):
    """A metric declaration; the metric is created when its process has a registry."""


def counter(name: str, text: str, *labels: str) -> Counter:
    """Declares a counter."""
    return cast(Counter, _Declared(Counter, name, text, labels))


def gauge(name: str, text: str, *labels: str, of_workers: str = "max") -> Gauge:
    """Declares a gauge. If several workers share their metrics, it shows the largest value, or the smallest (`min`)."""
    return cast(Gauge, _Declared(Gauge, name, text, labels, multiprocess_mode=of_workers))


def unset_gauge(name: str, text: str) -> Gauge:
    """Declares a gauge of a single process that is NaN until it is first set."""

    def make(*, registry: CollectorRegistry) -> Gauge:
        made = Gauge(name, text, registry=registry)
        made.set(math.nan)
        return made

    return cast(Gauge, _Declared(make))


def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
    """Declares a histogram."""
    return cast(Histogram, _Declared(Histogram, name, text, labels, buckets=buckets))


class Metrics:
    """The metrics of one process, as its class declares them; also sets `began`, if declared.

    Args:
        registry: The registry that collects them.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        for attribute, declared in vars(type(self)).items():
            if isinstance(declared, _Declared):
                setattr(self, attribute, declared(registry=registry))
        if isinstance(began := vars(self).get("began"), Gauge):
            began.set_to_current_time()


class StreamMetrics(Metrics):
    """Metrics of the Beam job."""

    began = gauge("springtide_stream_began_seconds", BEGAN)
    events = counter(
        "springtide_stream_events",
        "Positions of the clicks topic taken up, by outcome: rows, dead, filtered, absent, opened, feedback, masked.",
        "outcome",
    )
    dead_letters = counter("springtide_stream_dead_letters", "Records refused, by reason.", "reason")
    clocks_off = counter(
        "springtide_stream_clocks_off",
        "Clicks of a clock that is off, by direction: ahead, behind (or late), refused (reason implausible_time).",
        "direction",
    )
    clock_off_partition = gauge(
        "springtide_stream_clock_off_partition", "Partition of the newest of those.", "direction"
    )
    clock_off_offset = gauge("springtide_stream_clock_off_offset", "Its offset there.", "direction")
    clock_off_seconds = gauge(
        "springtide_stream_clock_off_seconds",
        "How far its time is from what the clicks around it say; 0 for a refused one.",
        "direction",
    )
    clock_off_time_seconds = gauge(
        "springtide_stream_clock_off_time_seconds", "When it was read, seconds since 1970.", "direction"
    )
    busy_seconds = counter(
        "springtide_stream_busy_seconds",
        "Time that the thread that reads clicks spent on what it had read, waiting for commits included.",
    )
    lag_events = unset_gauge(
        "springtide_stream_lag_events", "Positions of the clicks topic not yet read and committed; NaN while unknown."
    )
    lag_seconds = unset_gauge(
        "springtide_stream_lag_seconds",
        "Wall time since the newest committed click was appended to Kafka; 0 when none wait, NaN while unknown.",
    )
    microbatches = counter("springtide_stream_microbatches", "Micro-batches written.")
    microbatch_rows = histogram("springtide_stream_microbatch_rows", "Rows of a micro-batch.", ROWS)
    commit_seconds = histogram(
        "springtide_stream_commit_seconds", "Time to write and commit one micro-batch.", SHORT_SECONDS
    )
    truncated_histories = counter(
        "springtide_stream_truncated_histories", "Rows whose longest window began before the oldest remembered event."
    )
    cached_users = gauge("springtide_stream_cached_users", "Users whose histories are in memory.")
    history_users = gauge("springtide_stream_history_users", "Users who have a stored history.")
    swept_events = counter("springtide_stream_swept_events", "Stored events taken out that no window reaches any more.")
    swept_users = counter(
        "springtide_stream_swept_users",
        "Stored users taken out, by reason: old (no window reaches their events), too_many (read longest ago).",
        "reason",
    )
    attribute_records = gauge(
        "springtide_stream_attribute_records",
        "Positions of the topics of attributes read since the store began, by side (user, item) and outcome: value, removed, dead, absent.",
        "side",
        "outcome",
    )
    attributes_known = gauge(
        "springtide_stream_attributes_known", "Users and items that have attributes, by side.", "side"
    )
    accounting_positions = gauge(
        "springtide_accounting_positions",
        "Positions of the clicks topic since the store began, by outcome: positions (all), rows, dead, filtered, absent, gap, opened (impressions whose label comes later), feedback (outcomes), masked (left out by control's mask).",
        "outcome",
    )
    accounting_labels = gauge(
        "springtide_accounting_labels",
        "Impressions whose label comes later since the store began, by outcome: opened (all), joined, expired (negative), dropped, waiting; unmatched counts outcomes without an impression.",
        "outcome",
    )
    accounting_faults = gauge(
        "springtide_accounting_stream_faults",
        "Accounts of the stream that do not balance; 0 when each position has one outcome.",
    )
    gaps_accepted = counter(
        "springtide_stream_gaps_accepted", "Gaps in the clicks topic that operators accepted since the store began."
    )


class TrainerMetrics(Metrics):
    """Metrics of the trainer."""

    began = gauge("springtide_trainer_began_seconds", BEGAN)
    rows = counter(
        "springtide_trainer_rows",
        "Rows of the training log, by outcome: trained, skipped, duplicate, masked, other_features (of a former feature spec).",
        "outcome",
    )
    steps = counter("springtide_trainer_steps", "Training steps done.")
    step_seconds = histogram("springtide_trainer_step_seconds", "Time of one training step.", SHORT_SECONDS)
    log_loss = gauge(
        "springtide_trainer_log_loss",
        "Log loss of the user's next category over the candidates that serving has, a miss counted as a miss; scored before learning.",
    )
    auc = gauge("springtide_trainer_auc", "Area under the curve of the engagement, scored before learning.")
    top1_ratio = gauge("springtide_trainer_top1_ratio", "Share of rows whose category led, scored before learning.")
    quality_log_loss = gauge(
        "springtide_trainer_quality_log_loss",
        "Log loss of the next category, of the model and of what is simple (popular, previous, came_next), by users (all, new, known).",
        "predictor",
        "users",
    )
    quality_reciprocal_rank = gauge(
        "springtide_trainer_quality_reciprocal_rank",
        "Mean of 1 / rank of the next category among the candidates; 0 for a miss.",
        "predictor",
        "users",
    )
    quality_top1_ratio = gauge(
        "springtide_trainer_quality_top1_ratio",
        "Share of rows whose category led, of the model and of what is simple.",
        "predictor",
        "users",
    )
    quality_top5_ratio = gauge(
        "springtide_trainer_quality_top5_ratio",
        "Share of rows whose category was among the best five.",
        "predictor",
        "users",
    )
    quality_missed_ratio = gauge(
        "springtide_trainer_quality_missed_ratio",
        "Share of rows whose category was none of the candidates.",
        "predictor",
        "users",
    )
    quality_skipped_ratio = gauge(
        "springtide_trainer_quality_skipped_ratio",
        "Share of the recent rows that the guard skipped: measured like the others, not learned.",
    )
    lift_log_loss = gauge(
        "springtide_trainer_lift_log_loss",
        "Log loss of the best of what is simple less that of the model: below 0 the model is worse.",
    )
    lift_top1_ratio = gauge(
        "springtide_trainer_lift_top1_ratio",
        "Share of rows whose category led less that of the best of what is simple: below 0 the model is worse.",
    )
    slice_rows = gauge(
        "springtide_trainer_slice_rows",
        "Recent rows, by action, by users (new, known) and by the values of `attributes.slices`; the largest slices of each.",
        "attribute",
        "value",
    )
    slice_log_loss = gauge(
        "springtide_trainer_slice_log_loss",
        "Log loss of the next category of those rows, as springtide_trainer_log_loss.",
        "attribute",
        "value",
    )
    slice_log_loss_error = gauge(
        "springtide_trainer_slice_log_loss_error",
        "Half the width of its 95 % confidence interval.",
        "attribute",
        "value",
    )
    slice_auc = gauge(
        "springtide_trainer_slice_auc",
        "Area under the curve of the engagement of those rows, scored before learning.",
        "attribute",
        "value",
    )
    slice_auc_error = gauge(
        "springtide_trainer_slice_auc_error", "Half the width of its 95 % confidence interval.", "attribute", "value"
    )
    slice_calibration_ratio = gauge(
        "springtide_trainer_slice_calibration_ratio",
        "Predicted over observed engagement of those rows; 1 is right.",
        "attribute",
        "value",
    )
    slice_gap = gauge(
        "springtide_trainer_slice_gap",
        "By how much the worst slice of an attribute is worse than the best, by measure (log_loss, auc).",
        "attribute",
        "measure",
    )
    slice_gap_sure = gauge(
        "springtide_trainer_slice_gap_sure",
        "What is left of that between the ends of their confidence intervals, widened for as many slices as there are.",
        "attribute",
        "measure",
    )
    churn_examples = gauge(
        "springtide_trainer_churn_examples",
        "Examples of who left (`churn.days`) that were learned since the epoch began.",
    )
    churn_waiting = gauge(
        "springtide_trainer_churn_waiting", "Rows of users of whom it is not known yet whether they left."
    )
    churn_dropped = gauge(
        "springtide_trainer_churn_dropped",
        "Such rows that were dropped since the epoch began, with their users, for want of room (`churn.examples`).",
    )
    churn_left_ratio = gauge("springtide_trainer_churn_left_ratio", "Share of recent examples whose user left.")
    churn_log_loss = gauge("springtide_trainer_churn_log_loss", "Log loss of churn, scored before learning.")
    churn_auc = gauge("springtide_trainer_churn_auc", "Area under the curve of churn, scored before learning.")
    churn_calibration_ratio = gauge(
        "springtide_trainer_churn_calibration_ratio", "Predicted over observed churn; 1 is right."
    )
    churn_calibration_error = gauge(
        "springtide_trainer_churn_calibration_error",
        "How far predicted and observed churn lie apart, in the mean over tenths of the probability.",
    )
    version = gauge("springtide_trainer_version", "Newest version published.")
    epoch = gauge("springtide_trainer_epoch", "Epoch the trainer works in.")
    durable_version = gauge("springtide_trainer_durable_version", "Newest version that is durable.")
    publish_seconds = histogram(
        "springtide_trainer_publish_seconds", "Time until a version is there for those who follow.", SHORT_SECONDS
    )
    save_seconds = histogram(
        "springtide_trainer_save_seconds", "Time from there until a durable version is durable.", SHORT_SECONDS
    )
    publish_stall_seconds = histogram(
        "springtide_trainer_publish_stall_seconds", "Time a publication kept the steps waiting.", SHORT_SECONDS
    )
    lag_records = unset_gauge(
        "springtide_trainer_lag_records", "Positions of the training log not yet read; NaN while unknown."
    )
    lag_seconds = unset_gauge(
        "springtide_trainer_lag_seconds",
        "Wall time since the newest record that the trainer has taken was appended to Kafka; 0 when none wait, NaN while unknown.",
    )
    phase = gauge(
        "springtide_trainer_phase",
        "1 for what the trainer does now, 0 for the others: loading TensorFlow, compiling kernels, waiting for the bootstrap, building the model, lowering the program, loading the version, catching up, learning.",
        "phase",
    )
    caught_up = gauge("springtide_trainer_caught_up", "1 once this epoch has read the training log to its end.")
    device_memory_bytes = gauge(
        "springtide_trainer_device_memory_bytes",
        "GPU memory that TensorFlow holds, by kind: current, peak; absent where it computes on the CPU.",
        "kind",
    )
    table_rows = gauge("springtide_trainer_table_rows", "Rows in use, by table.", "table")
    table_rows_limit = gauge(
        "springtide_trainer_table_rows_limit", "Rows of a table at most: the least used go first.", "table"
    )
    guard = counter("springtide_trainer_guard", "The guard's verdicts: accept, skip, hold.", "verdict")
    held = gauge("springtide_trainer_held", "1 while the guard holds training.")
    held_rule = gauge(
        "springtide_trainer_held_rule", "1 of the rule by which the guard holds training, 0 of the others.", "rule"
    )
    held_offset = gauge(
        "springtide_trainer_held_offset", "Offset of the training log from which a held update is suspect; 0: none."
    )
    hold_waits = gauge(
        "springtide_trainer_hold_waits",
        "1 while a hold cannot be written, as while the store of a shared registry is away: nothing is published then.",
    )
    guard_ratio = gauge(
        "springtide_trainer_guard_ratio", "How near each rule of the guard is to a hold, which is 1.", "rule"
    )
    guard_windows = gauge(
        "springtide_trainer_guard_windows",
        "Windows that the guard compares with; below guard.warm_up it judges nothing.",
    )
    withheld = gauge("springtide_trainer_withheld", "1 while versions wait because the guard is not sure of them.")
    privacy_epsilon_spent = gauge(
        "springtide_trainer_privacy_epsilon_spent", "What of the privacy budget is spent, as epsilon at privacy.delta."
    )
    privacy_epsilon_limit = gauge(
        "springtide_trainer_privacy_epsilon_limit", "The privacy budget, privacy.epsilon; 0: there is none."
    )
    privacy_held = gauge(
        "springtide_trainer_privacy_held", "1 while training holds because the privacy budget is spent."
    )
    privacy_rows_left_out = gauge(
        "springtide_trainer_privacy_rows_left_out",
        "Rows of this line that were not learned from, for their user had no update of the period left.",
    )
    masks = gauge("springtide_trainer_masks", "Masks that training leaves out, as control has them.")
    paused = gauge("springtide_trainer_paused", "1 while an operator pauses training.")
    publishing_held = gauge(
        "springtide_trainer_publishing_held", "1 while an operator holds the publishing of versions."
    )
    compactor_failures = gauge(
        "springtide_trainer_compactor_failures_in_a_row", "Runs of the compactor that failed since one succeeded."
    )
    accounting_rows = gauge(
        "springtide_accounting_rows",
        "Rows of the training log since this line began, by outcome: rows (all), trained, skipped, duplicate, masked, other_features (of a former feature spec); gap counts positions that no record held.",
        "outcome",
    )
    accounting_faults = gauge(
        "springtide_accounting_trainer_faults",
        "Accounts of the trainer that do not balance; 0 when each row has one outcome.",
    )
    gaps_accepted = counter(
        "springtide_trainer_gaps_accepted", "Gaps that operators accepted since the registry began."
    )
    records_left_out = counter(
        "springtide_trainer_records_left_out",
        "Records of the training log that could not be learned from and that operators left out since the registry began.",
    )


class ApplierMetrics(Metrics):
    """Metrics of serving's applier."""

    began = gauge("springtide_serving_began_seconds", BEGAN)
    version = gauge("springtide_serving_version", "Version that answers use.")
    epoch = gauge("springtide_serving_epoch", "Epoch of that version.")
    version_age_seconds = gauge(
        "springtide_serving_version_age_seconds", "Time since the version that answers use was made."
    )
    pinned = gauge("springtide_serving_pinned", "1 while an operator pins the version.")
    masks = gauge("springtide_serving_masks", "Masks that answers leave out, as control has them.")
    applied_versions = counter("springtide_serving_applied_versions", "Versions whose rows were applied.")
    apply_seconds = histogram("springtide_serving_apply_seconds", "Time to apply one version's rows.", SHORT_SECONDS)
    rows_bytes = gauge(
        "springtide_serving_rows_bytes",
        "What the rows that answers read take, by place: memory, disk (where memory has no room for them).",
        "place",
    )
    feature_freshness_seconds = gauge(
        "springtide_serving_feature_freshness_seconds", "Age of the newest click in the histories that answers use."
    )
    weight_freshness_seconds = gauge(
        "springtide_serving_weight_freshness_seconds",
        "Age of the newest click trained into the version that answers use.",
    )
    attributes_known = gauge(
        "springtide_serving_attributes_known",
        "Users and items whose attributes answers use, by side (user, item).",
        "side",
    )
    history_rows = counter("springtide_serving_history_rows", "Rows taken into serving's histories.")
    history_users = gauge("springtide_serving_history_users", "Users who have a history on this host.")
    swept_events = counter(
        "springtide_serving_swept_events", "Events of the histories taken out that no window reaches any more."
    )
    swept_users = counter(
        "springtide_serving_swept_users",
        "Users taken out of the histories, by reason: old (no window reaches their events), too_many (read longest ago).",
        "reason",
    )
    remembered = gauge(
        "springtide_serving_remembered",
        "What is remembered beside the histories, as counted last, by kind: item (its category), name (of a category or attribute value).",
        "kind",
    )
    swept_items = counter(
        "springtide_serving_swept_items",
        "Items and names taken out: nobody named them for long, or there were too many.",
    )
    microbatch_lag_records = unset_gauge(
        "springtide_serving_microbatch_lag_records",
        "Positions of the micro-batch topic not yet taken into the histories; NaN while unknown.",
    )
    history_epoch = gauge(
        "springtide_serving_history_epoch", "Epoch of the training log whose records serving's histories take."
    )
    control_generation = gauge("springtide_serving_control_generation", "Control generation that serving has seen.")
    corrupt_versions = counter(
        "springtide_serving_corrupt_versions", "Versions refused because a file fails its digest."
    )
    failed_probes = counter(
        "springtide_serving_failed_probes", "Versions refused because they answer otherwise than their trainer did."
    )
    refused_version = gauge(
        "springtide_serving_refused_version",
        "The newest version that failed its probe and is newer than the one that answers; 0 for none.",
    )
    swept_versions = counter("springtide_serving_swept_versions", "Old versions forgotten.")
    segments = gauge(
        "springtide_serving_segments", "Segments that the settings name; somebody has to keep who is in them."
    )
    parity_rows = counter(
        "springtide_serving_parity_rows",
        "Sampled rows of the training log computed again from serving's histories, by outcome: equal, differs, unknown (another feature spec or mask, or a history that began before this host's).",
        "outcome",
    )
    history_duplicates = counter(
        "springtide_serving_history_duplicates", "Rows of the micro-batch topic that the histories had."
    )
    gap_positions = counter(
        "springtide_serving_gap_positions", "Positions that no micro-batch covered, or that were deleted unread."
    )
    unreadable_microbatches = counter(
        "springtide_serving_unreadable_microbatches", "Records of the micro-batch topic that are no micro-batch."
    )
    log_failures = counter("springtide_serving_log_failures", "Times that the micro-batch topic could not be read.")
    log_away = gauge("springtide_serving_log_away", "1 while no broker of the micro-batch topic can be reached.")
    feature_age_seconds = histogram(
        "springtide_serving_feature_age_seconds",
        "Age of the newest click in the histories, sampled ten times a second.",
        FRESHNESS_SECONDS,
    )
    weight_age_seconds = histogram(
        "springtide_serving_weight_age_seconds",
        "Age of the newest click trained into the served version, sampled ten times a second.",
        FRESHNESS_SECONDS,
    )


class WorkerMetrics(Metrics):
    """Metrics of a serving worker."""

    began = gauge("springtide_worker_began_seconds", BEGAN)
    requests = counter("springtide_requests", "Requests, by route and status code.", "route", "code")
    request_seconds = histogram(
        "springtide_request_seconds",
        "Time of a request, by route; those that no version answers are one: other.",
        ANSWER_SECONDS,
        "route",
    )
    cold_starts = counter("springtide_cold_starts", "Answers for users without a history.")
    refused = counter(
        "springtide_connections_refused",
        "Connections ended before a request was one, by reason: no_http, host (anybody's name, without tokens), head (too long), slow, connections (too many).",
        "reason",
    )
    worker_starts = counter("springtide_worker_starts", "Serving workers that have started and accepted connections.")


class ValidationMetrics(Metrics):
    """Metrics of the validation of live clicks; a window lasts `validation.window_s`."""

    records = counter(
        "springtide_validation_records",
        "Records of the training log, by outcome: read, passed (not among those looked at), other_features (of a former feature spec), unreadable.",
        "outcome",
    )
    rows = counter("springtide_validation_rows", "Rows of the training log that were looked at.")
    lag_records = gauge("springtide_validation_lag_records", "Positions of the training log not yet looked at.")
    windows = counter(
        "springtide_validation_windows",
        "Windows that ended, by outcome: judged, few_rows (fewer than validation.min_rows), begun_before (their beginning was not seen), no_baseline.",
        "outcome",
    )
    window_rows = gauge("springtide_validation_window_rows", "Events in the newest window that ended.")
    window_end_seconds = gauge(
        "springtide_validation_window_end_seconds", "Log time at which it ended, seconds since 1970."
    )
    baseline = gauge(
        "springtide_validation_baseline", "Number of the baseline that it was held against; 0 is that of the bootstrap."
    )
    distance = gauge(
        "springtide_validation_distance_ratio",
        "How far a feature of the newest window lies from the baseline or from the window before, by feature and against (baseline, previous): L-infinity distance of a categorical one, Jensen-Shannon divergence of a numeric one, the largest of a family.",
        "feature",
        "against",
    )
    missing_ratio = gauge(
        "springtide_validation_missing_ratio", "Share of its rows in which a feature has no value.", "feature"
    )
    anomalies = gauge(
        "springtide_validation_anomalies",
        "Features of the newest window that have an anomaly, by type, as TensorFlow Data Validation names it.",
        "type",
    )


class SegmentMetrics(Metrics):
    """Metrics of the process that maintains the segments named in the settings."""

    members = gauge("springtide_segments_members", "Users in a segment.", "segment")
    changes = counter(
        "springtide_segments_changes",
        "Changes of membership that are in the topic, by what happened: joined, left.",
        "segment",
        "change",
    )
    judged = counter(
        "springtide_segments_judged",
        "Profiles that were held against the expressions, by cause: click, sweep (users are looked at one after another), change (of control, such as a rollback, a mask or an erasure, and at the start).",
        "cause",
    )
    lag_records = gauge(
        "springtide_segments_lag_records", "Positions of the training log whose users are not yet known here."
    )
    waiting = gauge("springtide_segments_waiting", "Users who clicked and are not yet held against the expressions.")
    sweep_seconds = gauge("springtide_segments_sweep_seconds", "How long the newest look at all users took.")
    erased = gauge("springtide_segments_erased", "Number of the newest erasure whose users have left all segments.")
    failures_in_a_row = gauge(
        "springtide_segments_failures_in_a_row",
        "Rounds that failed since one did well; members stay as they are, and it is tried again each second.",
    )


class SupervisorMetrics(Metrics):
    """Metrics of `springtide up` about the parts that it supervises."""

    starts = counter("springtide_up_starts", "Starts of a part by `springtide up`.", "part")
    deaths = counter("springtide_up_deaths", "Ends of a part that nobody asked for.", "part")
    deaths_in_a_row = gauge(
        "springtide_up_deaths_in_a_row",
        "Ends of a part since it last ran for a minute; it starts again after 0.25 s, twice as long each time, 30 s at most, or 4 s where it waits for Kafka, a disk or a store.",
        "part",
    )
    settled = gauge(
        "springtide_up_settled",
        "1 once every part has come up for the first time; 0 while `springtide up` starts them.",
    )


class ConsoleMetrics(Metrics):
    """Metrics of the console page."""

    requests = counter(
        "springtide_console_requests",
        "Requests of the page, by outcome: answered, refused (not let in, not there, or wrong), failed (also where what it asked for did not answer).",
        "outcome",
    )


class ProbeMetrics(Metrics):
    """Latencies that `springtide probe --continuously` measures with clicks of probe users."""

    feature_seconds = histogram(
        "springtide_probe_feature_seconds",
        "Time from sending a probe user's click until an answer's features show it.",
        FRESHNESS_SECONDS,
    )
    weight_seconds = histogram(
        "springtide_probe_weight_seconds",
        "Time from sending a probe user's click until an answer's version has learned from its position.",
        FRESHNESS_SECONDS,
    )
    failures = counter(
        "springtide_probe_failures",
        "Probes that did not come through, by reason: kafka (the click could not be sent), answers (nobody answers), refused (no token, or a wrong one), features, weights (not within probe.timeout_s).",
        "reason",
    )
    last_success = gauge(
        "springtide_probe_last_success_timestamp_seconds",
        "When a probe last came through, seconds since 1970; 0 before the first.",
    )


class TrialMetrics(Metrics):
    """Comparisons of the running trials, at most four, with the live trainer."""

    rows = gauge("springtide_trial_rows", "Rows that both trainers scored before they learned them.", "trial")
    log_loss = gauge(
        "springtide_trial_log_loss", "Mean log loss of these rows in nats, by side: trial, live.", "trial", "side"
    )
    difference = gauge(
        "springtide_trial_difference",
        "Log loss of the trial less that of the live trainer, in nats a row, by end: mean, and low and high of the interval that holds at all looks. Below 0 the trial is better.",
        "trial",
        "end",
    )
    unpaired_records = gauge(
        "springtide_trial_unpaired_records",
        "Records of the training log that one side had alone, or with other rows: before the other began, or while a mask reached one first.",
        "trial",
    )


class RolloutMetrics(Metrics):
    """Metrics of the arms of the newest rollout, until it has ended; the label `trial` is the trial of that rollout."""

    share_ratio = gauge("springtide_rollout_share_ratio", "Share of the users whom the trial answers.", "trial")
    stopped = gauge(
        "springtide_rollout_stopped",
        "1 where the gate halted the rollout or took it back, until somebody resumes or ends it; else 0.",
        "trial",
    )
    users = gauge("springtide_rollout_users", "Users who were ever answered by the arm: trial, live.", "trial", "arm")
    answers = gauge("springtide_rollout_answers", "Answers of the arm.", "trial", "arm")
    engagements = gauge("springtide_rollout_engagements", "Engagements after their users' answers.", "trial", "arm")
    failures = gauge(
        "springtide_rollout_failures", "Answers of the newest step that the arm could not give.", "trial", "arm"
    )
    difference = gauge(
        "springtide_rollout_difference",
        "Engagements an answer of the trial less those of the live versions, by end: mean, and low and high of the interval that holds at all looks. Above 0 the trial is better.",
        "trial",
        "end",
    )
    lift_ratio = gauge(
        "springtide_rollout_lift_ratio", "The same as a part of the live versions', by end likewise.", "trial", "end"
    )
    finding = gauge(
        "springtide_rollout_finding",
        "1 for what is found of the trial, 0 for the others: mismatch (of the sample ratio), too early, better, worse, equal, undecided.",
        "trial",
        "finding",
    )
    mismatch_p = gauge(
        "springtide_rollout_mismatch_p",
        "How probable it is that chance alone brings users to the arms so far off the share; valid at all looks.",
        "trial",
    )
    judged_timestamp_seconds = gauge(
        "springtide_rollout_judged_timestamp_seconds",
        "While the rollout runs: when the command that drives it last judged it, or its step began, seconds since 1970.",
        "trial",
    )


class RetrainMetrics(Metrics):
    """Outcomes of scheduled retrains."""

    under_way = gauge("springtide_retrain_under_way", "1 while a scheduled retrain is under way.")
    due = gauge(
        "springtide_retrain_due_time_seconds",
        "When the next one is to begin, seconds since 1970; 0 while one is under way.",
    )
    judged = gauge(
        "springtide_retrain_judged_time_seconds",
        "When one was last judged, promoted or dropped, or else the schedule began, seconds since 1970.",
    )
    outcome = gauge(
        "springtide_retrain_outcome",
        "1 of what became of the newest one, by outcome: promoted, dropped, failed; 0 of the others, of all while it is under way.",
        "outcome",
    )


class StorageMetrics(Metrics):
    """Disk usage, as each process reports it for the parts of `storage.budget_gb` that it owns."""

    used_bytes = gauge(
        "springtide_storage_used_bytes",
        "Bytes on disk, by part: kafka (a local one), registry, stream, serving, logs; measured at most every 5 s.",
        "part",
    )
    limit_bytes = gauge("springtide_storage_limit_bytes", "The part's share of storage.budget_gb.", "part")
    free_bytes = gauge("springtide_storage_free_bytes", "Bytes free on the disk where the part lies.", "part")
    disk_bytes = gauge("springtide_storage_disk_bytes", "Bytes of that disk.", "part")
    waiting = gauge(
        "springtide_storage_waiting",
        "What of the part waits for room, its disk or share being full; 0 where nothing does.",
        "part",
    )
    waits = counter("springtide_storage_waits", "Times that the part began to wait for room.", "part")


class SharedMetrics(Metrics):
    """Metrics of a process that syncs a shared registry: the trainer, and one process of each host."""

    requests = counter(
        "springtide_shared_requests",
        "Requests to the place where the registry is shared, by operation: get, put, list, delete.",
        "operation",
    )
    failures = counter("springtide_shared_failures", "Those of them that it did not answer, or refused.", "operation")
    bytes = counter("springtide_shared_bytes", "Bytes sent there and received from there, by direction.", "direction")
    looked_seconds = gauge(
        "springtide_shared_looked_seconds",
        "When this host last saw there what is new, or began to look, seconds since 1970; 0 where another process of it looks.",
    )
    sent_seconds = gauge(
        "springtide_shared_sent_seconds",
        "When all durable versions of the trainer lay there last, or it began to send, seconds since 1970; 0 elsewhere.",
    )


class KernelMetrics(Metrics):
    """Progress of a process in compiling or loading its kernels before it is ready."""

    total = gauge("springtide_kernels_total", "Kernels that this process prepares at its start.")
    ready = gauge(
        "springtide_kernels_ready",
        "Those of them that are ready; the process is not ready before all are.",
        of_workers="min",
    )


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
    ours = {family.name + suffix for family in registry.collect() for suffix in suffixes[family.type]}
    return frozenset(ours | OF_ANY_PROCESS.keys())


class BuildMetrics(Metrics):
    """The versions of the software that a process runs."""

    info = gauge(
        "springtide_build_info",
        "1; the labels say which release runs, and on which Python, TensorFlow, Beam and Kafka client (empty: not installed).",
        "version",
        "python",
        "tensorflow",
        "beam",
        "kafka",
    )


OF_EACH_PROCESS = (BuildMetrics,)
OF_ANY_PROCESS = {
    "process_cpu_seconds_total": "Processor time, user and system.",
    "process_resident_memory_bytes": "Memory that is in use.",
    "process_virtual_memory_bytes": "Memory that is mapped.",
    "process_start_time_seconds": "When it started, seconds since 1970.",
    "process_open_fds": "Open files and sockets.",
    "process_max_fds": "How many there may be.",
}
"""Standard process metrics, which every process exposes. For several workers they are sums, including the parent."""


def add_process(registry: CollectorRegistry) -> None:
    """Adds the process metrics and the build info."""
    ProcessCollector(registry=registry)
    say_build(registry)


def say_build(registry: CollectorRegistry) -> None:
    """Adds the build info."""
    BuildMetrics(registry).info.labels(**build()).set(1)


def serve(registry: CollectorRegistry, port: int, host: str = "127.0.0.1") -> Callable[[], None]:
    """Adds the process metrics to `registry` and exposes it, as `offer` does.

    Raises:
        PortTaken: The port is in use.
    """
    add_process(registry)
    return offer(registry, port, host)


def offer(registry: CollectorRegistry, port: int, host: str) -> Callable[[], None]:
    """Exposes `registry` on http://host:port/metrics from a daemon thread; returns a function that stops it.

    Clients that request OpenMetrics get that format.

    Raises:
        PortTaken: The port is in use.
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
    """A registry that is exposed on http://host:port/metrics within the block.

    Raises:
        PortTaken: The port is in use.
    """
    registry = CollectorRegistry()
    stop = serve(registry, port, host)
    try:
        yield registry
    finally:
        stop()
