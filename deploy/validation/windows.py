"""Stored state of the validation: statistics of the newest windows, and the log offset where the open window begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatistics

from state.disk import files as durable
from state.errors import SettingsError
from state.statistics.protos import as_list, of_bytes

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
