"""Baselines for the comparison of live clicks: the bootstrap's schema and statistics, or later accepted ones.

`tfdv.load_schema_text` and `tfdv.load_stats_binary` read their files. The baseline with the highest number is in force;
none is changed or deleted.

A new schema has types, domains, presence, and the allowed distance of a window. The validation stores the statistics of
the newest windows, and the log offset where the open window begins.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import text_format
from tensorflow_metadata.proto.v0 import schema_pb2
from tensorflow_metadata.proto.v0.schema_pb2 import Schema
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics, FeatureNameStatistics

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.errors import ControlConflict, CorruptVersion, SettingsError
from state.registry.control import Control, following
from state.registry.directory import Directory, file_bytes, usable
from state.registry.specs import SPEC
from state.statistics.collecting import DELAY, FEATURES, ITEM, LABEL, USER, as_list, common, frequencies, of_bytes

LARGEST = 65_535
# Thresholds of a new schema; an operator edits them in `schema.pbtxt`, see `springtide schema accept --schema`.
MISSING_SHARE = 0.1  # increase of the share of missing values over the baseline
NEW_VALUES_SHARE = 0.1  # share of values of a categorical feature that the baseline does not contain
MAX_L_INFINITY = 0.1  # largest change in the share of a value of a categorical feature
MAX_DIVERGENCE = 0.1  # Jensen-Shannon divergence of a numeric feature, bits
_BOUNDS = {"is_last": 1, "truncated": 1, "same_label": 1, "recency": 255, "age": 255, "oldest": 255}
"""By the last part of a feature's name: the largest value that the kernel writes, if it is not 65,535."""


def infer_schema(statistics: DatasetFeatureStatistics, warm: bool) -> Schema:
    """Infers the schema of the statistics of a baseline.

    `warm` is whether windows were full. Only then are their integers also compared with the baseline, because a
    bootstrap's histories begin with its first click.
    """
    schema = Schema()
    for observed in statistics.features:
        name, statistics_of = observed.path.step[0], common(observed)
        feature = schema.feature.add(name=name)
        rows = statistics_of.num_non_missing + statistics_of.num_missing
        present = statistics_of.num_non_missing / rows if rows else 0.0
        feature.value_count.min = feature.value_count.max = 1
        # A feature that was present only occasionally may be absent.
        feature.presence.min_fraction = max(0.0, round(present - MISSING_SHARE, 6))
        if observed.HasField("string_stats"):
            feature.type = schema_pb2.BYTES
            _categorical(feature, observed)
        else:
            feature.type = schema_pb2.FLOAT if observed.type == FeatureNameStatistics.FLOAT else schema_pb2.INT
            _numeric(feature, name, warm)
    return schema


def bounds(name: str) -> tuple[int, int]:
    """The minimum and maximum value that a feature of the spec can have.

    >>> bounds("features.view.recency"), bounds("features.gap.1"), bounds("features.view.count_1h")
    ((0, 255), (0, 255), (0, 65535))
    """
    words = name.split(".")
    if words[1] == "gap":
        return 0, 255
    if words[1] == "clock":
        return 0, 2000
    if words[-1].startswith("top_share"):
        return 0, 1000
    return 0, _BOUNDS.get(words[-1], LARGEST)


def schema_text(schema: Schema) -> str:
    """Formats the schema as the text of `schema.pbtxt`."""
    return str(text_format.MessageToString(schema))


def schema_of(text: str) -> Schema:
    """Parses the text of a `schema.pbtxt`; ValueError if the text is not a schema."""
    try:
        return text_format.Parse(text, Schema())
    except text_format.ParseError as error:
        raise ValueError(f"no Schema of TensorFlow Metadata: {error}") from error


def _categorical(feature: schema_pb2.Feature, observed: FeatureNameStatistics) -> None:
    counts, total = frequencies(observed), common(observed).num_non_missing
    if feature.name in (USER, ITEM) or not total:
        return
    feature.string_domain.value.extend(sorted(counts))
    listed_share = sum(counts.values()) / total
    # Good, The population frequencies of species, 1953: the next value is new with the share of values seen once.
    unseen = sum(count == 1 for count in counts.values()) / total
    feature.distribution_constraints.min_domain_mass = max(0.0, listed_share - unseen - NEW_VALUES_SHARE)
    for comparator in (feature.skew_comparator, feature.drift_comparator):
        comparator.infinity_norm.threshold = MAX_L_INFINITY


def _numeric(feature: schema_pb2.Feature, name: str, warm: bool) -> None:
    if name == LABEL:
        feature.float_domain.min, feature.float_domain.max = 0.0, 1.0
    elif name == DELAY:
        feature.int_domain.min, feature.int_domain.max = 0, LARGEST
    else:
        feature.int_domain.min, feature.int_domain.max = bounds(name)
    of_spec = name.startswith(f"{FEATURES}.")
    # The hour differs between windows. A history's age is the age of the log until the history is full.
    if of_spec and name.removeprefix(f"{FEATURES}.").startswith(("clock.", "events.", "sessions.count")):
        return
    feature.drift_comparator.jensen_shannon_divergence.threshold = MAX_DIVERGENCE
    if warm or not of_spec:
        feature.skew_comparator.jensen_shannon_divergence.threshold = MAX_DIVERGENCE


SCHEMA, STATISTICS, ABOUT = "schema.pbtxt", "statistics.pb", "baseline.json"


@dataclass(frozen=True)
class AcceptedBaseline:
    """The origin of a baseline: its number (0 for the bootstrap's), and actor, reason and time of its acceptance."""

    number: int
    actor: str
    reason: str
    at_ms: int


@dataclass(frozen=True)
class Baseline:
    """A baseline for live clicks: its origin, its domains and thresholds, and the statistics of its rows."""

    accepted: AcceptedBaseline
    schema: Schema
    statistics: DatasetFeatureStatistics


def accepted(control: Control, baseline: AcceptedBaseline) -> Control:
    """Records that an operator accepted live statistics as the new baseline: a generation that changes nothing else."""
    plan = {"baseline": baseline.number}
    return following(control, "accept", baseline.actor, baseline.reason, baseline.at_ms, plan=plan)


def baseline_files(schema: Schema, statistics: DatasetFeatureStatistics) -> dict[str, bytes]:
    """The files of a baseline by name."""
    return {
        SCHEMA: schema_text(schema).encode(),
        STATISTICS: as_list(statistics).SerializeToString(deterministic=True),
    }


class Baselines:
    """The baselines of one registry directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._directory = Directory(path)
        self._directory.ensure()

    def newest_number(self, spec: str) -> int:
        """The number of the baseline in force for a bootstrap of `Specs.bootstrapped`; 0 for the bootstrap's own."""
        with usable("be listed"):
            folder = self.path / layout.BASELINES / spec
            numbers = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
        return max(numbers, default=0)

    def newest(self, spec: str) -> Baseline | None:
        """The baseline in force; None if the bootstrap is of a release that wrote none.

        It raises CorruptVersion if a file is missing or fails its digest.
        """
        number = self.newest_number(spec)
        folder = self._folder(spec, number) if number else self.path / layout.SPECS / spec
        document = self._about(folder / (ABOUT if number else SPEC))
        digests = document["files"]
        if SCHEMA not in digests:
            return None
        data = {name: self._checked(folder / name, digests[name]) for name in (SCHEMA, STATISTICS)}
        accepted = AcceptedBaseline(
            number, str(document.get("actor", "")), str(document.get("reason", "")), int(document["created_at_ms"])
        )
        try:
            return Baseline(accepted, schema_of(data[SCHEMA].decode()), of_bytes(data[STATISTICS]))
        except ValueError as error:
            raise CorruptVersion(f"{folder} is damaged: {error}", f"move it away: {_INSTEAD}") from error

    def add(
        self, spec: str, accepted: AcceptedBaseline, schema: Schema, statistics: DatasetFeatureStatistics
    ) -> AcceptedBaseline:
        """Stores a baseline, durably; from then on it is in force.

        It raises `ControlConflict` if another baseline was stored under this number meanwhile.
        """
        document = {"actor": accepted.actor, "reason": accepted.reason, "created_at_ms": accepted.at_ms}

        def fill(folder: Path) -> None:
            for name, data in baseline_files(schema, statistics).items():
                durable.write(folder / name, data)

        with usable(f"take baseline {accepted.number}"):
            if not self._directory.add_folder(self._folder(spec, accepted.number), ABOUT, document, fill):
                raise ControlConflict(
                    f"baseline {accepted.number} was just accepted by somebody else",
                    "look at `springtide schema show`, then repeat the command",
                )
        return accepted

    def _folder(self, spec: str, number: int) -> Path:
        return self.path / layout.BASELINES / spec / str(number)

    def _about(self, path: Path) -> dict[str, Any]:
        try:
            return documents.decode_sealed(file_bytes(path), dict[str, Any])
        except FileNotFoundError:
            raise CorruptVersion(f"{path} is missing", f"move its directory away: {_INSTEAD}") from None
        except ValueError as error:
            raise CorruptVersion(f"{path} is damaged: {error}", f"move its directory away: {_INSTEAD}") from error

    def _checked(self, path: Path, expected: str) -> bytes:
        try:
            data = file_bytes(path)
        except FileNotFoundError:
            data = b""
        if durable.digest(data) != expected:
            raise CorruptVersion(f"{path} is missing or fails its digest", f"move its directory away: {_INSTEAD}")
        return data


_INSTEAD = "the baseline before it counts then, or that of a new `springtide bootstrap`"

WINDOWS, POSITION = "windows", "place.json"


class KeptWindow(NamedTuple):
    """The statistics of the window that ended at `end_ms`, log time."""

    end_ms: int
    statistics: DatasetFeatureStatistics


class KeptWindows:
    """The windows in the directory `validation`, written by one process; the first write creates the directory."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, window: KeptWindow, keep: int) -> None:
        """Stores a window, and removes all but the `keep` newest."""
        folder = self._path / WINDOWS
        folder.mkdir(parents=True, exist_ok=True)
        durable.replace(
            folder / f"{window.end_ms}.pb", as_list(window.statistics).SerializeToString(deterministic=True)
        )
        for end_ms in self.ends()[:-keep]:
            (folder / f"{end_ms}.pb").unlink(missing_ok=True)

    def ends(self) -> list[int]:
        """Returns the end times of all windows, ascending."""
        folder = self._path / WINDOWS
        return sorted(int(path.stem) for path in folder.glob("*.pb") if path.stem.isdigit()) if folder.is_dir() else []

    def read(self, end_ms: int) -> KeptWindow:
        """Reads one window.

        Raises:
            SettingsError: Its file is damaged or missing.
        """
        path = self._path / WINDOWS / f"{end_ms}.pb"
        try:
            return KeptWindow(end_ms, of_bytes(path.read_bytes()))
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{path} cannot be read: {error}", "remove it: the next window takes its place"
            ) from error

    def newest(self, before_ms: int | None = None) -> KeptWindow | None:
        """Reads the newest window, or the newest that ended by `before_ms`; returns None if there is none.

        Raises:
            SettingsError: Its file is damaged.
        """
        ends = [end_ms for end_ms in self.ends() if before_ms is None or end_ms <= before_ms]
        return self.read(ends[-1]) if ends else None

    def note_position(self, topic_id: str, offset: int) -> None:
        """Stores the offset to continue from after a restart."""
        self._path.mkdir(parents=True, exist_ok=True)
        durable.replace(self._path / POSITION, json.dumps({"topic_id": topic_id, "offset": offset}).encode())

    def position(self) -> tuple[str, int] | None:
        """Returns the topic's id and the offset to continue from; None if none is stored."""
        try:
            noted = json.loads((self._path / POSITION).read_bytes())
            return str(noted["topic_id"]), int(noted["offset"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
