"""Baselines for the comparison of live clicks: the bootstrap's schema and statistics, or later accepted ones.

`tfdv.load_schema_text` and `tfdv.load_stats_binary` read their files. The baseline with the highest number is in force;
none is changed or deleted.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorflow_metadata.proto.v0.schema_pb2 import Schema
from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from state import layout
from state.disk import documents
from state.disk import files as durable
from state.errors import ControlConflict, CorruptVersion
from state.registry.control import Control, following
from state.registry.directory import Directory, file_bytes, usable
from state.registry.specs import SPEC
from state.statistics import schema as schemas
from state.statistics.protos import as_list, of_bytes

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
        SCHEMA: schemas.as_text(schema).encode(),
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
            return Baseline(accepted, schemas.of_text(data[SCHEMA].decode()), of_bytes(data[STATISTICS]))
        except ValueError as error:
            raise CorruptVersion(f"{folder} is damaged: {error}", f"move it away: {_INSTEAD}") from error

    def add(
        self, spec: str, accepted: AcceptedBaseline, schema: Schema, statistics: DatasetFeatureStatistics
    ) -> AcceptedBaseline:
        """Stores a baseline, durably; from then on it is in force.

        It raises `ControlConflict` if another baseline was stored under this number meanwhile.
        """
        files = baseline_files(schema, statistics)
        document = {
            "actor": accepted.actor,
            "reason": accepted.reason,
            "created_at_ms": accepted.at_ms,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
        final = self._folder(spec, accepted.number)
        temporary = self._directory.temporary(f"baseline-{spec}-{accepted.number}")
        with usable(f"take baseline {accepted.number}"):
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            try:
                for name, data in files.items():
                    durable.write(temporary / name, data)
                durable.write(temporary / ABOUT, documents.encode_sealed(document))
                durable.sync_directory(temporary)
                temporary.rename(final)
            except OSError:
                if not (final / ABOUT).exists():
                    raise
                raise ControlConflict(
                    f"baseline {accepted.number} was just accepted by somebody else",
                    "look at `springtide schema show`, then repeat the command",
                ) from None
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            durable.sync_directory(final.parent)
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
        if hashlib.sha256(data).hexdigest() != expected:
            raise CorruptVersion(f"{path} is missing or fails its digest", f"move its directory away: {_INSTEAD}")
        return data


_INSTEAD = "the baseline before it counts then, or that of a new `springtide bootstrap`"
