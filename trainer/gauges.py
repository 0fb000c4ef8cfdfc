"""Exports the trainer's steps, rows, versions and measures as the metrics that `state/metrics.py` declares.

The lag behind the training log, in positions and seconds, goes to metrics and a Kafka consumer group. A separate thread polls once a second, so lag is visible while training is held, and Kafka does not delay a step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from state.config.sections import Kafka
from state.errors import LogError
from state.log import Log, Topics
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import TrainerMetrics
from state.process.log_lines import SaidOnce
from state.registry.control import Control
from trainer.engine.guard import Verdict
from trainer.engine.report import Report
from trainer.engine.step import WorkerLoad
from trainer.intake import Intake
from trainer.measures.progressive import PREDICTORS, USERS, where_of
from trainer.measures.slices import GAPS, SliceMeasures, gap
from trainer.tables.id_table import IdTable

MOST_DIMENSIONS, MOST_SLICES = 8, 16
"""Limits of the slices on /metrics: the most dimensions, and the most slices. Each dimension shows its largest slices.
Versions contain all slices."""

logger = logging.getLogger(__name__)


def show_intake(intake: Intake, metrics: TrainerMetrics) -> None:
    """Counts the rows of a record that are not learned from."""
    metrics.rows.labels("duplicate").inc(intake.duplicate)
    metrics.rows.labels("masked").inc(intake.masked)
    metrics.rows.labels("other_features").inc(intake.other_features)


def show_step(report: Report, offset: int, metrics: TrainerMetrics) -> None:
    """Counts the step of the record at `offset` and its rows. Logs the step if the guard skipped rows of it."""
    metrics.steps.inc()
    metrics.step_seconds.observe(report.seconds)
    metrics.guard.labels(report.verdict.value).inc()
    metrics.rows.labels("trained").inc(report.rows - report.skipped)
    metrics.rows.labels("skipped").inc(report.skipped)
    if report.verdict is not Verdict.ACCEPT:
        logger.warning(
            "the guard skipped rows of offset %d: loss %.3g a row, gradient norm %.3g",
            *(offset, report.interest_log_loss, report.grad_norm),
        )


def show_workers(loads: Sequence[WorkerLoad], metrics: TrainerMetrics) -> None:
    """Adds a step to the metrics of the workers of a group, in their order."""
    for worker, load in enumerate(loads):
        metrics.worker_seconds.labels(str(worker)).inc(load.seconds)
        metrics.worker_users.labels(str(worker)).set(load.users)


def show_control(control: Control, version: int, metrics: TrainerMetrics) -> None:
    """Sets the gauges of control's requests to the trainer, and of the current version."""
    metrics.version.set(version)
    metrics.epoch.set(control.epoch)
    metrics.paused.set(not control.training)
    metrics.publishing_held.set(not control.publishing)


def show_version(measured: Mapping[str, float], tables: Mapping[str, IdTable], metrics: TrainerMetrics) -> None:
    """Sets the gauges of a version's measures and of the tables' rows."""
    for name, table in tables.items():
        metrics.table_rows.labels(name).set(len(table))
        metrics.table_rows_limit.labels(name).set(table.max_rows)
    for gauge, name in ((metrics.log_loss, "log_loss"), (metrics.auc, "auc"), (metrics.top1_ratio, "top1")):
        gauge.set(measured.get(name, float("nan")))


def show_quality(measured: Mapping[str, float], metrics: TrainerMetrics) -> None:
    """Sets the gauges of the model and the simple baselines. Only the model's are also split by kind of user."""
    shown = {
        "log_loss": metrics.quality_log_loss,
        "mrr": metrics.quality_reciprocal_rank,
        "top1": metrics.quality_top1_ratio,
        "top5": metrics.quality_top5_ratio,
        "missed": metrics.quality_missed_ratio,
    }
    for predictor in PREDICTORS:
        for users in USERS if predictor == "model" else USERS[:1]:
            where = where_of(predictor, users)
            for name, gauge in shown.items():
                if f"{where}{name}" in measured:
                    gauge.labels(predictor, users).set(measured[f"{where}{name}"])
    for gauge, name in ((metrics.lift_log_loss, "lift.log_loss"), (metrics.lift_top1_ratio, "lift.top1")):
        gauge.set(measured.get(name, float("nan")))
    metrics.quality_skipped_ratio.set(measured.get("skipped", 0.0))


def show_churn(measured: Mapping[str, float], metrics: TrainerMetrics) -> None:
    """Sets the gauges of churn; measures that are absent set none."""
    shown = {
        "total.rows": metrics.churn_examples,
        "waiting": metrics.churn_waiting,
        "dropped": metrics.churn_dropped,
        "left": metrics.churn_left_ratio,
        "log_loss": metrics.churn_log_loss,
        "auc": metrics.churn_auc,
        "calibration": metrics.churn_calibration_ratio,
        "calibration_error": metrics.churn_calibration_error,
    }
    for name, gauge in shown.items():
        if f"churn.{name}" in measured:
            gauge.set(measured[f"churn.{name}"])


def show_slices(slices: Sequence[SliceMeasures], metrics: TrainerMetrics) -> None:
    """Sets the gauges of the largest slices of each dimension, and of the gaps. Clears old ones: names may change."""
    shown = {
        "rows": metrics.slice_rows,
        "log_loss": metrics.slice_log_loss,
        "auc": metrics.slice_auc,
        "calibration": metrics.slice_calibration_ratio,
    }
    for gauge in (*shown.values(), metrics.slice_gap, metrics.slice_gap_sure):
        gauge.clear()
    dimensions = list(dict.fromkeys(slice_.dimension for slice_ in slices))[:MOST_DIMENSIONS]
    for dimension in dimensions:
        largest = sorted(
            (slice_ for slice_ in slices if slice_.dimension == dimension), key=lambda slice_: -slice_.figures["rows"]
        )
        for slice_ in largest[: MOST_SLICES // len(dimensions)]:
            for name in shown.keys() & slice_.figures.keys():
                shown[name].labels(dimension, slice_.value).set(slice_.figures[name])
        for name in GAPS:
            if (difference := gap(slices, dimension, name)) is not None:
                metrics.slice_gap.labels(dimension, name).set(difference.size)
                metrics.slice_gap_sure.labels(dimension, name).set(difference.sure)


POLL_S = 1.0


class Taken(NamedTuple):
    """The trainer's progress in the training log.

    Attributes:
        at_ms: Kafka's timestamp of the newest record that was read; 0 if none was read since the start.
    """

    next: int
    at_ms: int


class TrainingLag:
    """Reports the lag of one trainer from `start` to `close`."""

    def __init__(
        self,
        kafka: Kafka,
        taken: Callable[[], Taken],
        metrics: TrainerMetrics,
        log: Log | None = None,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._kafka, self._position, self._metrics = kafka, taken, metrics
        self._log, self._wall_s = log or Log(kafka), wall_s
        self._topics: Topics | None = None
        self._committed = -1
        self.records: int | None = None
        self._warn_once = SaidOnce(logger.warning)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag", daemon=True)

    def start(self) -> None:
        """Starts the polling thread."""
        self._thread.start()

    def close(self) -> None:
        """Stops without a final poll, which an unreachable broker would delay."""
        self._closing.set()

    def poll(self) -> None:
        """Polls once: sets the gauges and commits the group's offset to Kafka.

        Raises:
            LogError: Kafka does not answer.
        """
        topic = self._kafka.microbatches_topic
        if self._topics is None:
            self._topics = self._log.topics()
        # Read before the end of the log, so that the lag is never negative.
        position = self._position()
        _, end = self._topics.ends(topic, committed_only=True)[TRAINING_PARTITION]
        lag = max(0, end - position.next)
        self._metrics.lag_records.set(lag)
        self.records = lag
        waits = lag and position.at_ms
        self._metrics.lag_seconds.set(max(0.0, self._wall_s() - position.at_ms / 1000) if waits else 0.0)
        if position.next != self._committed:
            self._topics.commit(self._kafka.group, topic, {TRAINING_PARTITION: position.next})
            self._committed = position.next

    def _run(self) -> None:
        while not self._closing.wait(POLL_S):
            try:
                self.poll()
                self._warn_once.clear()
            except LogError as error:
                self._warn_once(f"the lag of the training log is unknown for now: {error}")
        if self._topics is not None:
            self._topics.close()
