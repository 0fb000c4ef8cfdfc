"""Holds each window against the baseline and the window before, and says what was found: metrics, and lines in the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from deploy.validation.kept import KeptWindow, KeptWindows
from deploy.validation.windows import Window
from state.config.settings import Settings
from state.errors import SettingsError
from state.metrics import ValidationMetrics
from state.process.said_once import SaidOnce
from state.registry.specs import Specs
from state.statistics.anomalies import validate
from state.statistics.baselines import Baseline, Baselines
from state.statistics.collecting import FEATURES
from state.statistics.protos import by_name, common, dataset

MOST_LABELS = 40
SETTLED_WINDOWS = 24
OTHERS = "others"
_log = logging.getLogger(__name__)


def labels_of(names: Iterable[str]) -> dict[str, str]:
    """The value of the metrics' label `feature` of each feature, at most `MOST_LABELS` different ones.

    Each input has its own; the integers of the feature spec have that of what they are about.

    >>> labels_of(["category", "features.view.count_1h", "features.view.recency"])
    {'category': 'category', 'features.view.count_1h': 'features.view', 'features.view.recency': 'features.view'}
    """
    found = {name: ".".join(name.split(".")[:2]) if name.startswith(f"{FEATURES}.") else name for name in names}
    # Inputs first: there may be as many actions as a byte can say.
    ordered = sorted({*found.values()}, key=lambda label: (label.startswith(f"{FEATURES}."), label))
    kept = {*ordered[: MOST_LABELS - 1]} if len(ordered) > MOST_LABELS else {*ordered}
    return {name: label if label in kept else OTHERS for name, label in found.items()}


class WindowJudge:
    """Judges windows as they end.

    Args:
        settings: Of the loop.
        spec: Digest of its feature spec.
        kept: Where windows stay.
        metrics: Of the validation.
    """

    def __init__(self, settings: Settings, spec: str, kept: KeptWindows, metrics: ValidationMetrics) -> None:
        self._settings, self._spec, self._kept, self._metrics = settings, spec, kept, metrics
        self._say = SaidOnce(_log.warning)
        self._seen: set[str] = set()

    def judge(self, window: Window) -> Anomalies | None:
        """Keeps a window and says what is wrong with it; None where it is held against nothing.

        Raises:
            RegistryError: The registry cannot be read, or a baseline is damaged.
            OSError: The disk refused the window.
        """
        rows, metrics = window.statistics.rows, self._metrics
        metrics.window_rows.set(rows)
        metrics.window_end_seconds.set(window.end_ms / 1000)
        if not window.whole or rows < self._settings.validation.min_rows:
            self._clear()
            metrics.windows.labels("begun_before" if not window.whole else "few_rows").inc()
            return None
        counted = dataset(window.statistics, f"window until {window.end_ms}")
        previous = self._previous(window)
        self._kept.add(KeptWindow(window.end_ms, counted), self._settings.validation.keep)
        baseline = self._baseline()
        if baseline is None:
            self._clear()
            metrics.windows.labels("no_baseline").inc()
            return None
        metrics.windows.labels("judged").inc()
        metrics.baseline.set(baseline.accepted.number)
        if previous is not None and not self._settled(window):
            previous = without_features(previous)
        found = validate(counted, baseline.schema, baseline.statistics, previous)
        self._show(counted, found)
        self._tell(found, rows)
        return found

    def _previous(self, window: Window) -> DatasetFeatureStatistics | None:
        try:
            before = self._kept.newest(window.start_ms)
        except SettingsError as error:
            self._say(str(error))
            return None
        return None if before is None else before.statistics

    def _settled(self, window: Window) -> bool:
        """Whether histories, which begin empty with the bootstrap, grow slowly enough by now to be like a window before."""
        specs = Specs(self._settings.registry_dir)
        name = specs.bootstrapped(self._spec, self._settings.model)
        begun_ms = 0 if name is None else int(specs.spec(name)["newest_ms"])
        return window.end_ms - begun_ms >= SETTLED_WINDOWS * (window.end_ms - window.start_ms)

    def _baseline(self) -> Baseline | None:
        name = Specs(self._settings.registry_dir).bootstrapped(self._spec, self._settings.model)
        found = None if name is None else Baselines(self._settings.registry_dir).newest(name)
        if found is None:
            self._say(
                "there is no baseline yet"
                if name is None
                else "the bootstrap was one of an earlier release, which made no baseline: "
                "`springtide schema accept --reason TEXT` makes the newest window one"
            )
        return found

    def _clear(self) -> None:
        """What was said of an earlier window is not said of this one."""
        for one in (self._metrics.distance, self._metrics.missing_ratio):
            one.clear()
        self._count({})

    def _show(self, counted: DatasetFeatureStatistics, found: Anomalies) -> None:
        self._clear()
        features = by_name(counted)
        labels = labels_of(features)
        for label, against, distance in largest(found, labels):
            self._metrics.distance.labels(label, against).set(distance)
        for name, feature in features.items():
            if not name.startswith(f"{FEATURES}.") and labels[name] != OTHERS:
                there, missing = common(feature).num_non_missing, common(feature).num_missing
                self._metrics.missing_ratio.labels(name).set(missing / max(1, there + missing))
        self._count(Counter(AnomalyInfo.Type.Name(kind) for kind in kinds(found)))

    def _count(self, features: Mapping[str, int]) -> None:
        for kind in KINDS:
            self._metrics.anomalies.labels(kind).set(features.get(kind, 0))

    def _tell(self, found: Anomalies, rows: int) -> None:
        """Each anomaly in a line when it begins, and that it is over."""
        now = {*found.anomaly_info}
        for name in sorted(now - self._seen):
            _log.warning("%s: %s (%d rows)", name, found.anomaly_info[name].description, rows)
        for name in sorted(self._seen - now):
            _log.info("%s: as expected again", name)
        self._seen = now


def without_features(statistics: DatasetFeatureStatistics) -> DatasetFeatureStatistics:
    """Statistics of the inputs alone."""
    made = DatasetFeatureStatistics(name=statistics.name, num_examples=statistics.num_examples)
    made.features.extend(one for one in statistics.features if not one.path.step[0].startswith(f"{FEATURES}."))
    return made


def largest(found: Anomalies, labels: Mapping[str, str]) -> Iterable[tuple[str, str, float]]:
    """Label, what it is from, and the largest distance of the features with that label.

    Args:
        found: What a window was found to be.
        labels: By feature its label.
    """
    distances: dict[tuple[str, str], float] = {}
    for one in found.drift_skew_info:
        label = labels[one.path.step[0]]
        for against, measured in (("baseline", one.skew_measurements), ("previous", one.drift_measurements)):
            for measurement in measured:
                key = label, against
                distances[key] = max(distances.get(key, 0.0), measurement.value)
    return [(label, against, distance) for (label, against), distance in sorted(distances.items())]


def kinds(found: Anomalies) -> Iterable[int]:
    """The kinds of anomalies, each once a feature."""
    for info in found.anomaly_info.values():
        yield from sorted({reason.type for reason in info.reason})


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
"""Those that `state/statistics/anomalies.py` can find."""
