"""How `springtide schema` tells a feature: its type, presence, typical values and thresholds, in words and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.statistics_pb2 import FeatureNameStatistics

from state.statistics.protos import common, frequencies


def present(one: FeatureNameStatistics | None) -> float:
    """In which share of the rows a feature has a value."""
    if one is None:
        return 0.0
    there, missing = common(one).num_non_missing, common(one).num_missing
    return float(there / max(1, there + missing))


def limits(feature: schema_pb2.Feature) -> dict[str, float]:
    """How far a feature may move: from the baseline, and from the window before."""
    found = {}
    for against, comparator in (("baseline", feature.skew_comparator), ("previous", feature.drift_comparator)):
        for kind in ("infinity_norm", "jensen_shannon_divergence"):
            if comparator.HasField(kind):
                found[against] = getattr(comparator, kind).threshold
    return found


def feature_document(feature: schema_pb2.Feature, one: FeatureNameStatistics | None) -> dict[str, Any]:
    """A feature of the baseline as JSON values."""
    said: dict[str, Any] = {
        "name": feature.name,
        "type": schema_pb2.FeatureType.Name(feature.type),
        "present": present(one),
        "min_fraction": feature.presence.min_fraction,
        "thresholds": limits(feature),
    }
    if one is not None and one.HasField("string_stats"):
        return said | {"distinct": one.string_stats.unique, "domain": len(feature.string_domain.value)}
    if one is not None and common(one).num_non_missing:
        numbers = one.num_stats
        return said | {"mean": numbers.mean, "median": numbers.median, "min": numbers.min, "max": numbers.max}
    return said


def feature_line(feature: schema_pb2.Feature, one: FeatureNameStatistics | None, names: Mapping[str, str]) -> list[str]:
    """A feature of the baseline as a row of a table."""
    allowed = limits(feature)
    moves = ", ".join(
        f"{allowed[against]:g} from {what}"
        for against, what in (("baseline", "it"), ("previous", "the window before"))
        if against in allowed
    )
    kind = schema_pb2.FeatureType.Name(feature.type).lower()
    there = f"{present(one):.0%} (at least {feature.presence.min_fraction:.0%})"
    return [feature.name, kind, there, typical(one, names), moves or "anything"]


def typical(one: FeatureNameStatistics | None, names: Mapping[str, str]) -> str:
    """The most frequent value of a categorical feature with its share, or the middle of a numeric one."""
    if one is None or not (there := common(one).num_non_missing):
        return "none"
    if one.HasField("num_stats"):
        return f"median {one.num_stats.median:g}, {one.num_stats.min:g} to {one.num_stats.max:g}"
    found = frequencies(one)
    if not found:
        return f"{one.string_stats.unique:,} different"
    value, count = next(iter(found.items()))
    return f"{names.get(value, value)} {count / there:.1%} of {one.string_stats.unique:,}"


def with_names(text: str, names: Mapping[str, str]) -> str:
    """A text with the names of ids where they are known."""
    for value in {word.strip(".,:()") for word in text.split()} & names.keys():
        text = text.replace(value, names[value])
    return text
