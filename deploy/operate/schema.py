"""`springtide schema`: shows the schema that live clicks are validated against, compares it, and accepts a new baseline."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.anomalies_pb2 import Anomalies, AnomalyInfo
from tensorflow_metadata.proto.v0.schema_pb2 import Schema
from tensorflow_metadata.proto.v0.statistics_pb2 import FeatureNameStatistics

from deploy.formats import iso
from deploy.operate.control import Say, current
from deploy.operate.versions import open_registry, table
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.process.environment import actor
from state.registry.registry import Registry
from state.statistics.anomalies import validate
from state.statistics.baselines import (
    AcceptedBaseline,
    Baseline,
    Baselines,
    KeptWindow,
    KeptWindows,
    accepted,
    infer_schema,
    schema_of,
    schema_text,
)
from state.statistics.collecting import by_name, common, frequencies

LISTED = 12


def present(statistics: FeatureNameStatistics | None) -> float:
    """Returns the share of the rows in which a feature has a value."""
    if statistics is None:
        return 0.0
    present, missing = common(statistics).num_non_missing, common(statistics).num_missing
    return float(present / max(1, present + missing))


def _limits(feature: schema_pb2.Feature) -> dict[str, float]:
    limits = {}
    for against, comparator in (("baseline", feature.skew_comparator), ("previous", feature.drift_comparator)):
        for kind in ("infinity_norm", "jensen_shannon_divergence"):
            if comparator.HasField(kind):
                limits[against] = getattr(comparator, kind).threshold
    return limits


def _feature_document(feature: schema_pb2.Feature, statistics: FeatureNameStatistics | None) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": feature.name,
        "type": schema_pb2.FeatureType.Name(feature.type),
        "present": present(statistics),
        "min_fraction": feature.presence.min_fraction,
        "thresholds": _limits(feature),
    }
    if statistics is not None and statistics.HasField("string_stats"):
        return document | {"distinct": statistics.string_stats.unique, "domain": len(feature.string_domain.value)}
    if statistics is not None and common(statistics).num_non_missing:
        numbers = statistics.num_stats
        return document | {"mean": numbers.mean, "median": numbers.median, "min": numbers.min, "max": numbers.max}
    return document


def _feature_line(
    feature: schema_pb2.Feature, statistics: FeatureNameStatistics | None, names: Mapping[str, str]
) -> list[str]:
    allowed = _limits(feature)
    moves = ", ".join(
        f"{allowed[against]:g} from {reference}"
        for against, reference in (("baseline", "it"), ("previous", "the window before"))
        if against in allowed
    )
    kind = schema_pb2.FeatureType.Name(feature.type).lower()
    presence = f"{present(statistics):.0%} (at least {feature.presence.min_fraction:.0%})"
    return [feature.name, kind, presence, _typical(statistics, names), moves or "anything"]


def _typical(statistics: FeatureNameStatistics | None, names: Mapping[str, str]) -> str:
    if statistics is None or not (present_rows := common(statistics).num_non_missing):
        return "none"
    if statistics.HasField("num_stats"):
        return f"median {statistics.num_stats.median:g}, {statistics.num_stats.min:g} to {statistics.num_stats.max:g}"
    counts = frequencies(statistics)
    if not counts:
        return f"{statistics.string_stats.unique:,} different"
    value, count = next(iter(counts.items()))
    return f"{names.get(value, value)} {count / present_rows:.1%} of {statistics.string_stats.unique:,}"


def _with_names(text: str, names: Mapping[str, str]) -> str:
    for value in {word.strip(".,:()") for word in text.split()} & names.keys():
        text = text.replace(value, names[value])
    return text


class Bootstrapped(NamedTuple):
    """The bootstrap of the settings: its name in the registry, and its document."""

    name: str
    about: Mapping[str, Any]


def schema(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Shows, compares or accepts a baseline."""
    if args.what != "accept" and (args.schema or args.reason):
        raise SettingsError("--schema and --reason belong to `springtide schema accept`", "leave them out")
    if args.what == "show":
        show(settings, args, say)
    elif args.what == "diff":
        diff(settings, args, say)
    else:
        if not args.reason:
            raise SettingsError(
                "a new baseline needs --reason TEXT", "give it: it is recorded with your name in the history"
            )
        baseline = accept_window(settings, actor(), args.reason, now_ms, args.schema)
        if args.output == "json":
            say(json.dumps(dataclasses.asdict(baseline), indent=2))
        else:
            say(f"baseline {baseline.number}: the next window is held against it; `springtide schema show` shows it")


def show(settings: Settings, args: argparse.Namespace, say: Say) -> None:
    """Shows the baseline.

    Raises:
        SettingsError: There is none.
    """
    bootstrapped, baseline = _baseline(settings)
    if args.pbtxt:
        say(schema_text(baseline.schema).rstrip())
        return
    statistics = by_name(baseline.statistics)
    if args.output == "json":
        features = [_feature_document(feature, statistics.get(feature.name)) for feature in baseline.schema.feature]
        say(json.dumps({**_about(baseline), "rows": baseline.statistics.num_examples, "features": features}, indent=2))
        return
    say(_title(baseline))
    head = ["feature", "type", "has a value", "values", "may move by"]
    rows = [
        _feature_line(feature, statistics.get(feature.name), bootstrapped.about.get("names", {}))
        for feature in baseline.schema.feature
    ]
    say(table([head, *rows]))


def diff(settings: Settings, args: argparse.Namespace, say: Say) -> None:
    """Compares the newest window with the baseline, and with the window before it.

    Raises:
        SettingsError: There is no baseline, or no window yet.
    """
    bootstrapped, baseline = _baseline(settings)
    windows = KeptWindows(settings.validation_dir)
    window = _window(windows)
    length_ms = settings.validation.window_s * 1000
    before = windows.newest(window.end_ms - max(1, length_ms))
    anomalies = validate(
        window.statistics, baseline.schema, baseline.statistics, None if before is None else before.statistics
    )
    distances = _distances(anomalies)
    wrong = {
        name: [{"type": AnomalyInfo.Type.Name(reason.type), "what": reason.description} for reason in info.reason]
        for name, info in sorted(anomalies.anomaly_info.items())
    }
    rows = window.statistics.num_examples
    if args.output == "json":
        document = {"window_end_ms": window.end_ms, "rows": rows, **_about(baseline), "anomalies": wrong}
        say(json.dumps({**document, "distances": distances}, indent=2))
        return
    names = bootstrapped.about.get("names", {})
    say(f"the window until {iso(window.end_ms)}, {rows:,} events, against {_title(baseline)}")
    for name, reasons in wrong.items():
        say(f"{name}: {' '.join(_with_names(reason['what'], names) for reason in reasons)}")
    if not wrong:
        say("nothing is wrong with it")
    head = ["feature", "from", "distance", "may be", "here", "there"]
    features = by_name(window.statistics)
    befores = {
        "baseline": by_name(baseline.statistics),
        "previous": {} if before is None else by_name(before.statistics),
    }
    rows_listed = [
        [
            distance["feature"],
            "the baseline" if distance["against"] == "baseline" else "the window before",
            f"{distance['distance']:.3f}",
            f"{distance['threshold']:g}",
            _typical(features.get(distance["feature"]), names),
            _typical(befores[distance["against"]].get(distance["feature"]), names),
        ]
        for distance in distances[:LISTED]
    ]
    if rows_listed:
        say(table([head, *rows_listed]))


def _distances(anomalies: Anomalies) -> list[dict[str, Any]]:
    distances = [
        {
            "feature": feature.path.step[0],
            "against": against,
            "measure": type(measurement).Type.Name(measurement.type),
            "distance": measurement.value,
            "threshold": measurement.threshold,
        }
        for feature in anomalies.drift_skew_info
        for against, measured in (("baseline", feature.skew_measurements), ("previous", feature.drift_measurements))
        for measurement in measured
    ]
    return sorted(
        distances,
        key=lambda distance: (
            -distance["distance"] / max(distance["threshold"], 1e-9),
            distance["feature"],
            distance["against"],
        ),
    )


def accept_window(
    settings: Settings, who: str, reason: str, now_ms: int, schema_file: Path | None = None
) -> AcceptedBaseline:
    """Makes the newest window the baseline.

    `schema_file` has domains and thresholds; None for what the window and the settings suggest.

    Raises:
        SettingsError: There is no window or no bootstrap yet, or the file contains no schema.
        RegistryError: There is no control yet.
        ControlConflict: Another client accepted a baseline in the meantime.
    """
    registry, bootstrapped = _bootstrapped(settings)
    current(registry)
    window = _window(KeptWindows(settings.validation_dir))
    spec = FeatureSpec.from_settings(settings)
    # From then on, most histories are full.
    warm = window.end_ms - int(bootstrapped.about["newest_ms"]) >= spec.windows_s[-1] * 1000
    edited = infer_schema(window.statistics, warm) if schema_file is None else _read(schema_file)
    baselines = Baselines(settings.registry_dir)
    number = baselines.newest_number(bootstrapped.name) + 1
    new = baselines.add(bootstrapped.name, AcceptedBaseline(number, who, reason, now_ms), edited, window.statistics)
    registry.change(lambda control: accepted(control, new))
    return new


def _read(path: Path) -> Schema:
    try:
        return schema_of(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"--schema {path}: {error}", "begin with the text that `springtide schema show --pbtxt` prints"
        ) from None


def _bootstrapped(settings: Settings) -> tuple[Registry, Bootstrapped]:
    registry = open_registry(settings)
    name = registry.specs.bootstrapped(FeatureSpec.from_settings(settings).digest, settings.model)
    if name is None:
        raise SettingsError(
            "these feature settings were not bootstrapped yet",
            "`springtide up` does it with the first clicks; or `springtide bootstrap`",
        )
    return registry, Bootstrapped(name, registry.specs.spec(name))


def _baseline(settings: Settings) -> tuple[Bootstrapped, Baseline]:
    _, bootstrapped = _bootstrapped(settings)
    baseline = Baselines(settings.registry_dir).newest(bootstrapped.name)
    if baseline is None:
        raise SettingsError(
            "there is no baseline: the bootstrap was one of an earlier release",
            "`springtide schema accept --reason TEXT` makes the newest window one",
        )
    return bootstrapped, baseline


def _window(windows: KeptWindows) -> KeptWindow:
    window = windows.newest()
    if window is None:
        raise SettingsError(
            "no window of live clicks has ended yet",
            "wait for validation.window_s of clicks; `springtide up` or `springtide validate` takes the statistics",
        )
    return window


def _about(baseline: Baseline) -> dict[str, Any]:
    acceptance = baseline.accepted
    return {
        "baseline": acceptance.number,
        "actor": acceptance.actor,
        "reason": acceptance.reason,
        "at_ms": acceptance.at_ms,
    }


def _title(baseline: Baseline) -> str:
    acceptance, rows = baseline.accepted, baseline.statistics.num_examples
    whose = f"accepted by {acceptance.actor} ({acceptance.reason})" if acceptance.number else "of the bootstrap"
    return f"baseline {acceptance.number}, {whose}, {iso(acceptance.at_ms)}, {rows:,} events"
