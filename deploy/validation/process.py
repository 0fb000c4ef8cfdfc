"""Validates live clicks against the baseline: `python -m deploy.validation.process`, `springtide validate`."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from prometheus_client import CollectorRegistry
from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from state.config.settings import Settings
from state.disk.lock import DirectoryLock
from state.errors import GapError, LogError, MicroBatchError, RegistryError, SettingsError, UnknownTopic, of_disk
from state.features.spec import FeatureSpec
from state.kernels import Kernels
from state.log import KERNELS, Log, PartitionBatch
from state.log.follow import Follower, Opening, Position
from state.log.topic_plan import TRAINING_PARTITION
from state.metrics import ValidationMetrics, served
from state.microbatch.batch import ATTRIBUTES, SCALARS, MicroBatch
from state.microbatch.codec import decode
from state.process.environment import freeze_objects, run_in_background
from state.process.log_lines import SaidOnce
from state.process.part import run_part, stop_on_signals
from state.registry.directory import Directory
from state.registry.specs import Specs
from state.statistics.anomalies import validate
from state.statistics.baselines import Baseline, Baselines, KeptWindow, KeptWindows
from state.statistics.collecting import FEATURES, Statistics, by_name, common, dataset

MOST_LABELS = 40
SETTLED_WINDOWS = 24
OTHERS = "others"
KINDS = (
    "SCHEMA_MISSING_COLUMN",
    "SCHEMA_NEW_COLUMN",
    "FEATURE_TYPE_LOW_FRACTION_PRESENT",
    "UNEXPECTED_DATA_TYPE",
    "ENUM_TYPE_UNEXPECTED_STRING_VALUES",
    "INT_TYPE_SMALL_INT",
    "INT_TYPE_BIG_INT",
    "FLOAT_TYPE_SMALL_FLOAT",
    "FLOAT_TYPE_BIG_FLOAT",
    "COMPARATOR_L_INFTY_HIGH",
    "COMPARATOR_JENSEN_SHANNON_DIVERGENCE_HIGH",
)
"""The kinds of anomalies that `state/statistics/anomalies.py` can find."""
FETCH_S = 0.5
RETRY_S = 1.0
PAUSE_S = 0.5
"""Between two polls: some large fetches cost less than many small ones, and a window lasts minutes."""
RECORDS_AT_ONCE = 64
MOST_ROWS = 200_000
"""The most rows of a window that count, spread over its length, unless `validation.min_rows` is larger. More rows would
hardly change a distance."""
HEAD = ("user", "source", "at_ms")
COLUMNS = (*SCALARS, "context", FEATURES, *ATTRIBUTES)
"""What statistics count; the windows of categories would take half of the time to decode."""
LOOK_BACK_WINDOWS = 2
KEPT_WINDOWS = 12
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Window:
    """A span of log time and the statistics of its rows.

    Attributes:
        start_ms: Its beginning, a multiple of its length.
        first: Offset of its first record in the training log.
        whole: Whether its beginning was seen.
    """

    start_ms: int
    end_ms: int
    first: int
    statistics: Statistics
    whole: bool


def _log_time_ms(batch: MicroBatch) -> int:
    """Returns the time after the last event of a batch by the clocks of many users, ms; 0 if it is unknown.

    Batches of 0.1.0 have no clocks: their time is that of their newest row.
    """
    if batch.header.clocks:
        return max(after for _, after in batch.header.clocks)
    return int(batch.at_ms.max(initial=0))


class Windows:
    """Divides records, in the order of the log, into windows of `window_s` seconds; `new` returns empty statistics.

    Of many rows, records spread over the window count: `MOST_ROWS` rows, and at least `min_rows`.
    `resumed`: the first record to come is the first of its window.
    """

    def __init__(self, window_s: int, new: Callable[[], Statistics], resumed: bool = False, min_rows: int = 0) -> None:
        self._length_ms = window_s * 1000
        self._new = new
        self._is_whole = resumed
        self._min_rows = min_rows
        self._now_ms = 0
        self.open: Window | None = None

    def take(self, offset: int, head: MicroBatch, decoded: Callable[[], MicroBatch]) -> Window | None:
        """Counts the rows of the record at `offset` if the window has not enough of them; returns the window that it ended.

        `head` has the columns `HEAD`, and `decoded` returns the columns `COLUMNS`.
        """
        self._now_ms = max(self._now_ms, _log_time_ms(head))
        ended = None
        if self.open is None or self._now_ms >= self.open.end_ms:
            ended = self.open
            start_ms = self._now_ms - self._now_ms % self._length_ms
            is_whole = self._is_whole or ended is not None
            self.open = Window(start_ms, start_ms + self._length_ms, offset, self._new(), is_whole)
        enough = max(self._min_rows, MOST_ROWS * (self._now_ms - self.open.start_ms) / self._length_ms)
        if self.open.statistics.rows <= enough:
            batch = decoded()
            self.open.statistics.add(batch.columns, batch.header.attributes)
        return ended


def labels_of(names: Iterable[str]) -> dict[str, str]:
    """Returns the value of the metrics' label `feature` of each feature, at most `MOST_LABELS` different ones.

    Each input has its own; the integers of the feature spec have that of what they describe.

    >>> labels_of(["category", "features.view.count_1h", "features.view.recency"])
    {'category': 'category', 'features.view.count_1h': 'features.view', 'features.view.recency': 'features.view'}
    """
    labels = {name: ".".join(name.split(".")[:2]) if name.startswith(f"{FEATURES}.") else name for name in names}
    # Inputs first: there may be up to 255 actions.
    ordered = sorted({*labels.values()}, key=lambda label: (label.startswith(f"{FEATURES}."), label))
    shown = {*ordered[: MOST_LABELS - 1]} if len(ordered) > MOST_LABELS else {*ordered}
    return {name: label if label in shown else OTHERS for name, label in labels.items()}


class WindowJudge:
    """Judges windows as they end; `spec` is the digest of the feature spec."""

    def __init__(self, settings: Settings, spec: str, windows: KeptWindows, metrics: ValidationMetrics) -> None:
        self._settings, self._spec, self._kept, self._metrics = settings, spec, windows, metrics
        self._warn_once = SaidOnce(_log.warning)
        self._seen: set[str] = set()

    def judge(self, window: Window) -> Anomalies | None:
        """Stores a window and returns its anomalies; None if there is nothing to compare it with.

        Raises:
            RegistryError: The registry cannot be read, or a baseline is damaged.
            OSError: The window cannot be written to disk.
        """
        rows, metrics = window.statistics.rows, self._metrics
        metrics.window_rows.set(rows)
        if not window.whole or rows < self._settings.validation.min_rows:
            self._clear()
            metrics.windows.labels("begun_before" if not window.whole else "few_rows").inc()
            return None
        statistics = dataset(window.statistics, f"window until {window.end_ms}")
        previous = self._previous(window)
        self._kept.add(KeptWindow(window.end_ms, statistics), KEPT_WINDOWS)
        baseline = self._baseline()
        if baseline is None:
            self._clear()
            metrics.windows.labels("no_baseline").inc()
            return None
        metrics.windows.labels("judged").inc()
        metrics.baseline.set(baseline.accepted.number)
        if previous is not None and not self._settled(window):
            previous = _without_features(previous)
        anomalies = validate(statistics, baseline.schema, baseline.statistics, previous)
        self._show(statistics, anomalies)
        self._tell(anomalies, rows)
        return anomalies

    def _previous(self, window: Window) -> DatasetFeatureStatistics | None:
        try:
            before = self._kept.newest(window.start_ms)
        except SettingsError as error:
            self._warn_once(str(error))
            return None
        return None if before is None else before.statistics

    def _settled(self, window: Window) -> bool:
        specs = Specs(Directory(self._settings.registry_dir))
        name = specs.bootstrapped(self._spec, self._settings.model)
        begun_ms = 0 if name is None else int(specs.spec(name)["newest_ms"])
        return window.end_ms - begun_ms >= SETTLED_WINDOWS * (window.end_ms - window.start_ms)

    def _baseline(self) -> Baseline | None:
        name = Specs(Directory(self._settings.registry_dir)).bootstrapped(self._spec, self._settings.model)
        baseline = None if name is None else Baselines(self._settings.registry_dir).newest(name)
        if baseline is None:
            self._warn_once(
                "there is no baseline yet"
                if name is None
                else "the bootstrap was one of an earlier release, which made no baseline: "
                "`springtide schema accept --reason TEXT` makes the newest window one"
            )
        return baseline

    def _clear(self) -> None:
        """Clears the metrics of the previous window, so that none of them is shown for this one."""
        for metric in (self._metrics.distance, self._metrics.missing_ratio):
            metric.clear()
        self._count({})

    def _show(self, statistics: DatasetFeatureStatistics, anomalies: Anomalies) -> None:
        self._clear()
        features = by_name(statistics)
        labels = labels_of(features)
        for label, against, distance in _largest(anomalies, labels):
            self._metrics.distance.labels(label, against).set(distance)
        for name, feature in features.items():
            if not name.startswith(f"{FEATURES}.") and labels[name] != OTHERS:
                present, missing = common(feature).num_non_missing, common(feature).num_missing
                self._metrics.missing_ratio.labels(name).set(missing / max(1, present + missing))
        self._count(Counter(AnomalyInfo.Type.Name(kind) for kind in _kinds(anomalies)))

    def _count(self, features: Mapping[str, int]) -> None:
        for kind in KINDS:
            self._metrics.anomalies.labels(kind).set(features.get(kind, 0))

    def _tell(self, anomalies: Anomalies, rows: int) -> None:
        now = {*anomalies.anomaly_info}
        for name in sorted(now - self._seen):
            _log.warning("%s: %s (%d rows)", name, anomalies.anomaly_info[name].description, rows)
        for name in sorted(self._seen - now):
            _log.info("%s: as expected again", name)
        self._seen = now


def _without_features(statistics: DatasetFeatureStatistics) -> DatasetFeatureStatistics:
    inputs = DatasetFeatureStatistics(name=statistics.name, num_examples=statistics.num_examples)
    inputs.features.extend(
        feature for feature in statistics.features if not feature.path.step[0].startswith(f"{FEATURES}.")
    )
    return inputs


def _largest(anomalies: Anomalies, labels: Mapping[str, str]) -> Iterable[tuple[str, str, float]]:
    distances: dict[tuple[str, str], float] = {}
    for feature in anomalies.drift_skew_info:
        label = labels[feature.path.step[0]]
        for against, measured in (("baseline", feature.skew_measurements), ("previous", feature.drift_measurements)):
            for measurement in measured:
                key = label, against
                distances[key] = max(distances.get(key, 0.0), measurement.value)
    return [(label, against, distance) for (label, against), distance in sorted(distances.items())]


def _kinds(anomalies: Anomalies) -> Iterable[int]:
    for info in anomalies.anomaly_info.values():
        yield from sorted({reason.type for reason in info.reason})


class LogValidation:
    """Follows one partition of the training log. Not thread-safe."""

    def __init__(self, settings: Settings, log: Log, metrics: ValidationMetrics, clock: Callable[[], float]) -> None:
        self._settings, self._kafka, self._metrics, self._clock = settings, log, metrics, clock
        self._spec = FeatureSpec.from_settings(settings)
        self._kept = KeptWindows(settings.validation_dir)
        self._judge = WindowJudge(settings, self._spec.digest, self._kept, metrics)
        self._topic, self._partition = settings.kafka.microbatches_topic, TRAINING_PARTITION
        self._log = Follower(log, self._topic, [self._partition], self._stored, opened=self._opened)
        self._windows = self._new_windows(resumed=False)
        self._warn_once = SaidOnce(_log.warning)

    def step(self) -> None:
        """Reads what has arrived, waiting at most `FETCH_S`.

        Raises:
            LogError: The log cannot be read; call again.
            RegistryError: A window could not be judged; it is stored, and the next one is judged.
        """
        for batch in self._log.poll(FETCH_S, RECORDS_AT_ONCE):
            self._take(batch)
        self._metrics.lag_records.set(self._log.lag())

    def disconnect(self) -> None:
        """Closes the connection; the next step opens another."""
        self._log.disconnect()

    def _stored(self) -> Position | None:
        position = self._kept.position()
        return None if position is None else Position(position[0], {self._partition: position[1]})

    def _opened(self, opening: Opening) -> None:
        """Without a stored offset, starts some windows back."""
        self._windows = self._new_windows(opening.resumed)
        if not opening.resumed:
            back_ms = 1000 * LOOK_BACK_WINDOWS * self._settings.validation.window_s
            with self._kafka.topics() as topics:
                before = topics.offset_before(self._topic, max(0, round(self._clock() * 1000) - back_ms))
            self._log.reader.seek(self._partition, before[self._partition])

    def _new_windows(self, resumed: bool) -> Windows:
        spec, context, validation = self._spec, self._settings.events.context, self._settings.validation

        def empty() -> Statistics:
            return Statistics(spec.actions, spec.names, context)

        return Windows(validation.window_s, empty, resumed, validation.min_rows)

    def _take(self, batch: PartitionBatch) -> None:
        records = self._metrics.records
        for offset, value in zip(batch.offsets.tolist(), batch.values, strict=True):
            try:
                head = decode(value or b"", HEAD)
            except MicroBatchError as error:
                records.labels("unreadable").inc()
                self._warn_once(f"record {offset} of the training log is left out: {error}")
                continue
            if head.header.spec != self._spec.digest:
                records.labels("other_features").inc()
                continue
            records.labels("read").inc()
            self._metrics.rows.inc(len(head))
            ended = self._windows.take(offset, head, partial(decode, value or b"", COLUMNS))
            if self._windows.open is not None and self._windows.open.first == offset and self._windows.open.whole:
                self._kept.note_position(batch.topic_id, offset)
            if ended is not None:
                self._judge.judge(ended)


def run(settings: Settings, log: Log, registry: CollectorRegistry, stop: threading.Event) -> None:
    """Follows the log until `stop` is set, which takes at most some `FETCH_S`."""
    validation = LogValidation(settings, log, ValidationMetrics(registry), time.time)
    say = SaidOnce(_log.warning)
    freeze_objects()
    try:
        while not stop.is_set():
            try:
                validation.step()
                say.clear()
                stop.wait(PAUSE_S)
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
    run_in_background()
    with (
        DirectoryLock(settings.validation_dir),
        served(settings.up.validation_port, settings.metrics.host) as registry,
    ):
        Kernels(registry, _log, uses=[KERNELS]).prepare(stop.is_set)
        run(settings, Log(settings.kafka), registry, stop)


if __name__ == "__main__":
    sys.exit(main())
