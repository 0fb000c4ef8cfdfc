"""The validation: `python -m deploy.validation.process`, `springtide validate`.

Follows the training log beside the trainer, takes the statistics of each window
of log time, and judges it when it is over. Nobody waits for it: where it is slow
or dead, clicks, training and answers go on, and it takes the log up again where
its open window began.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry

from deploy.validation.judging import WindowJudge
from deploy.validation.kept import KeptWindows
from deploy.validation.windows import Windows, chosen
from state.compiled.preparing import Kernels
from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import GapError, LogError, MicroBatchError, RegistryError, UnknownTopic, of_disk
from state.features.spec import FeatureSpec
from state.log import KERNELS, KafkaLog, Log, LogReader, PartitionBatch
from state.metrics import ValidationMetrics, served
from state.microbatch.codec import decode
from state.process.ending import stop_on_signals
from state.process.garbage import keep_what_is_there
from state.process.part import run_part
from state.process.said_once import SaidOnce
from state.statistics.collecting import Statistics

FETCH_S = 0.5
RETRY_S = 1.0
RECORDS_AT_ONCE = 64
LOOK_BACK_WINDOWS = 2
_log = logging.getLogger(__name__)


class LogValidation:
    """Follows one partition of the training log; used by one thread.

    Args:
        settings: Of the loop.
        log: Where the training log is.
        metrics: Where it counts.
        clock: Wall clock, seconds.
    """

    def __init__(self, settings: Settings, log: Log, metrics: ValidationMetrics, clock: Callable[[], float]) -> None:
        self._settings, self._kafka, self._metrics, self._clock = settings, log, metrics, clock
        self._spec = FeatureSpec.from_settings(settings)
        self._kept = KeptWindows(settings.validation_dir)
        self._judge = WindowJudge(settings, self._spec.digest, self._kept, metrics)
        self._reader: LogReader | None = None
        self._windows = self._new_windows(resumed=False)
        self._say = SaidOnce(_log.warning)

    def step(self) -> None:
        """Takes what has arrived, waiting `FETCH_S` at most.

        Raises:
            LogError: The log cannot be read; come again.
            RegistryError: A window could not be judged; it is kept, and the next one is judged as always.
        """
        if self._reader is None:
            self._reader = self._open()
        try:
            for batch in self._reader.poll(FETCH_S, RECORDS_AT_ONCE):
                self._take(batch)
            self._metrics.lag_records.set(sum(self._reader.lag().values()))
        except LogError:
            self.disconnect()
            raise

    def disconnect(self) -> None:
        """Ends the connection; the next step makes another."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> LogReader:
        """A reader where the open window began, or, where nobody knows, some windows back."""
        topic, partition = self._settings.kafka.microbatches_topic, self._settings.trainer.partition
        with self._kafka.topics() as topics:
            topic_id, (begin, end) = topics.describe(topic).topic_id, topics.ends(topic)[partition]
            place = self._kept.place(topic_id)
            resumed = place is not None and begin <= place <= end
            if place is None or not resumed:
                back_ms = 1000 * LOOK_BACK_WINDOWS * self._settings.validation.window_s
                place = topics.offset_before(topic, max(0, round(self._clock() * 1000) - back_ms))[partition]
        self._windows = self._new_windows(resumed)
        return self._kafka.reader(topic, [partition], {partition: place})

    def _new_windows(self, resumed: bool) -> Windows:
        spec, context = self._spec, self._settings.events.context
        return Windows(
            self._settings.validation.window_s, lambda: Statistics(spec.actions, spec.names, context), resumed
        )

    def _take(self, batch: PartitionBatch) -> None:
        every, records = self._settings.validation.every, self._metrics.records
        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            if not chosen(offset, every):
                records.labels("passed").inc()
                continue
            try:
                found = decode(value or b"")
            except MicroBatchError as error:
                records.labels("unreadable").inc()
                self._say(f"record {offset} of the training log is left out: {error}")
                continue
            if found.header.spec != self._spec.digest:
                records.labels("other_features").inc()
                continue
            records.labels("read").inc()
            self._metrics.rows.inc(len(found))
            ended = self._windows.take(offset, found)
            if self._windows.open is not None and self._windows.open.first == offset and self._windows.open.whole:
                self._kept.note_place(batch.topic_id, offset)
            if ended is not None:
                self._judge.judge(ended)


def run(settings: Settings, log: Log, registry: CollectorRegistry, stop: threading.Event) -> None:
    """Follows the log until `stop` is set.

    Args:
        settings: Of the loop.
        log: Where the training log is.
        registry: Where metrics are collected.
        stop: Ends it, within some `FETCH_S`.
    """
    validation = LogValidation(settings, log, ValidationMetrics(registry), time.time)
    say = SaidOnce(_log.warning)
    keep_what_is_there()
    try:
        while not stop.is_set():
            try:
                validation.step()
                say.clear()
            except (GapError, UnknownTopic, LogError, RegistryError, OSError) as error:
                say(f"{of_disk(error)}; the validation tries again")
                stop.wait(RETRY_S)
    finally:
        validation.disconnect()


def main(argv: list[str] | None = None) -> int:
    """Runs the validation with the settings of `argv` until a signal; returns the exit code."""
    stop = stop_on_signals()
    return run_part("validation", lambda settings: _run(settings, stop), argv, _log)


def _run(settings: Settings, stop: threading.Event) -> None:
    with (
        DirectoryLock(settings.validation_dir),
        served(settings.validation.metrics_port, settings.metrics.host) as registry,
    ):
        Kernels(registry, _log, uses=[KERNELS]).prepare(stop.is_set)
        run(settings, KafkaLog(settings.kafka), registry, stop)


if __name__ == "__main__":
    sys.exit(main())
